"""One chunk of rows on its way through a loop, and the Protocol of a pass, which makes the chunks and takes their gradients.

`cpu_sweep.CpuSweep` and `gpu_sweep.GpuSweep` fulfil it. A loop in `driver` reads: for each piece of a sweep, statistics; from
these, derivatives by them; a gradient by the logits; and the sweep adds it to those of hidden, weight and bias.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from drift_kernels.backends.contract import BucketSlopes, Chunk, Coefs, RowKernels, TeacherChunk
from drift_kernels.calls import Call, HeadOptions
from drift_kernels.formulas import Tokens
from drift_kernels.plan import Plan
from drift_kernels.spec import PolicySpec
from drift_kernels.tensors import Grads, Inputs


@dataclass
class Piece:
    """One chunk on its way: rows [start, stop) of a plan, entries [first, last) of the plan's."""

    kernels: RowKernels
    plan: Plan
    start: int
    stop: int
    first: int
    last: int
    hidden: Tensor  # [C, D]
    logits: Tensor  # [C, V] products, or logits after `row_stats` in place
    chunk: Chunk
    out: (
        Tensor | None
    )  # [C, V], receives the gradient by the products: `logits` itself in place; None if none is wanted
    final: bool  # no chunk adds to the gradients after this one
    raw: bool = True  # `logits` holds products

    def entries(self, values: Tensor) -> Tensor:
        """The chunk's part [M] of values of the plan's entries."""
        return values[self.first : self.last]

    def sum_by_row(self, values: Tensor | None) -> Tensor | None:
        """Values of the chunk's entries [M] added up for each of its rows [C]."""
        if values is None or self.chunk.row_ptr is None:
            return values
        return torch.segment_reduce(values, "sum", offsets=self.chunk.row_ptr, initial=0)

    def first_of_row(self, values: Tensor) -> Tensor:
        """Values of the chunk's entries [M], equal within a row, for each of its rows [C]."""
        return values if self.chunk.row_ptr is None else values[self.chunk.row_ptr[:-1]]

    def row_stats(self, want: tuple[str, ...]) -> dict[str, Tensor]:
        """The statistics in `want`, per row or per entry."""
        stats = self.kernels.row_stats(self.logits, self.chunk, want)
        self.raw = self.out is not self.logits  # in place they leave logits (unread without an `out`)
        return stats

    def fused_policy(
        self, spec: PolicySpec, tokens: Tokens, want: tuple[str, ...]
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Statistics and policy terms of the chunk's tokens, and live rows [C] if a gradient is wanted."""
        return self.kernels.fused_policy(self.logits, self.chunk, spec, tokens, want, out=self.out)

    def fused_distill(
        self, coefs: Coefs, teacher: TeacherChunk, weights: Tensor, alpha: float
    ) -> tuple[Tensor, Tensor | None]:
        """Divergences from the teacher's rows [n], after `row_stats`, and live rows [C] if a gradient is wanted."""
        return self.kernels.fused_distill(self.logits, self.chunk, coefs, teacher, weights, alpha, out=self.out)

    def grad_logits(self, coefs: Coefs) -> Tensor:
        """Writes the gradient; returns live rows [C]."""
        assert self.out is not None
        return self.kernels.grad_logits(self.logits, self.chunk, coefs, raw=self.raw, out=self.out)

    def grad_buckets(self, coefs: Coefs, teacher_rows: Tensor | None, slopes: BucketSlopes) -> Tensor:
        """Writes the gradient of a loss of some tokens' log-probs, after `row_stats`; returns live rows [C]."""
        assert self.out is not None
        return self.kernels.grad_buckets(self.logits, self.chunk, coefs, teacher_rows, slopes, out=self.out)


class LogitsBlock(Protocol):
    """Products of hidden rows and a teacher's head, in memory of their own."""

    bytes: int  # of the workspace once
    row_bytes: int  # and for each row

    def reserve(self, count: int) -> None:
        """Makes room for `count` rows."""
        ...

    def products(self, hidden: Tensor) -> Tensor:
        """[n, V] of hidden rows [n, D]; the next call's take their place."""
        ...


class Sweep(Protocol):
    """A pass over the rows that count: products chunk by chunk, and gradients back into hidden, weight and bias."""

    x: Inputs
    call: Call
    plan: Plan
    dtype: torch.dtype  # of logits, losses and sums
    limit: int  # rows of logits that the workspace holds
    kernels: RowKernels

    def chunks(self, start: int, stop: int) -> list[tuple[int, int]]:
        """[start, stop) of a plan's rows cut into spans of at most `limit` rows."""
        ...

    def aim(self, count: int) -> int:
        """The fastest number of rows in a chunk, for `count` of them."""
        ...

    def pieces(self, plan: Plan, spans: Sequence[tuple[int, int]], *, final: bool = True) -> Iterator[Piece]:
        """The chunks [start, stop) of the plan's rows, each as soon as its products are there; they share one block.

        `final`: no gradients are added after those of the last chunk.
        """
        ...

    def add_gradients(self, piece: Piece, live: Tensor) -> None:
        """Adds the gradient that a kernel wrote for a chunk, zero except in rows that are `live` [C]."""
        ...

    def divisor(self, normalizer: Tensor) -> Tensor:
        """The number that losses are divided by before they are differentiated."""
        ...

    def total(self, parts: list[Tensor]) -> Tensor:
        """The sum of per-chunk losses (0-d), added up in fp64 and divided by whatever `divisor` left out."""
        ...

    def finish(self) -> Grads:
        """The gradients; zero if no row reached them."""
        ...

    def scatter(self, collected: dict[str, list[Tensor]], names: tuple[str, ...]) -> Tensor:
        """Per-chunk outputs as one [len(names), N] tensor, 0 for entries that took no part."""
        ...

    def score(self) -> dict[str, list[Tensor]] | None:
        """`call.outputs` of the plan's rows without logits in memory, as `scatter` takes them; None if that is not possible."""
        ...

    def check_temperature(self, temperature: Tensor | None) -> None:
        """ValueError for one that is not positive, if values can be read without a wait."""
        ...

    def checked_ids(self, ids: Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor]:
        """A teacher's ids and their log-probs. An id outside the vocabulary raises IndexError; where that would have to be
        waited for, its log-prob becomes NaN."""
        ...


def chunk_of(
    plan: Plan,
    start: int,
    stop: int,
    targets: Tensor,
    inverse_temperature: Tensor | None,
    bias: Tensor | None,
    head: HeadOptions,
) -> tuple[int, int, Chunk]:
    """[first, last) of the plan's entries in rows [start, stop), and these as kernels read them.

    `targets` are those of the plan's entries, `inverse_temperature` those of its rows.
    """
    first, last = plan.entries_of(start, stop)
    row_ptr = None if plan.row_ptr is None else plan.row_ptr[start : stop + 1] - first
    inverse = None if inverse_temperature is None else inverse_temperature[start:stop]
    return first, last, Chunk(targets[first:last], row_ptr, inverse, bias, head)


def hidden_rows(hidden: Tensor, plan: Plan, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of the plan [C, D] of `hidden` [T, D]."""
    return hidden[start:stop] if plan.index is None else hidden[plan.index[start:stop]]


def sum_in_fp64(parts: list[Tensor], sweep: Sweep) -> Tensor:
    """Σ of all elements (0-d) in the sweep's dtype."""
    total = torch.zeros((), dtype=torch.float64, device=sweep.x.hidden.device)
    for part in parts:
        total += part.double().sum()
    return total.to(sweep.dtype)
