"""What the public ops return, the names of per-token outputs, and metrics as (sum, count)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Metrics = dict[str, tuple[Tensor, Tensor]]

OUTPUTS = ("logprobs", "entropy", "lse", "is_top1", "mean_logits", "log_sum_sq_probs")
POLICY_OUTPUTS = (*OUTPUTS, "ratio", "kl", "clipped")
TEACHER_OUTPUTS = ("teacher_logprobs", "teacher_entropy", "divergence")
DISTILL_OUTPUTS = (*OUTPUTS, *TEACHER_OUTPUTS)
EXPLORATION_OUTPUTS = ("difference", "rhythm", "gate", "rebellious")


@dataclass
class LinearLogprob:
    """Result of `linear_logprob`: tensors of the targets' shape in fp32 (fp64 for fp64), 0 at masked positions."""

    logprobs: Tensor  # differentiable
    outputs: dict[str, Tensor] = field(default_factory=dict)  # the statistics asked for, by name

    @property
    def entropy(self) -> Tensor | None:
        """Entropies of the predicted distributions, if asked for; differentiable with entropy_gradient=True."""
        return self.outputs.get("entropy")


@dataclass
class LossOutput:
    """Result of every loss. Per-token outputs carry no gradient, have the targets' shape and are 0 at masked positions."""

    loss: Tensor  # 0-d fp32 (fp64 for fp64), differentiable
    outputs: dict[str, Tensor] = field(default_factory=dict)  # by the names in `outputs=`
    metrics: Metrics = field(default_factory=dict)  # name → (sum, count); they add up over micro-batches and ranks

    @property
    def logprobs(self) -> Tensor | None:
        """Log-probs of the targets, if asked for."""
        return self.outputs.get("logprobs")

    @property
    def entropy(self) -> Tensor | None:
        """Entropies of the predicted distributions, if asked for."""
        return self.outputs.get("entropy")


def check_outputs(outputs: Sequence[str], allowed: tuple[str, ...]) -> tuple[str, ...]:
    """`outputs` as a tuple. Raises ValueError that names the unknown output and the known ones."""
    if isinstance(outputs, str):
        raise TypeError(f"outputs={outputs!r} is text; pass a tuple of names: ({outputs!r},)")
    for name in outputs:
        if name not in allowed:
            raise ValueError(f"outputs has {name!r}; this op knows {', '.join(allowed)}")
    return tuple(outputs)


def policy_metrics(
    values: dict[str, Tensor], mask: Tensor, names: tuple[str, ...], factor: Tensor | None, weights: Tensor | None
) -> Metrics:
    """(sum, count) over unmasked tokens by the names that TRL's users know; ppo_kl (mean of old − logp) by verl's.

    factor   the sampler correction's factor [N], None without a correction; its mean is over tokens of weight other than 0
    weights  the caller's token weights [N], None = 1
    """
    count, clipped = mask.sum(), values["clipped"]
    sums = {
        "clip_ratio/low_mean": (clipped < 0).sum(),
        "clip_ratio/high_mean": (clipped > 0).sum(),
        "clip_ratio/region_mean": (clipped != 0).sum(),
    }
    sums |= {name: values[name].sum() for name in ("kl", "entropy") if name in names}
    if "ratio" in names:
        sums["ratio"] = values["ratio"].sum()
        sums["ppo_kl"] = -torch.where(mask, values["ratio"].log(), 0.0).sum()
    metrics = {name: (total, count) for name, total in sums.items()}
    if factor is not None:
        read = mask if weights is None else mask & (weights != 0)
        metrics["sampling/importance_sampling_ratio/mean"] = (torch.where(read, factor, 0.0).sum(), read.sum())
    return metrics
