"""verl's policy losses and their aggregation, called as its workers call them: log-probs, an ActorConfig, a mask."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from peer_cases import Batch, Result, gradients, importance, logprobs, masked_mean, ratio, sequence_ratio, settle
from torch import Tensor
from verl.trainer.config.algorithm import RolloutCorrectionConfig
from verl.trainer.ppo.core_algos import agg_loss, get_policy_loss_fn, kl_penalty
from verl.trainer.ppo.rollout_corr_helper import (
    compute_rollout_correction_and_rejection_mask,
    compute_rollout_correction_weights,
)
from verl.workers.config import ActorConfig, PolicyLossConfig

import drift_kernels as dk

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
ESTIMATORS = {"kl": "k1", "k1": "k1", "abs": "abs", "mse": "k2", "k2": "k2", "low_var_kl": "k3", "k3": "k3"}
STRAIGHT = {"k1": "k1+", "abs": "abs+", "k2": "k2", "k3": "k3+"}
ESTIMATORS |= {f"{name}+": STRAIGHT[base] for name, base in ESTIMATORS.items()}
CORRECTIONS = {float: "truncate", str: "mask"}
# What rollout_rs can be, each with a threshold between what is near and what is far here.
REJECTIONS = {
    "token_k1": "0.8_1.3",
    "token_k2": "0.04",
    "token_k3": "0.05",
    "seq_sum_k1": "0.5_1.6",
    "seq_sum_k2": "0.3",
    "seq_sum_k3": "0.35",
    "seq_mean_k1": "0.85_1.2",
    "seq_mean_k2": "0.06",
    "seq_mean_k3": "0.07",
    "seq_max_k2": "0.2",
    "seq_max_k3": "0.25",
}


@dataclass(frozen=True)
class Options:
    """Of ActorConfig and PolicyLossConfig; the names are verl's.

    `rollout`: (level, threshold) of the correction; `rejection`: (rollout_rs, rollout_rs_threshold); `bypass`: the loss_type
    of bypass_mode, where the batch's `old` is the sampler's.
    """

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
    rejection: tuple[str, str | float] | None = None
    bypass: str | None = None
    kl: tuple[str, float] | None = None  # kl_loss_type, kl_loss_coef
    entropy_coef: float = 0.0


def actor_config(o: Options) -> ActorConfig:
    """With bypass_mode, where the correction is one of the loss's options."""
    options = dict(o.policy_loss)
    if o.bypass is not None:
        (level, threshold), (kinds, limits) = o.rollout or (None, 2.0), o.rejection or (None, None)
        options["rollout_correction"] = RolloutCorrectionConfig(
            bypass_mode=True,
            loss_type=o.bypass,
            rollout_is=level,
            rollout_is_threshold=threshold,
            rollout_is_batch_normalize=o.batch_normalize,
            rollout_rs=kinds,
            rollout_rs_threshold=limits,
        )
    return ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio_low=o.low,
        clip_ratio_high=o.high,
        clip_ratio_c=o.c,
        tau_pos=o.tau[0],
        tau_neg=o.tau[1],
        policy_loss=PolicyLossConfig(loss_mode=o.loss, **options),
        global_batch_info=dict(o.info),  # verl writes into it
    )


def rollout_weights(batch: Batch, o: Options) -> tuple[Tensor, dict[str, float]]:
    """verl's factors [B, L] between trainer and sampler, and its metrics of them."""
    assert o.rollout is not None
    level, threshold = o.rollout
    return compute_rollout_correction_weights(
        batch.old - batch.rollout, batch.mask.long(), level, threshold, o.batch_normalize
    )


def corrected(batch: Batch, o: Options) -> tuple[Tensor | None, Tensor, dict[str, float]]:
    """verl's factors [B, L], the mask that its rejection leaves [B, L] int64, and its metrics of both."""
    (level, threshold), (kinds, limits) = o.rollout or (None, 2.0), o.rejection or (None, None)
    made, mask, metrics = compute_rollout_correction_and_rejection_mask(
        batch.old, batch.rollout, batch.mask.long(), level, threshold, o.batch_normalize, kinds, limits
    )
    return None if made is None else made.batch["rollout_is_weights"], mask, metrics


def verl(batch: Batch, o: Options) -> Result:
    """verl's loss of the batch, its gradients, and what it logs."""
    logp, entropy = logprobs(batch.hidden, batch.weight, batch.targets)
    weights, mask = None, batch.mask.long()
    if (o.rollout or o.rejection) and not o.bypass:
        weights, mask, _ = corrected(batch, o)
    advantages = batch.advantages if batch.advantages.dim() == 2 else batch.advantages[:, None].expand_as(logp)
    loss, metrics = get_policy_loss_fn(o.loss)(batch.old, logp, advantages, mask, o.mode, actor_config(o), weights)
    if o.entropy_coef:
        loss = loss - o.entropy_coef * agg_loss(entropy, mask, o.mode, **o.info)
    if o.kl is not None:
        loss = loss + o.kl[1] * agg_loss(kl_penalty(logp, batch.ref, o.kl[0]), mask, o.mode, **o.info)
    return gradients(loss, batch, metrics)


def normalizer(batch: Batch, o: Options) -> float:
    """What `agg_loss` divides by: ours is given it as a number."""
    dp, L = o.info.get("dp_size", 1), batch.mask.shape[1]
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


def bounds(threshold: float | str) -> tuple[float, float]:
    low, high = threshold.split("_") if isinstance(threshold, str) else (0, threshold)
    return float(low), float(high)


def spec_of(o: Options, **changes) -> dk.PolicySpec:
    """Ours for verl's options, in the common range."""
    cov = o.policy_loss.get("clip_cov_lb", 1.0), o.policy_loss.get("clip_cov_ub", 5.0)
    own = {
        "vanilla": {"dual_clip": o.c},
        "dppo_tv": {"objective": "dppo_tv", "delta": o.c},
        "dppo_kl": {"objective": "dppo_kl", "delta": o.c},
        "gspo": {"ratio": "sequence_token"},
        "sapo": {"objective": "sapo", "sapo_temperatures": o.tau},
        "gpg": {"objective": "reinforce"},
        "clip_cov": {
            "objective": "clip_cov",
            "cov_bounds": cov,
            "cov_share": o.policy_loss.get("clip_cov_ratio", 2e-4),
        },
        "kl_cov": {
            "objective": "kl_cov",
            "cov_share": o.policy_loss.get("kl_cov_ratio", 2e-4),
            "cov_kl_coef": o.policy_loss.get("ppo_kl_coef", 0.1),
        },
        "geo_mean": {"objective": "gmpo", "ratio": "sequence"},
        "dro": {"objective": "dro", "dro_beta": o.policy_loss.get("dro_beta")},
        "cispo": {"objective": "cispo"},
    }[o.loss]
    aggregation = "seq-mean-token-mean" if o.loss in ("sapo", "geo_mean") else o.mode
    own |= {"clip_low": o.low, "clip_high": o.high, "aggregation": AGGREGATIONS[aggregation]}
    own |= {"entropy_coef": o.entropy_coef}
    if o.kl is not None:
        own |= {"kl_estimator": ESTIMATORS[o.kl[0]], "kl_coef": o.kl[1]}
    if o.rollout is not None and o.loss != "geo_mean":
        level, threshold = o.rollout
        own |= {"correction": f"{level}_{CORRECTIONS[type(threshold)]}", "correction_bounds": bounds(threshold)}
    return dk.PolicySpec(**own | changes)


def given_of(batch: Batch, o: Options) -> dict:
    """What else `policy_loss` is to be given."""
    said = {"old": True, "ref": o.kl is not None, "rollout": o.rollout is not None, "normalizer": normalizer(batch, o)}
    if o.loss in ("sapo", "geo_mean"):
        info = {} if o.loss == "geo_mean" else o.info
        said["normalizer"] = normalizer(batch, replace(o, mode="seq-mean-token-mean", info=info))
    if o.batch_normalize:
        said["normalizer"] *= rollout_weights(batch, o)[1]["rollout_is_batch_norm_factor"]
    if o.loss == "geo_mean" and o.rollout is not None:
        said |= {"rollout": False, "token_weights": geometric_mean(rollout_weights(batch, o)[0], batch)}
    return said


def of_current(batch: Batch) -> Batch:
    """`batch` as bypass_mode compares it: the current log-probs against `old`, which are the sampler's."""
    return replace(batch, old=batch.logp, rollout=batch.old)


def accepted(batch: Batch, o: Options) -> Batch:
    """`batch` without the tokens that verl rejects."""
    compared = of_current(batch) if o.bypass else batch
    return replace(batch, mask=corrected(compared, replace(o, rollout=None))[1].bool())


def statistic(kind: str) -> Callable[[Batch], Tensor]:
    """What a rejection compares with its threshold, by the name that verl has for it: [B, L], or [B, 1] of sequences."""
    level, estimator = kind.rsplit("_", 1)

    def value(batch: Batch) -> Tensor:
        d = batch.old - batch.rollout
        each = {"k1": -d, "k2": d * d / 2, "k3": d.exp() - 1 - d}[estimator]
        match level:
            case "token":
                return each
            case "seq_sum":
                return (each * batch.mask).sum(-1, keepdim=True)
            case "seq_mean":
                return masked_mean(each, batch.mask, -1)
            case _:
                return each.masked_fill(~batch.mask, -math.inf).amax(-1, keepdim=True)

    return value


def criteria(rejection: tuple[str, str | float]) -> list[tuple[str, float, float]]:
    """(kind, least, most) of each statistic; k1's bounds are of ratios, and one alone is the upper."""
    kinds, limits = rejection[0].split(","), str(rejection[1]).split(",")
    made = []
    for kind, limit in zip(kinds, limits * len(kinds) if len(limits) == 1 else limits):
        low, high = limit.split("_") if "_" in limit else (1 / float(limit), limit)
        bounds = (math.log(float(low)), math.log(float(high))) if kind.endswith("k1") else (-math.inf, float(limit))
        made.append((kind, *bounds))
    return made


def kept(batch: Batch, o: Options) -> Tensor:
    """Which tokens a rollout correction does not mask; `rollout_weights` fails where there are none."""
    low, high = bounds(o.rollout[1])
    factor = importance(o.rollout[0])(batch)
    return batch.mask & (factor >= low) & ((factor <= high) | isinstance(o.rollout[1], float))


def geometric_mean(weights: Tensor, batch: Batch) -> Tensor:
    return masked_mean((weights + 1e-10).log(), batch.mask, -1).exp().expand_as(weights)


def moved(batch: Batch) -> Tensor:
    return batch.logp.exp() - batch.old.exp()


def binary_kl(batch: Batch) -> Tensor:
    p, q = batch.logp.exp(), batch.old.exp()
    return q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()


def covariances(batch: Batch) -> Tensor:
    """(A − Ā)(logp − mean logp) of the trained tokens [M], in order."""
    a = batch.advantages if batch.advantages.dim() == 2 else batch.advantages[:, None].expand_as(batch.mask)
    a, logp = a[batch.mask], batch.logp[batch.mask]
    return (a - a.mean()) * (logp - logp.mean())


def widest_gap(values: Tensor) -> float:
    """The middle of the widest gap between neighbours of sorted `values`; below them where none is clear."""
    gaps = values.diff()
    if not len(gaps) or gaps.max() < 1e-3:
        return float(values[0]) - 1
    at = int(gaps.argmax())
    return float(values[at] + values[at + 1]) / 2


def off_the_edges(batch: Batch, o: Options) -> Batch:
    """`batch` with no ratio, divergence or factor where the options' bounds would decide by rounding."""
    clip = 1 - o.low, 1 + o.high
    edges = {
        "vanilla": [(ratio, (*clip, o.c))],
        "dppo_tv": [(moved, (-o.low, o.high)), (ratio, (o.c,))],
        "dppo_kl": [(binary_kl, (o.low, o.high)), (ratio, (o.c, 1.0))],
        "gspo": [(sequence_ratio, clip)],
        "clip_cov": [(ratio, clip)],
        "kl_cov": [(ratio, (1.0,))],
        "geo_mean": [(lambda b: b.logp - b.old, (-o.low, o.high))],
        "cispo": [(ratio, clip)],
    }
    edges["bypass_mode"] = edges["vanilla"] if o.bypass == "ppo_clip" else []
    between: list[tuple[Callable[[Batch], Tensor], tuple[float, ...]]]
    between = [] if o.rollout is None else [(importance(o.rollout[0]), bounds(o.rollout[1]))]
    for kind, *ends in criteria(o.rejection) if o.rejection else []:
        between.append((statistic(kind), tuple(end for end in ends if math.isfinite(end))))
    if o.bypass:
        own = [((lambda b, fn=fn: fn(of_current(b))), ends) for fn, ends in between]
        return settle(batch, "old", *edges[o.loss], *own)
    batch = settle(batch, "old", *edges.get(o.loss, []))
    if o.kl is not None:
        batch = settle(batch, "ref", (lambda b: b.logp - b.ref, (0.0,)))
    return settle(batch, "rollout", *between)
