"""CUDA C++ kernels (`csrc/cuda`) on torch tensors: fp32 logits [C, V] of M entries, gradients out of place.

Kernels are enqueued on torch's current stream of the logits' device; nothing here waits for them. Left out: float64 (the cpu
backend), and squeezing out rows whose gradient is zero (their rows of `out` are zero).
"""

from __future__ import annotations

from ctypes import byref, c_int
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from drift_kernels.backends import structs
from drift_kernels.backends.contract import BucketSlopes, Chunk, Coefs, TeacherChunk
from drift_kernels.backends.cuda_library import library
from drift_kernels.backends.partials import SUMS, Partials
from drift_kernels.backends.tuning import VARIABLE, tuning
from drift_kernels.formulas import Tokens
from drift_kernels.spec import PolicySpec

OUT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
PAIR = "fused_distill"  # has launch choices of its own in the tuning file: it keeps two rows on chip


def unavailable() -> str | None:
    """Why this backend cannot run here; None if it can."""
    try:
        call = library()
    except (ImportError, OSError, AttributeError) as error:
        return str(error)
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA; install a CUDA build of torch"
    count = c_int(0)
    try:
        call("device_count", byref(count))
    except RuntimeError as error:
        return f"no CUDA device: {error}"
    return None if count.value else "no CUDA device is visible"


# ---- launch choices


@dataclass(frozen=True)
class Launch:
    """threads a block (of 32…512), blocks a row (1, 2, 4 or 8), and whether the row is kept in their shared memory."""

    threads: int
    cluster: int
    on_chip: bool


@lru_cache(maxsize=64)
def choose(vocabulary: int, twice: bool, shared_bytes: int, clusters: bool, pair: bool = False) -> Launch:
    """The launch for rows of `vocabulary` logits, or a `pair` of them, needed `twice` (sums, then gradient) or once.

    A row needed once is one block's. A row needed twice is kept on chip by the fewest blocks whose slices leave room for two
    blocks a multiprocessor (one loads while the other stores), or else by the fewest that hold it at all; where the largest
    cluster does not hold it, it is read twice. A thread takes sixteen logits or more, up to 512 threads.
    """
    cluster, on_chip = 1, False
    if twice:
        sizes = (1, 2, 4, 8) if clusters else (1,)
        for room in (shared_bytes // 2 - 1536, shared_bytes - 1024):
            fits = [n for n in sizes if (8 if pair else 4) * (-(-vocabulary // n) + 36) <= room]
            if fits:
                cluster, on_chip = fits[0], True
                break
    threads = 32
    while threads < 512 and threads * 16 < vocabulary // cluster:
        threads *= 2
    chosen = {"threads": threads, "cluster": cluster, "on_chip": on_chip}
    measured = tuning("cuda", (*chosen, PAIR))
    own = measured.get(PAIR, {}) if pair else {name: value for name, value in measured.items() if name != PAIR}
    if not isinstance(own, dict) or not own.keys() <= chosen.keys():
        raise ValueError(f"{VARIABLE}: 'cuda': {PAIR!r} is {own!r}; it takes {', '.join(chosen)}")
    return Launch(**chosen | own)


@lru_cache(maxsize=64)
def _limits(device: int) -> tuple[int, bool]:
    shared, clusters = c_int(0), c_int(0)
    library()("limits", device, byref(shared), byref(clusters))
    return shared.value, bool(clusters.value)


def _place(logits: Tensor) -> tuple[int, int]:
    """Device index and current stream; TypeError, ValueError for logits that the kernels cannot read."""
    if logits.dtype != torch.float32:
        raise TypeError(f"logits are {logits.dtype}; this backend takes float32 (backend='cpu' takes float64)")
    if logits.ndim != 2 or (logits.shape[1] > 1 and logits.stride(1) != 1):
        raise ValueError(
            f"logits {tuple(logits.shape)} with strides {logits.stride()} must be rows of adjacent columns"
        )
    return _device_and_stream(logits.device)


def _device_and_stream(device: torch.device) -> tuple[int, int]:
    if device.type != "cuda":
        raise ValueError(f"logits are on {device}; this backend takes tensors on a CUDA device")
    index = torch.cuda.current_device() if device.index is None else device.index
    return index, torch.cuda.current_stream(index).cuda_stream


def _output(logits: Tensor, out: Tensor | None) -> tuple[int, int, int]:
    """Address, stride and type of `out`, zeros for None; ValueError unless gradients of `logits` can be written there."""
    if out is None:
        return 0, 0, 0
    if out.dtype not in OUT_TYPES:
        raise TypeError(f"out is {out.dtype}; gradients are float32, bfloat16 or float16")
    if out.shape != logits.shape or out.device != logits.device or (out.shape[1] > 1 and out.stride(1) != 1):
        raise ValueError(
            f"out {tuple(out.shape)} on {out.device} with strides {out.stride()} must be rows like the logits, "
            f"{tuple(logits.shape)} on {logits.device}"
        )
    if logits.numel() and max(out.data_ptr(), logits.data_ptr()) < min(_end(out), _end(logits)):
        raise ValueError("out overlaps the logits; gradients are written out of place")
    return out.data_ptr(), out.stride(0), OUT_TYPES[out.dtype]


def _end(t: Tensor) -> int:
    return t.data_ptr() + ((t.shape[0] - 1) * t.stride(0) + t.shape[1]) * t.element_size()


# ---- kernels


def row_stats(logits: Tensor, chunk: Chunk, want: tuple[str, ...]) -> dict[str, Tensor]:
    """The statistics in `want` of products [C, V], per row or per entry. The products are left as they are."""
    device, stream = _place(logits)
    rows, (stats, outputs) = structs.logit_rows(logits, chunk), structs.stats(logits, chunk, want)
    how = choose(logits.shape[1], False, *_limits(device))
    library()("row_stats", device, stream, rows.address, stats.address, how.threads, how.cluster)
    return outputs


def partial_stats(logits: Tensor, chunk: Chunk, want: tuple[str, ...], first: int = 0) -> Partials:
    """What `partials.merge` needs of products [C, V] that are columns first … first + V of whole rows, whatever the `want`.

    `chunk.targets` are those of whole rows, `chunk.bias` is of these columns.
    """
    device, stream = _place(logits)
    local = replace(chunk, targets=chunk.targets - first)  # named, so that it lives until the launch
    rows = structs.logit_rows(logits, local)
    part = Partials(logits.new_empty((SUMS, logits.shape[0])), logits.new_empty(chunk.targets.numel()))
    how = choose(logits.shape[1], False, *_limits(device))
    where = (part.sums.data_ptr(), part.at_target.data_ptr())
    library()("partial_stats", device, stream, rows.address, *where, how.threads, how.cluster)
    return part


def _flags(logits: Tensor) -> Tensor:
    return torch.empty(logits.shape[0], dtype=torch.uint8, device=logits.device)


def grad_logits(logits: Tensor, chunk: Chunk, coefs: Coefs, *, raw: bool, out: Tensor) -> Tensor:
    """d(loss)/d(product) of products (raw) or logits [C, V] into `out` [C, V]; returns which rows are not all zero [C] uint8.

    `out` is fp32, bf16 or fp16. After `row_stats` logits are raw still.
    """
    device, stream = _place(logits)
    address, stride, out_type = _output(logits, out)
    rows, c, live = structs.logit_rows(logits, chunk), structs.coefs(coefs), _flags(logits)
    how = choose(logits.shape[1], False, *_limits(device))
    arguments = (rows.address, c.address, raw, address, stride, out_type, live.data_ptr(), how.threads, how.cluster)
    library()("grad_logits", device, stream, *arguments)
    return live


def fused_policy(
    logits: Tensor, chunk: Chunk, spec: PolicySpec, tokens: Tokens, want: tuple[str, ...], *, out: Tensor | None = None
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Statistics and policy loss of products [C, V] and, with `out` [C, V], d(loss)/d(product) into it.

    Returns outputs and which rows are not all zero [C] uint8. The products are left as they are.
    """
    device, stream = _place(logits)
    address, stride, out_type = _output(logits, out)
    rows, (stats, outputs) = structs.logit_rows(logits, chunk), structs.stats(logits, chunk, want)
    policy, terms = structs.policy(logits, chunk, spec, tokens, want, out is not None)
    live = _flags(logits)
    how = choose(logits.shape[1], out is not None, *_limits(device))
    arguments = (rows.address, stats.address, policy.address, address, stride, out_type, live.data_ptr())
    library()("fused_policy", device, stream, *arguments, how.threads, how.cluster, how.on_chip)
    return outputs | terms, None if out is None else live


def top_k(logits: Tensor, chunk: Chunk, teacher_rows: Tensor | None, n: int, k: int) -> Tensor:
    """The k largest logits of products [C, V], largest first and the lower of equal ones before: ids [n, k] int64.

    `teacher_rows` as `TeacherChunk.rows`. A NaN counts as −∞. ValueError if k does not fit
    into a block's shared memory.
    """
    device, stream = _place(logits)
    shared, clusters = _limits(device)
    if not 1 <= k <= logits.shape[1]:
        raise ValueError(f"k={k} of a vocabulary of {logits.shape[1]}")
    how = choose(logits.shape[1], False, shared, clusters)
    tile = 4 * how.threads  # columns looked at together
    room = 1 << (k + tile - 1).bit_length()
    if 8 * room > shared:
        largest = (1 << (shared // 8).bit_length() - 1) - tile
        raise ValueError(f"k={k} does not fit into {shared} bytes of shared memory; this backend takes k ≤ {largest}")
    ids = torch.empty((n, k), dtype=torch.int64, device=logits.device)
    rows, b = _single_rows(logits, chunk), structs.buckets(ids)
    which = structs.address(teacher_rows, logits.device)
    library()("top_k", device, stream, rows.address, which, b.address, room, how.threads)
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
    """Log-probs of `ids` [n, k], and with `rest` of all other tokens together [n], by products [C, V] and their lse [C].

    An id outside the vocabulary has log-prob NaN.
    """
    device, stream = _place(logits)
    logprobs = logits.new_empty(ids.shape)
    others = logits.new_empty(ids.shape[0]) if rest else None
    rows, b = _single_rows(logits, chunk), structs.buckets(ids, logprobs, others)
    which = tuple(structs.address(t, logits.device) for t in (teacher_rows, lse, lse_low))
    threads = choose(logits.shape[1], False, *_limits(device)).threads
    library()("bucket_logprobs", device, stream, rows.address, *which, b.address, threads)
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
    """Divergences [n] of products [C, V] from the teacher's [n, V], and with `out` [C, V] d(loss)/d(product) into it.

    `weights` [C] are those of the divergences, `coefs` the derivatives of other terms. Returns with the divergences
    which rows are not all zero [C] uint8, None without a gradient.
    """
    device, stream = _place(logits)
    _place(teacher.logits)
    if teacher.logits.shape[1] != logits.shape[1] or teacher.logits.device != logits.device:
        raise ValueError(
            f"teacher's logits {tuple(teacher.logits.shape)} on {teacher.logits.device} need the student's vocabulary and "
            f"device, {logits.shape[1]} on {logits.device}"
        )
    address, stride, out_type = _output(logits, out)
    rows, teacher_rows = _single_rows(logits, chunk), structs.logit_rows(teacher.logits, teacher.chunk)
    t, divergence = structs.teacher(teacher, weights, alpha, out is not None)
    c, which = structs.coefs(coefs), structs.address(teacher.rows, logits.device)
    live = None if out is None else _flags(logits)
    how = choose(logits.shape[1], out is not None, *_limits(device), True)
    arguments = (rows.address, c.address, which, teacher_rows.address, t.address, address, stride, out_type)
    flags = 0 if live is None else live.data_ptr()
    library()("fused_distill", device, stream, *arguments, flags, how.threads, how.cluster, how.on_chip)
    return divergence, live


def grad_buckets(
    logits: Tensor, chunk: Chunk, coefs: Coefs, teacher_rows: Tensor | None, slopes: BucketSlopes, *, out: Tensor
) -> Tensor:
    """d(loss)/d(product) of products [C, V] into `out`, by derivatives of the results of `bucket_logprobs`; live rows [C]."""
    device, stream = _place(logits)
    address, stride, out_type = _output(logits, out)
    rows, b, c = _single_rows(logits, chunk), structs.bucket_slopes(slopes), structs.coefs(coefs)
    live, which = _flags(logits), structs.address(teacher_rows, logits.device)
    arguments = (rows.address, c.address, which, b.address, address, stride, out_type, live.data_ptr())
    library()("grad_buckets", device, stream, *arguments, choose(logits.shape[1], False, *_limits(device)).threads)
    return live


def score(hidden: Tensor, weight: Tensor, chunk: Chunk, want: tuple[str, ...]) -> None:
    """None: scores are made of logits here."""


def _single_rows(logits: Tensor, chunk: Chunk):
    """Rows of one target each; ValueError for several."""
    if chunk.row_ptr is not None:
        raise ValueError("distillation takes one target a row; row_ptr must be None")
    return structs.logit_rows(logits, chunk)
