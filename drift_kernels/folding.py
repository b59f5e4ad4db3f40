"""From a caller's per-token data to that of the chunk loop, and the loss's own denominator.

Aggregation over sequences becomes token weights; a sampler correction becomes a factor on advantages, or on weights if the loss
is not linear in the advantage.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from drift_kernels import formulas
from drift_kernels.formulas import Tokens
from drift_kernels.spec import PolicySpec


def folded_tokens(data: Tokens, mask: Tensor, spec: PolicySpec) -> tuple[Tokens, Tensor | None]:
    """The loss's per-token data, and the correction's factor [N] for the metrics (None without one).

    data  as `inputs.caller_tokens` makes it
    mask  [N] bool, entries that take part
    """
    lengths = None if data.lengths is None else data.lengths.clamp(min=1)
    tokens, factor = replace(data, rollout=None, segments=None, lengths=None), None
    if spec.correction:
        old, rollout = (None if v is None else torch.where(mask, v, 0.0) for v in (data.old, data.rollout))
        sampled = Tokens(old=old, rollout=rollout, segments=data.segments, lengths=lengths)
        factor = formulas.correction(sampled, spec)
        tokens = formulas.corrected(tokens, factor, spec)
    if spec.aggregation == "sequence_mean_token_mean":
        assert lengths is not None
        assert data.advantages is not None
        share = 1 / lengths.to(data.advantages.dtype)[data.segments]
        tokens = replace(tokens, weights=share if tokens.weights is None else tokens.weights * share)
    if spec.reads_sequences:
        reads_rollout = spec.objective == "vespo" or spec.off_policy_threshold is not None
        rollout = data.rollout if reads_rollout else None
        tokens = replace(tokens, rollout=rollout, segments=data.segments, lengths=lengths)
    return tokens, factor


def own_normalizer(data: Tokens, mask: Tensor, spec: PolicySpec, dtype: torch.dtype) -> Tensor:
    """The denominator of `spec.aggregation` over this call."""
    match spec.aggregation:
        case "token_mean":
            return or_one(mask.sum(), dtype)
        case "token_sum":
            return torch.ones((), dtype=dtype, device=mask.device)
        case _:
            assert data.lengths is not None
            return or_one((data.lengths > 0).sum(), dtype)


def or_one(total: Tensor, dtype: torch.dtype) -> Tensor:
    """A denominator that is 1 when nothing counts, so that an empty batch has loss 0 and zero gradients."""
    total = total.to(dtype)
    return torch.where(total == 0, torch.ones_like(total), total)
