"""The tensors that an op reads and the gradients that it makes, whatever the backend."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from drift_kernels.formulas import NO_TOKENS, Tokens


@dataclass(frozen=True)
class LoRAHead:
    """A low-rank addition to the head: the weight is W + scale·B·A, which is never formed."""

    A: Tensor  # [r, D]
    B: Tensor  # [V, r]
    scale: float = 1.0  # alpha / r as LoRA has it (arXiv 2106.09685)

    def __post_init__(self) -> None:
        if isinstance(self.scale, str) or not math.isfinite(float(self.scale)):
            raise ValueError(f"lora.scale={self.scale!r} must be a finite number")


@dataclass(frozen=True)
class Inputs:
    """T hidden rows, N entries, vocabulary V, width D. Per-entry floats are in the compute dtype."""

    hidden: Tensor  # [T, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    targets: Tensor  # [N] int64
    rows: Tensor | None  # [N] int64 sorted, the hidden row that each target reads; None: target i reads row i
    active: Tensor | None  # [A] int64, the entries that may count
    temperature: Tensor | None  # [T]
    tokens: Tokens = NO_TOKENS
    lora: LoRAHead | None = None
    weight_grad: Tensor | None = None  # [V, D], to which dweight is added instead of a new tensor


@dataclass
class Grads:
    """Gradients in the compute dtype, dweight in `products.gradient_dtype`; None if not wanted."""

    hidden: Tensor | None  # [T, D]
    weight: Tensor | None  # [V, D]
    bias: Tensor | None  # [V]
    lora_a: Tensor | None = None  # [r, D]
    lora_b: Tensor | None = None  # [V, r]

    def flat(self) -> tuple[Tensor | None, ...]:
        """In the order of the ops' results."""
        return self.hidden, self.weight, self.bias, self.lora_a, self.lora_b


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for the rest: the dtype of logits, losses and sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_dtensor(value: object) -> bool:
    """Whether `value` is a DTensor, without importing DTensor: a process that has one has imported it (0.9 s)."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)
