"""torchtitan: `DriftLoss` in the place of `ChunkedLossWrapper`, which hands a loss hidden states and the head.

    from drift_kernels.adapters.torchtitan import DriftLoss

    config.loss = DriftLoss.Config()          # was: ChunkedLossWrapper.Config(loss_fn=CrossEntropyLoss.Config(…))

One pass over all tokens instead of a forward and a backward a chunk. Left out: losses other than cross-entropy (the inner
`loss_fn` reads logits), and vocabularies split over tensor-parallel ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import drift_kernels as dk
from drift_kernels.adapters._common import Support

SUPPORTED = Support("torchtitan", "0.3", "0.4")
SUPPORTED.check()

from torchtitan.components.loss import (  # noqa: E402  (the check above says how to get it)
    ChunkedLossWrapper,
    CrossEntropyLoss,
)
from torchtitan.distributed.spmd_types import spmd_mesh_size  # noqa: E402
from torchtitan.distributed.utils import get_spmd_backend  # noqa: E402


class DriftLoss(ChunkedLossWrapper):
    """Σ over labels of wᵢ·(−log pᵢ) / global_valid_tokens, as `ChunkedLossWrapper` over `CrossEntropyLoss` for w = 1.

    Runs inside the head's own forward, so that FSDP gathers its weight and reduces its gradient as for any module. Tokens
    with the label −100 are never multiplied. `token_weights` [B, L] among the loss inputs gives each label a weight.
    Raises ValueError for another inner loss, NotImplementedError for a head that is no plain linear layer or is split over
    tensor-parallel ranks.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ChunkedLossWrapper.Config):
        kernel: dk.KernelConfig = field(default_factory=dk.KernelConfig)
        """How the op runs; `num_chunks` is not read, since chunks follow from its workspace."""

    def __init__(self, config: Config, *, compile_config: Any = None) -> None:
        if type(config.loss_fn) is not CrossEntropyLoss.Config:
            raise ValueError(
                f"loss_fn={type(config.loss_fn).__qualname__} reads logits; DriftLoss is cross-entropy, use ChunkedLossWrapper"
            )
        super().__init__(config, compile_config=compile_config)
        self.kernel = config.kernel

    def set_lm_head(self, lm_head: nn.Module) -> None:
        """The head; NotImplementedError unless its forward is that of nn.Linear."""
        if not isinstance(lm_head, nn.Linear) or type(lm_head).forward is not nn.Linear.forward:
            raise NotImplementedError(
                f"lm_head is a {type(lm_head).__name__}, whose forward is not nn.Linear's; use ChunkedLossWrapper"
            )
        super().set_lm_head(lm_head)

    def __call__(
        self, pred: Tensor, labels: Tensor, global_valid_tokens: Tensor | None = None, **loss_inputs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, {}) of hidden states `pred` [B, L, D] and labels [B, L]; without `global_valid_tokens` a sum."""
        head: Any = self.lm_head
        if head is None:
            raise RuntimeError("call set_lm_head before the loss; torchtitan's trainer does")
        weights = loss_inputs.get("token_weights")
        count = torch.as_tensor(1.0 if global_valid_tokens is None else global_valid_tokens)
        count = torch.where(count == 0, torch.ones_like(count), count)  # a global batch without a label has loss 0

        def inside(hidden: Tensor) -> Tensor:
            split = get_spmd_backend() == "spmd_types" and spmd_mesh_size("tp") > 1
            if split or hasattr(head.weight, "full_tensor") or hasattr(hidden, "full_tensor"):
                raise NotImplementedError(
                    "a head or hidden states split over tensor-parallel ranks are not supported; use ChunkedLossWrapper"
                )
            return dk.weighted_cross_entropy(
                hidden,
                dk.Head(head.weight, bias=head.bias),
                labels,
                weights,
                normalizer=count,
                config=self.kernel,
            ).loss

        before = vars(head).get("forward")
        head.forward = inside
        try:
            return head(pred), {}
        finally:
            del head.forward
            if before is not None:
                head.forward = before
