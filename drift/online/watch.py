"""The watch for collapse: what every step is measured by, and when that looks like a policy that has stopped thinking.

A policy that collapses grows certain (its entropy goes), says the same again (its repeat rate rises), finds less (solved
falls) and fewer different things (pass@k comes down to pass@1). The thresholds are ours; a warning stops nothing.

    >>> from drift.online.watch import Watch, WatchConfig, pass_at_k
    >>> watch = Watch(WatchConfig(window=1, entropy_below=0.2))
    >>> seen = {"problem_ids": ["a", "a", "b", "b"], "correct": [True, False, False, False]}
    >>> watch.update(entropy=1.0, repeat_rate=0.1, **seen)
    []
    >>> watch.update(entropy=0.1, repeat_rate=0.1, **seen)
    ['entropy has fallen to 10% of its start, 0.1 nats from 1']
    >>> watch.metrics()["pass_at_1"], watch.metrics()["pass_at_2"], watch.metrics()["low_entropy"]
    (0.25, 0.5, 1.0)
    >>> pass_at_k(8, 2, 4)
    0.7857142857142857

Left out: what needs a run to compare with. Whether a fall is a collapse or a harder batch is for the reader to say.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from drift.config.online import WatchConfig

__all__ = ["SIGNS", "Watch", "WatchConfig", "pass_at", "pass_at_k", "repeat_rate"]

SIGNS = {
    "low_entropy": "entropy is far below its start",
    "high_repeat": "many answers repeat an earlier one",
    "low_solved": "far less is solved than at the best",
}  # as they are named in the log, and said in a report


def pass_at_k(n: int, c: int, k: int) -> float:
    """1 − C(n−c, k)/C(n, k): of n samples c are right, the unbiased chance that one of k is (arXiv 2107.03374).

    Raises ValueError unless 0 ≤ c ≤ n and 1 ≤ k ≤ n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k of n={n}, c={c}, k={k}: c should lie in [0, n], k in [1, n]")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def pass_at(problem_ids: Iterable[str], correct: Iterable[bool]) -> dict[int, float]:
    """k → mean pass@k over the problems of the samples, for k = 1, 2, 4, … and the fewest samples of a problem."""
    groups: dict[str, list[bool]] = {}
    for problem, right in zip(problem_ids, correct, strict=True):
        groups.setdefault(problem, []).append(bool(right))
    if not groups:
        return {}
    most = min(map(len, groups.values()))
    sizes = [*(2**i for i in range(most.bit_length()) if 2**i < most), most]
    return {
        k: math.fsum(pass_at_k(len(group), sum(group), k) for group in groups.values()) / len(groups) for k in sizes
    }


def repeat_rate(answers: Iterable[Sequence[str]]) -> float:
    """Share of answers that were given before in their trajectory; `answers` has a list for each trajectory."""
    counts = [(len(given), len(set(given))) for given in answers]
    total = sum(number for number, _ in counts)
    return 1 - sum(distinct for _, distinct in counts) / total if total else 0.0


class Watch:
    """Takes in each step's numbers, which are those of all ranks, and says what has begun to look wrong."""

    def __init__(self, config: WatchConfig) -> None:
        self.config = config
        self.warnings: list[str] = []  # of the last step
        self._recent: dict[str, list[float]] = {"entropy": [], "repeat_rate": [], "solved": []}
        self._start: float | None = None  # entropy of the first step that had one
        self._best = 0.0  # the best window's solved share
        self._signs: list[str] = []  # that stand
        self._metrics: dict[str, float] = {}

    def update(
        self,
        *,
        entropy: float,
        repeat_rate: float,
        problem_ids: Sequence[str],
        correct: Sequence[bool],
        reference_kl: float | None = None,
    ) -> list[str]:
        """One step: nats a token, share of answers given before, and of each sample its problem and whether it is right.

        Returns a sentence for every sign of collapse that was not there in the step before. Nothing is held against a
        threshold before `window` steps are in.
        """
        solved = sum(map(bool, correct)) / max(len(correct), 1)
        if self._start is None and math.isfinite(entropy):
            self._start = float(entropy)
        for name, value in (("entropy", entropy), ("repeat_rate", repeat_rate), ("solved", solved)):
            self._recent[name] = [*self._recent[name], float(value)][-self.config.window :]
        self._metrics = {f"pass_at_{k}": value for k, value in pass_at(problem_ids, correct).items()}
        if reference_kl is not None:
            self._metrics["reference_kl"] = float(reference_kl)
        found = self._look() if len(self._recent["entropy"]) == self.config.window else {}
        self._metrics |= {name: float(name in found) for name in SIGNS}
        self.warnings = [said for name, said in found.items() if name not in self._signs]
        self._signs = list(found)
        return self.warnings

    def _look(self) -> dict[str, str]:
        """The signs of the last window, in words."""
        now = {name: math.fsum(values) / len(values) for name, values in self._recent.items()}
        start = self._start or 0.0
        self._best = max(self._best, now["solved"])
        found = {}
        if now["entropy"] < self.config.entropy_below * start:
            share = now["entropy"] / start
            found["low_entropy"] = (
                f"entropy has fallen to {share:.0%} of its start, {now['entropy']:.3g} nats from {start:.3g}"
            )
        if now["repeat_rate"] > self.config.repeat_above:
            found["high_repeat"] = f"{now['repeat_rate']:.0%} of the answers repeat an earlier one of their trajectory"
        if now["solved"] < self.config.solved_below * self._best:
            found["low_solved"] = f"solved has fallen to {now['solved']:.1%} from {self._best:.1%} at its best"
        return found

    def metrics(self) -> dict[str, float]:
        """Of the last step: pass_at_K, reference_kl where it was estimated, and 1 for each sign of collapse that stands."""
        return dict(self._metrics)

    def state_dict(self) -> dict[str, Any]:
        """Everything that later warnings depend on, as JSON holds it."""
        recent = {name: list(values) for name, values in self._recent.items()}
        return {"recent": recent, "start": self._start, "best": self._best, "signs": list(self._signs)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what `state_dict` gave."""
        self._recent = {name: list(values) for name, values in state["recent"].items()}
        self._start, self._best, self._signs = state["start"], state["best"], list(state["signs"])
        self._metrics, self.warnings = {}, []
