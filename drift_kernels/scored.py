"""A `PolicySpec` on log-probs that somebody else made: a sharded head, another engine, a trainer's own forward.

Plain torch, differentiable, per token: what `policy_loss` adds up. Left out: entropy and z terms, which need the logits.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from drift_kernels import formulas
from drift_kernels.inputs import check_off_policy, segments_of
from drift_kernels.spec import PolicySpec


def policy_token_loss(
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    segment_ids: Tensor | None = None,
    spec: PolicySpec = PolicySpec(),
) -> dict[str, Tensor]:
    """Each token's loss before aggregation, of the shape of `logprobs` ([T] packed or [B, L] padded), 0 where masked.

    logprobs     of the tokens that were sampled; the loss is differentiable in them alone
    advantages   of the same shape
    mask         of the same shape, non-zero where a token counts
    cu_seqlens, segment_ids   where packed sequences end, for losses that read whole sequences; a padded row is one sequence
    Returns "loss", and without gradient "ratio" and "clipped" (−1, 0, 1 as `policy_loss` has it). `spec.aggregation` is the
    caller's to apply. Raises ValueError for entropy_coef, z_loss_coef, batch-level objectives, missing or misshapen tensors.
    """
    if spec.entropy_coef or spec.z_loss_coef or spec.scope == "batch":
        raise ValueError(f"{spec} needs the logits, or the whole batch: use policy_loss")
    data = {
        "advantages": advantages,
        "mask": mask,
        "old_logprobs": old_logprobs,
        "ref_logprobs": ref_logprobs,
        "rollout_logprobs": rollout_logprobs,
    }
    for name, value in data.items():
        if value is not None and value.shape != logprobs.shape:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}, logprobs {tuple(logprobs.shape)}; they must agree"
            )
    needs = {
        "ref_logprobs": bool(spec.kl_coef),
        "old_logprobs": spec.correction is not None,
        "rollout_logprobs": spec.correction is not None,
    }
    for name, needed in needs.items():
        if needed and data[name] is None:
            raise ValueError(f"kl_coef={spec.kl_coef} and correction={spec.correction!r} need {name}")
    check_off_policy(spec, old_logprobs, rollout_logprobs)
    segments, count = segments_of(logprobs.shape, cu_seqlens, segment_ids, logprobs.device)
    whole = spec.reads_sequences or (spec.correction or "").startswith("sequence")
    if whole and segments is None:
        raise ValueError("this loss reads whole sequences: pass cu_seqlens or segment_ids, or padded [B, L] tensors")

    where = mask.reshape(-1).nonzero().squeeze(1)
    picked = logprobs.reshape(-1)[where]
    flat = {name: None if v is None else v.detach().reshape(-1)[where].to(picked) for name, v in data.items()}
    tokens = formulas.Tokens(flat["advantages"], flat["old_logprobs"], flat["ref_logprobs"])
    if segments is not None and whole:
        segments = segments[where]
        lengths = torch.zeros(count, dtype=torch.int64, device=where.device).index_add_(
            0, segments, torch.ones_like(segments)
        )
        tokens = replace(tokens, segments=segments, lengths=lengths.clamp(min=1), rollout=flat["rollout_logprobs"])
    if spec.correction is not None:
        factor = formulas.correction(replace(tokens, rollout=flat["rollout_logprobs"]), spec)
        tokens = formulas.corrected(tokens, factor, spec)
    loss = formulas.token_loss(picked, tokens, None, None, spec)
    terms = {
        "loss": loss if tokens.weights is None else loss * tokens.weights,
        "ratio": formulas.ratio_of(picked, tokens, spec).detach(),
        "clipped": formulas.clipped(picked, tokens, spec).detach(),
    }
    empty = picked.new_zeros(logprobs.numel())
    return {name: empty.index_copy(0, where, value).reshape(logprobs.shape) for name, value in terms.items()}
