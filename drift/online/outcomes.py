"""The numbers that a step logs of its trajectories, and of its tokens over all ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from drift.online.samples import Sample
from drift.online.watch import repeat_rate
from drift.training import distributed


def outcomes(samples: Sequence[Sample]) -> dict[str, float]:
    """Rates over the batch's trajectories; `teacher_cut` of those whose teacher's prompt was too long."""
    count = len(samples)
    return {
        "reward": math.fsum(sample.reward for sample in samples) / count,
        "solved": sum(sample.solved_at > 0 for sample in samples) / count,
        "solved_first": sum(sample.solved_at == 1 for sample in samples) / count,
        "turns": sum(len(sample.row["verifier"]) for sample in samples) / count,
        "unparsed": sum(sample.unparsed for sample in samples) / count,
        "failed_checks": float(sum(sample.row.get("failed_checks", 0) for sample in samples)),
        "repeat_rate": repeat_rate(sample.answers for sample in samples),
        "response_tokens": sum(part.tokens for sample in samples for part in sample.parts) / count,
        "no_spread": sum(sample.trajectory.advantage == 0 for sample in samples) / count,
        "teacher_cut": sum(any(part.cut for part in sample.parts) for sample in samples) / count,
    }


def token_means(sums: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """The means of (sum, count) pairs over all ranks; a name without a count anywhere is left out."""
    names = sorted(set(distributed.gather(sorted(sums))))  # a rank may have no sample with a teacher
    totals = distributed.sum_values(*(value for name in names for value in sums.get(name, (0.0, 0.0))))
    pairs = zip(names, totals[::2], totals[1::2])
    return {name: total / count for name, total, count in pairs if count}
