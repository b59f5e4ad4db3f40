"""`GRPOTrainer` with its whole policy loss in one pass: log-probs, ratios, clipping, KL and both gradients.

    trainer = DriftGRPOTrainer(model=…, reward_funcs=…, args=GRPOConfig(…), train_dataset=…)

The loss is made inside the model's forward by `policy_loss`. TRL's own arithmetic then runs once more on the [B, T]
log-probs and entropies that came of it, without gradient: that is where its metrics come from, by its names. Left out:
what is not text.
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer  # pyright: ignore[reportAttributeAccessIssue]

import drift_kernels as dk
from drift_kernels.adapters._common import run_inside_forward, share_prefixes
from drift_kernels.adapters.trl.swap import SUPPORTED
from drift_kernels.head.models import unwrap_peft

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
LOSS_TYPES = (*CLIPPED, "cispo", "sapo", "vespo")
AGGREGATIONS = {
    "grpo": "sequence_mean_token_mean",
    "sapo": "sequence_mean_token_mean",
    "bnpo": "token_mean",
    "luspo": "sequence_mean_token_sum",
}  # the others: token_sum over a denominator of TRL's
IMAGES = ("pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles")
NO_BOUND = (0.0, 1e30)
LOG_RATIO_FLOOR = -18.420680743952367  # log 1e-8, where TRL's vespo takes a masked token's log-ratio to end


def policy_spec(args: Any) -> dk.PolicySpec:
    """The loss that a `GRPOConfig` describes; ValueError names an option that is not mapped.

    TRL's numbers are taken as TRL means them: for cispo `epsilon_high` is the cap itself, `sapo_temperature_*` go by the
    sign of the advantage, importance_sampling_level="sequence" is the mean log-ratio of a sequence (GSPO). An entropy bonus is
    not in it: its coefficient depends on the batch (and, where it adapts, on the step), and `DriftGRPOTrainer` adds it.
    """
    if args.loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type={args.loss_type!r} is not mapped; DriftGRPOTrainer knows {', '.join(LOSS_TYPES)}")
    if args.entropy_coef != 0.0 or args.use_adaptive_entropy:
        _refuse_bonus(args)
    if args.off_policy_mask_threshold is not None and args.off_policy_mask_threshold < 0:
        raise ValueError(f"off_policy_mask_threshold={args.off_policy_mask_threshold} must be at least 0")
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    options: dict[str, Any] = {"clip_low": args.epsilon, "clip_high": high, "delta": args.delta}
    ratio = args.importance_sampling_level
    match args.loss_type:
        case "cispo":
            if high < 1:
                raise ValueError(f"epsilon_high={high} is the cap on cispo's ratio; it must be at least 1 (5 is usual)")
            options = {"objective": "cispo", "clip_low": None, "clip_high": high - 1}
        case "sapo":
            options = {"objective": "sapo", "sapo_temperatures": (args.sapo_temperature_pos, args.sapo_temperature_neg)}
        case "vespo":
            if ratio == "sequence" and args.use_bias_correction_kl:
                raise ValueError(
                    "loss_type='vespo' with importance_sampling_level='sequence' and use_bias_correction_kl"
                )
            weights = (args.vespo_k_pos, args.vespo_lambda_pos, args.vespo_k_neg, args.vespo_lambda_neg)
            options, ratio = {"objective": "vespo", "vespo_weights": weights}, "token"
    return dk.PolicySpec(
        **options,
        ratio=ratio,
        kl_coef=args.beta,
        kl_unbiased=args.use_bias_correction_kl and args.beta != 0.0,
        off_policy_threshold=args.off_policy_mask_threshold,
        aggregation=AGGREGATIONS.get(args.loss_type, "token_sum"),
    )


def _refuse_bonus(args: Any) -> None:
    """TRL's bonus is a mean over tokens, whatever its loss is: one coefficient makes it only where all tokens weigh the same."""
    by_sequence = AGGREGATIONS.get(args.loss_type) == "sequence_mean_token_mean"
    cases = {
        f"loss_type={args.loss_type!r}, which averages each sequence first": by_sequence,
        f"top_entropy_quantile={args.top_entropy_quantile}, which the bonus goes by and the KL does not": (
            args.top_entropy_quantile < 1.0
        ),
        f"entropy_coef={args.entropy_coef}, less than 0": args.entropy_coef < 0,
    }
    refused = [name for name, is_on in cases.items() if is_on]
    if refused:
        raise ValueError(
            f"an entropy bonus is not mapped for {' and '.join(refused)}; use GRPOTrainer with "
            "drift_kernels.adapters.trl.enable()"
        )


class DriftGRPOTrainer(GRPOTrainer):
    """As `GRPOTrainer`, in one pass over the head: 2 products for rows read and 4 for rows whose gradient is not zero.

    Mapped: every loss_type of TRL, importance_sampling_level, epsilon, epsilon_high, delta, beta, use_bias_correction_kl,
    off_policy_mask_threshold, top_entropy_quantile (one scoring pass more), tool masks, vLLM's importance sampling
    correction in all its modes, entropy bonuses (fixed or adaptive) of losses that weigh all tokens the same,
    cast_lm_head_to_fp32, PEFT but for prompt learning. Raises ValueError for other entropy bonuses, a router loss, images,
    and an option `PolicySpec` cannot hold.

    tree  prompts, and all else that rows begin with alike, go through the model once, in scoring passes too
          (`share_prefixes`); `tokens_shared` among the metrics is the share of tokens saved. Needs `drift`'s trainer
    """

    args: Any
    model: Any
    current_gradient_accumulation_steps: Any

    def __init__(
        self, *args: Any, kernel: dk.KernelConfig = dk.KernelConfig(), tree: bool = False, **kwargs: Any
    ) -> None:
        SUPPORTED.check()
        super().__init__(*args, **kwargs)
        if self.aux_loss_enabled:
            raise ValueError(
                "the router loss of a mixture of experts is not mapped; router_aux_loss_coef=0 turns it off"
            )
        self._spec, self._kernel = policy_spec(self.args), kernel
        self._scored: tuple[Tensor, Tensor] | None = None
        run_inside_forward(unwrap_peft(self.model))
        self._sharing = share_prefixes(self.model) if tree else None
        if tree and self.ref_model is not None:
            share_prefixes(self.accelerator.unwrap_model(self.ref_model))

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        images = [name for name in IMAGES if inputs.get(name) is not None]
        if images:
            raise ValueError(f"inputs hold {', '.join(images)}: DriftGRPOTrainer is for text; GRPOTrainer is not")
        scores = self._one_pass(model, inputs)
        logprobs, mask, old = scores["logprobs"], _mask(inputs), inputs.get("old_per_token_logps")
        # a ratio of 1 where nothing was computed
        logprobs = logprobs if old is None else torch.where(mask, logprobs, old.to(logprobs))
        self._scored = (logprobs, scores["entropy"])
        try:
            with torch.no_grad():
                super()._compute_loss(model, inputs)
        finally:
            self._scored = None
        if self._sharing is not None:
            mode = "train" if self.model.training else "eval"
            self._metrics[mode]["tokens_shared"].append(self._sharing.saved)
        return scores["loss"]

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        if self._scored is not None:
            return (*self._scored, None)
        return super()._get_per_token_logps_and_entropies(self._placed(model), *args, **kwargs)

    def _placed(self, model: Any) -> Any:
        """`model`, which counts positions from the first token that is no padding, as `generate` does.

        TRL leaves positions out. Then a model of absolute positions counts the padding on the left.
        """
        plain = unwrap_peft(self.accelerator.unwrap_model(model, keep_torch_compile=False))
        if "position_ids" not in inspect.signature(plain.forward).parameters:
            return model  # it reads them off the mask, or has none

        def call(*, attention_mask: Tensor, **kwargs: Any) -> Any:
            positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
            return model(attention_mask=attention_mask, position_ids=positions, **kwargs)

        return call

    def _one_pass(self, model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """loss (0-d), and per-token logprobs and entropy [B, T] without gradient."""
        completion, mask = inputs["completion_ids"], _mask(inputs)
        length, targets = completion.shape[1], completion.masked_fill(~mask, -100)
        normalizer = self._normalizer(inputs, mask)
        spec = self._with_bonus(self._spec_for(inputs), normalizer, mask)

        def inside(hidden: Tensor, head: dk.Head) -> dict[str, Tensor]:
            hidden = hidden[:, -length - 1 : -1]  # row i predicts completion token i
            autocast = nullcontext()
            if self.args.cast_lm_head_to_fp32:
                hidden, autocast = hidden.float(), torch.autocast(hidden.device.type, enabled=False)
            head, options = head.at(self.temperature), dict[str, Any](config=self._kernel)
            with autocast:
                chosen = self._high_entropy(hidden, head, targets, mask, options)
                out = dk.policy_loss(
                    hidden,
                    head,
                    targets,
                    spec=spec,
                    outputs=("logprobs", "entropy"),
                    normalizer=normalizer,
                    **self._data(inputs, chosen),
                    **options,
                )
            return {"loss": out.loss, **out.outputs}

        with self.accelerator.autocast():
            return self._placed(model)(
                input_ids=torch.cat([inputs["prompt_ids"], completion], dim=1),
                attention_mask=torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
                drift_inside=inside,
            )

    def _high_entropy(
        self, hidden: Tensor, head: dk.Head, targets: Tensor, mask: Tensor, options: Any
    ) -> Tensor | None:
        """Which tokens top_entropy_quantile leaves [B, T], from a scoring pass; None if it leaves all."""
        if self.top_entropy_quantile >= 1.0:
            return None
        with torch.no_grad():
            scored = dk.linear_logprob(hidden, head, targets, outputs=("entropy",), **options)
        return self.get_high_entropy_mask(scored.outputs["entropy"], mask, 1 - self.top_entropy_quantile)

    def _corrected(self) -> bool:
        return bool(self.use_vllm and self.vllm_importance_sampling_correction)

    def _spec_for(self, inputs: dict[str, Any]) -> dk.PolicySpec:
        spec = self._spec
        if spec.off_policy_threshold is not None:
            sampled = inputs.get("sampling_per_token_logps")
            if sampled is None and inputs.get("old_per_token_logps") is None:
                spec = replace(spec, off_policy_threshold=None)  # on-policy: nothing is far from itself
            elif sampled is not None and bool(torch.isnan(sampled).any()):
                raise ValueError("off_policy_mask_threshold is not mapped for sampling log-probs that are NaN")
        if self.loss_type == "vespo" and self._corrected():
            spec = replace(spec, correction="token_truncate", correction_bounds=NO_BOUND)  # TRL has bounded it
        return spec

    def _with_bonus(self, spec: dk.PolicySpec, normalizer: Tensor | float, mask: Tensor) -> dk.PolicySpec:
        """`spec` with TRL's entropy bonus, a mean over this micro-batch's tokens, in units of the loss's denominator."""
        on = not self.use_adaptive_entropy or self._last_world_entropy <= self.args.entropy_target
        if not on or self.entropy_coef == 0.0:
            return spec
        count = mask.sum().clamp(min=1) * self._accumulated()
        return replace(spec, entropy_coef=float(self.entropy_coef * normalizer / count))  # one read from a GPU

    def _accumulated(self) -> Any:
        """Micro-batches of an optimizer step; 1 in evaluation."""
        return self.current_gradient_accumulation_steps if self.model.training else 1.0

    def _data(self, inputs: dict[str, Any], chosen: Tensor | None) -> dict[str, Tensor | None]:
        """Per-token tensors [B, T]; what multiplies the objective alone goes into the advantages."""
        advantages, old = inputs["advantages"], inputs.get("old_per_token_logps")
        advantages = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
        advantages = advantages.expand(inputs["completion_ids"].shape)
        rollout = inputs.get("sampling_per_token_logps") if self._spec.off_policy_threshold is not None else None
        if chosen is not None:
            advantages = advantages * chosen
        if self._corrected():
            factor = inputs["importance_sampling_ratio"]
            if self.loss_type != "vespo":
                advantages = advantages * factor
            elif rollout is not None:
                raise ValueError(
                    "loss_type='vespo' with off_policy_mask_threshold is not mapped under vLLM's correction"
                )
            else:
                assert old is not None  # TRL always scores what vLLM wrote
                rollout = old - torch.log(factor).clamp(LOG_RATIO_FLOOR, 20.0)
        return {
            "advantages": advantages,
            "old_logprobs": old,
            "ref_logprobs": inputs["ref_per_token_logps"] if self.beta != 0.0 else None,
            "rollout_logprobs": rollout,
        }

    def _normalizer(self, inputs: dict[str, Any], mask: Tensor) -> Tensor | float:
        """TRL's denominators, gradient accumulation included."""
        steps, rows = self._accumulated(), len(mask)
        match self.loss_type:
            case "grpo" | "sapo" | "luspo":
                return float(rows * steps)
            case "bnpo":
                return mask.sum().clamp(min=1) * steps
            case "dr_grpo":
                return float(rows * self.args.max_completion_length * steps)
        items = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        return items * steps / self.args.steps_per_generation if self.model.training else items


def _mask(inputs: dict[str, Any]) -> Tensor:
    """Which completion tokens the policy wrote [B, T] bool."""
    mask = inputs["completion_mask"]
    return (mask * inputs["tool_mask"] if "tool_mask" in inputs else mask).bool()
