"""Backends by name. A backend module supplies the row kernels; `reference` is whole ops in plain torch instead."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch

from drift_kernels.backends.contract import RowKernels
from drift_kernels.calls import KERNEL_BACKENDS

if TYPE_CHECKING:
    from drift_kernels.backends import cpu, cuda, triton

    CHECKED: tuple[RowKernels, ...] = (cpu, cuda, triton)  # the type checker holds them to the contract

AUTO = {"cpu": "cpu", "cuda": "triton"}  # the backend of each device, unless `prefers_cuda`


def available_backends() -> dict[str, str | None]:
    """Every backend's name, with None if it can run, else the reason."""
    return {"reference": None, **{name: _reason(name) for name in KERNEL_BACKENDS}}


def _reason(name: str) -> str | None:
    return REASONS[name]()


# Constant for the life of a process, which keeps imports out of compiled graphs: torch.compiler.assume_constant_result does
# the same, but imports the compiler, and triton with it.
_reason._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def _cpu_reason() -> str | None:
    try:
        importlib.import_module("drift_kernels._cpu")
    except ImportError as error:
        return f"the compiled extension does not import ({error}); install drift-rl again with a C++ compiler on PATH"
    return None


def _cuda_reason() -> str | None:
    return _cpu_reason() or importlib.import_module("drift_kernels.backends.cuda").unavailable()


def _triton_reason() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; install it with: pip install triton, on Linux"
    if not torch.cuda.is_available() and not interpreted():
        return (
            "no CUDA device is visible; run where nvidia-smi and torch.cuda.is_available() see one, or set "
            "TRITON_INTERPRET=1 before Python starts to run the kernels, slowly, on a CPU"
        )
    return None


REASONS: dict[str, Callable[[], str | None]] = {"cpu": _cpu_reason, "triton": _triton_reason, "cuda": _cuda_reason}


def prefers_cuda(index: int | None) -> bool:
    """Whether "auto" takes the CUDA backend on the GPU of that index (None: the current one). It does if

    - its library is built and runs here;
    - the GPU has clusters (sm_90 and later). They keep a row on chip, so that it is read once; Triton reads it twice.
      Older GPUs have no clusters, and their gain is smaller: they stay with Triton.
    """
    return _reason("cuda") is None and torch.cuda.get_device_capability(index) >= (9, 0)


prefers_cuda._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]  # as `_reason`


def scorer(asked: str, chosen: str) -> RowKernels:
    """The module whose `score` serves a call that `asked` for a backend and runs on the `chosen` one.

    Under "auto" it is Triton's if Triton can run: the CUDA backend has no scorer, and would make logits.
    """
    return load("triton" if asked == "auto" and chosen == "cuda" and _reason("triton") is None else chosen)


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors. Loads Triton."""
    triton = importlib.import_module("triton")
    return triton.knobs.runtime.interpret


def resolve(name: str, device: torch.device) -> str:
    """The backend's name for `device`; "auto" picks by device (without the compiled extension `reference`,
    and warns once). Raises RuntimeError with the reason if it cannot run."""
    if name == "reference":
        return name
    wanted = AUTO.get(device.type, "") if name == "auto" else name
    if name == "auto" and device.type == "cuda" and prefers_cuda(device.index):
        wanted = "cuda"
    if not wanted:
        raise RuntimeError(
            f"backend='auto' has no kernels for device {device}; use backend='reference' or move to a CPU"
        )
    reason = _reason(wanted)
    if reason and name == "auto" and wanted == "cpu" and _warned_without_extension():
        return "reference"
    if reason:
        raise RuntimeError(
            f"backend={wanted!r} cannot run: {reason}. backend='reference' runs anywhere, with full logits"
        )
    if (wanted == "cpu") != (device.type == "cpu") and not (wanted == "triton" and interpreted()):
        raise RuntimeError(f"backend={wanted!r} does not run on device {device}; use backend='auto'")
    return wanted


@functools.cache
def _warned_without_extension() -> bool:
    """Says once that the package was installed without a compiler; True."""
    warnings.warn(
        "drift_kernels has no compiled extension here, so that backend='auto' computes in plain torch with full logits; "
        "install drift-rl again with a C++ compiler on PATH",
        stacklevel=2,
    )
    return True


def load(name: str) -> RowKernels:
    """The module of row kernels called `name`."""
    return cast("RowKernels", importlib.import_module(f"drift_kernels.backends.{name}"))
