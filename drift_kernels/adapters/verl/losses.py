"""Policy losses for verl's registry: any `PolicySpec` on the padded log-probs that its engines hand to a loss.

actor_rollout_ref.actor.policy_loss.loss_mode=drift_vespo
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import drift_kernels as dk

# What verl 0.9.1 has no loss for. Bounds of ratios come from the actor's config (clip_ratio, clip_ratio_low, _high).
LOSSES: dict[str, dk.PolicySpec] = {
    "drift_vespo": dk.PolicySpec.preset("vespo"),
    "drift_gspo": dk.PolicySpec.preset("gspo"),  # the gradient of the sequence's ratio; verl's "gspo" has the token's
    "drift_luspo": dk.PolicySpec.preset("luspo"),  # with loss_agg_mode=seq-mean-token-sum
}


def register_policy_loss(name: str, spec: dk.PolicySpec, clip_from_config: bool = False) -> None:
    """Makes `spec` verl's policy loss `name`, for `policy_loss.loss_mode=name`; again under the same name replaces it.

    clip_from_config takes clip_low and clip_high from the actor's config, as verl's own losses do. `spec.aggregation` and its
    KL are verl's to do: loss_agg_mode and use_kl_loss. Raises ValueError for a spec with a KL, an entropy or a z term, a
    correction (verl passes rollout_is_weights) or a batch-level objective.
    """
    if spec.kl_coef or spec.entropy_coef or spec.z_loss_coef or spec.correction or spec.scope == "batch":
        raise ValueError(
            f"{name}: verl adds KL, entropy and rollout corrections itself, and hands out micro-batches: leave kl_coef, "
            f"entropy_coef, z_loss_coef, correction and covariance objectives out of {spec}"
        )
    from verl.trainer.ppo.core_algos import register_policy_loss as register

    register(name)(_policy_loss(spec, clip_from_config))  # pyright: ignore[reportArgumentType]


def register_all() -> None:
    """`LOSSES`, under their names."""
    for name, spec in LOSSES.items():
        register_policy_loss(name, spec, clip_from_config=spec.objective == "clip")


def _policy_loss(spec: dk.PolicySpec, clip_from_config: bool) -> Any:
    def policy_loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """(loss, metrics by verl's names) of [B, L] tensors."""
        from verl.trainer.ppo.core_algos import agg_loss

        used = spec
        if clip_from_config:
            low, high = (config.clip_ratio if v is None else v for v in (config.clip_ratio_low, config.clip_ratio_high))
            used = replace(spec, clip_low=low, clip_high=high)
        terms = dk.policy_token_loss(log_prob, advantages, response_mask, old_logprobs=old_log_prob, spec=used)
        losses = terms["loss"] if rollout_is_weights is None else terms["loss"] * rollout_is_weights
        if response_mask.any():
            loss = agg_loss(losses, response_mask, loss_agg_mode, **config.global_batch_info)
        else:  # verl may divide by the number of tokens
            loss = torch.where(response_mask.bool(), losses, 0.0).sum()
        count = response_mask.sum().clamp(min=1)
        clipped = (terms["clipped"] != 0).sum() / count
        moved = torch.where(response_mask.bool(), old_log_prob - log_prob.detach(), 0.0).sum() / count
        metrics = {
            "actor/pg_clipfrac": clipped.item(),
            "actor/ppo_kl": moved.item(),
            "actor/pg_clipfrac_lower": 0.0,  # of dual clipping, in verl's words
        }
        return loss, metrics

    return policy_loss
