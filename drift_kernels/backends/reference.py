"""Whole ops in plain torch: full [T, V] logits, and autograd does the rest. The oracle; any device, any float dtype.

fp16 and bf16 inputs are widened to fp32 first, as every backend does; fp64 stays fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from drift_kernels import formulas
from drift_kernels.spec import HeadOptions, PolicySpec


def logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: Tensor | None, head: HeadOptions
) -> Tensor:
    """z [T, V] = softcap(logit_scale·(h·Wᵀ + b)) / temperature in the compute dtype, differentiable."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    z = hidden.to(dtype) @ weight.to(dtype).t()
    if bias is not None:
        z = z + bias.to(dtype)
    z = z * head.logit_scale
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    return z / (head.temperature if temperature is None else temperature.to(dtype)[:, None])


def statistics(z: Tensor, targets: Tensor, rows: Tensor | None, mask: Tensor) -> dict[str, Tensor]:
    """Per-entry statistics [N] of logits [T, V], zero where `mask` [N] is false; logprobs, entropy and lse differentiable."""
    log_p = torch.log_softmax(z, -1)
    p = log_p.exp()
    safe = targets.masked_fill(~mask, 0)
    per_row = {
        "lse": torch.logsumexp(z, -1),
        "entropy": -torch.where(p > 0, p * log_p, 0.0).sum(-1),
        "mean_logits": z.mean(-1),
        "log_sum_sq_probs": torch.logsumexp(2 * log_p, -1),
    }
    entry = torch.arange(len(targets), device=z.device) if rows is None else rows
    out = {name: value[entry] for name, value in per_row.items()}
    out["logprobs"] = log_p[entry, safe]
    out["is_top1"] = (z[entry, safe] >= z.max(-1).values[entry]).to(z.dtype)
    return {name: torch.where(mask, value, 0.0) for name, value in out.items()}


def policy(
    stats: dict[str, Tensor], mask: Tensor, advantages, old, ref, weights, spec: PolicySpec
) -> dict[str, Tensor]:
    """Weighted token losses and per-token terms [N], zero outside `mask`; `loss` is differentiable through `stats`."""
    logprobs = stats["logprobs"]
    advantages, old, ref, weights = (
        None if v is None else torch.where(mask, v, 0.0) for v in (advantages, old, ref, weights)
    )
    advantages = torch.ones_like(logprobs) if advantages is None else advantages
    loss = formulas.token_loss(logprobs, advantages, old, ref, stats["entropy"], stats["lse"], spec)
    if weights is not None:
        loss = torch.where(weights != 0, loss * weights, 0.0)
    out = {
        "loss": loss,
        "ratio": formulas.log_ratio(logprobs, old).exp().detach(),
        "clipped": formulas.clipped(logprobs, advantages, old, spec).detach(),
        "kl": torch.zeros_like(logprobs) if ref is None else formulas.kl(logprobs, ref, spec.kl_estimator).detach(),
    }
    if weights is not None:
        out["clipped"] = torch.where(weights != 0, out["clipped"], 0.0)
    return {name: torch.where(mask, value, 0.0) for name, value in out.items()}
