"""What goes through the chunk loop: an op's tensors, its gradients, and one chunk on its way."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from drift_kernels.backends.params import Chunk
from drift_kernels.plan import Plan

WORKSPACE_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}


@dataclass(frozen=True)
class Piece:
    """One chunk on its way: `logits` [C, V] of `hidden` [C, D] rows, entries [first, last) of the plan's."""

    plan: Plan
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
