"""What answers a model's turn: a verifier with feedback, the same with a tool, or an environment of one's own.

An environment sees all live episodes of a batch at once, so that verification stays batched, and keeps nothing about
them: what it has to know of an episode is on the episode. One of one's own goes to `play`, `collect` or `train_online`:

    >>> from drift.rollouts.environments import Step
    >>> class Guess:
    ...     def reset(self, problem):
    ...         return [{"role": "user", "content": problem.prompt}]
    ...     def step(self, episodes):
    ...         higher = Step([{"role": "user", "content": "Higher."}])
    ...         return [Step(reward=1.0, done=True) if e.problem.answer in e.reply else higher for e in episodes]

What an environment says is never trained: it is appended as messages of other roles than the assistant's, and their ids
come from the chat template, outside every `Turn`.

Left out: environments that hold state (a shell, a browser): keep it in a dict by (problem.id, index).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from drift.rollouts.tools import ToolError, calculate
from drift.tasks import Task, parse_answer
from drift.types import Problem

FEEDBACK = "Incorrect. Please think again."
TOOLS: dict[str, Callable[[str], str]] = {"calculator": calculate}
CALCULATOR = "If you like, first have a Python expression calculated: write it inside <tool_call> and </tool_call>."
Messages = list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Step:
    """What an environment answers to one turn.

    A turn of tool calls is no attempt at an answer: it is counted apart, has no reward and does not end the episode.
    """

    messages: Messages = field(default_factory=list)  # appended before the next turn; not after the last one
    reward: float = 0.0  # of the turn; 1 or more is right
    done: bool = False
    answer: str | None = ""  # as it was read; "" where there is none to compare; None, one that could not be read
    tool_calls: int = 0  # of the turn
    tool_errors: int = 0  # among them


class Turns(Protocol):
    """What an environment sees of an episode; `drift.rollouts.rollout.Episode` is one."""

    @property
    def problem(self) -> Problem: ...
    @property
    def index(self) -> int: ...  # among the trajectories of its problem
    @property
    def messages(self) -> Messages: ...  # so far, the turn to answer last
    @property
    def reply(self) -> str: ...  # that turn, as text without the token that ends it
    @property
    def turn(self) -> int: ...  # the number of this attempt, from 1; turns of tool calls are not counted
    @property
    def tool_calls(self) -> int: ...  # so far


class Environment(Protocol):
    """The other side of a batch of episodes."""

    def reset(self, problem: Problem) -> Messages:
        """A conversation's opening messages."""
        ...

    def step(self, episodes: Sequence[Turns]) -> list[Step]:
        """One answer for each episode, in order; those that are done do not come again."""
        ...


class VerifyEnvironment:
    """The task's verifier: a right answer ends the episode with reward 1, any other gets feedback (A1).

    feedback: simple, or full, which also says which turn of how many it was and repeats the problem. parse: the answer in
    a reply, given the task's answer tag; None where there is none.
    """

    def __init__(
        self,
        task: Task,
        turns: int,
        feedback: str = "simple",
        parse: Callable[[str, str], str | None] = parse_answer,
    ) -> None:
        self.task, self.turns, self.feedback, self.parse = task, turns, feedback, parse

    def reset(self, problem: Problem) -> Messages:
        """The problem as a user message."""
        return [{"role": "user", "content": problem.prompt}]

    def step(self, episodes: Sequence[Turns]) -> list[Step]:
        """All answers go to the verifier at once."""
        answers = [self.parse(episode.reply, self.task.answer_tag) for episode in episodes]
        parsed = [(episode.problem, answer) for episode, answer in zip(episodes, answers) if answer is not None]
        verdicts = iter(self.task.verify_many(parsed))
        return [
            Step(reward=1.0, done=True, answer=answer)
            if answer is not None and next(verdicts)
            else Step([self._told(episode)], answer=answer)
            for episode, answer in zip(episodes, answers)
        ]

    def _told(self, episode: Turns) -> dict[str, str]:
        said = feedback(episode.problem, episode.turn, self.turns, self.feedback)
        return {"role": "user", "content": said}


class ToolEnvironment(VerifyEnvironment):
    """The same with a tool: `<tool_call>…</tool_call>` is answered by a tool message, its value or why there is none.

    A reply that holds an answer too is an answer, and thinking counts for neither. More than `calls` calls in an episode
    are refused, as an answer that could not be read. tool: text to text; raises ToolError with words for the model.
    about: what the model is told of the tool, after the problem.
    """

    def __init__(
        self,
        task: Task,
        turns: int,
        feedback: str = "simple",
        parse: Callable[[str, str], str | None] = parse_answer,
        *,
        tool: Callable[[str], str] = calculate,
        calls: int = 8,
        about: str = CALCULATOR,
    ) -> None:
        super().__init__(task, turns, feedback, parse)
        self.tool, self.calls, self.about = tool, calls, about

    def reset(self, problem: Problem) -> Messages:
        """The problem, then what the tool is."""
        return [{"role": "user", "content": f"{problem.prompt}\n\n{self.about}"}]

    def step(self, episodes: Sequence[Turns]) -> list[Step]:
        """Tool calls are answered here, the rest goes to the verifier at once."""
        called = [self._called(episode) for episode in episodes]
        verified = iter(super().step([episode for episode, calls in zip(episodes, called) if not calls]))
        return [self._use(episode, calls) if calls else next(verified) for episode, calls in zip(episodes, called)]

    def _called(self, episode: Turns) -> list[str]:
        if self.parse(episode.reply, self.task.answer_tag) is not None:
            return []
        said = episode.reply.rsplit("</think>", 1)[-1]
        return re.findall(r"<tool_call>((?:(?!<tool_call>).)*?)</tool_call>", said, re.DOTALL)

    def _use(self, episode: Turns, calls: Sequence[str]) -> Step:
        if episode.tool_calls + len(calls) > self.calls:
            tag = self.task.answer_tag
            text = f"Error: no more than {self.calls} calls. Answer inside <{tag}> and </{tag}>."
            return Step([{"role": "tool", "content": text}], answer=None)
        messages, errors = [], 0
        for call in calls:
            try:
                text = self.tool(call)
            except ToolError as error:
                text, errors = f"Error: {error}", errors + 1
            messages.append({"role": "tool", "content": text})
        return Step(messages, tool_calls=len(calls), tool_errors=errors)


def feedback(problem: Problem, turn: int, turns: int, mode: str) -> str:
    """What a wrong answer in this turn gets; `full` also says which turn it was and repeats the first message (A1)."""
    return FEEDBACK if mode == "simple" else f"{FEEDBACK} This was turn {turn} of {turns}.\n\n{problem.prompt}"
