"""C++ kernels (`csrc/cpu`) on torch tensors. C rows of V logits, M entries; R is float32 or float64.

The products sum in fp32. They take matrices whose last stride is 1, and a scratch tensor of `gemm_scratch_bytes`. Hidden rows
are fp32, and the weight fp32, bf16 or fp16; or both are bf16, and multiplied so (`has_bf16_gemm`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from drift_kernels import _cpu  # pyright: ignore[reportAttributeAccessIssue]
from drift_kernels.backends import structs
from drift_kernels.backends.params import ENTRY_OUTPUTS, ROW_OUTPUTS, Chunk
from drift_kernels.spec import PolicySpec

__all__ = [  # with what drivers read of every backend
    "ENTRY_OUTPUTS",
    "ROW_OUTPUTS",
    "Chunk",
    "bucket_logprobs",
    "compact",
    "fused_distill",
    "fused_policy",
    "gemm_nn",
    "gemm_nt",
    "gemm_scratch_bytes",
    "gemm_tn",
    "grad_buckets",
    "grad_logits",
    "has_bf16_gemm",
    "has_gemm",
    "row_stats",
    "top_k",
]

CPU = torch.device("cpu")
GEMM_ALIGNMENT = 64  # bytes, of the scratch


def _address(tensor: Tensor | None) -> int:
    return structs.address(tensor, CPU)


def row_stats(logits: Tensor, chunk: Chunk, want: tuple[str, ...]) -> dict[str, Tensor]:
    """Products [C, V] become logits in place; returns the statistics in `want`, per row or per entry."""
    stats, outputs = structs.stats(logits, chunk, want)
    _cpu.row_stats(structs.rows(logits, chunk), stats, logits.dtype == torch.float64)
    return outputs


def grad_logits(
    logits: Tensor,
    chunk: Chunk,
    coefs: Tensor | None,
    lse: Tensor,
    entropy_coefs: Tensor | None = None,
    entropy: Tensor | None = None,
    lse_coefs: Tensor | None = None,
    *,
    raw: bool,
) -> Tensor:
    """Products (raw) or logits [C, V] become d(loss)/d(product) in place; returns which rows are not all zero [C] uint8.

    `coefs` [M], `entropy_coefs` and `lse_coefs` [C] are d(loss)/d(log-prob), d(loss)/d(entropy) and d(loss)/d(lse).
    """
    c = structs.coefs(CPU, coefs, lse, entropy_coefs, entropy, lse_coefs)
    live = torch.empty(logits.shape[0], dtype=torch.uint8)
    _cpu.grad_logits(structs.rows(logits, chunk), c, raw, live.data_ptr(), logits.dtype == torch.float64)
    return live


def fused_policy(
    logits: Tensor,
    chunk: Chunk,
    spec: PolicySpec,
    advantages: Tensor | None,
    old: Tensor | None,
    ref: Tensor | None,
    weights: Tensor | None,
    want: tuple[str, ...],
    *,
    gradient: bool,
) -> tuple[dict[str, Tensor], Tensor]:
    """Statistics, policy loss and, with `gradient`, d(loss)/d(product) in place; returns outputs and live rows [C]."""
    stats, outputs = structs.stats(logits, chunk, want)
    policy, more = structs.policy(logits, chunk, spec, advantages, old, ref, weights, want, gradient)
    live = torch.empty(logits.shape[0], dtype=torch.uint8)
    _cpu.fused_policy(structs.rows(logits, chunk), stats, policy, live.data_ptr(), logits.dtype == torch.float64)
    return outputs | more, live


def top_k(logits: Tensor, chunk: Chunk, taught: Tensor | None, n: int, k: int) -> Tensor:
    """The k largest of logits [C, V], largest first [n, k] int64; row i of `taught` [C] says which of n it is, −1 none."""
    ids = torch.empty((n, k), dtype=torch.int64)
    double = logits.dtype == torch.float64
    _cpu.top_k(structs.rows(logits, chunk), _address(taught), structs.buckets(ids), double)
    return ids


def bucket_logprobs(
    logits: Tensor, chunk: Chunk, taught: Tensor | None, lse: Tensor, ids: Tensor, rest: bool
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of `ids` [n, k], and with `rest` of all other tokens together [n], by logits [C, V]."""
    logprobs = logits.new_empty(ids.shape)
    others = logits.new_empty(ids.shape[0]) if rest else None
    b = structs.buckets(ids, logprobs, others)
    _cpu.bucket_logprobs(structs.rows(logits, chunk), _address(taught), _address(lse), b, logits.dtype == torch.float64)
    return logprobs, others


def fused_distill(
    logits: Tensor,
    chunk: Chunk,
    taught: Tensor | None,
    teacher: Tensor,
    teacher_chunk: Chunk,
    teacher_lse: Tensor,
    weights: Tensor,
    alpha: float,
    lse: Tensor,
    coefs: Tensor | None = None,
    entropy_coefs: Tensor | None = None,
    entropy: Tensor | None = None,
    lse_coefs: Tensor | None = None,
    *,
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Divergences [n] of logits [C, V] from the teacher's [n, V], and with `gradient` d(loss)/d(product) in place.

    `teacher_chunk` goes unread: the teacher's are logits by now, where other backends have products still. `weights` [C] are
    the divergences', the coefficients what other terms add (see `grad_logits`). Returns live rows [C] too.
    """
    t, divergence = structs.teacher(teacher, teacher_lse, weights, alpha, gradient)
    live = torch.empty(logits.shape[0], dtype=torch.uint8)
    c = structs.coefs(CPU, coefs, lse, entropy_coefs, entropy, lse_coefs)
    double = logits.dtype == torch.float64
    _cpu.fused_distill(structs.rows(logits, chunk), c, _address(taught), t, live.data_ptr(), double)
    return divergence, live


def grad_buckets(
    logits: Tensor,
    chunk: Chunk,
    taught: Tensor | None,
    ids: Tensor,
    rest: Tensor | None,
    dlogprobs: Tensor,
    drest: Tensor | None,
    lse: Tensor,
    coefs: Tensor | None = None,
    entropy_coefs: Tensor | None = None,
    entropy: Tensor | None = None,
    lse_coefs: Tensor | None = None,
) -> Tensor:
    """Logits [C, V] become d(loss)/d(product), by the derivatives of what `bucket_logprobs` gave; returns live rows [C]."""
    b = structs.buckets(ids, None, rest, dlogprobs, drest)
    live = torch.empty(logits.shape[0], dtype=torch.uint8)
    c = structs.coefs(CPU, coefs, lse, entropy_coefs, entropy, lse_coefs)
    double = logits.dtype == torch.float64
    _cpu.grad_buckets(structs.rows(logits, chunk), c, _address(taught), b, live.data_ptr(), double)
    return live


def compact(logits: Tensor, live: Tensor) -> tuple[int, Tensor | None]:
    """Moves live rows of [C, V] to the front; returns how many, and where each came from (None: all are live)."""
    order = torch.empty(logits.shape[0], dtype=torch.int64)
    size = logits.element_size()
    row, stride = logits.shape[1] * size, logits.stride(0) * size
    count = _cpu.compact(logits.data_ptr(), logits.shape[0], row, stride, live.data_ptr(), order.data_ptr())
    return (count, None) if count == logits.shape[0] else (count, order[:count])


has_gemm = _cpu.has_gemm  # () -> bool
has_bf16_gemm = _cpu.has_bf16_gemm  # () -> bool
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
