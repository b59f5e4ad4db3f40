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

import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

from drift.rollouts.feedback import Feedback
from drift.rollouts.tools import ToolError, calculate
from drift.tasks import Failed, Task, TaskError, Verdict, parse_answer, spoken
from drift.tasks.parsing import Parser
from drift.types import Problem

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
    answer: str | None = ""  # as it was read; "" if there is none to compare; None, one that could not be read
    tool_calls: int = 0  # of the turn
    tool_errors: int = 0  # among them
    failed: str = ""  # why the check has no verdict, such as a traceback; the turn then counts as wrong, and is counted


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
    def opened(self) -> str: ...  # what the template had the turn begin with, <think> or nothing; not part of `reply`
    @property
    def cut(self) -> bool: ...  # whether that turn ran into the limit of its length
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
    """The task's verifier: a right answer ends the episode with its reward, any other gets feedback (A1).

    feedback: the words for it, or its mode, simple or full. parse: the answer in a reply, given the task's answer tag; None
    when there is none. cut_answers: whether an answer counts in a turn that was cut by its length later ("count" or "drop").
    """

    def __init__(
        self,
        task: Task,
        turns: int,
        feedback: str | Feedback = "simple",
        parse: Parser = parse_answer,
        cut_answers: str = "count",
    ) -> None:
        self.task, self.turns, self.parse, self.cut_answers = task, turns, parse, cut_answers
        if isinstance(feedback, str):
            feedback = Feedback("full" if feedback == "full" else "simple", turns, tag=task.answer_tag)
        self.feedback = feedback

    def reset(self, problem: Problem) -> Messages:
        """The problem as a user message, after its system message and what was said before, if there is any."""
        system = [] if problem.system is None else [{"role": "system", "content": problem.system}]
        earlier = [dict(message) for message in problem.earlier]
        return [*system, *earlier, {"role": "user", "content": problem.prompt}]

    def step(self, episodes: Sequence[Turns]) -> list[Step]:
        """All answers go to the verifier at once."""
        answers = [self.answer(episode) for episode in episodes]
        parsed = [(episode.problem, answer) for episode, answer in zip(episodes, answers) if answer is not None]
        verdicts = iter(self.task.verify_many(parsed))
        return [
            self._judged(episode, answer, False if answer is None else next(verdicts))
            for episode, answer in zip(episodes, answers)
        ]

    def answer(self, episode: Turns) -> str | None:
        """The answer in the last turn; None when there is none to read."""
        if episode.cut and self.cut_answers == "drop":
            return None
        return self.parse(episode.opened + episode.reply, self.task.answer_tag)

    def _judged(self, episode: Turns, answer: str | None, verdict: Verdict) -> Step:
        if isinstance(verdict, Failed):
            return Step([self._told(episode, answer, 0.0)], answer=answer, failed=verdict.reason)
        reward = float(verdict)
        if reward >= 1:
            return Step(reward=reward, done=True, answer=answer)
        return Step([self._told(episode, answer, reward)], reward=reward, answer=answer)

    def _told(self, episode: Turns, answer: str | None, reward: float) -> dict[str, str]:
        said = self.feedback(episode.problem, episode.turn, reward=reward, parsed=answer is not None)
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
        feedback: str | Feedback = "simple",
        parse: Parser = parse_answer,
        cut_answers: str = "count",
        *,
        tool: Callable[[str], str] = calculate,
        calls: int = 8,
        about: str = CALCULATOR,
    ) -> None:
        super().__init__(task, turns, feedback, parse, cut_answers)
        self.tool, self.calls, self.about = tool, calls, about

    def reset(self, problem: Problem) -> Messages:
        """The problem, then what the tool is."""
        return super().reset(replace(problem, prompt=f"{problem.prompt}\n\n{self.about}"))

    def step(self, episodes: Sequence[Turns]) -> list[Step]:
        """Tool calls are answered here, the rest goes to the verifier at once."""
        called = [self._called(episode) for episode in episodes]
        verified = iter(super().step([episode for episode, calls in zip(episodes, called) if not calls]))
        return [self._use(episode, calls) if calls else next(verified) for episode, calls in zip(episodes, called)]

    def _called(self, episode: Turns) -> list[str]:
        if self.answer(episode) is not None:
            return []
        said = spoken(episode.opened + episode.reply)
        return re.findall(r"<tool_call>((?:(?!<tool_call>).)*?)</tool_call>", said or "", re.DOTALL)

    def _use(self, episode: Turns, calls: Sequence[str]) -> Step:
        if episode.tool_calls + len(calls) > self.calls:
            tag = self.task.answer_tag
            text = f"Error: no more than {self.calls} calls. Answer inside <{tag}> and </{tag}>."
            return Step([{"role": "tool", "content": text}], answer=None)
        messages, errors, failed = [], 0, ""
        for call in calls:
            try:
                text = self.tool(call)
            except ToolError as error:
                text, errors = f"Error: {error}", errors + 1
            except Exception:  # a tool of somebody's own that meets what a model writes
                text, errors, failed = "Error: the tool failed.", errors + 1, traceback.format_exc()
            messages.append({"role": "tool", "content": text})
        return Step(messages, tool_calls=len(calls), tool_errors=errors, failed=failed)


def load_environment(path: str) -> Callable[[Task, Any], Environment]:
    """The class, or function, at "module:name", looked for in the working directory too; called with (task, settings).

    It runs in this process, with all its rights. Raises TaskError when it cannot be imported.
    """
    module, _, name = path.partition(":")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        made: Any = getattr(importlib.import_module(module), name)
    except Exception as error:  # code of the user's own runs when it is imported
        raise TaskError(
            f"rollout.environment={path!r} cannot be imported ({type(error).__name__}: {error}); it must read module:Class, of "
            "a module in the working directory or installed"
        ) from error
    if not callable(made):
        raise TaskError(f"rollout.environment={path!r} is {made!r}; it must be a class, called with (task, settings)")
    return cast("Callable[[Task, Any], Environment]", made)
