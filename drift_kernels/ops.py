"""The public ops: check → autograd → LossOutput. Each takes hidden states and the lm_head, and never holds [T, V] logits.

Shapes: hidden [T, D] (packed) or [B, L, D] (padded), targets of its leading shape, weight [V, D]. Row i predicts targets[i]
(`shift_targets` makes them). The logit is z = softcap(logit_scale·(h·Wᵀ + b)) / temperature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from drift_kernels import backends, formulas
from drift_kernels.autograd import FusedLoss, Head, LinearLogprobs, PointwiseLoss, Rest
from drift_kernels.backends import reference
from drift_kernels.calls import Call, HeadOptions, KernelConfig
from drift_kernels.formulas import Tokens
from drift_kernels.inputs import (
    OUTPUTS,
    POLICY_OUTPUTS,
    Flat,
    as_normalizer,
    check_closure,
    check_cu_seqlens,
    check_data,
    check_no_tangent,
    check_off_policy,
    check_outputs,
    check_tensor,
    flatten,
    segment_ids,
    with_needs,
)
from drift_kernels.plan import check_finite, check_targets, check_temperature, counting
from drift_kernels.spec import PolicySpec
from drift_kernels.tensors import LoRAHead
from drift_kernels.token_terms import without_saved_hooks

Metrics = dict[str, tuple[Tensor, Tensor]]


@dataclass
class LinearLogprob:
    """Of `linear_logprob`; tensors of the targets' shape in fp32 (fp64 for fp64), 0 at masked positions."""

    logprobs: Tensor  # differentiable
    entropy: Tensor | None = None  # differentiable; with return_entropy=True
    outputs: dict[str, Tensor] = field(default_factory=dict)  # the further statistics asked for, no gradient


@dataclass
class LossOutput:
    """Of every loss. Per-token outputs carry no gradient, have the targets' shape and are 0 at masked positions."""

    loss: Tensor  # 0-d fp32 (fp64 for fp64), differentiable
    outputs: dict[str, Tensor] = field(default_factory=dict)  # by the names in `outputs=`
    metrics: Metrics = field(default_factory=dict)  # name → (sum, count), to be added up over micro-batches and ranks

    @property
    def logprobs(self) -> Tensor | None:
        """Log-probs of the targets, where asked for."""
        return self.outputs.get("logprobs")

    @property
    def entropy(self) -> Tensor | None:
        """Entropies of the predicted distributions, where asked for."""
        return self.outputs.get("entropy")


def shift_targets(input_ids: Tensor, cu_seqlens: Tensor | None = None, ignore_index: int = -100) -> Tensor:
    """Targets for `input_ids` [T] or [B, L] int64: the next token, `ignore_index` at the end of every segment."""
    check_tensor("input_ids", input_ids)
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"input_ids has dtype {input_ids.dtype}; it must be int64 (or int32)")
    targets = torch.full_like(input_ids, ignore_index)
    targets[..., :-1] = input_ids[..., 1:]
    if cu_seqlens is not None:
        check_tensor("cu_seqlens", cu_seqlens)
        if input_ids.dim() != 1:
            raise ValueError(f"cu_seqlens goes with packed [T] input_ids; got {tuple(input_ids.shape)}")
        check_cu_seqlens(cu_seqlens, input_ids.numel())
        ends = cu_seqlens[1:].to(torch.int64)
        targets[ends[ends > 0] - 1] = ignore_index
    return targets


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    return_entropy: bool = False,
    outputs: Sequence[str] = (),
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    lora: LoRAHead | None = None,
    rows: Tensor | None = None,
    active: Tensor | None = None,
    config: KernelConfig = KernelConfig(),
) -> LinearLogprob:
    """log p(target) of every unmasked position, differentiable under any loss on top.

    Without gradients it costs one GEMM. Backward recomputes logits for rows whose incoming gradient is not 0; where only
    `hidden` needs a gradient (a frozen head) the forward keeps ∂logp/∂hidden instead, and backward is a product. With `rows`
    or `return_entropy` there is no such single derivative a row: backward recomputes logits there too.
    Raises TypeError or ValueError naming the argument, RuntimeError where the backend cannot run.
    """
    flat = flatten(hidden, weight, targets, bias, temperature, rows, active, lora)
    names = check_outputs(outputs, OUTPUTS)
    wanted = tuple(dict.fromkeys(("logprobs", *(("entropy",) if return_entropy else ()))))
    if config.accumulate_into_grad is not None and torch.is_grad_enabled() and weight.requires_grad:
        raise ValueError("accumulate_into_grad is for losses made in one pass; linear_logprob does not know its own")
    call = with_needs(
        Call(PolicySpec(), head_options(temperature, softcap, logit_scale, ignore_index), config, wanted), flat
    )
    if backends.resolve(config.backend, hidden.device) == "reference":
        stats = _reference_stats(flat, call, flat.mask(ignore_index))
        logprobs, entropy = stats["logprobs"], stats["entropy"]
        extra = unflatten({name: stats[name].detach() for name in names}, flat)
    else:
        rest = Rest(flat.targets, rows, active, flat.temperature)
        logprobs, entropy, values = LinearLogprobs.apply(*head_of(flat).flat(), rest, call, names)
        extra = unflatten(dict(zip(names, values)), flat)
    return LinearLogprob(logprobs.reshape(flat.shape), entropy.reshape(flat.shape) if return_entropy else None, extra)


def weighted_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    lora: LoRAHead | None = None,
    rows: Tensor | None = None,
    active: Tensor | None = None,
    outputs: Sequence[str] = (),
    normalizer: float | Tensor | None = None,
    config: KernelConfig = KernelConfig(),
) -> LossOutput:
    """Σᵢ token_weightsᵢ·(−log p(targetᵢ)) / normalizer, in one pass: the gradient is made in the forward.

    `token_weights` has the targets' shape (default 1); rows of weight 0 are never computed. `normalizer` is the global
    denominator over all micro-batches and ranks; default: this call's Σ token_weights over unmasked positions.
    Raises TypeError or ValueError naming the argument, RuntimeError where the backend cannot run.
    """
    flat = flatten(hidden, weight, targets, bias, temperature, rows, active, lora)
    weights = flat.per_entry("token_weights", token_weights)
    names = check_outputs(outputs, OUTPUTS)
    head = head_options(temperature, softcap, logit_scale, ignore_index)
    call = with_needs(Call(PolicySpec(objective="reinforce"), head, config, names), flat)
    if normalizer is None:
        mask = flat.mask(ignore_index)
        total = mask.sum() if weights is None else torch.where(mask, weights, 0.0).sum()
        normalizer = or_one(total, flat)
    return _fused(flat, Tokens(weights=weights), call, normalizer)[0]


def policy_loss(
    hidden: Tensor,
    weight: Tensor,
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
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    lora: LoRAHead | None = None,
    rows: Tensor | None = None,
    active: Tensor | None = None,
    outputs: Sequence[str] = (),
    normalizer: float | Tensor | None = None,
    config: KernelConfig = KernelConfig(),
) -> LossOutput:
    """A policy loss (`PolicySpec`) straight from hidden states, in one pass: 2 units for rows read, 4 for rows not clipped.

    A loss that reads whole sequences (`spec.scope`) takes one pass too where a chunk holds them whole, else 2 units more for
    rows not clipped; so does one that selects over the call.

    advantages        of the targets' shape, or else one per segment [S] with `cu_seqlens`, `segment_ids` or padded inputs
    old_logprobs      log-probs under the policy that is being improved on; None = on-policy, the ratio is 1
    ref_logprobs      of the reference policy, for spec.kl_coef
    rollout_logprobs  of the sampler, for spec.correction (needs old_logprobs)
    token_weights     factor on each token's whole loss (objective, KL, entropy)
    generator         for the random choice of objective "clip_cov"; default, torch's own
    normalizer        the global denominator; default, this call's own: unmasked tokens for token_mean, sequences with at
                      least one of them for the sequence forms, 1 for token_sum
    outputs           per-token statistics: logprobs, entropy, lse, is_top1, mean_logits, log_sum_sq_probs, ratio, kl, clipped
    Metrics, as (sum, count): clip_ratio/{low,high,region}_mean; kl where outputs has "kl", entropy likewise, ratio and
    ppo_kl where it has "ratio"; sampling/importance_sampling_ratio/mean, the factor after its bounds, with a correction.
    Raises TypeError or ValueError naming the argument, RuntimeError where the backend cannot run.
    """
    flat = flatten(hidden, weight, targets, bias, temperature, rows, active, lora)
    names = check_outputs(outputs, POLICY_OUTPUTS)
    mask = flat.mask(ignore_index)
    check_data("advantages", advantages, flat.targets.device)
    segments, count = segments_of(flat, spec, advantages, cu_seqlens, segment_ids)
    given = given_tokens(flat, segments, count, advantages, old_logprobs, ref_logprobs, rollout_logprobs, token_weights)
    tokens, factor = folded_tokens(flat, mask, segments, count, given, spec)
    if spec.objective == "clip_cov":
        noise = torch.rand(mask.shape, generator=generator, dtype=flat.dtype, device=mask.device)
        tokens = replace(tokens, noise=noise)
    head = head_options(temperature, softcap, logit_scale, ignore_index)
    # metrics take "clipped" from the rows that train; a caller who asks for it reads every row, as for any output
    dense = ("ratio",) if "clipped" in names else ()
    wanted = tuple(dict.fromkeys((*names, "clipped", *dense)))
    call = with_needs(Call(spec, head, config, wanted), flat)
    if normalizer is None:
        normalizer = own_normalizer(flat, mask, segments, count, spec)
    result, values = _fused(flat, tokens, call, normalizer)
    result.outputs = {name: result.outputs[name] for name in names}
    result.metrics = policy_metrics(values, mask, names, factor)
    return result


def pointwise_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    fn: Callable[..., Tensor],
    *per_token_tensors: Tensor,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    lora: LoRAHead | None = None,
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
    flat = flatten(hidden, weight, targets, bias, temperature, rows, active, lora)
    for i, tensor in enumerate(per_token_tensors):
        if tensor.requires_grad:
            raise ValueError(f"per_token_tensors[{i}] requires grad, and no gradient would reach it; detach it")
        check_no_tangent(f"per_token_tensors[{i}]", tensor)
        if tensor.shape != flat.shape:
            raise ValueError(
                f"per_token_tensors[{i}] has shape {tuple(tensor.shape)}, targets {tuple(flat.shape)}; they must agree"
            )
    tensors = tuple(tensor.reshape(-1) for tensor in per_token_tensors)
    mask = flat.mask(ignore_index)
    with without_saved_hooks():
        _check_pointwise(fn, tuple(t[mask] for t in tensors), int(mask.sum()), flat.dtype)
    names = check_outputs(outputs, OUTPUTS)
    call = with_needs(
        Call(PolicySpec(), head_options(temperature, softcap, logit_scale, ignore_index), config, names), flat
    )
    denominator = as_normalizer(
        or_one(mask.sum(), flat) if normalizer is None else normalizer, flat.hidden.new_empty((), dtype=flat.dtype)
    )
    if backends.resolve(config.backend, hidden.device) == "reference":
        stats = _reference_stats(flat, call, mask)
        picked = fn(stats["logprobs"][mask], *(t[mask] for t in tensors))
        return LossOutput(picked.sum() / denominator, unflatten({name: stats[name].detach() for name in names}, flat))
    rest = Rest(flat.targets, rows, active, flat.temperature)
    loss, values = PointwiseLoss.apply(*head_of(flat).flat(), denominator, rest, fn, tensors, call)
    return LossOutput(loss, unflatten(dict(zip(names, values)), flat))


def head_options(
    temperature: float | Tensor, softcap: float | None, logit_scale: float, ignore_index: int
) -> HeadOptions:
    return HeadOptions(1.0 if isinstance(temperature, Tensor) else temperature, softcap, logit_scale, ignore_index)


def head_of(flat: Flat) -> Head:
    a, b = (None, None) if flat.lora is None else (flat.lora.A, flat.lora.B)
    return Head(flat.hidden, flat.weight, flat.bias, a, b)


def unflatten(values: dict[str, Tensor], flat: Flat) -> dict[str, Tensor]:
    return {name: value.reshape(flat.shape) for name, value in values.items()}


def or_one(total: Tensor, flat: Flat) -> Tensor:
    """A denominator that is 1 where nothing counts, so that an empty batch has loss 0 and zero gradients."""
    total = total.to(flat.dtype)
    return torch.where(total == 0, torch.ones_like(total), total)


def reference_logits(flat: Flat, call: Call, mask: Tensor) -> Tensor:
    """Logits [T, V] of the hidden rows that the entries in `mask` [N] read; of zeros elsewhere."""
    check_targets(flat.targets[mask], flat.weight.shape[0], call.head.ignore_index)
    read = (
        mask
        if flat.rows is None
        else torch.zeros_like(flat.hidden[:, 0], dtype=torch.bool).index_fill(0, flat.rows[mask], True)
    )
    check_temperature(None if flat.temperature is None else flat.temperature[read])
    hidden = torch.where(read[:, None], flat.hidden, 0.0)  # so that a masked NaN reaches nothing
    *_, a, b = head_of(flat).flat()
    weight = reference.merged(flat.weight, a, b, call.lora_scale, flat.dtype)
    return reference.logits(hidden, weight, flat.bias, flat.temperature, call.head)


def _reference_stats(flat: Flat, call: Call, mask: Tensor) -> dict[str, Tensor]:
    return reference.statistics(reference_logits(flat, call, mask), flat.targets, flat.rows, mask)


def _fused(flat: Flat, tokens: Tokens, call: Call, normalizer: float | Tensor) -> tuple[LossOutput, dict[str, Tensor]]:
    """The loss, and per-token outputs flat by name."""
    denominator = as_normalizer(normalizer, flat.hidden.new_empty((), dtype=flat.dtype))
    if backends.resolve(call.config.backend, flat.hidden.device) == "reference":
        mask = flat.mask(call.head.ignore_index)
        if call.config.check_finite:
            check_finite(tokens.pick(counting(flat.targets, flat.active, tokens, call)))
        stats = _reference_stats(flat, call, mask)
        terms = reference.policy(stats, mask, tokens, call.spec)
        loss = terms["loss"].sum() / denominator
        values = {name: (stats | terms)[name].detach() for name in call.outputs}
    else:
        rest = Rest(flat.targets, flat.rows, flat.active, flat.temperature)
        loss, stacked = FusedLoss.apply(*head_of(flat).flat(), denominator, rest, tokens, call)
        values = dict(zip(call.outputs, stacked))
    return LossOutput(loss, unflatten(values, flat)), values


def segments_of(
    flat: Flat, spec: PolicySpec, advantages: Tensor, cu_seqlens: Tensor | None, given: Tensor | None
) -> tuple[Tensor | None, int]:
    if not isinstance(spec, PolicySpec):
        raise TypeError(f"spec={spec!r} must be a PolicySpec, such as PolicySpec.preset('dapo')")
    segments, count = segment_ids(flat.shape, cu_seqlens, given, flat.targets.device)
    if segments is None:
        wants = [spec.aggregation] if spec.aggregation.startswith("sequence") else []
        wants += (
            [f"correction={spec.correction!r}"] if spec.correction and spec.correction.startswith("sequence") else []
        )
        wants += [f"objective={spec.objective!r} or ratio={spec.ratio!r}"] if spec.scope == "sequence" else []
        wants += ["advantages per segment"] if advantages.shape != flat.shape else []
        if wants:
            raise ValueError(
                f"{', '.join(wants)}: pass cu_seqlens (or segment_ids), since packed tokens alone do not say where sequences end"
            )
    return segments, count


def given_tokens(
    flat: Flat,
    segments: Tensor | None,
    count: int,
    advantages: Tensor,
    old: Tensor | None,
    ref: Tensor | None,
    rollout: Tensor | None,
    weights: Tensor | None,
    weights_name: str = "token_weights",
) -> Tokens:
    """What the caller gave per token, flat, checked, and in the compute dtype."""
    if advantages.shape != flat.shape:
        if advantages.dim() == 1 and torch.compiler.is_compiling():  # a graph may know the count only as it runs
            torch._check(advantages.shape[0] == count, lambda: "advantages must be one a token, or one a segment")
        elif advantages.shape != (count,):
            raise ValueError(
                f"advantages has shape {tuple(advantages.shape)}; it must be {tuple(flat.shape)}, or [{count}], one a segment"
            )
        advantages = advantages.detach()[segments].reshape(flat.shape)
    named = {
        "advantages": advantages,
        "old_logprobs": old,
        "ref_logprobs": ref,
        weights_name: weights,
        "rollout_logprobs": rollout,
    }
    return Tokens(*(flat.per_entry(name, value) for name, value in named.items()))


def folded_tokens(
    flat: Flat, mask: Tensor, segments: Tensor | None, count: int, given: Tokens, spec: PolicySpec
) -> tuple[Tokens, Tensor | None]:
    """What the loss reads per token, and the correction's factor [N] for the metrics (None without one).

    Aggregation is folded into weights, and corrections into advantages where the loss is linear in them, else into weights.
    """
    if spec.kl_coef and given.ref is None:
        raise ValueError(f"kl_coef={spec.kl_coef} needs ref_logprobs")
    if spec.correction and (given.old is None or given.rollout is None):
        raise ValueError(f"correction={spec.correction!r} needs old_logprobs and rollout_logprobs")
    check_off_policy(spec, given.old, given.rollout)
    lengths = None if segments is None else _lengths(mask, segments, count)
    whole = Tokens(segments=segments, lengths=None if lengths is None else lengths.clamp(min=1))
    tokens, factor = replace(given, rollout=None), None
    if spec.correction:
        known = (None if v is None else torch.where(mask, v, 0.0) for v in (given.old, given.rollout))
        factor = formulas.correction(replace(whole, **dict(zip(("old", "rollout"), known))), spec)
        tokens = formulas.corrected(tokens, factor, spec)
    if spec.aggregation == "sequence_mean_token_mean":
        assert whole.lengths is not None
        share = 1 / whole.lengths.to(flat.dtype)[segments]
        tokens = replace(tokens, weights=share if tokens.weights is None else tokens.weights * share)
    if spec.scope == "sequence":
        reads_rollout = spec.objective == "vespo" or spec.off_policy_threshold is not None
        rollout = given.rollout if reads_rollout else None
        tokens = replace(tokens, rollout=rollout, segments=segments, lengths=whole.lengths)
    return tokens, factor


def own_normalizer(flat: Flat, mask: Tensor, segments: Tensor | None, count: int, spec: PolicySpec) -> Tensor:
    match spec.aggregation:
        case "token_mean":
            return or_one(mask.sum(), flat)
        case "token_sum":
            return torch.ones((), dtype=flat.dtype, device=mask.device)
        case _:
            return or_one((_lengths(mask, segments, count) > 0).sum(), flat)


def _lengths(mask: Tensor, segments: Tensor | None, count: int) -> Tensor:
    """Unmasked entries of each sequence [count] int64."""
    assert segments is not None  # `segments_of` has seen to it
    return torch.zeros(count, dtype=torch.int64, device=mask.device).index_add_(0, segments, mask.to(torch.int64))


def policy_metrics(values: dict[str, Tensor], mask: Tensor, names: tuple[str, ...], factor: Tensor | None) -> Metrics:
    """(sum, count) over unmasked tokens by the names that TRL's users know; ppo_kl (mean of old − logp) by verl's."""
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
    if factor is not None:
        sums["sampling/importance_sampling_ratio/mean"] = torch.where(mask, factor, 0.0).sum()
    return {name: (total, count) for name, total in sums.items()}


def _check_pointwise(fn: Callable[..., Tensor], tensors: tuple[Tensor, ...], count: int, dtype: torch.dtype) -> None:
    """Raises ValueError unless fn makes one loss a token, of that token alone.

    Tried on log-probs from −0.001 to −50 in random order, and in the opposite one. fn of the tokens in two random parts
    must be what it is of all of them; and each token's gradient must grow as its loss does, by powers of two, which
    round nothing.
    """
    device = tensors[0].device if tensors else None
    drawn = torch.Generator().manual_seed(0)
    order, picked = (torch.randperm(count, generator=drawn).to(device) for _ in range(2))
    spread = -torch.logspace(-3, math.log10(50), max(count, 1), dtype=dtype, device=device)[:count][order]
    alone = "a token's loss may read that token alone"
    for logprobs in (spread, spread.flip(0)):
        whole = fn(logprobs.requires_grad_(torch.is_grad_enabled()), *tensors)
        check_closure(whole, logprobs)
        if whole.shape != logprobs.shape:
            raise ValueError(
                f"fn returned shape {tuple(whole.shape)} for {count} tokens; it must return one loss a token, not reduce"
            )
        if count < 2:
            return
        with torch.no_grad():
            try:
                halves = picked.tensor_split([count // 2 | 1])
                parts = torch.cat([fn(logprobs[half], *(t[half] for t in tensors)) for half in halves])
            except Exception as error:
                raise ValueError(f"fn fails on some of the tokens, though {alone}: {error}") from error
        if parts.shape != whole.shape or not torch.allclose(whole[picked], parts, rtol=1e-4, atol=1e-6, equal_nan=True):
            raise ValueError(f"fn of all tokens differs from fn of two parts of them: {alone}")
        if whole.requires_grad:
            factor = torch.exp2(picked % 5).to(dtype)
            (plain,) = torch.autograd.grad(whole.sum(), logprobs, retain_graph=True)
            (scaled,) = torch.autograd.grad((factor * whole).sum(), logprobs)
            if not torch.allclose(scaled, factor * plain, rtol=1e-6, atol=1e-30, equal_nan=True):
                raise ValueError(f"fn's gradient at a token depends on other tokens' losses: {alone}")
