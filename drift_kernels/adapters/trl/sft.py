"""`SFTTrainer` with a weight per example or per token, in one pass: importance-weighted fine-tuning inside TRL.

    trainer = DriftSFTTrainer(model=…, args=SFTConfig(…), train_dataset=…)   # rows with a "weight", or "token_weights"

The loss is made inside the model's forward by `weighted_cross_entropy`; around it runs TRL's own `compute_loss`, which
keeps its metrics. Left out: packing (TRL's packing drops every column but tokens and labels), and what needs logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from trl import SFTTrainer  # pyright: ignore[reportAttributeAccessIssue]

import drift_kernels as dk
from drift_kernels.adapters._common import WeightedCollator, run_inside_forward, share_prefixes
from drift_kernels.adapters.trl.swap import SUPPORTED
from drift_kernels.head.models import unwrap_peft

NORMALIZE = ("tokens", "weights", "samples", "sample_weights")


class DriftSFTTrainer(SFTTrainer):
    """As `SFTTrainer`, and Σ over trained tokens of wᵢ·(−log pᵢ) over a denominator of the whole accumulated batch.

    wᵢ is the row's `weight_column` (a number) times its `token_weights_column` (a list as long as "input_ids", for data
    that is tokenised already); either may be absent, in evaluation data both. `normalize` says what the sum is over:

    "tokens"          trained tokens
    "weights"         their weights: a weighted mean
    "samples"         rows, each counting with the mean over its trained tokens (arXiv 2605.31455, A4)
    "sample_weights"  the same, over the rows' weights

    With `tree` what a batch's rows have in common at their beginning goes through the model once (`share_prefixes`), and
    `tokens_shared` among the metrics is the share of tokens saved. The sampler decides which rows share a batch.

    The denominator counts all micro-batches of an optimizer step and all processes, so that neither changes the loss.
    Raises ValueError for packing, loss_type="dft", label smoothing, compute_loss_func, images, a mixture of experts with a
    router loss, and sequence or context parallelism; NotImplementedError for prompt learning.
    """

    args: Any

    def __init__(
        self,
        *args: Any,
        normalize: str = "weights",
        weight_column: str = "weight",
        token_weights_column: str = "token_weights",
        kernel: dk.KernelConfig = dk.KernelConfig(),
        tree: bool = False,
        **kwargs: Any,
    ) -> None:
        if normalize not in NORMALIZE:
            raise ValueError(f"normalize={normalize!r} is not known; it is one of {', '.join(map(repr, NORMALIZE))}")
        self._fused_output = SUPPORTED.seam("trl.trainer.utils", "FusedCausalLMOutput")
        self.normalize, self._kernel = normalize, kernel
        self._columns = (weight_column, token_weights_column)
        super().__init__(*args, **kwargs)
        self._refuse()
        per_sample = normalize in ("samples", "sample_weights")
        self.data_collator = WeightedCollator(
            self.data_collator, token_weights_column, weight_column, per_sample, required=False
        )
        run_inside_forward(unwrap_peft(self.model))
        self._sharing = share_prefixes(self.model) if tree else None

    def _refuse(self) -> None:
        parallel = getattr(self.accelerator, "parallelism_config", None)
        split = parallel is not None and (parallel.cp_enabled or parallel.sp_enabled)
        many = self.accelerator.num_processes > 1
        cases = {
            f"loss_type={self.args.loss_type!r}": self.args.loss_type != "nll",
            f"label_smoothing_factor={self.args.label_smoothing_factor}": self.args.label_smoothing_factor > 0,
            "compute_loss_func": self.compute_loss_func is not None,
            "a dataset with images": self._is_vision_dataset,
            "the router loss of a mixture of experts (router_aux_loss_coef=0 turns it off)": self.aux_loss_enabled,
            "sequence or context parallelism": split,
            "average_tokens_across_devices=False": many and not self.args.average_tokens_across_devices,
        }
        refused = [name for name, is_on in cases.items() if is_on]
        if refused:
            raise ValueError(f"DriftSFTTrainer does not take {', '.join(refused)}; SFTTrainer does")

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        if packing:
            raise ValueError(
                "packing=True drops the weights of rows; use padding_free=True, which flattens batches instead"
            )
        columns = set(dataset.column_names or next(iter(dataset)))
        weight, per_token = self._columns
        if dataset_name == "train" and not columns & set(self._columns):
            raise ValueError(
                f"the dataset has columns {sorted(columns)}, but neither {weight!r} nor {per_token!r}; "
                "add one, or train rows without weights by SFTTrainer with trl.enable()"
            )
        if per_token in columns and "input_ids" not in columns:
            raise ValueError(
                f"{per_token!r} needs a dataset that is tokenised: which token is which is not known before"
            )
        if per_token in columns and args.max_length is not None:
            start = args.truncation_mode == "keep_start"
            kept = slice(None, args.max_length) if start else slice(-args.max_length, None)
            dataset = dataset.map(_cut, fn_kwargs={"column": per_token, "kept": kept})
        return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*dict.fromkeys((*(self._signature_columns or ()), *self._columns))]

    def _reject_skip_prepare_without_labels(self, datasets, data_collator) -> None:
        super()._reject_skip_prepare_without_labels(datasets, getattr(data_collator, "inner", data_collator))

    def _factors(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Of a batch, [B, L] each, row i by what it predicts: targets, factors of −log p, shares of the denominator."""
        targets, weights = dk.shift(batch["labels"], fill=-100), dk.shift(batch["token_weights"])
        shares = dk.shift(batch["token_shares"]) if "token_shares" in batch else torch.ones_like(weights)
        counted = shares if self.normalize in ("tokens", "samples") else shares * weights
        return targets, shares * weights, torch.where(targets != -100, counted, 0.0)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        if not batch_samples:
            return None
        total = torch.stack([self._factors(batch)[2].sum() for batch in batch_samples]).sum().to(device)
        if self.accelerator.num_processes > 1:
            gathered: Any = self.accelerator.gather(total)
            total = gathered.sum()
        return total / self.get_tp_size()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """TRL's, with a model whose `log_probs` are one number: minus the finished loss."""
        targets, factors, shares = self._factors(inputs)
        labelled: Any = num_items_in_batch
        total = shares.sum() if labelled is None else torch.as_tensor(labelled)
        total = torch.where(total == 0, torch.ones_like(total), total)
        inputs = {name: value for name, value in inputs.items() if name not in ("token_weights", "token_shares")}

        def inside(hidden: Tensor, head: dk.Head) -> dict[str, Tensor]:
            out = dk.weighted_cross_entropy(
                hidden,
                head,
                targets.to(hidden.device),
                factors.to(hidden.device),
                normalizer=total,
                outputs=("entropy", "is_top1"),
                config=self._kernel,
            )
            return {"loss": out.loss, **out.outputs}

        def scored(fused_lm_head: bool = False, labels: Tensor | None = None, **kwargs: Any) -> Any:
            if not fused_lm_head:
                return model(**kwargs) if labels is None else model(labels=labels, **kwargs)
            scores = model(**kwargs, drift_inside=inside)
            mask = targets != -100
            # in evaluation TRL divides by the number of labels
            undo = 1 if num_items_in_batch is not None else mask.sum().clamp(min=1)
            return self._fused_output(
                log_probs=-scores["loss"] * undo, entropy=scores["entropy"], is_top1=scores["is_top1"], label_mask=mask
            )

        model_like: Any = scored
        one = None if num_items_in_batch is None else torch.ones_like(total)
        found = super().compute_loss(model_like, inputs, return_outputs=return_outputs, num_items_in_batch=one)
        if self._sharing is not None:
            mode = "train" if self.model is not None and self.model.training else "eval"
            self._metrics[mode]["tokens_shared"].append(self._sharing.saved)
        return found


def _cut(example: dict[str, Any], column: str, kept: slice) -> dict[str, Any]:
    if len(example[column]) != len(example["input_ids"]):
        raise ValueError(
            f"{column} has {len(example[column])} weights for {len(example['input_ids'])} tokens; one a token"
        )
    return {column: example[column][kept]}
