"""The three matrix products of a chunk on a CPU: logits, and from their gradient dhidden and dweight. Two ways to one sum.

`Native` multiplies in `csrc/cpu/gemm.cpp`, summing in fp32. Halves are widened on the way into its panels; with AVX512-BF16
it multiplies bf16 operands as they are (torch's bf16 products round their results to bf16) and rounds d(logits) to bf16 on
the way in. `Widened` gives torch operands in the compute dtype. `LowRank` adds a LoRA head's part to either.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from drift_kernels import memory
from drift_kernels.backends import cpu
from drift_kernels.tensors import LoRAHead

# Of a widened tile of a weight: small enough for a cache, with rows enough for a product.
TILE_BYTES, TILE_ROWS = 2 << 20, 256
TILE_SHARE = 8  # and at most this part of the workspace


def row_stride(width: int, dtype: torch.dtype) -> int:
    """Elements from one row of logits to the next: rows begin at multiples of 64 bytes, but not all at multiples of 2,048.

    Those share few sets of a cache, and of the products two read down the columns. With V = 65,536 a call took 4 % longer.
    """
    line = 64 // dtype.itemsize
    stride = -(-width // line) * line
    return stride + line if stride % (32 * line) == 0 else stride


class LowRank:
    """What a `LoRAHead` adds to the products of a chunk, in the compute dtype (out= keeps autocast away)."""

    def __init__(self, head: LoRAHead, dtype: torch.dtype) -> None:
        self.A, self.B, self.scale = head.A.to(dtype), head.B.to(dtype), head.scale

    def _down(self, hidden: Tensor) -> Tensor:
        """scale · hidden · Aᵀ [C, r]"""
        out = hidden.new_empty((hidden.shape[0], self.A.shape[0]), dtype=self.A.dtype)
        return torch.mm(hidden.to(self.A.dtype), self.A.t(), out=out).mul_(self.scale)

    def add_logits(self, hidden: Tensor, out: Tensor) -> None:
        """out [C, V] += scale · hidden [C, D] · Aᵀ · Bᵀ"""
        torch.addmm(out, self._down(hidden), self.B.t(), out=out)

    def add_gradients(
        self, dlogits: Tensor, hidden: Tensor, dhidden: Tensor | None, dA: Tensor | None, dB: Tensor | None
    ) -> None:
        """Adds to what there is of dhidden [C, D], dA [r, D] and dB [V, r]."""
        if dB is not None:
            torch.addmm(dB, dlogits.t(), self._down(hidden), out=dB)
        if dhidden is None and dA is None:
            return
        up = torch.mm(dlogits, self.B, out=dlogits.new_empty((dlogits.shape[0], self.B.shape[1]))).mul_(self.scale)
        if dhidden is not None:
            torch.addmm(dhidden, up, self.A, out=dhidden)
        if dA is not None:
            torch.addmm(dA, up.t(), hidden.to(self.A.dtype), out=dA)


class Widened:
    """Products by torch in `dtype`; a weight of another dtype is widened tile by tile."""

    def __init__(self, weight: Tensor, dtype: torch.dtype, workspace: int) -> None:
        V, D = weight.shape
        self.weight, self.operand, self.sums = weight, dtype, dtype
        self.row_bytes = D * dtype.itemsize  # of the workspace for each row: the gathered hidden rows
        self.bytes, self.tile, self.buffer = 0, V, None  # bytes: of the workspace once
        if weight.dtype != dtype:
            best = max(TILE_BYTES // self.row_bytes, TILE_ROWS)
            self.tile = max(1, min(V, best, workspace // TILE_SHARE // self.row_bytes))
            self.bytes = self.tile * self.row_bytes
            self.buffer = memory.empty("tile", (self.tile, D), dtype)

    def reserve(self, rows: int) -> None:
        """Makes room for chunks of at most `rows` rows."""

    def _parts(self) -> Iterator[slice]:
        V = self.weight.shape[0]
        return (slice(v, min(v + self.tile, V)) for v in range(0, V, self.tile))

    def _tiles(self) -> Iterator[tuple[slice, Tensor]]:
        for part in self._parts():
            tile = self.weight[part]
            yield part, tile if self.buffer is None else self.buffer[: part.stop - part.start].copy_(tile)

    def logits(self, hidden: Tensor, out: Tensor) -> None:
        """out [C, V] = hidden [C, D] · weightᵀ"""
        for part, weight in self._tiles():
            torch.mm(hidden, weight.t(), out=out[:, part])

    def dhidden(self, dlogits: Tensor, out: Tensor) -> None:
        """out [C, D] = dlogits [C, V] · weight"""
        for part, weight in self._tiles():
            torch.addmm(out, dlogits[:, part], weight, beta=0 if part.start == 0 else 1, out=out)

    def dweight(
        self,
        dlogits: Tensor,
        hidden: Tensor,
        sums: Tensor | None,
        rounded: Tensor | None,
        *,
        accumulate: bool,
        scale: float,
    ) -> None:
        """sums [V, D] (+)= scale · dlogits [C, V]ᵀ · hidden [C, D]; what then would be there to `rounded` [V, D] where given."""
        if rounded is None:
            assert sums is not None
            torch.addmm(sums, dlogits.t(), hidden, beta=int(accumulate), alpha=scale, out=sums)
            return
        for part in self._parts():
            tile = self.buffer if sums is None else sums[part]
            assert tile is not None  # what is rounded was widened
            tile = tile[: part.stop - part.start]
            torch.addmm(tile, dlogits[:, part].t(), hidden, beta=int(accumulate), alpha=scale, out=tile)
            rounded[part].copy_(tile)


class Native:
    """The same products by `csrc/cpu/gemm.cpp`, of fp32 rows and a weight of any dtype, or of bf16 ones with a bf16 weight."""

    sums = torch.float32

    def __init__(self, weight: Tensor, operand: torch.dtype, workspace: int) -> None:
        self.weight, self.operand, self.threads = weight, operand, 1
        self.threads = max(1, min(torch.get_num_threads(), workspace // 2 // self._scratch_bytes(8)))
        self.bytes = self._scratch_bytes(8)
        packed = self.bytes - self._scratch_bytes(0)
        self.row_bytes = weight.shape[1] * operand.itemsize + packed // 8  # as gathered, and packed eight by eight

    def _scratch_bytes(self, rows: int) -> int:
        return cpu.gemm_scratch_bytes(rows, self.weight.shape[1], self.threads, self.operand)

    def reserve(self, rows: int) -> None:
        self.scratch = memory.empty("scratch", (self._scratch_bytes(rows),), torch.uint8)

    def logits(self, hidden: Tensor, out: Tensor) -> None:
        cpu.gemm_nt(hidden, self.weight, out, self.scratch, self.threads)

    def dhidden(self, dlogits: Tensor, out: Tensor) -> None:
        pairs = self.operand == torch.bfloat16
        cpu.gemm_nn(dlogits, self.weight, out, self.scratch, self.threads, pairs=pairs)

    def dweight(
        self,
        dlogits: Tensor,
        hidden: Tensor,
        sums: Tensor | None,
        rounded: Tensor | None,
        *,
        accumulate: bool,
        scale: float,
    ) -> None:
        scratch, threads = self.scratch, self.threads
        cpu.gemm_tn(dlogits, hidden, sums, scratch, threads, accumulate=accumulate, scale=scale, rounded=rounded)


class WeightGradient:
    """dweight [V, D] = scale · Σ dlogitsᵀ · hidden over chunks, summed in the compute dtype, or added to `into`.

    A bf16 weight's leaves as bf16, and backward can hand it over as it is: the last product rounds it on its way out, so that
    a single chunk needs no [V, D] of sums. (An fp16 one's stays fp32: it would underflow before loss scaling.)
    """

    def __init__(self, by: Widened | Native, into: Tensor | None = None, scale: float = 1.0) -> None:
        self.by, self.sums, self.scale = by, into, scale
        self.dtype = by.sums if into is not None else gradient_dtype(by.weight.dtype, by.sums, by.weight.device)
        self.rounded = None

    def add(self, dlogits: Tensor, hidden: Tensor, *, final: bool) -> None:
        """Adds scale · dlogits [C, V]ᵀ · hidden [C, D]; `final` says that nothing comes after."""
        by, accumulate = self.by, self.sums is not None
        if final and self.dtype != by.sums:
            self.rounded = memory.empty("dweight", by.weight.shape, self.dtype)
        elif self.sums is None:
            self.sums = memory.empty("sums" if self.dtype != by.sums else "dweight", by.weight.shape, by.sums)
        by.dweight(dlogits, hidden, self.sums, self.rounded, accumulate=accumulate, scale=self.scale)

    def result(self) -> Tensor:
        """The gradient; zero where nothing was added."""
        if self.rounded is not None:
            return self.rounded
        return torch.zeros(self.by.weight.shape, dtype=self.dtype) if self.sums is None else self.sums.to(self.dtype)


def gradient_dtype(weight: torch.dtype, compute: torch.dtype, device: torch.device) -> torch.dtype:
    """What dtype a weight's gradient leaves an op in. On a GPU backward rounds it while it scales it, in one pass."""
    return weight if weight == torch.bfloat16 and device.type == "cpu" else compute


def native_operand(hidden: Tensor, weight: Tensor) -> torch.dtype | None:
    """In what dtype `Native` takes hidden rows of this kind: bf16 where it can multiply in it, else fp32. None: not at all.

    That is for fp64, where the elements of a row do not lie side by side in memory (the kernels read them so), and on a CPU
    without AVX2 or with a compiler that did not know it.
    """
    dtypes = {hidden.dtype, weight.dtype}
    if not (dtypes <= set(cpu.WEIGHT_TYPES) and hidden.stride(1) == weight.stride(1) == 1 and cpu.has_gemm()):
        return None
    return torch.bfloat16 if dtypes == {torch.bfloat16} and cpu.has_bf16_gemm() else torch.float32


def choose(hidden: Tensor, weight: Tensor, dtype: torch.dtype, workspace: int) -> Widened | Native:
    """The products of hidden rows by `weight` in the compute dtype; the workspace bounds a widened tile."""
    operand = native_operand(hidden, weight)
    return Widened(weight, dtype, workspace) if operand is None else Native(weight, operand, workspace)


def block_of_rows(use: str, count: int, width: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised logits [count, width], for `use` as `memory.empty` has it."""
    return memory.empty(use, (count, row_stride(width, dtype)), dtype)[:, :width]


class CpuBlock:
    """`pieces.LogitsBlock` on a CPU."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, lora: LoRAHead | None, dtype: torch.dtype, workspace: int
    ) -> None:
        self.by, self.dtype, self.vocabulary = choose(hidden, weight, dtype, workspace), dtype, weight.shape[0]
        self.low_rank = None if lora is None else LowRank(lora, dtype)
        self.bytes = self.by.bytes  # of the workspace: once,
        self.row_bytes = row_stride(self.vocabulary, dtype) * dtype.itemsize + self.by.row_bytes  # and for each row

    def reserve(self, count: int) -> None:
        """Makes room for `count` rows."""
        self.by.reserve(count)
        self.block = block_of_rows("teacher's logits", count, self.vocabulary, self.dtype)

    def products(self, hidden: Tensor) -> Tensor:
        """[n, V] of hidden rows [n, D]; the next call's take their place."""
        hidden, out = hidden.to(self.by.operand), self.block[: hidden.shape[0]]
        self.by.logits(hidden, out)
        if self.low_rank is not None:
            self.low_rank.add_logits(hidden, out)
        return out
