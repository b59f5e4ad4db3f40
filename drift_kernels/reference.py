"""The ops in plain torch: whole [T, V] logits, and autograd does the rest. The oracle; any device, any float dtype.

fp16 and bf16 inputs are widened to fp32 first, as every backend does; fp64 stays fp64. First the ops on a caller's flat tensors,
then their arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from drift_kernels import distill_driver, divergences, formulas
from drift_kernels.calls import Call, DistillCall, HeadOptions
from drift_kernels.distill_spec import DistillSpec
from drift_kernels.divergences import DistillTokens, TeacherTensors
from drift_kernels.formulas import Tokens
from drift_kernels.inputs import Flat
from drift_kernels.plan import check_finite, check_targets, check_temperature, counting, distillation_rows
from drift_kernels.spec import PolicySpec
from drift_kernels.tensors import Inputs


def student_logits(flat: Flat, call: Call, mask: Tensor) -> Tensor:
    """Logits [T, V] of the hidden rows that the entries in `mask` [N] read; of zeros elsewhere."""
    check_targets(flat.targets[mask], flat.head.vocabulary, call.head.ignore_index)
    read = mask
    if flat.rows is not None:
        read = torch.zeros_like(flat.hidden[:, 0], dtype=torch.bool).index_fill(0, flat.rows[mask], True)
    check_temperature(None if flat.temperature is None else flat.temperature[read])
    hidden = torch.where(read[:, None], flat.hidden, 0.0)  # so that a masked NaN reaches nothing
    _, weight, bias, a, b = flat.operands()
    weight = merged(weight, a, b, call.lora_scale, flat.dtype)
    return logits(hidden, weight, bias, flat.temperature, call.head)


def linear_logprob(flat: Flat, call: Call, mask: Tensor) -> dict[str, Tensor]:
    """Per-entry statistics [N] by name, differentiable."""
    return statistics(student_logits(flat, call, mask), flat.targets, flat.rows, mask)


def policy_loss(flat: Flat, tokens: Tokens, call: Call, normalizer: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """As `autograd.PolicyWork`: the loss, and the call's outputs [N] by name."""
    mask = flat.mask()
    if call.config.check_finite:
        check_finite(tokens, counting(flat.targets, flat.active, tokens, call))
    read = counting(flat.targets, flat.active, replace(tokens, advantages=None), replace(call, outputs=()))
    stats = linear_logprob(flat, call, read)
    terms = policy(stats, read, tokens, call.spec)
    loss = terms["loss"].sum() / normalizer
    if bool(
        (read != mask).any()
    ):  # outputs are of every unmasked entry; a NaN of one without a weight reaches no gradient
        with torch.no_grad():
            stats = linear_logprob(flat, call, mask)
            terms = policy(stats, mask, tokens, call.spec)
    return loss, {name: (stats | terms)[name].detach() for name in call.outputs}


def pointwise_loss(
    flat: Flat, fn: Callable[..., Tensor], tensors: tuple[Tensor, ...], call: Call, normalizer: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """As `autograd.PointwiseWork`: the loss, and the call's outputs [N] by name."""
    mask = flat.mask()
    stats = linear_logprob(flat, call, mask)
    losses = fn(stats["logprobs"][mask], *(t[mask] for t in tensors))
    return losses.sum() / normalizer, {name: stats[name].detach() for name in call.outputs}


def distill_loss(
    flat: Flat,
    teacher: TeacherTensors,
    tokens: Tokens,
    lessons: DistillTokens,
    call: DistillCall,
    normalizer: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """As `autograd.DistillWork`: the loss, and the call's outputs [N] by name."""
    options = call.student
    x = Inputs(flat.hidden, flat.head.weight, flat.head.bias, flat.targets, None, flat.active, flat.temperature, tokens)
    student_reads, taught = distillation_rows(x, lessons, call)
    if options.config.check_finite:
        check_finite(tokens, student_reads)
        check_finite(Tokens(weights=lessons.weights), student_reads)
    z = student_logits(flat, options, student_reads)
    stats = statistics(z, flat.targets, None, student_reads)
    teacher_z, teacher_stats = None, {}
    if teacher.hidden is not None:
        teacher_z = _teacher_logits(teacher, taught, flat, call)
        teacher_stats = statistics(teacher_z, flat.targets, None, taught)
    seen, nothing = {name: value.detach() for name, value in stats.items()}, flat.hidden.new_zeros(1, dtype=flat.dtype)
    lessons = replace(lessons, taught=taught)
    weights, factor, values = distill_driver.weigh(seen, teacher_stats, (nothing, nothing), tokens, lessons, call)
    divergence = distillation(z, stats, teacher_z, teacher, taught.nonzero().squeeze(1), call.distill)
    loss = torch.where(weights != 0, weights * divergence, 0.0)
    if call.policy:
        if factor is not None:
            tokens = replace(tokens, weights=factor if tokens.weights is None else tokens.weights * factor)
        terms = policy(stats, student_reads, tokens, options.spec)
        loss, values = loss + terms.pop("loss"), values | terms
    values = stats | values | {f"teacher_{name}": value for name, value in teacher_stats.items()}
    values["divergence"] = divergence
    return loss.sum() / normalizer, {name: values[name].detach() for name in options.outputs}


def topk_logprobs(flat: Flat, k: int, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """As the op `top_k`, without gradient."""
    mask = flat.mask()
    with torch.no_grad():
        return top_k(student_logits(flat, call, mask), k, mask)


def _teacher_logits(teacher: TeacherTensors, taught: Tensor, flat: Flat, call: DistillCall) -> Tensor:
    assert teacher.hidden is not None
    assert teacher.weight is not None
    check_temperature(None if teacher.temperature is None else teacher.temperature[taught])
    hidden = torch.where(taught[:, None], teacher.hidden, 0.0)
    weight = merged(teacher.weight, teacher.lora_a, teacher.lora_b, call.teacher_lora_scale, flat.dtype)
    return logits(hidden, weight, teacher.bias, teacher.temperature, call.teacher)


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
    """The divergence of each row [T], zero outside the rows `where` [n] int64; differentiable through logits `z` [T, V]."""
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
