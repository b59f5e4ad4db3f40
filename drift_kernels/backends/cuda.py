"""CUDA C++ kernels (`csrc/cuda`) on torch tensors: fp32 logits [C, V] of M entries, gradients out of place.

The kernels are a library of their own, which loads on first use and also where there is no driver. They are enqueued on
torch's current stream of the logits' device; nothing here waits for them. Left out: float64 (the cpu backend), squeezing out
rows whose gradient is zero (their rows of `out` are zero), and distillation.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import byref, c_char_p, c_int, c_int64, c_uint64, c_void_p
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from drift_kernels import _cpu  # pyright: ignore[reportAttributeAccessIssue]
from drift_kernels.backends import structs
from drift_kernels.backends.params import Chunk
from drift_kernels.backends.tuning import tuning
from drift_kernels.spec import PolicySpec

BUILD = "FORCE_CUDA=1 pip install --no-build-isolation -e . (needs nvcc; CUDA_HOME names its toolkit)"
OUT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
HINTS = {
    "cudaErrorNoDevice": "no NVIDIA GPU is visible: look at nvidia-smi and CUDA_VISIBLE_DEVICES",
    "cudaErrorInsufficientDriver": "there is no NVIDIA driver, or it is older than this build's CUDA: update the driver, or "
    "build with an older toolkit",
    "cudaErrorNoKernelImageForDevice": f"not built for this GPU: TORCH_CUDA_ARCH_LIST=<its capability> {BUILD}",
    "cudaErrorUnsupportedPtxVersion": "the driver is older than the toolkit this was built with: update it, or name the "
    f"GPU's capability: TORCH_CUDA_ARCH_LIST=<capability> {BUILD}",
    "cudaErrorInvalidValue": "a size or a launch choice does not fit: look at DRIFT_TUNING",
    "cudaErrorInvalidClusterSize": "this build or GPU has no clusters of that size: set a smaller cluster in DRIFT_TUNING",
}
_SIGNATURES = {
    "layout": (c_uint64, ()),
    "error_name": (c_char_p, (c_int,)),
    "error_text": (c_char_p, (c_int,)),
    "device_count": (c_int, (c_void_p,)),
    "limits": (c_int, (c_int, c_void_p, c_void_p)),
    "row_stats": (c_int, (c_int, c_void_p, c_void_p, c_void_p, c_int, c_int)),
    "grad_logits": (c_int, (c_int, *[c_void_p] * 3, c_int, c_void_p, c_int64, c_int, c_void_p, c_int, c_int)),
    "fused_policy": (c_int, (c_int, *[c_void_p] * 5, c_int64, c_int, c_void_p, c_int, c_int, c_int)),
}


# ---- the library


@lru_cache(maxsize=1)
def library() -> Callable[..., int]:
    """The library's entries as call(name, *arguments), which raises RuntimeError; ImportError says how to build it."""
    package = Path(__file__).parent.parent
    found = sorted(package.glob("_cuda*.so"))
    if not found:
        raise ImportError(f"the CUDA library is not built; build it with: {BUILD}")
    return bind(found[0])


def bind(path: Path) -> Callable[..., int]:
    """As `library`, for the library at `path`. Calls release the GIL."""
    handle = ctypes.CDLL(str(path))
    entries = {name: getattr(handle, f"drift_cuda_{name}") for name in _SIGNATURES}
    for name, (result, arguments) in _SIGNATURES.items():
        entries[name].restype, entries[name].argtypes = result, arguments
    if entries["layout"]() != _cpu.layout:
        raise ImportError(f"{path.name} and the C++ extension are of different sources; build both: {BUILD}")

    def call(name: str, *arguments) -> int:
        error = entries[name](*arguments)
        if error:
            title = entries["error_name"](error).decode()
            hint = HINTS.get(title, "CUDA_LAUNCH_BLOCKING=1 shows which call failed")
            raise RuntimeError(f"{name}: {title} ({entries['error_text'](error).decode()}); {hint}")
        return error

    return call


def unavailable() -> str | None:
    """Why this backend cannot run here; None where it can."""
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
def choose(vocabulary: int, twice: bool, shared_bytes: int, clusters: bool) -> Launch:
    """The launch for rows of `vocabulary` logits that are needed `twice` (statistics, then gradient) or once.

    A row needed once is one block's. A row needed twice is kept on chip by the fewest blocks whose slices leave room for two
    blocks a multiprocessor (one loads while the other stores), or else by the fewest that hold it at all; where the largest
    cluster does not hold it, it is read twice. A thread takes sixteen logits or more, up to 512 threads.
    """
    cluster, on_chip = 1, False
    if twice:
        sizes = (1, 2, 4, 8) if clusters else (1,)
        for room in (shared_bytes // 2 - 1536, shared_bytes - 1024):
            fits = [n for n in sizes if 4 * (-(-vocabulary // n) + 36) <= room]
            if fits:
                cluster, on_chip = fits[0], True
                break
    threads = 32
    while threads < 512 and threads * 16 < vocabulary // cluster:
        threads *= 2
    chosen = {"threads": threads, "cluster": cluster, "on_chip": on_chip}
    return Launch(**chosen | tuning("cuda", tuple(chosen)))


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


def _output(logits: Tensor, out: Tensor) -> tuple[int, int, int]:
    """Address, stride and type of `out`; ValueError unless gradients of `logits` can be written there."""
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
    rows, (stats, outputs) = structs.rows(logits, chunk), structs.stats(logits, chunk, want)
    how = choose(logits.shape[1], False, *_limits(device))
    library()("row_stats", device, stream, rows.address, stats.address, how.threads, how.cluster)
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
    out: Tensor,
) -> Tensor:
    """d(loss)/d(product) of products (raw) or logits [C, V] into `out` [C, V]; returns which rows are not all zero [C] uint8.

    `coefs` [M], `entropy_coefs` and `lse_coefs` [C] are d(loss)/d(log-prob), d(loss)/d(entropy) and d(loss)/d(lse). `out` is
    fp32, bf16 or fp16. After `row_stats` logits are raw still.
    """
    device, stream = _place(logits)
    where, stride, out_type = _output(logits, out)
    rows = structs.rows(logits, chunk)
    c = structs.coefs(logits.device, coefs, lse, entropy_coefs, entropy, lse_coefs)
    live = torch.empty(logits.shape[0], dtype=torch.uint8, device=logits.device)
    how = choose(logits.shape[1], False, *_limits(device))
    arguments = (rows.address, c.address, raw, where, stride, out_type, live.data_ptr(), how.threads, how.cluster)
    library()("grad_logits", device, stream, *arguments)
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
    out: Tensor | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Statistics and policy loss of products [C, V] and, with `gradient`, d(loss)/d(product) into `out` [C, V].

    Returns outputs and which rows are not all zero [C] uint8. The products are left as they are.
    """
    device, stream = _place(logits)
    if gradient and out is None:
        raise ValueError("gradient=True needs out, where gradients are written")
    where, stride, out_type = _output(logits, out) if gradient and out is not None else (0, 0, 0)
    rows, (stats, outputs) = structs.rows(logits, chunk), structs.stats(logits, chunk, want)
    policy, more = structs.policy(logits, chunk, spec, advantages, old, ref, weights, want, gradient)
    live = torch.empty(logits.shape[0], dtype=torch.uint8, device=logits.device)
    how = choose(logits.shape[1], gradient, *_limits(device))
    arguments = (rows.address, stats.address, policy.address, where, stride, out_type, live.data_ptr())
    library()("fused_policy", device, stream, *arguments, how.threads, how.cluster, how.on_chip)
    return outputs | more, live
