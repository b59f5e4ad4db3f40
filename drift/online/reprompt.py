"""What the teacher is shown (B5; SDPO, arXiv 2601.20802): the student's conversation, its first user message rewritten.

The rewritten message holds the original prompt, a correct solution, or the feedback on the failed attempt, or both. From
the first response on, the teacher reads the student's own ids: so every response token has one counterpart, at a fixed
distance, and nothing that was sampled is tokenised again.

Who has a teacher is decided by identity: a solved sibling with another index, whatever its text. In a format such as
`<think>…</think><answer>15</answer>` all right siblings end in the same answer, and each still teaches the others.

    >>> from drift.online.reprompt import Attempt, TeacherConfig, lessons, rewrite
    >>> attempts = [Attempt("p", "It is 15.", True, entropy=0.4), Attempt("p", "It is 14.", False, "Incorrect.")]
    >>> [lesson and lesson.demonstration for lesson in lessons(attempts, TeacherConfig())]
    [None, 'It is 15.']
    >>> asked = [{"role": "user", "content": "7 + 8?"}]
    >>> rewrite(asked, lessons(attempts, TeacherConfig())[1])[0]["content"].splitlines()[2:5:2]
    ['Correct solution:', 'It is 15.']
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from drift.buffer import SuccessBuffer
from drift.config.online import TeacherConfig
from drift.model import chat
from drift.rollouts.feedback import is_bare
from drift.types import Trajectory, Turn

__all__ = [
    "Attempt",
    "Lesson",
    "TeacherConfig",
    "fit",
    "informative",
    "lessons",
    "preferred",
    "rewrite",
    "strip_thinking",
    "teacher_messages",
    "teacher_trajectory",
]


@dataclass(frozen=True, slots=True)
class Attempt:
    """One trajectory of a rollout batch, as far as teaching goes."""

    problem_id: str
    text: str  # of its final turn
    solved: bool
    feedback: str | None = None  # the environment's answer to the failed attempt
    score: float = 1.0  # of its trajectory
    entropy: float | None = None  # of its sequence, nats a token; needed with `choose="entropy"`


@dataclass(frozen=True, slots=True)
class Lesson:
    """What a teacher knows that the student did not; at least one of the two."""

    demonstration: str | None = None
    feedback: str | None = None


def lessons(
    attempts: Sequence[Attempt],
    config: TeacherConfig,
    buffer: SuccessBuffer | None = None,
    *,
    prompts: Sequence[str] | None = None,
    step: int | None = None,
    epoch: int | None = None,
) -> list[Lesson | None]:
    """A lesson for each attempt of one whole rollout batch; None for an attempt without a teacher.

    The demonstration is the text of a solved attempt at the same problem with another index, else the buffer's, without
    entries whose text is the attempt's own (`config.exclude_own` off: the attempt itself counts too). `config.choose`
    picks one of several: the highest sequence entropy, the highest score, or the first; the earlier one of equals.
    Thinking is stripped from the chosen text (`config.strip_thinking`); a text that is thinking alone is never chosen.
    Feedback counts for failed attempts, if `informative`, as `config.feedback` says.
    prompts: each attempt's first user message, so that feedback which only repeats it does not count. step, epoch: for
    the buffer's start.
    Raises ValueError for `choose="entropy"` and a solved attempt without one.
    """
    solved: dict[str, list[int]] = {}
    for place in preferred(attempts, config.choose):
        if _shown(attempts[place].text, config):
            solved.setdefault(attempts[place].problem_id, []).append(place)
    made = []
    for place, attempt in enumerate(attempts):
        demonstration = feedback = None
        if config.demonstrations:
            others = (i for i in solved.get(attempt.problem_id, []) if i != place or not config.exclude_own)
            sibling = next(others, None)
            text = None if sibling is None else attempts[sibling].text
            if text is None and buffer is not None:
                text = _from_buffer(buffer, attempt, config, step, epoch)
            demonstration = None if text is None else _shown(text, config)
        wanted = config.feedback == "always" or (config.feedback == "without_solution" and demonstration is None)
        if wanted and not attempt.solved and attempt.feedback is not None:
            prompt = prompts[place] if prompts is not None else ""
            feedback = attempt.feedback if informative(attempt.feedback, prompt) else None
        made.append(Lesson(demonstration, feedback) if demonstration or feedback else None)
    return made


def preferred(attempts: Sequence[Attempt], choose: Literal["entropy", "best", "first"]) -> list[int]:
    """Places of the solved attempts, the preferred first; equals in their order.

    Raises ValueError for `choose="entropy"` and a solved attempt without one.
    """
    solved = [place for place, attempt in enumerate(attempts) if attempt.solved]
    if choose == "best":
        solved.sort(key=lambda place: -attempts[place].score)
    elif choose == "entropy":
        missing = next((place for place in solved if attempts[place].entropy is None), None)
        if missing is not None:
            raise ValueError(
                f"attempts[{missing}].entropy is None; teacher.choose 'entropy' must know it: give the attempt's sequence "
                "entropy, or set choose='first'"
            )
        solved.sort(key=lambda place: -(attempts[place].entropy or 0.0))
    return solved


def _from_buffer(
    buffer: SuccessBuffer, attempt: Attempt, config: TeacherConfig, step: int | None, epoch: int | None
) -> str | None:
    own = attempt.text if config.exclude_own else None
    by_entropy = config.choose == "entropy"
    entries = buffer.demonstrations(
        attempt.problem_id, buffer.config.entries, own, step=step, epoch=epoch, by_entropy=by_entropy
    )
    return next((entry.text for entry in entries if _shown(entry.text, config)), None)


def _shown(text: str, config: TeacherConfig) -> str:
    """As the teacher sees it; empty if nothing is left."""
    shown = strip_thinking(text) if config.strip_thinking else text
    return shown if shown.strip() else ""


def strip_thinking(text: str) -> str:
    """The text after the last `</think>`, stripped; of thinking that never ends, the text before it."""
    return text.rsplit("</think>", 1)[-1].split("<think>", 1)[0].strip()


_VERDICT = re.compile(
    r"((that|this|it|(your|the) (last |previous )?(answer|solution|attempt))('s| is| was)? )?(still )?(not )?"
    r"(in)?(correct|wrong|right|false|accurate)( answer)?|no|nope|sorry|failed|failure|"
    r"(please )?(think|try)( it)?( once)?( more| again)?( please)?|this was turn \d+( of \d+)?",
    re.IGNORECASE,
)


def informative(feedback: str, prompt: str = "") -> bool:
    """Whether feedback says more than that the answer was wrong: "Incorrect. Please think again." does not.

    Sentences that are a bare verdict, an invitation to try again or a turn number are left out, and so is a repeated
    `prompt`; the rest has to hold a letter or a digit.
    """
    if is_bare(feedback):
        return False
    rest = feedback.replace(prompt, " ") if prompt else feedback
    sentences = (sentence.strip() for sentence in re.split(r"[.!?,;:\n]+|\s[-–—]\s", rest))
    return any(re.search(r"\w", sentence) and not _VERDICT.fullmatch(sentence) for sentence in sentences)


def rewrite(messages: chat.Messages, lesson: Lesson) -> chat.Messages:
    """The messages with the lesson in the first user message; the others are the same objects.

    Raises ValueError if there is no user message, or if its content is not text.
    """
    first = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None or not isinstance(messages[first]["content"], str):
        raise ValueError("messages: the teacher's prompt is made from the first user message's text, and there is none")
    parts = [messages[first]["content"]]
    if lesson.demonstration is not None:
        parts.append(f"Correct solution:\n\n{lesson.demonstration}")
    if lesson.feedback is not None:
        parts.append(f"The following is feedback from your unsuccessful earlier attempt:\n\n{lesson.feedback}")
    parts.append("Correctly solve the original question.")
    return [*messages[:first], {**messages[first], "content": "\n\n".join(parts)}, *messages[first + 1 :]]


def fit(tokenizer: Any, messages: chat.Messages, lesson: Lesson, limit: int) -> Lesson | None:
    """The lesson, cut so that the rewritten prompt has at most `limit` tokens; the same object if nothing was cut.

    The beginning of the demonstration goes first, then that of the feedback (ours: an answer stands at the end). None if
    the prompt is too long without any lesson.
    """

    def excess(lesson: Lesson) -> int:
        return len(chat.render(tokenizer, rewrite(messages, lesson), True)) - limit

    over = excess(lesson)
    for name in ("demonstration", "feedback"):
        while over > 0 and (text := getattr(lesson, name)):
            left = tokenizer.decode(chat.encode(tokenizer, text)[over:]).lstrip("\N{REPLACEMENT CHARACTER}").strip()
            lesson = replace(lesson, **{name: left or None})
            over = excess(lesson)
    return lesson if over <= 0 and (lesson.demonstration or lesson.feedback) else None


def teacher_messages(trajectory: Trajectory, messages: chat.Messages) -> chat.Messages:
    """The messages before the trajectory's first turn. Raises ValueError if turns and assistant messages do not match."""
    spoken = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not 0 < len(trajectory.turns) <= len(spoken):
        raise ValueError(
            f"row {trajectory.index} (problem {trajectory.problem_id}): {len(trajectory.turns)} turns and "
            f"{len(spoken)} assistant messages; each turn must be one of them"
        )
    return messages[: spoken[-len(trajectory.turns)]]


def teacher_trajectory(tokenizer: Any, trajectory: Trajectory, messages: chat.Messages, lesson: Lesson) -> Trajectory:
    """The student's trajectory under the teacher's prompt: same responses, token for token, in a longer context.

    messages: those that the trajectory was made of; its turns are the last ones of theirs by an assistant (all of them,
    save for `history: template`, where a sample is one turn). Ids before its first turn are rendered anew with the lesson
    in; all later ones are the student's. So the k-th response token here is the k-th there, `turns[i].start` apart by
    one and the same number.

    Raises ValueError if the ids before the first turn are not those that the template renders for `messages`: then
    nobody knows which ids to put in their place.
    """
    before, start = teacher_messages(trajectory, messages), trajectory.turns[0].start
    if chat.render(tokenizer, before, True) != list(trajectory.token_ids[:start]):
        raise ValueError(
            f"row {trajectory.index} (problem {trajectory.problem_id}): the {start} ids before the first turn are not "
            "what the chat template renders for its messages (another template, or a prompt that was cut?)"
        )
    prompt = chat.render(tokenizer, rewrite(before, lesson), True)
    shift = len(prompt) - start
    logprobs = trajectory.logprobs
    return replace(
        trajectory,
        token_ids=[*prompt, *trajectory.token_ids[start:]],
        turns=[Turn(turn.start + shift, turn.stop + shift) for turn in trajectory.turns],
        logprobs=None if logprobs is None else [0.0] * len(prompt) + list(logprobs[start:]),
    )
