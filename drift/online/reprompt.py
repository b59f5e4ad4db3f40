"""What the teacher is shown (B5; SDPO, arXiv 2601.20802): the student's conversation, its first user message rewritten.

The rewritten message holds the original prompt, a correct solution, or the feedback on the failed attempt, or both. From
the first response on, the teacher reads the student's own ids: so every response token has one counterpart, at a fixed
distance, and nothing that was sampled is tokenised again.

    >>> from drift.online.reprompt import Attempt, TeacherConfig, lessons, rewrite
    >>> attempts = [Attempt("p", "It is 15.", solved=True), Attempt("p", "It is 14.", solved=False, feedback="Incorrect.")]
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
from typing import Any

from drift.buffer import SuccessBuffer, strip_thinking
from drift.config.online import TeacherConfig
from drift.model import chat
from drift.types import Trajectory, Turn

__all__ = ["Attempt", "Lesson", "TeacherConfig", "informative", "lessons", "rewrite", "teacher_trajectory"]


@dataclass(frozen=True, slots=True)
class Attempt:
    """One trajectory of a rollout batch, as far as teaching goes."""

    problem_id: str
    text: str  # of its final turn
    solved: bool
    feedback: str | None = None  # what the failed attempt was told
    score: float = 1.0  # among solved ones, the higher is shown first


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
    strip: bool = True,
    step: int | None = None,
    epoch: int | None = None,
) -> list[Lesson | None]:
    """A lesson for each attempt of one whole rollout batch; None where it has no teacher.

    The demonstration is the best solved sibling's text (the first of equals), else the buffer's best; never the
    attempt's own text, unless `config.exclude_own` is off. Feedback counts for failed attempts, where `informative`.
    prompts: each attempt's first user message, so that feedback which only repeats it does not count. strip: without
    thinking. step, epoch: for the buffer's start.
    """
    shown = [strip_thinking(attempt.text) if strip else attempt.text for attempt in attempts]
    solved: dict[str, list[str]] = {}
    for attempt, text in sorted(zip(attempts, shown), key=lambda pair: -pair[0].score):  # stable
        if attempt.solved and text.strip():
            solved.setdefault(attempt.problem_id, []).append(text)
    found = []
    for number, (attempt, own) in enumerate(zip(attempts, shown)):
        demonstration = feedback = None
        if config.demonstrations:
            exclude = own if config.exclude_own else None
            siblings = solved.get(attempt.problem_id, [])
            demonstration = next((text for text in siblings if text != exclude), None)
            if demonstration is None and buffer is not None:
                entries = buffer.demonstrations(attempt.problem_id, 1, exclude, step=step, epoch=epoch)
                demonstration = entries[0].text if entries else None
        if config.feedback and not attempt.solved and attempt.feedback is not None:
            prompt = prompts[number] if prompts is not None else ""
            feedback = attempt.feedback if informative(attempt.feedback, prompt) else None
        found.append(Lesson(demonstration, feedback) if demonstration or feedback else None)
    return found


_VERDICT = re.compile(
    r"((that|this|it|(your|the) (last |previous )?(answer|solution|attempt))('s| is| was)? )?(still )?(not )?"
    r"(in)?(correct|wrong|right|false|accurate)( answer)?|no|nope|sorry|failed|failure|"
    r"(please )?(think|try)( it)?( once)?( more| again)?( please)?|this was turn \d+( of \d+)?",
    re.IGNORECASE,
)


def informative(feedback: str, prompt: str = "") -> bool:
    """Whether feedback says more than that the answer was wrong: "Incorrect. Please think again." does not.

    Sentences that are a bare verdict, an invitation to try again or a turn number are left out, and so is `prompt`
    where it is repeated; what is left has to hold a letter or a digit.
    """
    rest = feedback.replace(prompt, " ") if prompt else feedback
    sentences = (sentence.strip() for sentence in re.split(r"[.!?,;:\n]+|\s[-–—]\s", rest))
    return any(re.search(r"\w", sentence) and not _VERDICT.fullmatch(sentence) for sentence in sentences)


def rewrite(messages: chat.Messages, lesson: Lesson) -> chat.Messages:
    """The messages with the lesson in the first user message; the others are the same objects.

    Raises ValueError where there is no user message, or where its content is not text.
    """
    first = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None or not isinstance(messages[first]["content"], str):
        raise ValueError("messages: the teacher's prompt is made from the first user message's text, and there is none")
    parts = [messages[first]["content"]]
    if lesson.demonstration is not None:
        parts.append(f"Correct solution:\n\n{lesson.demonstration}")
    if lesson.feedback is not None:
        parts.append(f"Feedback on a failed attempt:\n\n{lesson.feedback}")
    parts.append("Correctly solve the original question.")
    return [*messages[:first], {**messages[first], "content": "\n\n".join(parts)}, *messages[first + 1 :]]


def teacher_trajectory(tokenizer: Any, trajectory: Trajectory, messages: chat.Messages, lesson: Lesson) -> Trajectory:
    """The student's trajectory under the teacher's prompt: same responses, token for token, in a longer context.

    messages: those that the trajectory was made of; its turns are the last ones of theirs by an assistant (all of them,
    save for `history: template`, where a sample is one turn). Ids before its first turn are rendered anew with the lesson
    in; all later ones are the student's. So the k-th response token here is the k-th there, `turns[i].start` apart by
    one and the same number.

    Raises ValueError where the ids before the first turn are not what the template renders for `messages`: then nobody
    knows what to put in their place.
    """
    spoken = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not 0 < len(trajectory.turns) <= len(spoken):
        raise ValueError(
            f"row {trajectory.index} (problem {trajectory.problem_id}): {len(trajectory.turns)} turns and "
            f"{len(spoken)} assistant messages; each turn should be one of them"
        )
    before, start = messages[: spoken[-len(trajectory.turns)]], trajectory.turns[0].start
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
