"""verl's policy losses and their aggregation, called as its workers call them: log-probs, an ActorConfig, a mask."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peer_cases import Batch, Result, gradients, logprobs
from torch import Tensor
from verl.trainer.ppo.core_algos import agg_loss, get_policy_loss_fn, kl_penalty
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights
from verl.workers.config import ActorConfig, PolicyLossConfig

LOSSES = (
    "vanilla",
    "dppo_tv",
    "dppo_kl",
    "gspo",
    "sapo",
    "gpg",
    "clip_cov",
    "kl_cov",
    "geo_mean",
    "dro",
    "cispo",
)
AGGREGATIONS = {
    "token-mean": "token_mean",
    "token-sum": "token_sum",
    "seq-mean-token-sum": "sequence_mean_token_sum",
    "seq-mean-token-sum-norm": "sequence_mean_token_sum",
    "seq-mean-token-mean": "sequence_mean_token_mean",
}


@dataclass(frozen=True)
class Options:
    """Of ActorConfig and PolicyLossConfig; the names are verl's. `rollout`: (level, threshold) of the correction."""

    loss: str = "vanilla"
    mode: str = "token-mean"
    low: float = 0.2
    high: float = 0.2
    c: float = 3.0
    tau: tuple[float, float] = (1.0, 1.05)
    policy_loss: dict[str, Any] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)  # global_batch_info
    rollout: tuple[str, float | str] | None = None
    batch_normalize: bool = False
    kl: tuple[str, float] | None = None  # kl_loss_type, kl_loss_coef
    entropy_coef: float = 0.0


def actor_config(o: Options) -> ActorConfig:
    return ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio_low=o.low,
        clip_ratio_high=o.high,
        clip_ratio_c=o.c,
        tau_pos=o.tau[0],
        tau_neg=o.tau[1],
        policy_loss=PolicyLossConfig(loss_mode=o.loss, **o.policy_loss),
        global_batch_info=o.info,
    )


def rollout_weights(batch: Batch, o: Options) -> tuple[Tensor, dict[str, float]]:
    """verl's factors [B, L] between trainer and sampler, and its metrics of them."""
    assert o.rollout is not None
    level, threshold = o.rollout
    return compute_rollout_correction_weights(
        batch.old - batch.rollout, batch.mask.long(), level, threshold, o.batch_normalize
    )


def verl(batch: Batch, o: Options) -> Result:
    """verl's loss of the batch, its gradients, and what it logs."""
    logp, entropy = logprobs(batch.hidden, batch.weight, batch.targets)
    mask = batch.mask.long()
    advantages = batch.advantages if batch.advantages.dim() == 2 else batch.advantages[:, None].expand_as(logp)
    weights = None if o.rollout is None else rollout_weights(batch, o)[0]
    loss, metrics = get_policy_loss_fn(o.loss)(batch.old, logp, advantages, mask, o.mode, actor_config(o), weights)
    if o.entropy_coef:
        loss = loss - o.entropy_coef * agg_loss(entropy, mask, o.mode, **o.info)
    if o.kl is not None:
        loss = loss + o.kl[1] * agg_loss(kl_penalty(logp, batch.ref, o.kl[0]), mask, o.mode, **o.info)
    return gradients(loss, batch, metrics)


def normalizer(batch: Batch, o: Options) -> float:
    """What `agg_loss` divides by: ours is given it as a number."""
    dp, (B, L) = o.info.get("dp_size", 1), batch.mask.shape
    tokens = o.info.get("batch_num_tokens", int(batch.mask.sum()))
    sequences = o.info.get("global_batch_size", int(batch.mask.any(-1).sum()))
    scale = o.info.get("loss_scale_factor", L) if o.mode == "seq-mean-token-sum-norm" else 1
    match o.mode:
        case "token-mean":
            return tokens / dp
        case "token-sum":
            return 1 / dp
        case _:
            return sequences * scale / dp


