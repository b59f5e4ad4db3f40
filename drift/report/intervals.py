"""How sure a difference is: paired differences over seeds, and intervals bootstrapped over seeds and problems.

Every seed has its own model and rollouts, and all seeds are evaluated on the same problems: seeds and problems are
crossed, not nested. `bootstrap` therefore draws both anew, independently of each other (the pigeonhole bootstrap of
Owen, 2007), which errs on the wide side; and every arm gets the same draws, so differences are paired in both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Difference(NamedTuple):
    """A mean over seeds of (one arm - another) and its standard error; NaN if there is one seed."""

    mean: float
    stderr: float

    @property
    def beyond_twice(self) -> bool:
        """Whether the mean exceeds twice its standard error; False if there is none."""
        return self.mean > 2 * self.stderr


def mean_stderr(values: Sequence[float]) -> Difference:
    """Mean and standard error of the mean (n - 1 in the variance). Raises ValueError if there are no values."""
    if len(values) == 0:
        raise ValueError("values is empty; a mean needs at least one")
    spread = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Difference(float(np.mean(values)), spread)


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Mean and standard error of `ours - theirs`, seed by seed. Raises ValueError if the lengths differ."""
    if len(ours) != len(theirs):
        raise ValueError(
            f"ours has {len(ours)} seeds and theirs {len(theirs)}; a paired difference needs the same seeds"
        )
    return mean_stderr(np.subtract(ours, theirs).tolist())


def bootstrap(solved: Mapping[str, np.ndarray], replicates: int = 10_000, seed: int = 0) -> dict[str, np.ndarray]:
    """Bootstrapped means, one a replicate, drawn anew over seeds and over problems, the same draws for every arm.

    solved: arm -> [S seeds, P problems], 1 where that seed's model solved that problem, all of one shape.
    Returns arm -> [replicates] float64. Raises ValueError if the shapes differ or are not [S, P] with S, P >= 1.
    """
    shapes = {arm: np.shape(table) for arm, table in solved.items()}
    if len(set(shapes.values())) != 1 or len(shape := next(iter(shapes.values()))) != 2 or 0 in shape:
        raise ValueError(f"solved needs the same [seeds, problems] for every arm, both at least 1; it has {shapes}")
    seeds, problems = shape
    generator = np.random.default_rng(seed)
    drawn = {arm: np.empty(replicates) for arm in solved}
    step = max(1, 4_000_000 // problems)  # replicates at a time: 32 MB of problem counts
    for start in range(0, replicates, step):
        size = min(step, replicates - start)
        by_seed = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size)  # [size, S] how often each was drawn
        by_problem = generator.multinomial(problems, np.full(problems, 1 / problems), size)  # [size, P]
        for arm, table in solved.items():
            means = by_seed @ np.asarray(table, dtype=np.float64)  # [size, P]
            drawn[arm][start : start + size] = np.einsum("bp,bp->b", means, by_problem) / (seeds * problems)
    return drawn


def interval(drawn: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The central `level` of bootstrapped values, by percentiles."""
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
