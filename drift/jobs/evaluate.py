"""multi@k (A6): the share of problems solved within k turns, greedy, with the feedback of `eval.feedback`.

The correction rate of turn t is the share of the problems still unsolved before it that are solved in it.
With `eval.samples` also mean@n and pass@n: of n one-turn samples a problem at `eval.temperature` and `eval.top_p`, the
share that is right, and the share of problems with at least one right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from drift.config import EvalConfig
from drift.engines import Engine
from drift.model.policy import Policy
from drift.rollouts.failures import Failures
from drift.rollouts.rollout import Episode, framing, play
from drift.tasks import Task
from drift.track import Track
from drift.types import Problem

EXAMPLES = 8


@dataclass(frozen=True)
class Evaluation:
    """The results of one policy on a set of problems."""

    multi_at_k: float  # share solved within all k turns
    single: float  # share solved in the first turn
    by_turn: list[float]  # [k], share solved within 1, 2, … k turns
    corrected: list[float | None]  # [k - 1], correction rates of turns 2 … k; None if nothing was left to solve
    solved_at: list[int]  # [problems], the turn of the right answer, 0 for never
    examples: list[dict[str, Any]]  # a few conversations to read: prompt_id, messages, t_star
    samples: int = 0  # one-turn samples a problem
    temperature: float = 1.0  # of the samples, as is top_p
    top_p: float = 1.0
    right: list[int] = field(default_factory=list)  # [problems], how many of them; empty without samples
    failed_checks: int = 0  # checks without a verdict, which count as wrong
    problems: list[str] = field(default_factory=list)  # [problems], their ids, which change with question and answer
    sets: dict[str, dict[str, Any]] = field(default_factory=dict)  # of several evaluation sets, each as JSON by name

    def to_json(self) -> dict[str, Any]:
        """As a plain dict; shares under their published names, such as multi_at_5, mean_at_16 and pass_at_16."""
        values = asdict(self)
        if not self.samples:
            del values["temperature"], values["top_p"]
        named = {f"multi_at_{len(self.by_turn)}": values.pop("multi_at_k")}
        if n := self.samples:
            named[f"mean_at_{n}"] = sum(self.right) / (n * len(self.right))
            named[f"pass_at_{n}"] = sum(count > 0 for count in self.right) / len(self.right)
            for key in (f"mean_at_{n}", f"pass_at_{n}") if self.sets else ():
                named[key] = _mean([one[key] for one in self.sets.values()])
        if not self.sets:
            del values["sets"]
        return {**named, **values}


@dataclass(frozen=True)
class _How:
    """`rollout.Settings` of an evaluation."""

    turns: int
    max_new_tokens: int
    feedback: Literal["simple", "full"]
    history: Literal["keep", "template"]
    tool: str | None
    tool_calls: int
    environment: str | None
    temperature: float
    top_p: float = 1.0


def evaluate(
    policy: Policy,
    engine: Engine,
    task: Task,
    problems: Sequence[Problem],
    config: EvalConfig,
    *,
    history: Literal["keep", "template"] = "keep",
    tool: str | None = None,
    tool_calls: int = 0,
    environment: str | None = None,
    name: str = "",
    track: Track | None = None,
) -> Evaluation:
    """Plays each problem once, greedily, for up to `config.turns` turns, and samples `config.samples` one-turn answers.

    Wrong answers get `config.feedback`. name: of the set, for the progress. Raises ValueError for no problems, CheckError
    when too many checks have no verdict.
    """
    if not problems:
        raise ValueError("problems is empty; an evaluation needs at least one")
    track, failures = track or Track(None, progress=False), Failures(framing(task).max_failed)

    def played(
        what: str, jobs: Sequence[tuple[Problem, int]], turns: int, temperature: float, top_p: float = 1.0
    ) -> list[Episode]:
        length, feedback = config.max_new_tokens, config.feedback
        how = _How(turns, length, feedback, history, tool, tool_calls, environment, temperature, top_p)
        episodes = []
        with track.progress(f"{what} {name}".strip(), len(jobs)) as bar:
            for first in range(0, len(jobs), config.batch_size):
                chunk = jobs[first : first + config.batch_size]
                episodes += play(policy, engine, task, chunk, how, seed=[0, first], bar=bar, failures=failures)
        return episodes

    episodes = played("evaluate", [(problem, 0) for problem in problems], config.turns, 0.0)
    right: list[int] = []
    if n := config.samples:
        jobs = [(problem, index) for problem in problems for index in range(n)]
        sampled = played("sample", jobs, 1, config.temperature, config.top_p)
        right = [sum(e.solved_at > 0 for e in sampled[first : first + n]) for first in range(0, len(sampled), n)]
    solved_at = [episode.solved_at for episode in episodes]
    by_turn = [sum(0 < at <= turn for at in solved_at) / len(solved_at) for turn in range(1, config.turns + 1)]
    examples = [
        {"prompt_id": e.problem.id, "messages": e.messages, "t_star": e.solved_at or None} for e in episodes[:EXAMPLES]
    ]
    how = (config.samples, config.temperature, config.top_p)
    return Evaluation(
        by_turn[-1],
        by_turn[0],
        by_turn,
        _corrected(solved_at, config.turns),
        solved_at,
        examples,
        *how,
        right,
        failures.failed,
        [problem.id for problem in problems],
    )


def _corrected(solved_at: Sequence[int], turns: int) -> list[float | None]:
    rates: list[float | None] = []
    for turn in range(2, turns + 1):
        left = [at for at in solved_at if at == 0 or at >= turn]
        rates.append(sum(at == turn for at in left) / len(left) if left else None)
    return rates


def average(parts: dict[str, Evaluation]) -> Evaluation:
    """Several sets as one: shares are means over the sets, whatever their sizes; problems lie one set after another."""
    every = list(parts.values())
    by_turn = [_mean(shares) for shares in zip(*(one.by_turn for one in every))]
    rates = [[rate for rate in turn if rate is not None] for turn in zip(*(one.corrected for one in every))]
    return Evaluation(
        by_turn[-1],
        by_turn[0],
        by_turn,
        [_mean(turn) if turn else None for turn in rates],
        [at for one in every for at in one.solved_at],
        [example for one in every for example in one.examples[:2]],
        every[0].samples,
        every[0].temperature,
        every[0].top_p,
        [count for one in every for count in one.right],
        sum(one.failed_checks for one in every),
        [name for one in every for name in one.problems],
        {name: one.to_json() for name, one in parts.items()},
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def lines(done: Evaluation) -> list[str]:
    """The summary for a reader: a line for each set, the last for their average; with one set, that one alone."""
    shown = [_line(name, one) for name, one in done.sets.items()]
    return [*shown, _line("average" if done.sets else "", done.to_json())]


def _line(name: str, one: dict[str, Any]) -> str:
    multi = next(key for key in one if key.startswith("multi_at_"))
    parts = [f"multi@{multi.removeprefix('multi_at_')} {one[multi]:.1%}", f"single turn {one['single']:.1%}"]
    parts += [f"{key.replace('_at_', '@')} {one[key]:.1%}" for key in one if key.startswith(("mean_at_", "pass_at_"))]
    rates = " ".join("–" if rate is None else f"{rate:.1%}" for rate in one["corrected"])
    turns = "2" if len(one["by_turn"]) == 2 else f"2…{len(one['by_turn'])}"
    parts += [f"corrected in turn {turns}: {rates}"] if rates else []
    return f"{name + ': ' if name else ''}{', '.join(parts)} of {len(one['solved_at'])} problems"
