"""Policy losses in plain torch: (logp, old, advantage, …) → loss per token. The oracle for `csrc/policy.h`.

All tensors are [N], one entry a token. Differentiable in `logprobs`; everything else is data.
"""

from __future__ import annotations

import torch
from torch import Tensor

from drift_kernels.spec import PolicySpec

LOG_RATIO_BOUND = 20.0


def log_ratio(logprobs: Tensor, old_logprobs: Tensor | None) -> Tensor:
    """logp − old clamped to ±20 [N]; without `old_logprobs` zero in value (on-policy), with the gradient of logp."""
    old = logprobs.detach() if old_logprobs is None else old_logprobs
    return (logprobs - old).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def ratio_bounds(spec: PolicySpec) -> tuple[float, float]:
    """Lower and upper bound of the ratio; 0 below where the spec leaves it open."""
    return (0.0 if spec.clip_low is None else 1 - spec.clip_low), 1 + spec.clip_high


def objective(logprobs: Tensor, advantages: Tensor, old_logprobs: Tensor | None, spec: PolicySpec) -> Tensor:
    """The policy term of each token [N] (algorithms table of `PolicySpec`), without KL and entropy."""
    low, high = ratio_bounds(spec)
    ratio = log_ratio(logprobs, old_logprobs).exp()
    match spec.objective:
        case "clip":
            free = (ratio if spec.delta is None else ratio.clamp(max=spec.delta)) * advantages
            loss = -torch.minimum(free, ratio.clamp(low, high) * advantages)
            if spec.dual_clip is not None:
                loss = torch.where(advantages < 0, torch.minimum(loss, -spec.dual_clip * advantages), loss)
            return loss
        case "cispo":
            return -ratio.clamp(low, high).detach() * advantages * logprobs
        case "sapo":
            positive, negative = spec.sapo_temperatures
            tau = torch.full_like(ratio, negative).masked_fill(advantages > 0, positive)
            return -(4 / tau) * torch.sigmoid(tau * (ratio - 1)) * advantages
        case "reinforce":
            return -advantages * logprobs
    raise AssertionError(spec.objective)


def kl(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """Estimate of KL(policy‖reference) from the sampled token [N]; a trailing "+" takes its gradient from k2."""
    d = logprobs - ref_logprobs
    match estimator.rstrip("+"):
        case "k1":
            value = d
        case "k2":
            value = d * d / 2
        case "k3":
            value = torch.exp(-d) + d - 1
        case _:
            value = d.abs()
    if estimator.endswith("+"):
        straight = d * d / 2
        return straight - straight.detach() + value.detach()
    return value


def clipped(logprobs: Tensor, advantages: Tensor, old_logprobs: Tensor | None, spec: PolicySpec) -> Tensor:
    """−1 where the lower bound of the ratio is what counts, +1 where the upper one does, else 0 (and for A = 0) [N]."""
    low, high = ratio_bounds(spec)
    ratio = log_ratio(logprobs, old_logprobs).exp()
    below, above = ratio < low, ratio > high
    if spec.objective == "clip":
        below, above = below & (advantages < 0), above & (advantages > 0)
    elif spec.objective == "cispo":
        below, above = below & (advantages != 0), above & (advantages != 0)
    else:
        return torch.zeros_like(ratio)
    return above.to(ratio.dtype) - below.to(ratio.dtype)


def token_loss(
    logprobs: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    entropy: Tensor | None,
    lse: Tensor | None,
    spec: PolicySpec,
) -> Tensor:
    """Objective + KL − entropy bonus + z-loss of each token [N], before weights and aggregation."""
    loss = objective(logprobs, advantages, old_logprobs, spec)
    if spec.kl_coef and ref_logprobs is not None:
        loss = loss + spec.kl_coef * kl(logprobs, ref_logprobs, spec.kl_estimator)
    if spec.entropy_coef and entropy is not None:
        loss = loss - spec.entropy_coef * entropy
    if spec.z_loss_coef and lse is not None:
        loss = loss + spec.z_loss_coef * lse * lse
    return loss


def correction(
    old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, segments: Tensor | None, spec: PolicySpec
) -> Tensor:
    """Factor exp(old − rollout) on each token's objective [N], truncated or masked per token or per sequence.

    `mask` [N] bool says which tokens count; `segments` [N] int64 which sequence they are of (the sequence forms).
    The sequence ratio is the product over its tokens. No gradient.
    """
    delta = torch.where(mask, old_logprobs - rollout_logprobs, 0.0).detach()
    assert spec.correction is not None
    if spec.correction.startswith("sequence"):
        assert segments is not None
        size = int(segments.max()) + 1 if segments.numel() else 0
        delta = torch.zeros(size, dtype=delta.dtype, device=delta.device).index_add_(0, segments, delta)[segments]
    ratio = delta.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
    low, high = spec.correction_bounds
    if spec.correction.endswith("truncate"):
        return ratio.clamp(low, high)
    return torch.where((ratio < low) | (ratio > high), 0.0, ratio)
