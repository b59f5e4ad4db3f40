"""How much policy optimisation, and how much distillation, each sample gets: the difficulty router (arXiv 2606.30345; B1).

A problem's history of successes and failures, which fades, gives a pass rate; soft gates on it say how easy, medium or
hard the problem is; a table of weights says what that means for a sample. SDPO, GRPO and SRPO are the same table with
other numbers (`RouterConfig(mode="sdpo")`). Plain floats, rounded to fp32 at the end: a batch is a few hundred samples.

    >>> from drift.routing import DifficultyRouter, RouterConfig
    >>> router = DifficultyRouter(RouterConfig())
    >>> routes = router.update(["a", "a", "b"], [True, False, False], [True, True, False], step=0)
    >>> [round(w, 3) for w in routes.policy.tolist()], [round(w, 3) for w in routes.distill.tolist()]
    ([0.876, 0.0, 1.0], [0.0, 0.102, 0.0])
    >>> router.load_state_dict(router.state_dict())

Left out: sharing a history between ranks. The router is plain state: give every rank the whole batch, or route on one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from drift.config.online import RouterConfig

__all__ = ["DifficultyRouter", "RouterConfig", "Routes", "gates"]


@dataclass(frozen=True, slots=True)
class Routes:
    """Each sample's weight in each branch; all [B] float32, without gradient."""

    distill: torch.Tensor  # of the divergence from the teacher (B6)
    policy: torch.Tensor  # of the policy loss (B7)
    rebellious: torch.Tensor  # how far the rebellious bonus applies (B3)
    pass_rate: torch.Tensor  # the problem's, this batch included, drawn towards 0.5 by how little is known


@dataclass(slots=True)
class _History:
    successes: float = 0.0
    failures: float = 0.0
    step: int = 0  # at which it was last brought up to date


class DifficultyRouter:
    """Remembers every problem's fading history. Updated once a rollout batch, with all of it.

    transition_end: the first step, counted from 0, after the curriculum's transition; `config.reset_every` counts from it.
    It may be set anew while the curriculum is still in its warm-up.
    """

    def __init__(self, config: RouterConfig, transition_end: int = 0) -> None:
        self.config, self.transition_end = config, transition_end
        self._histories: dict[str, _History] = {}
        self._period = 0  # how many times `reset_every` steps have passed
        self._metrics: dict[str, float] = {}

    def update(
        self, problem_ids: Sequence[str], correct: Sequence[bool], has_teacher: Sequence[bool], step: int
    ) -> Routes:
        """Takes in one batch, and says how each of its samples is routed.

        correct: the sample solved its problem. has_teacher: it has a demonstration or informative feedback (B5).
        A problem last seen Δ steps ago has its counts multiplied by decay^Δ first; a step before the last one counts as
        Δ = 0, and does not turn the clock back. Raises ValueError for lengths that differ.
        """
        if not len(problem_ids) == len(correct) == len(has_teacher):
            raise ValueError(
                f"problem_ids has {len(problem_ids)} items, correct {len(correct)} and has_teacher {len(has_teacher)}; "
                "there should be one of each a sample"
            )
        self._forget(step)
        for problem in dict.fromkeys(problem_ids):
            self._age(self._histories.setdefault(problem, _History(step=step)), step)
        for problem, right in zip(problem_ids, correct):
            history = self._histories[problem]
            history.successes += bool(right)
            history.failures += not right
        rates = {problem: self.pass_rate(problem) for problem in dict.fromkeys(problem_ids)}
        opened = {problem: gates(rate, self.config) for problem, rate in rates.items()}
        rows = [
            (*self._weights(opened[problem], bool(right), bool(taught)), rates[problem])
            for problem, right, taught in zip(problem_ids, correct, has_teacher)
        ]
        columns = torch.tensor(rows, dtype=torch.float64).reshape(-1, 4).T.float().contiguous()
        self._metrics = self._measure(columns, [opened[problem] for problem in problem_ids], correct, has_teacher)
        self._metrics |= self._measure_right(columns, correct, has_teacher)
        return Routes(*columns)

    def pass_rate(self, problem: str) -> float:
        """p = c·(S + 1)/(S + F + 2) + (1 − c)/2 with c = n/(n + confidence), n = S + F; 0.5 for an unknown problem."""
        history = self._histories.get(problem, _History())
        count = history.successes + history.failures
        known = count / (count + self.config.confidence)
        return known * (history.successes + 1) / (count + 2) + (1 - known) * 0.5

    def _forget(self, step: int) -> None:
        """Clears everything once a multiple of `reset_every` after the transition's end is reached, or passed.

        Published steps count from 1: with reset_every = K the K-th step after the transition starts without a history.
        """
        if not self.config.reset_every:
            return
        period = max(step + 1 - self.transition_end, 0) // self.config.reset_every
        if period > self._period:
            self._period = period
            self._histories.clear()

    def _age(self, history: _History, step: int) -> None:
        fade = self.config.decay ** max(step - history.step, 0)
        history.successes *= fade
        history.failures *= fade
        history.step = max(step, history.step)

    def _weights(self, opened: tuple[float, float, float], right: bool, taught: bool) -> tuple[float, float, float]:
        """(distill, policy, rebellious) of one sample: the table's row, mixed by the gates (easy, medium, hard)."""
        config = self.config
        if not taught:
            return 0.0, config.policy_untaught, 0.0
        if not right:
            return _mix(opened, config.distill_incorrect), _mix(opened, config.policy_incorrect), 0.0
        distill = 0.0 if config.binary_routing else _mix(opened, config.distill_correct)
        return distill, _mix(opened, config.policy_correct), _mix(opened, config.rebellious)

    def _measure(
        self, columns: torch.Tensor, opened: list[tuple[float, float, float]], correct: Any, has_teacher: Any
    ) -> dict[str, float]:
        count = max(len(opened), 1)
        distill, policy, rebellious, rate = columns
        return {
            "pass_rate": float(rate.sum()) / count,
            "easy": math.fsum(easy for easy, _, _ in opened) / count,
            "medium": math.fsum(medium for _, medium, _ in opened) / count,
            "hard": math.fsum(hard for _, _, hard in opened) / count,
            "teacher": sum(map(bool, has_teacher)) / count,
            "correct": sum(map(bool, correct)) / count,
            **{
                f"{name}_{what}": float(value) / count
                for name, column in (("distill", distill), ("policy", policy), ("rebellious", rebellious))
                for what, value in (("weight", column.sum()), ("share", (column > 0).sum()))
            },
        }

    def _measure_right(self, columns: torch.Tensor, correct: Any, has_teacher: Any) -> dict[str, float]:
        """Whether the parts act on right samples; a number without samples is left out."""
        _, policy, _, rates = columns.tolist()
        right = [place for place, solved in enumerate(correct) if solved]
        if not right:
            return {}
        measured = {"right_taught": sum(bool(has_teacher[place]) for place in right) / len(right)}
        for band in ("easy", "medium", "hard"):
            weights = [policy[place] for place in right if self.band(rates[place]) == band]
            if weights:
                measured[f"right_policy_{band}"] = math.fsum(weights) / len(weights)
        return measured

    def band(self, pass_rate: float) -> Literal["easy", "medium", "hard"]:
        """The name of a pass rate's band, between `hard_below` and `easy_above`."""
        if pass_rate < self.config.hard_below:
            return "hard"
        return "easy" if pass_rate > self.config.easy_above else "medium"

    def metrics(self) -> dict[str, float]:
        """Of the last batch: means over samples of pass rate, gates and weights, and the share with a weight above 0.

        `teacher` and `correct` are shares of samples; `right_taught` is the share of right samples with a teacher, and
        `right_policy_BAND` the mean policy weight of right samples of problems in that band. `problems` and `resets` count
        since the start.
        """
        return {**self._metrics, "problems": len(self._histories), "resets": self._period}

    def state_dict(self) -> dict[str, Any]:
        """Everything that later weights depend on, as JSON holds it."""
        histories = {name: [h.successes, h.failures, h.step] for name, h in self._histories.items()}
        return {"histories": histories, "period": self._period}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what `state_dict` gave."""
        self._histories = {name: _History(*values) for name, values in state["histories"].items()}
        self._period = state["period"]
        self._metrics = {}


def gates(pass_rate: float, config: RouterConfig) -> tuple[float, float, float]:
    """(easy, medium, hard) of a pass rate, adding up to 1.

    hard = σ((hard_below − p)/temperature), easy = σ((p − easy_above)/temperature), medium = (1 − hard)(1 − easy), each
    divided by the sum of the three.
    """
    hard = _sigmoid((config.hard_below - pass_rate) / config.temperature)
    easy = _sigmoid((pass_rate - config.easy_above) / config.temperature)
    medium = (1 - hard) * (1 - easy)
    total = easy + medium + hard
    return easy / total, medium / total, hard / total


def _sigmoid(x: float) -> float:
    return 0.5 * (1 + math.tanh(x / 2))  # exp(-x) would overflow for a sharp gate


def _mix(opened: tuple[float, float, float], weights: tuple[float, float, float]) -> float:
    return sum(gate * weight for gate, weight in zip(opened, weights))
