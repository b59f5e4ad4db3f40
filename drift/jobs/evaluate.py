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
    """What one policy did on a set of problems."""

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

    def to_json(self) -> dict[str, Any]:
        """As a plain dict; shares under their published names, such as multi_at_5, mean_at_16 and pass_at_16."""
        values = asdict(self)
        if not self.samples:
            del values["temperature"], values["top_p"]
        named = {f"multi_at_{len(self.by_turn)}": values.pop("multi_at_k")}
        if n := self.samples:
            named[f"mean_at_{n}"] = sum(self.right) / (n * len(self.right))
            named[f"pass_at_{n}"] = sum(count > 0 for count in self.right) / len(self.right)
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
    track: Track | None = None,
) -> Evaluation:
    """Plays each problem once, greedily, for up to `config.turns` turns, and samples `config.samples` one-turn answers.

    Wrong answers get `config.feedback`. Raises ValueError for no problems, CheckError when too many checks have no verdict.
    """
    if not problems:
        raise ValueError("problems is empty; an evaluation needs at least one")
    track, failures = track or Track(None, progress=False), Failures(framing(task).max_failed)

    def played(
        name: str, jobs: Sequence[tuple[Problem, int]], turns: int, temperature: float, top_p: float = 1.0
    ) -> list[Episode]:
        how = _How(turns, config.max_new_tokens, config.feedback, history, tool, tool_calls, temperature, top_p)
        episodes = []
        with track.progress(name, len(jobs)) as bar:
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
    )


def _corrected(solved_at: Sequence[int], turns: int) -> list[float | None]:
    rates: list[float | None] = []
    for turn in range(2, turns + 1):
        left = [at for at in solved_at if at == 0 or at >= turn]
        rates.append(sum(at == turn for at in left) / len(left) if left else None)
    return rates
