"""Backends by name. A backend module supplies the row kernels; `reference` is whole ops in plain torch instead."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

import torch

NAMES = ("cpu", "triton", "cuda")
MODULES = {name: f"drift_kernels.backends.{name}" for name in NAMES}


def available_backends() -> dict[str, str | None]:
    """Every backend's name with None where it can run, else the reason why it cannot."""
    return {"reference": None, **{name: _reason(name) for name in NAMES}}


def _reason(name: str) -> str | None:
    if name == "triton":
        return _triton_reason()
    try:
        module = importlib.import_module(MODULES[name])
    except ImportError as error:
        return f"the compiled extension does not import ({error}); build it with: pip install -e ."
    return module.unavailable() if hasattr(module, "unavailable") else None


# The same for the life of a process, which keeps imports out of compiled graphs: all that torch.compiler.assume_constant_result
# does, but that one imports the compiler, and triton with it.
_reason._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def _triton_reason() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return 'Triton is not installed; install it with: pip install -e ".[triton]", on Linux'
    if not torch.cuda.is_available() and not interpreted():
        return (
            "no CUDA device is visible; run where nvidia-smi and torch.cuda.is_available() see one, or set "
            "TRITON_INTERPRET=1 before Python starts to run the kernels, slowly, on a CPU"
        )
    return None


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors. Loads Triton."""
    triton = importlib.import_module("triton")
    return triton.knobs.runtime.interpret


def resolve(name: str, device: torch.device) -> str:
    """The backend's name for `device`; "auto" picks by device. Raises RuntimeError with the reason where it cannot run."""
    if name == "reference":
        return name
    wanted = {"cpu": "cpu", "cuda": "triton"}.get(device.type, "") if name == "auto" else name
    if not wanted:
        raise RuntimeError(
            f"backend='auto' has no kernels for device {device}; use backend='reference' or move to a CPU"
        )
    reason = _reason(wanted)
    if reason:
        raise RuntimeError(
            f"backend={wanted!r} cannot run: {reason}. backend='reference' runs anywhere, with full logits"
        )
    if (wanted == "cpu") != (device.type == "cpu") and not (wanted == "triton" and interpreted()):
        raise RuntimeError(f"backend={wanted!r} does not run on device {device}; use backend='auto'")
    return wanted


def load(name: str) -> ModuleType:
    """The module of row kernels called `name`."""
    return importlib.import_module(MODULES[name])
