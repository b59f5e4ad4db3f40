"""The scorers that `task.scorer` names: from a problem and an answer to a reward, 1 or more being right.

What compares text runs in this process, on bounded text; math-verify, reasoning-gym's scorers and functions by import
path run in a sandbox (`drift.scoring`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from drift.scoring import actions, answers, choice
from drift.scoring.judges import EVALUATES
from drift.scoring.sandbox import Failed, Question, Sandbox, SandboxError, Verdict
from drift.tasks.base import TaskError
from drift.types import Problem

if TYPE_CHECKING:
    from drift.config import TaskConfig

__all__ = ["Failed", "MathScorer", "SandboxError", "Scorer", "Verdict", "load_scorer"]

Pair = tuple[Problem, str]


class Scorer(Protocol):
    """Rewards for answers."""

    def score(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """One verdict for each (problem, answer), in order."""
        ...

    def close(self) -> None:
        """Ends worker processes, if there are any."""
        ...


class TextScorer:
    """A rule on two texts, (gold, answer)."""

    def __init__(self, rule: Callable[[str, str], bool]) -> None:
        self._rule = rule

    def score(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """The rule, on each."""
        return [float(self._rule(problem.answer, answer)) for problem, answer in pairs]

    def close(self) -> None:
        """There is nothing to end."""


class _Undecided(Exception):
    """Only algebra can tell."""


class MathScorer:
    """`drift.scoring.answers.right`, with math-verify in a sandbox for algebra alone.

    tolerance: relative, for gold numbers that are not whole; None compares them exactly.
    """

    def __init__(self, tolerance: float | None = None, workers: int | None = None, seconds: float = 5.0) -> None:
        self.tolerance, self.sandbox = tolerance, Sandbox("math", workers, seconds)

    def score(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """Numbers and text are decided at once, the rest by the workers."""
        verdicts: list[Verdict | None] = [self._decided(problem.answer, answer) for problem, answer in pairs]
        asked = [Question(answer, problem.answer) for (problem, answer), known in zip(pairs, verdicts) if known is None]
        rest = iter(self.sandbox.ask(asked))
        return [next(rest) if verdict is None else verdict for verdict in verdicts]

    def _decided(self, gold: str, answer: str) -> float | None:
        try:
            if self.tolerance is None:
                return float(answers.right(gold, answer, _undecided))
            return float(answers.numeric(gold, answer, self.tolerance, _undecided))
        except _Undecided:
            return None

    def close(self) -> None:
        """Ends the workers."""
        self.sandbox.close()


def _undecided(gold: str, answer: str) -> bool:
    raise _Undecided


class GymScorer:
    """The scorer of a reasoning-gym generator, which pays 1 or nothing here. Raises SandboxError; see `unsafe`."""

    def __init__(self, name: str, options: dict[str, Any], unsafe: str) -> None:
        self.name, self.options = name, options
        self.sandbox = Sandbox("gym", workers=2 if name in EVALUATES else 1)
        if name in EVALUATES and unsafe != "allow" and not self.sandbox.confined():
            raise SandboxError(
                f"task.name={name!r}: its scorer evaluates the model's text, and this system cannot take a process's rights "
                "away (Linux with seccomp can); choose another generator, or set task.unsafe_scorers=allow if you trust "
                "the model"
            )

    def score(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """In workers, on stripped answers."""
        return self.sandbox.ask([self._question(problem, answer) for problem, answer in pairs])

    def _question(self, problem: Problem, answer: str) -> Question:
        gold = None if problem.metadata.get("answer") is None else problem.answer
        return Question(answer.strip(), gold, {"name": self.name, "options": self.options, "entry": problem.metadata})

    def close(self) -> None:
        """Ends the workers."""
        self.sandbox.close()


class FunctionScorer:
    """A function by import path, called with (answer, gold, problem) in a worker; problem is {"id", "prompt", "metadata"}.

    Raises SandboxError when it cannot be imported.
    """

    def __init__(self, path: str) -> None:
        self.sandbox = Sandbox("function", path=path)
        self.sandbox.confined()  # starts a worker, so that a path that does not import is named now

    def score(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """What the function returns for each."""
        return self.sandbox.ask(
            [
                Question(
                    answer, problem.answer, {"id": problem.id, "prompt": problem.prompt, "metadata": problem.metadata}
                )
                for problem, answer in pairs
            ]
        )

    def close(self) -> None:
        """Ends the workers."""
        self.sandbox.close()


def load_scorer(config: TaskConfig) -> Scorer:
    """The scorer that `config.scorer` names; by default the generator's own, or math for rows of a file.

    Raises TaskError for one that does not start, or that this system cannot confine.
    """
    rules = {"exact": answers.exact, "choice": choice.chosen, "tools": actions.same}
    try:
        match config.scorer:
            case None if config.kind == "reasoning_gym":
                return GymScorer(config.name, config.options, config.unsafe_scorers)
            case None | "math":
                return MathScorer()
            case "numeric":
                return MathScorer(config.tolerance)
            case name if name in rules:
                return TextScorer(rules[name])
            case path:
                return FunctionScorer(path)
    except SandboxError as error:
        raise TaskError(f"task.scorer={config.scorer!r}: {error}" if config.scorer else str(error)) from error
