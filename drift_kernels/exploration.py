"""Token weights of exploration (see `ExplorationSpec`), in plain torch: all tensors are [N], nothing is differentiated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from drift_kernels.distill_spec import ExplorationSpec
from drift_kernels.divergences import DistillTokens

LEAST_DIFFERENCE = 1e-3  # a mean of noise must not open every gate

NAMES = ("difference", "rhythm", "gate", "rebellious", "taught_entropy")


@dataclass(frozen=True)
class TokenStats:
    """What is seen of the student, or of the teacher."""

    logprobs: Tensor  # of the targets
    entropy: Tensor
    before: Tensor  # entropy of the row before, read where it belongs to the same turn

    @staticmethod
    def of(stats: dict[str, Tensor], last: Tensor) -> TokenStats:
        """From statistics by name, and the entropy [1] before the first row."""
        return TokenStats(stats["logprobs"], stats["entropy"], torch.cat((last, stats["entropy"]))[:-1])


def collapse(side: TokenStats, continues: Tensor) -> Tensor:
    """How far the entropy has fallen since the row before, 0 at a turn's first row."""
    return torch.where(continues, (side.before - side.entropy).clamp(min=0), 0.0)


def explore(
    student: TokenStats, teacher: TokenStats, lessons: DistillTokens, spec: ExplorationSpec
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Factors on the divergence and on the policy's token loss, and by `NAMES` what they were made from.

    Where `lessons.taught` is false, the factors are 1 and the rest 0.
    """
    one = torch.ones_like(student.entropy)
    taught = lessons.taught
    assert taught is not None
    assert lessons.continues is not None
    difference = (collapse(student, lessons.continues) - collapse(teacher, lessons.continues)).abs()
    difference = torch.where(taught, difference, 0.0)
    rhythm, span = one, spec.rhythm_maximum - 1
    if lessons.mean_difference is not None:
        rhythm = 1 + span * -torch.expm1(-difference / lessons.mean_difference.clamp(min=LEAST_DIFFERENCE))
    gate = one
    if spec.gate:
        gate = spec.gate_floor + (1 - spec.gate_floor) * ((rhythm - 1) / span) ** spec.gate_power
    rebellious = one
    if lessons.rebellious is not None:
        ahead = (student.logprobs - teacher.logprobs - spec.margin).clamp(min=0)
        bonus = (spec.gamma * ahead).exp().clamp(max=spec.bonus_maximum)
        rebellious = torch.where(taught, 1 + lessons.rebellious * (bonus - 1) * gate, 1.0)
    factor = rhythm if spec.weigh_divergence else one
    if spec.entropy_warmup and lessons.mean_entropy is not None:
        factor = factor * student.entropy / lessons.mean_entropy
    seen = (difference, rhythm, gate, rebellious, student.entropy)
    return torch.where(taught, factor, 1.0), rebellious, {n: torch.where(taught, v, 0.0) for n, v in zip(NAMES, seen)}
