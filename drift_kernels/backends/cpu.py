"""C++ kernels (`csrc/cpu`) on torch tensors. C rows of V logits, M entries; R is float32 or float64.

The products sum in fp32. They take matrices whose last stride is 1, and a scratch tensor of `gemm_scratch_bytes`. Hidden rows
are fp32, and the weight fp32, bf16 or fp16; or both are bf16, and multiplied so (`has_bf16_gemm`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from drift_kernels.backends import structs
from drift_kernels.backends.contract import BucketSlopes, Chunk, Coefs, TeacherChunk
from drift_kernels.formulas import Tokens
from drift_kernels.native import extension as _cpu
from drift_kernels.spec import PolicySpec

CPU = torch.device("cpu")
GEMM_ALIGNMENT = 64  # bytes, of the scratch


def _address(tensor: Tensor | None) -> int:
    return structs.address(tensor, CPU)


def row_stats(logits: Tensor, chunk: Chunk, want: tuple[str, ...]) -> dict[str, Tensor]:
    """Products [C, V] become logits in place; returns the statistics in `want`, per row or per entry."""
    stats, outputs = structs.stats(logits, chunk, want)
    _cpu.row_stats(structs.logit_rows(logits, chunk), stats, logits.dtype == torch.float64)
    return outputs


def _rows(logits: Tensor, chunk: Chunk, out: Tensor | None):
    """The rows as kernels take them; ValueError if gradients were to go anywhere but over the logits."""
    if out is not None and (out.data_ptr(), out.stride()) != (logits.data_ptr(), logits.stride()):
        raise ValueError("this backend writes gradients over the logits: out must be the logits")
    return structs.logit_rows(logits, chunk)


def _flags(logits: Tensor) -> Tensor:
    return torch.empty(logits.shape[0], dtype=torch.uint8)


def grad_logits(logits: Tensor, chunk: Chunk, coefs: Coefs, *, raw: bool, out: Tensor) -> Tensor:
    """Products (raw) or logits [C, V] become d(loss)/d(product) in place; returns which rows are not all zero [C] uint8."""
    rows, live = _rows(logits, chunk, out), _flags(logits)
    _cpu.grad_logits(rows, structs.coefs(coefs), raw, live.data_ptr(), logits.dtype == torch.float64)
    return live


def fused_policy(
    logits: Tensor, chunk: Chunk, spec: PolicySpec, tokens: Tokens, want: tuple[str, ...], *, out: Tensor | None = None
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Statistics, policy loss and, with `out`, d(loss)/d(product) in place; returns outputs and live rows [C]."""
    rows, live = _rows(logits, chunk, out), _flags(logits)
    stats, outputs = structs.stats(logits, chunk, want)
    policy, terms = structs.policy(logits, chunk, spec, tokens, want, out is not None)
    _cpu.fused_policy(rows, stats, policy, live.data_ptr(), logits.dtype == torch.float64)
    return outputs | terms, None if out is None else live


def top_k(logits: Tensor, chunk: Chunk, teacher_rows: Tensor | None, n: int, k: int) -> Tensor:
    """Ids [n, k] int64 of the k largest of logits [C, V], largest first; `teacher_rows` as `TeacherChunk.rows`."""
    ids = torch.empty((n, k), dtype=torch.int64)
    rows, double = structs.logit_rows(logits, chunk), logits.dtype == torch.float64
    _cpu.top_k(rows, _address(teacher_rows), structs.buckets(ids), double)
    return ids


def bucket_logprobs(
    logits: Tensor,
    chunk: Chunk,
    teacher_rows: Tensor | None,
    lse: Tensor,
    ids: Tensor,
    rest: bool,
    lse_low: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of `ids` [n, k], and with `rest` of all other tokens together [n], by logits [C, V]."""
    logprobs = logits.new_empty(ids.shape)
    others = logits.new_empty(ids.shape[0]) if rest else None
    rows, b = structs.logit_rows(logits, chunk), structs.buckets(ids, logprobs, others)
    _cpu.bucket_logprobs(
        rows, _address(teacher_rows), _address(lse), _address(lse_low), b, logits.dtype == torch.float64
    )
    return logprobs, others


def fused_distill(
    logits: Tensor,
    chunk: Chunk,
    coefs: Coefs,
    teacher: TeacherChunk,
    weights: Tensor,
    alpha: float,
    *,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Divergences [n] of logits [C, V] from the teacher's [n, V], and with `out` d(loss)/d(product) in place; live rows."""
    rows, live = _rows(logits, chunk, out), _flags(logits)
    t, divergence = structs.teacher(teacher, weights, alpha, out is not None)
    which, double = _address(teacher.rows), logits.dtype == torch.float64
    _cpu.fused_distill(rows, structs.coefs(coefs), which, t, live.data_ptr(), double)
    return divergence, None if out is None else live


def grad_buckets(
    logits: Tensor, chunk: Chunk, coefs: Coefs, teacher_rows: Tensor | None, slopes: BucketSlopes, *, out: Tensor
) -> Tensor:
    """Logits [C, V] become d(loss)/d(product), by derivatives of the results of `bucket_logprobs`; returns live rows [C]."""
    rows, live = _rows(logits, chunk, out), _flags(logits)
    b, double = structs.bucket_slopes(slopes), logits.dtype == torch.float64
    _cpu.grad_buckets(rows, structs.coefs(coefs), _address(teacher_rows), b, live.data_ptr(), double)
    return live


def score(hidden: Tensor, weight: Tensor, chunk: Chunk, want: tuple[str, ...]) -> None:
    """None: scores are made of logits here."""


def compact(logits: Tensor, live: Tensor) -> tuple[int, Tensor | None]:
    """Moves live rows of [C, V] to the front; returns how many, and where each came from (None: all are live)."""
    order = torch.empty(logits.shape[0], dtype=torch.int64)
    size = logits.element_size()
    row, stride = logits.shape[1] * size, logits.stride(0) * size
    count = _cpu.compact(logits.data_ptr(), logits.shape[0], row, stride, live.data_ptr(), order.data_ptr())
    return (count, None) if count == logits.shape[0] else (count, order[:count])


def has_gemm() -> bool:
    return _cpu.has_gemm()


def has_bf16_gemm() -> bool:
    return _cpu.has_bf16_gemm()


WEIGHT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/cpu/gemm.h: Type


def gemm_scratch_bytes(rows: int, width: int, threads: int, operand: torch.dtype) -> int:
    """What the products of up to `rows` hidden rows of `width` in `operand` need as scratch, whatever the vocabulary."""
    return _cpu.gemm_scratch_bytes(rows, width, threads, operand == torch.bfloat16) + GEMM_ALIGNMENT


def _gemm(a: Tensor, b: Tensor, out: Tensor, sizes: tuple[int, int, int], pairs: bool, scratch: Tensor, threads: int):
    g = _cpu.Gemm()
    g.a, g.b, g.c = a.data_ptr(), b.data_ptr(), out.data_ptr()
    g.a_stride, g.b_stride, g.c_stride = a.stride(0), b.stride(0), out.stride(0)
    g.m, g.n, g.k = sizes
    g.type, g.pairs = WEIGHT_TYPES[b.dtype], pairs
    g.scratch, g.threads = -(-scratch.data_ptr() // GEMM_ALIGNMENT) * GEMM_ALIGNMENT, threads
    return g


def gemm_nt(a: Tensor, b: Tensor, out: Tensor, scratch: Tensor, threads: int) -> None:
    """out [C, V] fp32 = a [C, D] · bᵀ, b [V, D]: hidden rows and a weight."""
    sizes = (a.shape[0], b.shape[0], a.shape[1])
    _cpu.gemm_nt(_gemm(a, b, out, sizes, a.dtype == torch.bfloat16, scratch, threads))


def gemm_nn(a: Tensor, b: Tensor, out: Tensor, scratch: Tensor, threads: int, *, pairs: bool) -> None:
    """out [C, D] fp32 = a [C, V] fp32 · b [V, D], a weight; `pairs`: a is rounded to bf16."""
    _cpu.gemm_nn(_gemm(a, b, out, (a.shape[0], b.shape[1], a.shape[1]), pairs, scratch, threads))


def gemm_tn(
    a: Tensor,
    b: Tensor,
    out: Tensor | None,
    scratch: Tensor,
    threads: int,
    *,
    accumulate: bool,
    scale: float = 1.0,
    rounded: Tensor | None = None,
) -> None:
    """out [V, D] fp32 (+)= scale · aᵀ · b, a [C, V] fp32, b [C, D] hidden rows; a is rounded to bf16 where b is bf16.

    To `rounded` [V, D] bf16 instead where given.
    """
    target = out if rounded is None else rounded
    assert target is not None
    sizes = (a.shape[1], b.shape[1], a.shape[0])
    g = _gemm(a, b, target, sizes, b.dtype == torch.bfloat16, scratch, threads)
    if rounded is not None:
        g.c, g.c_stride = (0, 0) if out is None else (out.data_ptr(), out.stride(0))
        g.rounded = _address(rounded)
    g.accumulate, g.scale = accumulate, scale
    _cpu.gemm_tn(g)
