"""From a caller's per-token and per-sequence data to the per-token data of the chunk loop.

Aggregation over sequences becomes token weights; a sampler correction becomes a factor on advantages, or on weights if the loss
is not linear in the advantage.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from drift_kernels import formulas
from drift_kernels.formulas import Tokens
from drift_kernels.inputs import Flat, check_off_policy, segment_ids
from drift_kernels.spec import PolicySpec


def segments_of(
    flat: Flat, spec: PolicySpec, advantages: Tensor, cu_seqlens: Tensor | None, ids: Tensor | None
) -> tuple[Tensor | None, int]:
    """The sequence of each entry [N] and their number; raises ValueError if the loss needs sequences and none are known."""
    if not isinstance(spec, PolicySpec):
        raise TypeError(f"spec={spec!r} must be a PolicySpec, such as PolicySpec.preset('dapo')")
    segments, count = segment_ids(flat.shape, cu_seqlens, ids, flat.targets.device)
    if segments is None:
        wants = [spec.aggregation] if spec.aggregation.startswith("sequence") else []
        wants += (
            [f"correction={spec.correction!r}"] if spec.correction and spec.correction.startswith("sequence") else []
        )
        wants += [f"objective={spec.objective!r} or ratio={spec.ratio!r}"] if spec.scope == "sequence" else []
        wants += ["off_policy_threshold"] if spec.off_policy_threshold is not None else []
        wants += ["advantages per segment"] if advantages.shape != flat.shape else []
        if wants:
            raise ValueError(
                f"{', '.join(wants)}: pass cu_seqlens (or segment_ids), since packed tokens alone do not say where sequences end"
            )
    return segments, count


def caller_tokens(
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
    """The caller's per-token data: flat, checked, in the compute dtype."""
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
    flat: Flat, mask: Tensor, segments: Tensor | None, count: int, data: Tokens, spec: PolicySpec
) -> tuple[Tokens, Tensor | None]:
    """The loss's per-token data, and the correction's factor [N] for the metrics (None without one).

    Aggregation is folded into weights, and corrections into advantages if the loss is linear in them, else into weights.
    """
    if spec.kl_coef and data.ref is None:
        raise ValueError(f"kl_coef={spec.kl_coef} needs ref_logprobs")
    if spec.correction and (data.old is None or data.rollout is None):
        raise ValueError(f"correction={spec.correction!r} needs old_logprobs and rollout_logprobs")
    check_off_policy(spec, data.old, data.rollout)
    lengths = None if segments is None else _lengths(mask, segments, count)
    whole = Tokens(segments=segments, lengths=None if lengths is None else lengths.clamp(min=1))
    tokens, factor = replace(data, rollout=None), None
    if spec.correction:
        logprobs = (None if v is None else torch.where(mask, v, 0.0) for v in (data.old, data.rollout))
        factor = formulas.correction(replace(whole, **dict(zip(("old", "rollout"), logprobs))), spec)
        tokens = formulas.corrected(tokens, factor, spec)
    if spec.aggregation == "sequence_mean_token_mean":
        assert whole.lengths is not None
        share = 1 / whole.lengths.to(flat.dtype)[segments]
        tokens = replace(tokens, weights=share if tokens.weights is None else tokens.weights * share)
    if spec.reads_sequences:
        reads_rollout = spec.objective == "vespo" or spec.off_policy_threshold is not None
        rollout = data.rollout if reads_rollout else None
        tokens = replace(tokens, rollout=rollout, segments=segments, lengths=whole.lengths)
    return tokens, factor


def own_normalizer(flat: Flat, mask: Tensor, segments: Tensor | None, count: int, spec: PolicySpec) -> Tensor:
    """The denominator of `spec.aggregation` over this call."""
    match spec.aggregation:
        case "token_mean":
            return flat.or_one(mask.sum())
        case "token_sum":
            return torch.ones((), dtype=flat.dtype, device=mask.device)
        case _:
            return flat.or_one((_lengths(mask, segments, count) > 0).sum())


def _lengths(mask: Tensor, segments: Tensor | None, count: int) -> Tensor:
    """Unmasked entries of each sequence [count] int64."""
    assert segments is not None  # checked by `segments_of`
    return torch.zeros(count, dtype=torch.int64, device=mask.device).index_add_(0, segments, mask.to(torch.int64))
