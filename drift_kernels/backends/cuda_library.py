"""The library of CUDA kernels, `_cuda.so`: how it is found, what its entries take, and its errors in words.

It holds no Python and no torch, has the CUDA runtime inside, and loads on first use, also where there is no driver.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_char_p, c_int, c_int64, c_uint64, c_void_p
from functools import lru_cache
from pathlib import Path

from drift_kernels.native import extension as _cpu

BUILD = "FORCE_CUDA=1 pip install --no-build-isolation -e . (needs nvcc; CUDA_HOME names its toolkit)"
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
    "partial_stats": (c_int, (c_int, *[c_void_p] * 4, c_int, c_int)),
    "grad_logits": (c_int, (c_int, *[c_void_p] * 3, c_int, c_void_p, c_int64, c_int, c_void_p, c_int, c_int)),
    "fused_policy": (c_int, (c_int, *[c_void_p] * 5, c_int64, c_int, c_void_p, c_int, c_int, c_int)),
    "fused_distill": (c_int, (c_int, *[c_void_p] * 7, c_int64, c_int, c_void_p, c_int, c_int, c_int)),
    "top_k": (c_int, (c_int, *[c_void_p] * 4, c_int, c_int)),
    "bucket_logprobs": (c_int, (c_int, *[c_void_p] * 6, c_int)),
    "grad_buckets": (c_int, (c_int, *[c_void_p] * 6, c_int64, c_int, c_void_p, c_int)),
}


@lru_cache(maxsize=1)
def library() -> Callable[..., int]:
    """The library's entries as call(name, *arguments), which raises RuntimeError; ImportError says how to build it."""
    package = Path(__file__).parent.parent
    libraries = sorted(package.glob("_cuda*.so"))
    if not libraries:
        raise ImportError(f"the CUDA library is not built; build it with: {BUILD}")
    return bind(libraries[0])


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
