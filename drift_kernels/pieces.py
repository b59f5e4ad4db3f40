"""What goes through the chunk loop: an op's tensors, its gradients, and one chunk on its way."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from drift_kernels import rows
from drift_kernels.backends.params import Chunk
from drift_kernels.formulas import NO_TOKENS, Tokens
from drift_kernels.products import LoRAHead

WORKSPACE_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}


@dataclass(frozen=True)
class Inputs:
    """T hidden rows, N entries, vocabulary V, width D. Per-entry floats are in the compute dtype."""

    hidden: Tensor  # [T, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    targets: Tensor  # [N] int64
    rows: Tensor | None  # [N] int64 sorted; None = entry i is of hidden row i
    active: Tensor | None  # [A] int64, the entries that may count
    temperature: Tensor | None  # [T]
    tokens: Tokens = NO_TOKENS
    lora: LoRAHead | None = None
    weight_grad: Tensor | None = None  # [V, D], what dweight is added to in place of a fresh one


@dataclass
class Grads:
    """Gradients in the compute dtype, dweight as `products.gradient_dtype` has it; None where nobody asked."""

    hidden: Tensor | None  # [T, D]
    weight: Tensor | None  # [V, D]
    bias: Tensor | None  # [V]
    lora_a: Tensor | None = None  # [r, D]
    lora_b: Tensor | None = None  # [V, r]

    def flat(self) -> tuple[Tensor | None, ...]:
        """In the order of the ops' results."""
        return self.hidden, self.weight, self.bias, self.lora_a, self.lora_b


@dataclass(frozen=True)
class Piece:
    """One chunk on its way: `logits` [C, V] of `hidden` [C, D] rows, entries [first, last) of the plan's."""

    plan: rows.Plan
    start: int
    stop: int
    first: int
    last: int
    hidden: Tensor
    logits: Tensor
    chunk: Chunk
    final: bool  # no chunk adds to the gradients after this one
    into: dict[str, Tensor] = field(default_factory=dict)  # out= of kernels that do not write gradients over the logits

    def pick(self, values: Tensor | None) -> Tensor | None:
        """Of the plan's entries [M] those of this chunk."""
        return None if values is None else values[self.first : self.last]

    def per_row(self, values: Tensor | None) -> Tensor | None:
        """This chunk's entries' values added up for each of its rows [C]."""
        if values is None or self.chunk.row_ptr is None:
            return values
        return torch.segment_reduce(values, "sum", offsets=self.chunk.row_ptr, initial=0)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for the rest: what logits, losses and sums are held in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
