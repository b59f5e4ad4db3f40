"""Whole ops in plain torch: full [T, V] logits, and autograd does the rest. The oracle; any device, any float dtype.

fp16 and bf16 inputs are widened to fp32 first, as every backend does; fp64 stays fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from drift_kernels import divergences, formulas
from drift_kernels.calls import HeadOptions
from drift_kernels.distill_spec import DistillSpec
from drift_kernels.divergences import TeacherTensors
from drift_kernels.formulas import Tokens
from drift_kernels.spec import PolicySpec


def logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: Tensor | None, head: HeadOptions
) -> Tensor:
    """z [T, V] = softcap(logit_scale·(h·Wᵀ + b)) / temperature in the compute dtype, differentiable."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    with torch.autocast(hidden.device.type, enabled=False):  # what it casts is cast by now
        z = hidden.to(dtype) @ weight.to(dtype).t()
    if bias is not None:
        z = z + bias.to(dtype)
    z = z * head.logit_scale
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    return z / (head.temperature if temperature is None else temperature.to(dtype)[:, None])


def merged(weight: Tensor, a: Tensor | None, b: Tensor | None, scale: float, dtype: torch.dtype) -> Tensor:
    """The weight W [V, D] of a head, or with LoRA's A [r, D] and B [V, r] W + scale·B·A in `dtype`; differentiable."""
    if a is None or b is None:
        return weight
    with torch.autocast(weight.device.type, enabled=False):
        return weight.to(dtype) + scale * (b.to(dtype) @ a.to(dtype))


def statistics(z: Tensor, targets: Tensor, rows: Tensor | None, mask: Tensor) -> dict[str, Tensor]:
    """Per-entry statistics [N] of logits [T, V], zero where `mask` [N] is false; logprobs, entropy and lse differentiable."""
    log_p = torch.log_softmax(z, -1)
    p = log_p.exp()
    safe = targets.masked_fill(~mask, 0)
    per_row = {
        "lse": torch.logsumexp(z, -1),
        "entropy": -(p * log_p.masked_fill(p == 0, 0.0)).sum(-1),  # 0·∞ is 0, in the gradient too
        "mean_logits": z.mean(-1),
        "log_sum_sq_probs": torch.logsumexp(2 * log_p, -1),
    }
    entry = torch.arange(len(targets), device=z.device) if rows is None else rows
    out = {name: value[entry] for name, value in per_row.items()}
    out["logprobs"] = log_p[entry, safe]
    out["is_top1"] = (z[entry, safe] >= z.max(-1).values[entry]).to(z.dtype)
    return {name: torch.where(mask, value, 0.0) for name, value in out.items()}


def policy(stats: dict[str, Tensor], mask: Tensor, tokens: Tokens, spec: PolicySpec) -> dict[str, Tensor]:
    """Weighted token losses and per-token terms [N], zero outside `mask`; `loss` is differentiable through `stats`."""
    where = mask.nonzero().squeeze(1)
    counted, logprobs = tokens.pick(where), stats["logprobs"][where]
    read = counted if counted.weights is None else formulas.read_at(counted.weights, counted, spec)
    loss = formulas.token_loss(logprobs, read, stats["entropy"][where], stats["lse"][where], spec)
    clipped = formulas.clipped(logprobs, counted, spec)
    if counted.weights is not None:
        loss = torch.where(counted.weights != 0, loss * counted.weights, 0.0)
        clipped = torch.where(counted.weights != 0, clipped, 0.0)
    terms = {
        "loss": loss,
        "ratio": formulas.ratio_of(logprobs, counted, spec).detach(),
        "clipped": clipped.detach(),
        "kl": torch.zeros_like(logprobs) if counted.ref is None else formulas.kl_term(logprobs, counted, spec).detach(),
    }
    return {name: torch.zeros_like(stats["lse"]).index_copy(0, where, value) for name, value in terms.items()}


def distillation(
    z: Tensor,
    stats: dict[str, Tensor],
    teacher_z: Tensor | None,
    teacher: TeacherTensors,
    where: Tensor,
    spec: DistillSpec,
) -> Tensor:
    """The divergence of each row [T], zero but at the rows `where` [n] int64; differentiable through logits `z` [T, V]."""
    z, V = z[where], z.shape[1]
    if teacher.sampled is not None:
        values = divergences.sampled(stats["logprobs"][where], teacher.sampled[where])
    elif teacher.ids is None and spec.top_k is None:
        assert teacher_z is not None
        s, t = (torch.log_softmax(logits, -1) for logits in (z, teacher_z[where]))
        values = divergences.divergence(s, t, spec.alpha)
    else:
        k = spec.top_k or 0
        ids = _likeliest(z, k) if teacher.ids is None else teacher.ids[where]
        if teacher.logprobs is None:
            assert teacher_z is not None
            t = _buckets(teacher_z[where], ids, spec.tail)
        else:
            rest = teacher.rest[where] if teacher.rest is not None else None
            stored = teacher.logprobs[where]
            rest = divergences.stored_rest(stored, V) if rest is None else rest
            t = divergences.buckets(stored, rest if spec.tail else None)
        values = divergences.divergence(_buckets(z, ids, spec.tail), t, spec.alpha)
    return torch.zeros_like(stats["lse"]).index_copy(0, where, values)


def _likeliest(z: Tensor, k: int) -> Tensor:
    """Ids [n, k] of the largest logits of z [n, V], the lower of equal ones first; a NaN counts as −∞."""
    z = torch.where(z.isnan(), -torch.inf, z.detach())
    return torch.sort(z, dim=-1, descending=True, stable=True).indices[:, :k]


def _buckets(z: Tensor, ids: Tensor, tail: bool) -> Tensor:
    """Log-probs of `ids` [n, k] by logits z [n, V], and with `tail` of all other tokens."""
    log_p = torch.log_softmax(z, -1)
    if not tail:
        return divergences.buckets(log_p.gather(1, ids), None)
    if ids.shape[1] == z.shape[1]:
        rest = torch.full_like(log_p[:, 0], -torch.inf)
    else:
        others = log_p.scatter(1, ids, -torch.inf)
        alive = (others != -torch.inf).any(-1)  # if not, logsumexp has no gradient
        rest = torch.where(alive, torch.where(alive[:, None], others, 0.0).logsumexp(-1), -torch.inf)
    return divergences.buckets(log_p.gather(1, ids), rest)


def top_k(z: Tensor, k: int, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and log-probs [T, k] of the likeliest tokens by logits [T, V], and the log-prob [T] of the rest; 0 outside `mask`."""
    order = _likeliest(z, k)
    ids = torch.where(mask[:, None], order, 0)
    logprobs = torch.where(mask[:, None], _buckets(z, order, True), 0.0)
    return ids, logprobs[:, :k], logprobs[:, k]
