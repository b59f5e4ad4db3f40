"""The public ops: check → autograd → LossOutput. Each takes hidden states and the lm_head, and never holds [T, V] logits.

Shapes: hidden [T, D] (packed) or [B, L, D] (padded), targets of its leading shape, head a `Head` or its weight [V, D].
Row i predicts targets[i]: `shift_targets` makes targets, `shift` aligns any other per-token values. A target of −100 takes no
part. The logit is z = softcap(logit_scale·(h·Wᵀ + b)) / temperature.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from drift_kernels import backends, whole
from drift_kernels.alignment import check_old_logprobs
from drift_kernels.autograd import FusedLoss, LinearLogprobs, PointwiseWork, PolicyWork
from drift_kernels.calls import Call, KernelConfig
from drift_kernels.closures import check_pointwise
from drift_kernels.folding import caller_tokens, folded_tokens, own_normalizer, segments_of
from drift_kernels.formulas import Tokens
from drift_kernels.head import Head
from drift_kernels.inputs import (
    IGNORE_INDEX,
    Flat,
    as_normalizer,
    check_cu_seqlens,
    check_data,
    check_no_tangent,
    check_tensor,
    flatten,
    layout_of,
    with_needs,
)
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
    call = with_needs(Call(PolicySpec(), flat.head.options, config, wanted), flat)
    if backends.resolve(config.backend, hidden.device) == "reference":
        stats = whole.statistics(flat, call, flat.mask())
        logprobs, entropy = stats["logprobs"], stats["entropy"]
        values = {name: stats[name].detach() for name in names}
    else:
        logprobs, entropy, stacked = LinearLogprobs.apply(*flat.operands(), layout_of(flat), call, names)
        values = dict(zip(names, stacked))
    if entropy_gradient:
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
    call = with_needs(Call(PolicySpec(objective="reinforce"), flat.head.options, config, names), flat)
    mask = flat.mask()
    if normalizer is None:
        normalizer = flat.or_one(mask.sum() if weights is None else torch.where(mask, weights, 0.0).sum())
    loss, values = _policy(flat, Tokens(weights=weights), call, normalizer)
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
    check_data("advantages", advantages, flat.targets.device)
    segments, count = segments_of(flat, spec, advantages, cu_seqlens, segment_ids)
    data = caller_tokens(flat, segments, count, advantages, old_logprobs, ref_logprobs, rollout_logprobs, token_weights)
    if old_logprobs is not None:
        warn_if_token_aligned(flat, mask, old_logprobs, config)
    tokens, factor = folded_tokens(flat, mask, segments, count, data, spec)
    if spec.objective == "clip_cov":
        noise = torch.rand(mask.shape, generator=generator, dtype=flat.dtype, device=mask.device)
        tokens = replace(tokens, noise=noise)
    # metrics take "clipped" from the rows that train; a caller who asks for it reads every row, as for any output
    dense = ("ratio",) if "clipped" in names else ()
    wanted = tuple(dict.fromkeys((*names, "clipped", *dense)))
    call = with_needs(Call(spec, flat.head.options, config, wanted), flat)
    if normalizer is None:
        normalizer = own_normalizer(flat, mask, segments, count, spec)
    loss, values = _policy(flat, tokens, call, normalizer)
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
    """
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
    call = with_needs(Call(PolicySpec(), flat.head.options, config, names), flat)
    denominator = as_normalizer(
        flat.or_one(mask.sum()) if normalizer is None else normalizer, flat.hidden.new_empty((), dtype=flat.dtype)
    )
    if backends.resolve(config.backend, hidden.device) == "reference":
        stats = whole.statistics(flat, call, mask)
        losses = fn(stats["logprobs"][mask], *(t[mask] for t in tensors))
        return LossOutput(losses.sum() / denominator, flat.unflatten({name: stats[name].detach() for name in names}))
    loss, values = FusedLoss.apply(*flat.operands(), PointwiseWork(layout_of(flat), fn, tensors, denominator, call))
    return LossOutput(loss, flat.unflatten(dict(zip(names, values))))


def _policy(flat: Flat, tokens: Tokens, call: Call, normalizer: float | Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and per-token outputs flat by name."""
    denominator = as_normalizer(normalizer, flat.hidden.new_empty((), dtype=flat.dtype))
    if backends.resolve(call.config.backend, flat.hidden.device) == "reference":
        return whole.policy(flat, tokens, call, denominator)
    loss, stacked = FusedLoss.apply(*flat.operands(), PolicyWork(layout_of(flat), tokens, denominator, call))
    return loss, dict(zip(call.outputs, stacked))


def warn_if_token_aligned(flat: Flat, mask: Tensor, old: Tensor, config: KernelConfig) -> None:
    """`check_old_logprobs` of a call; not with `rows`, whose entries need not follow each other, or a temperature of each row."""
    if flat.temperature is not None or flat.rows is not None:
        return

    def logprobs_of(entries: Tensor) -> Tensor:
        scratch = KernelConfig(backend=config.backend, workspace_bytes=config.workspace_bytes)
        return linear_logprob(flat.hidden[entries], flat.head, flat.targets[entries], config=scratch).logprobs

    check_old_logprobs(old.reshape(-1), mask, flat.shape, logprobs_of)
