"""TRL's `GRPOTrainer._compute_loss`, called with a stand-in for the trainer: one forward pass of log-probs and entropies."""

from __future__ import annotations

import ast
import inspect
import math
import textwrap
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cache
from types import CodeType, SimpleNamespace

import torch
from peer_cases import Batch, Result, gradients, importance, logprobs, masked_mean, of_level, settle
from torch import Tensor
from trl.experimental.gmpo.gmpo_trainer import GMPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer

import drift_kernels as dk

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
LOSSES = (*CLIPPED, "cispo", "sapo", "vespo")
AGGREGATIONS = {
    "grpo": "sequence_mean_token_mean",
    "sapo": "sequence_mean_token_mean",
    "gmpo": "sequence_mean_token_mean",
    "luspo": "sequence_mean_token_sum",
    "dr_grpo": "token_sum",
}


WINDOWED = ("dapo", "cispo", "vespo")  # num_items_in_batch is their denominator


@dataclass(frozen=True)
class Options:
    """Of GRPOConfig; the names are TRL's. What is None of `items` and `horizon` is the batch's own. "gmpo" is its GMPOTrainer."""

    loss_type: str = "grpo"
    importance_sampling_level: str = "token"
    epsilon: float = 0.2
    epsilon_high: float = 0.2
    delta: float | None = None
    beta: float = 0.0
    use_bias_correction_kl: bool = False
    off_policy_mask_threshold: float | None = None
    sapo: tuple[float, float] = (1.0, 1.05)  # for A > 0, A ≤ 0
    vespo: tuple[float, float, float, float] = (2.0, 3.0, 3.0, 2.0)  # k, λ for A ≥ 0; k, λ for A < 0
    mode: str | None = None  # of vllm_importance_sampling_correction
    clip: tuple[float | None, float | None] = (None, 3.0)  # vllm_importance_sampling_clip_min, _max
    entropy_coef: float = 0.0
    top_entropy_quantile: float = 1.0
    old: bool = True  # whether old_per_token_logps are given
    tool_mask: bool = True  # whether holes come as one, or inside completion_mask
    items: float | None = None  # num_items_in_batch
    horizon: int | None = None  # max_completion_length
    accumulation: int = 1  # gradient_accumulation_steps
    steps: int | None = None  # steps_per_generation; None = accumulation
    training: bool = True


@cache
def _ratio_block() -> CodeType:
    """The statement of TRL's generation step that makes importance_sampling_ratio from two lists of log-probs."""
    source = textwrap.dedent(inspect.getsource(GRPOTrainer._generate_and_score_completions))
    found = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.If)
        and ast.unparse(node.test) == "self.use_vllm and self.vllm_importance_sampling_correction"
        and "per_token_logps_diff =" in ast.unparse(node)
    ]
    assert len(found) == 1
    return compile(ast.Module([found[0]], []), "trl", "exec")


def importance_sampling_ratio(old: Tensor, rollout: Tensor, mask: Tensor, mode: str, clip: tuple) -> Tensor:
    """TRL's own lines, run: [B, L] for token modes, [B, 1] for sequence modes."""
    trainer = SimpleNamespace(
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_min=clip[0],
        vllm_importance_sampling_clip_max=clip[1],
    )
    names = {"self": trainer, "torch": torch, "math": math, "completion_mask": mask, "tool_mask": None}
    names |= {"old_per_token_logps": old, "sampling_per_token_logps": rollout}
    exec(_ratio_block(), names)  # the installed package's own text
    return names["vllm_importance_sampling_ratio"]


def trl(batch: Batch, o: Options) -> Result:
    """TRL's loss, gradients, and everything it logged."""
    logp, entropy = logprobs(batch.hidden, batch.weight, batch.targets)
    mask = batch.mask.to(logp.dtype)
    inside = (torch.arange(mask.shape[1]) < batch.lengths[:, None]).to(logp.dtype)
    inputs = {
        "prompt_ids": batch.targets[:, :0],
        "prompt_mask": mask[:, :0],
        "completion_ids": batch.targets,
        "completion_mask": inside if o.tool_mask else mask,
        "advantages": batch.advantages,
        "num_items_in_batch": mask.sum() if o.items is None else torch.tensor(o.items, dtype=logp.dtype),
        "ref_per_token_logps": batch.ref,
    }
    if o.tool_mask:
        inputs["tool_mask"] = mask
    if o.old:
        inputs["old_per_token_logps"] = batch.old
    if o.mode is not None:
        inputs["sampling_per_token_logps"] = batch.rollout
        inputs["importance_sampling_ratio"] = importance_sampling_ratio(batch.old, batch.rollout, mask, o.mode, o.clip)
    metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logp, entropy, None),
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        accelerator=SimpleNamespace(
            num_processes=1,
            gather=lambda x: x,
            reduce=lambda x, reduction: x,
            pad_across_processes=lambda x, **kwargs: x,
            sync_gradients=True,
        ),
        args=SimpleNamespace(
            delta=o.delta,
            use_bias_correction_kl=o.use_bias_correction_kl,
            sapo_temperature_pos=o.sapo[0],
            sapo_temperature_neg=o.sapo[1],
            vespo_k_pos=o.vespo[0],
            vespo_lambda_pos=o.vespo[1],
            vespo_k_neg=o.vespo[2],
            vespo_lambda_neg=o.vespo[3],
            steps_per_generation=o.steps or o.accumulation,
        ),
        model=SimpleNamespace(training=o.training),
        _metrics=metrics,
        aux_loss_enabled=False,
        top_entropy_quantile=o.top_entropy_quantile,
        off_policy_mask_threshold=o.off_policy_mask_threshold,
        importance_sampling_level=o.importance_sampling_level,
        beta=o.beta,
        loss_type=o.loss_type,
        epsilon_low=o.epsilon,
        epsilon_high=o.epsilon_high,
        use_vllm=o.mode is not None,
        vllm_importance_sampling_correction=True,
        max_completion_length=mask.shape[1] if o.horizon is None else o.horizon,
        current_gradient_accumulation_steps=o.accumulation,
        entropy_coef=o.entropy_coef,
        use_adaptive_entropy=False,
        _entropy_bonus_enabled=o.entropy_coef != 0,
    )
    trainer.get_high_entropy_mask = lambda *args: GRPOTrainer.get_high_entropy_mask(trainer, *args)
    owner = GMPOTrainer if o.loss_type == "gmpo" else GRPOTrainer
    loss = owner._compute_loss(trainer, None, inputs)
    mode, other = ("train", "eval") if o.training else ("eval", "train")
    assert not metrics[other]
    return gradients(loss, batch, {name: values[-1] for name, values in metrics[mode].items()})


def rloo(batch: Batch) -> Result:
    """The loss of TRL's RLOOTrainer at ε = 0.2."""
    logp, entropy = logprobs(batch.hidden, batch.weight, batch.targets)
    mask = batch.mask.to(logp.dtype)
    inputs = {
        "prompt_ids": batch.targets[:, :0],
        "prompt_mask": mask[:, :0],
        "completion_ids": batch.targets,
        "completion_mask": mask,
        "advantages": batch.advantages,
        "old_logps": (batch.old * mask).sum(-1),
    }
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logp, entropy, None),
        accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x),
        model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list)},
        aux_loss_enabled=False,
        epsilon_low=0.2,
        epsilon_high=0.2,
    )
    return gradients(RLOOTrainer._compute_loss(trainer, None, inputs), batch)


def high_entropy(batch: Batch, o: Options) -> Tensor:
    """Which tokens top_entropy_quantile keeps [B, L]."""
    entropy = logprobs(batch.hidden, batch.weight, batch.targets)[1]
    return batch.mask & (entropy >= entropy[batch.mask].quantile(1 - o.top_entropy_quantile))


def clear_of_entropy(batch: Batch, o: Options) -> bool:
    """Whether no entropy is so near the quantile that rounding decides."""
    entropy = logprobs(batch.hidden, batch.weight, batch.targets)[1][batch.mask]
    return bool(((entropy - entropy.quantile(1 - o.top_entropy_quantile)).abs() > 1e-4).all())


def spec_of(o: Options) -> dk.PolicySpec:
    """Ours for TRL's options."""
    objective = o.loss_type if o.loss_type in ("cispo", "sapo", "vespo", "gmpo") else "clip"
    low, high = (None, o.epsilon_high - 1) if objective == "cispo" else (o.epsilon, o.epsilon_high)
    own = {"sapo": {"sapo_temperatures": o.sapo}, "vespo": {"vespo_weights": o.vespo}}.get(objective, {})
    return dk.PolicySpec(
        **own,
        objective=objective,
        ratio=o.importance_sampling_level,
        clip_low=low,
        clip_high=high,
        delta=o.delta,
        kl_coef=o.beta,
        kl_estimator="k3",
        kl_unbiased=o.use_bias_correction_kl,
        entropy_coef=o.entropy_coef,
        off_policy_threshold=o.off_policy_mask_threshold,
        aggregation=AGGREGATIONS.get(o.loss_type, "token_mean"),
        correction=o.mode,
        correction_bounds=(o.clip[0] or 0.0, float("inf") if o.clip[1] is None else o.clip[1]),
    )


def denominator(batch: Batch, o: Options) -> float:
    """What TRL divides by: it counts accumulated micro-batches while training, and every sequence."""
    (B, L), tokens = batch.mask.shape, float(batch.mask.sum())
    steps = o.accumulation if o.training else 1
    if o.loss_type in WINDOWED:
        return (tokens if o.items is None else o.items) * (steps / (o.steps or o.accumulation) if o.training else 1)
    if o.loss_type == "bnpo":
        return tokens * steps
    return float(B * steps * ((L if o.horizon is None else o.horizon) if o.loss_type == "dr_grpo" else 1))


def given_of(batch: Batch, o: Options) -> dict:
    """What else `policy_loss` is to be given."""
    said = {"old": o.old, "ref": o.beta != 0, "rollout": o.mode is not None}
    aggregation = AGGREGATIONS.get(o.loss_type, "token_mean")
    own = {"token_mean": float(batch.mask.sum()), "token_sum": 1.0}.get(aggregation, float(len(batch.mask)))
    theirs = denominator(batch, o)
    return said if theirs == own else said | {"normalizer": theirs}


def with_its_entropy_bonus(spec: dk.PolicySpec, batch: Batch, o: Options) -> dk.PolicySpec:
    """The coefficient that makes ours, aggregated as the loss is, TRL's token mean; for losses that are sums over tokens."""
    assert not o.entropy_coef or spec.aggregation != "sequence_mean_token_mean"
    tokens = int((batch.mask if o.top_entropy_quantile == 1 else high_entropy(batch, o)).sum())
    share = denominator(batch, o) / (tokens * (o.accumulation if o.training else 1))
    return replace(spec, entropy_coef=o.entropy_coef * share)


def off_the_edges(batch: Batch, o: Options) -> Batch:
    """`batch` with no ratio, factor or distance where the options' bounds would decide by rounding."""
    sampler = "old" if o.mode is None else "rollout"
    distance = (lambda b: masked_mean(getattr(b, sampler) - b.logp, b.mask, -1)), (o.off_policy_mask_threshold,)
    edges = {
        "cispo": (o.epsilon_high,),
        **dict.fromkeys(CLIPPED, (1 - o.epsilon, 1 + o.epsilon_high, o.delta)),
    }.get(o.loss_type, ())
    of_ratio = of_level(o.importance_sampling_level)
    if o.loss_type == "gmpo":
        of_ratio, edges = (lambda b: b.logp - b.old), (-o.epsilon, o.epsilon_high)
    batch = settle(batch, "old", (of_ratio, edges), *([distance] if o.mode is None else []))
    return batch if o.mode is None else settle(batch, "rollout", (importance(o.mode), o.clip), distance)
