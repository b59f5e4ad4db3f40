"""The contract between the drivers and a backend: the row kernels that its module has, and what they read.

A chunk has C rows of V logits and M entries (targets), M = C unless rows share entries by `Chunk.row_ptr`. Products are
hidden · weightᵀ; a bias, a scale, a softcap and a temperature make logits of them. Backends come in two kinds:

- in place (cpu): `row_stats` turns the products into logits, and gradients are written over them: `out` is `logits`;
- out of place (triton, cuda): products stay as they are, and gradients go to another `out` [C, V] of fp32, bf16 or fp16.

A log-sum-exp comes in two parts, `lse` and `lse_low`, which rounding took from it. Logits may share an offset far larger than
their spread, at which `lse` alone is too coarse to subtract: a log-prob is (z − lse) − lse_low.

Kernels that write a gradient return with it which rows are not all zero, [C] uint8. Those that may do without one take
`out=None`, and return None for these flags.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from drift_kernels.calls import HeadOptions
from drift_kernels.formulas import Tokens
from drift_kernels.spec import PolicySpec


@dataclass(frozen=True)
class Chunk:
    """The entries of some rows, and how their products become logits. Tensors are contiguous and of the logits' dtype."""

    targets: Tensor  # [M] int64
    row_ptr: Tensor | None  # [C + 1] int64, None: one entry a row
    inv_temperature: Tensor | None  # [C], None: the head's own
    bias: Tensor | None  # [V]
    head: HeadOptions


@dataclass(frozen=True)
class Coefs:
    """Derivatives of a loss by a chunk's statistics, None for zeros, and the statistics that its gradient reads."""

    lse: Tensor  # [C] log-sum-exps
    dlogprobs: Tensor | None = None  # [M] d(loss)/d(log-prob)
    dentropy: Tensor | None = None  # [C] d(loss)/d(entropy)
    entropy: Tensor | None = None  # [C] entropies, read if there is a `dentropy`
    dlse: Tensor | None = None  # [C] d(loss)/d(lse)
    lse_low: Tensor | None = None  # [C] what rounding took from `lse`, None for zeros


@dataclass(frozen=True)
class TeacherChunk:
    """A teacher's n rows for a chunk of C."""

    logits: Tensor  # [n, V], as `row_stats` left them
    chunk: Chunk
    lse: Tensor  # [n]
    rows: Tensor | None = None  # [C] int64, index of each row's teacher row, −1 if none; None: row i has teacher row i
    lse_low: Tensor | None = None  # [n] what rounding took from `lse`, None for zeros


@dataclass(frozen=True)
class BucketSlopes:
    """Tokens of n teacher rows, and derivatives of a loss by the student's log-probs of them."""

    ids: Tensor  # [n, k] int64, distinct within a row
    dlogprobs: Tensor  # [n, k]
    rest: Tensor | None = None  # [n] log-prob of all other tokens together
    drest: Tensor | None = None  # [n] the derivative by it


class RowKernels(Protocol):
    """The functions that a backend's module has."""

    def row_stats(self, logits: Tensor, chunk: Chunk, want: tuple[str, ...]) -> dict[str, Tensor]:
        """The statistics in `want` of products [C, V], by `params.ROW_OUTPUTS` [C] or `params.ENTRY_OUTPUTS` [M]."""
        ...

    def grad_logits(self, logits: Tensor, chunk: Chunk, coefs: Coefs, *, raw: bool, out: Tensor) -> Tensor:
        """d(loss)/d(product) into `out`, from products (raw) or logits; returns live rows."""
        ...

    def fused_policy(
        self,
        logits: Tensor,
        chunk: Chunk,
        spec: PolicySpec,
        tokens: Tokens,
        want: tuple[str, ...],
        *,
        out: Tensor | None = None,
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Statistics and policy terms in `want` of products, and d(loss)/d(product) into `out`; outputs and live rows.

        Of `tokens` it reads advantages, old, ref and weights [M].
        """
        ...

    def fused_distill(
        self,
        logits: Tensor,
        chunk: Chunk,
        coefs: Coefs,
        teacher: TeacherChunk,
        weights: Tensor,
        alpha: float,
        *,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Divergences [n] from the teacher, weighted in the loss by `weights` [C], and d(loss)/d(product) into `out`.

        `logits` as `row_stats` left them; `coefs` are the derivatives of the loss's other terms. Returns live rows too.
        """
        ...

    def top_k(self, logits: Tensor, chunk: Chunk, teacher_rows: Tensor | None, n: int, k: int) -> Tensor:
        """Ids [n, k] int64 of the k largest logits of each row that has a teacher, largest first; `TeacherChunk.rows`."""
        ...

    def bucket_logprobs(
        self,
        logits: Tensor,
        chunk: Chunk,
        teacher_rows: Tensor | None,
        lse: Tensor,
        ids: Tensor,
        rest: bool,
        lse_low: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probs of `ids` [n, k], and with `rest` of all other tokens together [n]; `logits` as `row_stats` left them."""
        ...

    def grad_buckets(
        self,
        logits: Tensor,
        chunk: Chunk,
        coefs: Coefs,
        teacher_rows: Tensor | None,
        slopes: BucketSlopes,
        *,
        out: Tensor,
    ) -> Tensor:
        """d(loss)/d(product) into `out`, by derivatives of the results of `bucket_logprobs`; returns live rows."""
        ...

    def score(self, hidden: Tensor, weight: Tensor, chunk: Chunk, want: tuple[str, ...]) -> dict[str, Tensor] | None:
        """The statistics in `want` of hidden rows [C, D] and a weight [V, D] of one dtype, without logits in memory.

        One target a row. None: this backend has no such kernel.
        """
        ...
