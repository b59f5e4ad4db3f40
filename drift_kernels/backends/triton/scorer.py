"""Scores without logits in memory: tiles of hidden · weightᵀ by tl.dot, and the statistics of each tile folded into its rows'.

A program takes a tile of rows and a span of the vocabulary; rows of the grid's first axis share that span, so that a weight
tile comes from L2 for all but the first of them. Spans leave partial sums, which `partials.merge` joins in one order. One
target a row; a backward pass needs the logits' gradient and is no job for this kernel.

Operands are read through tensor descriptors (TMA) where the GPU has them, else through pointers. fp32 operands are multiplied
as torch's matmul setting says: TF32 only where it is allowed.
"""

# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from drift_kernels.backends.contract import Chunk
from drift_kernels.backends.partials import SUMS, Partials, merge, sweeps
from drift_kernels.backends.triton.launch import UNALIGNED, Launch, capability, run, score_launch
from drift_kernels.backends.triton.online import LOWEST, logit

PROGRAMS = 264  # enough for two on each multiprocessor of an H100


@triton.jit
def tile(operand, stride, first, k, count, D, SIZE: tl.constexpr, DEPTH: tl.constexpr, TMA: tl.constexpr):
    """[SIZE, DEPTH] of an operand's rows from `first` and columns from `k`, zeros outside of it."""
    if TMA:
        block = operand.load([first, k])
    else:
        rows = first + tl.arange(0, SIZE)
        cols = k + tl.arange(0, DEPTH)
        inside = (rows < count)[:, None] & (cols < D)[None, :]
        block = tl.load(operand + rows.to(tl.int64)[:, None] * stride + cols[None, :], mask=inside, other=0.0)
    return block


@triton.jit
def fold_tile(z, m, s0, s1, s2, ENTROPY: tl.constexpr, SQUARES: tl.constexpr):
    """The logits [rows, columns] of a tile into each row's maximum and sums."""
    highest = tl.max(z, axis=1)
    top = tl.where(highest > m, highest, m)
    k = tl.exp(m - top)
    d = z - top[:, None]
    e = tl.exp(d)
    if ENTROPY:
        s1 = k * (s1 + (m - top) * s0) + tl.sum(tl.where(e != 0, e * d, 0.0), axis=1)
    if SQUARES:
        s2 = k * k * s2 + tl.sum(e * e, axis=1)
    return top, k * s0 + tl.sum(e, axis=1), s1, s2


@triton.jit(do_not_specialize=["rows", "tiles"], do_not_specialize_on_alignment=UNALIGNED)
def score_kernel(
    hidden, hidden_stride, weight, weight_stride, rows, V, D, targets, bias, inverses, inverse, scale, cap,
    partials, at_target, tiles,
    ENTROPY: tl.constexpr, EXTRA: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """`partials` [splits, 5, rows] and `at_target` [splits, rows] of `tiles` tiles of BLOCK columns for each split."""
    row0 = tl.program_id(0) * ROWS
    split = tl.program_id(1)
    row = row0 + tl.arange(0, ROWS)
    there = row < rows
    y = tl.load(targets + row, mask=there, other=-1)
    inv = inverse if inverses is None else tl.load(inverses + row, mask=there, other=1.0)[:, None]
    m = tl.full([ROWS], LOWEST, tl.float32)
    s0 = tl.zeros([ROWS], tl.float32)
    s1 = tl.zeros([ROWS], tl.float32)
    s2 = tl.zeros([ROWS], tl.float32)
    sz = tl.zeros([ROWS], tl.float32)
    at = tl.full([ROWS], float("-inf"), tl.float32)
    first = split * tiles * BLOCK
    last = tl.minimum(first + tiles * BLOCK, V)
    for col0 in range(first, last, BLOCK):
        acc = tl.zeros([ROWS, BLOCK], tl.float32)
        for k in range(0, D, DEPTH):
            a = tile(hidden, hidden_stride, row0, k, rows, D, ROWS, DEPTH, TMA)
            b = tile(weight, weight_stride, col0, k, V, D, BLOCK, DEPTH, TMA)
            acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
        cols = col0 + tl.arange(0, BLOCK)
        inside = (cols < V)[None, :]
        shift = None if bias is None else tl.load(bias + cols, mask=cols < V, other=0.0)[None, :]
        z = logit(acc, shift, scale, cap, inv)
        if EXTRA:
            sz += tl.sum(tl.where(inside, z, 0.0), axis=1)
        hit = (y >= col0) & (y < tl.minimum(col0 + BLOCK, V))
        at = tl.where(hit, tl.sum(tl.where(cols[None, :] == y.to(tl.int32)[:, None], z, 0.0), axis=1), at)
        m, s0, s1, s2 = fold_tile(tl.where(inside, z, float("-inf")), m, s0, s1, s2, ENTROPY, EXTRA)
    sums = partials + split.to(tl.int64) * 5 * rows + row
    tl.store(sums, m, mask=there)
    tl.store(sums + rows, s0, mask=there)
    tl.store(sums + 2 * rows, s1, mask=there)
    tl.store(sums + 3 * rows, s2, mask=there)
    tl.store(sums + 4 * rows, sz, mask=there)
    tl.store(at_target + split.to(tl.int64) * rows + row, at, mask=there)


def has_descriptors(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the operands can be read through tensor descriptors. They cannot where

    - the GPU is older than sm_90 and has no TMA;
    - an operand or its rows do not begin at a multiple of 16 bytes, or its columns do not lie side by side;
    - there is nothing to read.
    """

    def describable(t: Tensor) -> bool:
        size = t.element_size()
        address = t.storage_offset() * size if t.device.type == "meta" else t.data_ptr()
        return t.numel() > 0 and t.stride(1) == 1 and t.stride(0) * size % 16 == 0 and address % 16 == 0

    return capability(hidden.device) >= (9, 0) and describable(hidden) and describable(weight)


def splits_of(rows: int, V: int, launch: Launch) -> tuple[int, int]:
    """(splits of the vocabulary, tiles in each): enough programs for the GPU, by the shapes alone."""
    tiles = -(-V // launch.block)
    wanted = max(1, min(tiles, PROGRAMS // -(-rows // launch.rows)))
    each = -(-tiles // wanted)
    return -(-tiles // each), each


def precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies: as torch would. Older settings of torch write this one too; reading them raises once it is used."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def score(hidden: Tensor, weight: Tensor, chunk: Chunk, want: tuple[str, ...]) -> dict[str, Tensor]:
    """The statistics in `want` of hidden [C, D] · weightᵀ [D, V], [C] each, for one target a row.

    `hidden` and `weight` have one type: fp32, bf16 or fp16; rows of either may lie apart.
    """
    if chunk.row_ptr is not None:
        raise ValueError("row_ptr: the scoring kernel takes one target a row; use row_stats")
    if hidden.dtype != weight.dtype or hidden.stride(1) != 1 or weight.stride(1) != 1:
        raise ValueError(
            f"hidden {hidden.dtype} {hidden.stride()} and weight {weight.dtype} {weight.stride()} must have one type and "
            "columns that lie side by side"
        )
    (C, D), V, sums, exact = hidden.shape, weight.shape[0], sweeps(want), precision(hidden.dtype)
    described = has_descriptors(hidden, weight)
    launch = score_launch(hidden, "half" if hidden.element_size() == 2 else exact, described, not any(sums.values()))
    splits, tiles = splits_of(C, V, launch)
    partials = Partials(
        torch.empty((splits, SUMS, C), dtype=torch.float32, device=hidden.device),
        torch.empty((splits, C), dtype=torch.float32, device=hidden.device),
    )
    operands: dict[str, Any] = {"hidden": hidden, "weight": weight}
    if described:
        blocks = {"hidden": [launch.rows, launch.depth], "weight": [launch.block, launch.depth]}
        operands = {name: TensorDescriptor.from_tensor(t, blocks[name]) for name, t in operands.items()}
    arguments = {
        **operands,
        "hidden_stride": hidden.stride(0),
        "weight_stride": weight.stride(0),
        "rows": C,
        "V": V,
        "D": D,
        "targets": chunk.targets,
        "bias": chunk.bias,
        "inverses": chunk.inv_temperature,
        "inverse": 1 / chunk.head.temperature,
        "scale": chunk.head.logit_scale,
        "cap": chunk.head.softcap,
        "partials": partials.sums,
        "at_target": partials.at_target,
        "tiles": tiles,
        **sums,
        "PRECISION": exact,
        "TMA": described,
        "ROWS": launch.rows,
        "BLOCK": launch.block,
        "DEPTH": launch.depth,
    }
    run(score_kernel, (-(-C // launch.rows), splits), hidden, launch, arguments)
    return merge(partials, chunk.targets, None, V, want)
