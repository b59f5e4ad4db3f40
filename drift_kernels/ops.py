"""The public ops: check → autograd → LossOutput. Each takes hidden states and the lm_head, and never holds [T, V] logits.

Shapes: hidden [T, D] (packed) or [B, L, D] (padded), targets of its leading shape, head a `Head` or its weight [V, D].
Row i predicts targets[i]: `shift_targets` makes targets, `shift` aligns any other per-token values. A target of −100 takes no
part. The logit is z = softcap(logit_scale·(h·Wᵀ + b)) / temperature.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from drift_kernels.alignment import check_old_logprobs
from drift_kernels.autograd import PointwiseWork, PolicyWork, fused_loss, logprobs_of
from drift_kernels.calls import KernelConfig
from drift_kernels.closures import check_pointwise
from drift_kernels.folding import folded_tokens, or_one, own_normalizer
from drift_kernels.formulas import Tokens
from drift_kernels.head import Head
from drift_kernels.inputs import (
    IGNORE_INDEX,
    caller_tokens,
    check_cu_seqlens,
    check_no_tangent,
    check_tensor,
    flatten,
)
from drift_kernels.needs import call_of
from drift_kernels.outputs import OUTPUTS, POLICY_OUTPUTS, LinearLogprob, LossOutput, check_outputs, policy_metrics
from drift_kernels.spec import PolicySpec
from drift_kernels.token_terms import without_saved_hooks


def shift_targets(input_ids: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Targets for `input_ids` [T] or [B, L] int64: the next token, −100 at the end of every segment."""
    check_tensor("input_ids", input_ids)
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"input_ids has dtype {input_ids.dtype}; it must be int64 (or int32)")
    return shift(input_ids, cu_seqlens, fill=IGNORE_INDEX)


def shift(values: Tensor, cu_seqlens: Tensor | None = None, fill: float = 0) -> Tensor:
    """Per-token values [T] or [B, L] of any dtype, aligned with targets: row i gets the value of token i + 1.

    Samplers give log-probs per token, and every op reads them per target: pass `shift(logprobs, cu_seqlens)`. The last row of
    every segment gets `fill`. Segments are those of `cu_seqlens` [S + 1] if packed, else the rows.
    """
    check_tensor("values", values)
    shifted = torch.full_like(values, fill)
    shifted[..., :-1] = values[..., 1:]
    if cu_seqlens is not None:
        check_tensor("cu_seqlens", cu_seqlens)
        if values.dim() != 1:
            raise ValueError(f"cu_seqlens goes with packed [T] values; got {tuple(values.shape)}")
        check_cu_seqlens(cu_seqlens, values.numel())
        ends = cu_seqlens[1:].to(torch.int64)
        shifted[ends[ends > 0] - 1] = fill
    return shifted


def linear_logprob(
    hidden: Tensor,
    head: Head | Tensor,
    targets: Tensor,
    *,
    outputs: Sequence[str] = (),
    entropy_gradient: bool = False,
    rows: Tensor | None = None,
    active: Tensor | None = None,
    config: KernelConfig = KernelConfig(),
) -> LinearLogprob:
    """log p(target) of every unmasked position, differentiable under any loss on top.

    outputs           further per-token statistics: entropy, lse, is_top1, mean_logits, log_sum_sq_probs; no gradient
    entropy_gradient  adds "entropy" to them, differentiable

    Without gradients it costs one GEMM. Backward recomputes logits for rows whose incoming gradient is not 0. If only `hidden`
    needs a gradient (a frozen head), the forward keeps ∂logp/∂hidden instead, and backward is a product; with `rows` or
    `entropy_gradient` there is no such single derivative a row, and backward recomputes logits there too.
    Raises TypeError or ValueError naming the argument, RuntimeError if the backend cannot run.
    """
    flat = flatten(hidden, head, targets, rows, active)
    names = check_outputs(outputs, OUTPUTS)
    wanted = ("logprobs", "entropy") if entropy_gradient else ("logprobs",)
    if config.accumulate_into_grad is not None and torch.is_grad_enabled() and flat.head.weight.requires_grad:
        raise ValueError("accumulate_into_grad is for losses made in one pass; linear_logprob does not know its own")
    logprobs, entropy, values = logprobs_of(flat, call_of(flat, PolicySpec(), config, wanted), names)
    if entropy is not None:
        values["entropy"] = entropy
    return LinearLogprob(logprobs.reshape(flat.shape), flat.unflatten(values))


def weighted_cross_entropy(
    hidden: Tensor,
    head: Head | Tensor,
    targets: Tensor,
    token_weights: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    active: Tensor | None = None,
    outputs: Sequence[str] = (),
    normalizer: float | Tensor | None = None,
    config: KernelConfig = KernelConfig(),
) -> LossOutput:
    """Σᵢ token_weightsᵢ·(−log p(targetᵢ)) / normalizer, in one pass: the gradient is made in the forward.

    token_weights  of the targets' shape and aligned with them (default 1); rows of weight 0 are never computed
    normalizer     the global denominator over all micro-batches and ranks; default: this call's Σ token_weights over unmasked
                   positions
    outputs        per-token statistics: logprobs, entropy, lse, is_top1, mean_logits, log_sum_sq_probs
    Metrics, as (sum, count): nll if outputs has "logprobs", entropy if it has "entropy", over unmasked tokens.
    Raises TypeError or ValueError naming the argument, RuntimeError if the backend cannot run.
    """
    flat = flatten(hidden, head, targets, rows, active)
    weights = flat.per_entry("token_weights", token_weights)
    names = check_outputs(outputs, OUTPUTS)
    mask = flat.mask()
    if normalizer is None:
        total = mask if weights is None else torch.where(mask, weights, 0.0)
        normalizer = or_one(total.sum(), flat.dtype)
    call = call_of(flat, PolicySpec(objective="reinforce"), config, names)
    loss, values = fused_loss(flat, PolicyWork(Tokens(weights=weights), call), normalizer)
    result = LossOutput(loss, flat.unflatten(values))
    if "logprobs" in names:
        result.metrics["nll"] = (-values["logprobs"].sum(), mask.sum())
    if "entropy" in names:
        result.metrics["entropy"] = (values["entropy"].sum(), mask.sum())
    return result


def policy_loss(
    hidden: Tensor,
    head: Head | Tensor,
    targets: Tensor,
    advantages: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    token_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    segment_ids: Tensor | None = None,
    spec: PolicySpec = PolicySpec(),
    generator: torch.Generator | None = None,
    rows: Tensor | None = None,
    active: Tensor | None = None,
    outputs: Sequence[str] = (),
    normalizer: float | Tensor | None = None,
    config: KernelConfig = KernelConfig(),
) -> LossOutput:
    """A policy loss (`PolicySpec`) straight from hidden states, in one pass: 2 units for rows read, 4 for rows not clipped.

    A loss that reads whole sequences (`spec.scope`) takes one pass too if a chunk holds them whole, else 2 units more for rows
    not clipped; so does one that selects over the call. Every per-token argument is aligned with targets (see `shift`).

    advantages        of the targets' shape, or else one per segment [S] with `cu_seqlens`, `segment_ids` or padded inputs
    old_logprobs      log-probs under the policy that is being improved; None = on-policy, the ratio is 1
    ref_logprobs      of the reference policy, for spec.kl_coef
    rollout_logprobs  of the sampler, for spec.correction (needs old_logprobs)
    token_weights     factor on each token's whole loss (objective, KL, entropy)
    generator         for the random choice of objective "clip_cov"; default, torch's own
    normalizer        the global denominator; default, this call's own: unmasked tokens for token_mean, sequences with at
                      least one of them for the sequence forms, 1 for token_sum
    outputs           per-token statistics: logprobs, entropy, lse, is_top1, mean_logits, log_sum_sq_probs, ratio, kl, clipped
    Metrics, as (sum, count): clip_ratio/{low,high,region}_mean; kl if outputs has "kl", entropy likewise, ratio and
    ppo_kl if it has "ratio"; sampling/importance_sampling_ratio/mean, the factor after its bounds, with a correction.
    Raises TypeError or ValueError naming the argument, RuntimeError if the backend cannot run.
    """
    flat = flatten(hidden, head, targets, rows, active)
    names = check_outputs(outputs, POLICY_OUTPUTS)
    mask = flat.mask()
    data = caller_tokens(
        flat,
        mask,
        spec,
        advantages,
        old=old_logprobs,
        ref=ref_logprobs,
        rollout=rollout_logprobs,
        weights=token_weights,
        cu_seqlens=cu_seqlens,
        segment_ids=segment_ids,
    )
    tokens, factor = folded_tokens(data, mask, spec)
    if spec.objective == "clip_cov":
        noise = torch.rand(mask.shape, generator=generator, dtype=flat.dtype, device=mask.device)
        tokens = replace(tokens, noise=noise)
    if normalizer is None:
        normalizer = own_normalizer(data, mask, spec, flat.dtype)
    # metrics take "clipped" from the rows that train; a caller who asks for it reads every row, as for any output
    dense = ("ratio",) if "clipped" in names else ()
    wanted = tuple(dict.fromkeys((*names, "clipped", *dense)))
    call = call_of(flat, spec, config, wanted)
    check_old_logprobs(flat, mask, data.old, call)
    loss, values = fused_loss(flat, PolicyWork(tokens, call), normalizer)
    metrics = policy_metrics(values, mask, names, factor, data.weights)
    return LossOutput(loss, flat.unflatten({name: values[name] for name in names}), metrics)


def pointwise_loss(
    hidden: Tensor,
    head: Head | Tensor,
    targets: Tensor,
    fn: Callable[..., Tensor],
    *per_token_tensors: Tensor,
    rows: Tensor | None = None,
    active: Tensor | None = None,
    outputs: Sequence[str] = (),
    normalizer: float | Tensor | None = None,
    config: KernelConfig = KernelConfig(),
) -> LossOutput:
    """Σᵢ fn(logprobs, *per_token_tensors)ᵢ / normalizer for any plain torch `fn`, still in one pass.

    `fn` gets log-probs [n] and the tensors' slices [n] of whichever positions are at hand, and returns losses [n]; token i's
    loss may read token i alone. That is checked on each call by comparing fn of the whole with fn of its halves; a function
    that mixes tokens, and tensors that require grad (passed or read by `fn`), raise ValueError. Default normalizer: the
    number of unmasked positions.

    Under torch.compile it runs as written between two graphs, since no op of a graph takes a Python function;
    `fullgraph=True` refuses that.
    """
    if torch.compiler.is_compiling():
        from drift_kernels import uncompiled

        options: dict[str, Any] = {"rows": rows, "active": active, "outputs": outputs, "normalizer": normalizer}
        return uncompiled.pointwise(
            pointwise_loss, hidden, head, targets, fn, *per_token_tensors, **options, config=config
        )
    flat = flatten(hidden, head, targets, rows, active)
    for i, tensor in enumerate(per_token_tensors):
        if tensor.requires_grad:
            raise ValueError(f"per_token_tensors[{i}] requires grad, and no gradient would reach it; detach it")
        check_no_tangent(f"per_token_tensors[{i}]", tensor)
        if tensor.shape != flat.shape:
            raise ValueError(
                f"per_token_tensors[{i}] has shape {tuple(tensor.shape)}, targets {tuple(flat.shape)}; they must agree"
            )
    tensors = tuple(tensor.reshape(-1) for tensor in per_token_tensors)
    mask = flat.mask()
    with without_saved_hooks():
        check_pointwise(fn, tuple(t[mask] for t in tensors), int(mask.sum()), flat.dtype)
    names = check_outputs(outputs, OUTPUTS)
    if normalizer is None:
        normalizer = or_one(mask.sum(), flat.dtype)
    work = PointwiseWork(fn, tensors, call_of(flat, PolicySpec(), config, names))
    loss, values = fused_loss(flat, work, normalizer)
    return LossOutput(loss, flat.unflatten(values))
