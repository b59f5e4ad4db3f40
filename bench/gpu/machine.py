"""What the numbers are taken on: a clock, a memory meter, backends; and the same without a GPU, for the dry run.

The stand-in executes all that is not CUDA itself: CPU tensors, a clock that ticks, and the CPU's row kernels behind the
GPU kernels' signature.
"""

from __future__ import annotations

import gc
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor

from bench.roofline import H100, Peaks, peaks_of
from drift_kernels import available_backends, backends

FLUSHED = 256 << 20  # bytes written before each timing, more than any L2 holds


class Clock(Protocol):
    """Seconds between `start` and `stop`."""

    def start(self) -> None: ...
    def stop(self) -> float: ...


class Meter(Protocol):
    """Bytes by which memory in use has risen since `reset`, at its highest."""

    def reset(self) -> None: ...
    def peak(self) -> int: ...


class EventClock:
    """CUDA events on the current stream. `start` overwrites L2 first, so that nothing is found there."""

    scratch: Tensor | None = None  # made when first needed

    def start(self) -> None:
        if self.scratch is None:
            self.scratch = torch.empty(FLUSHED, dtype=torch.uint8, device="cuda")
            self.began, self.ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.scratch.zero_()
        self.began.record()

    def stop(self) -> float:
        self.ended.record()
        self.ended.synchronize()
        return self.began.elapsed_time(self.ended) / 1e3


class AllocatorMeter:
    """By torch's caching allocator."""

    def reset(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() - self.before


class Ticks:
    """Readings of one to two milliseconds, by a rule."""

    count = 0

    def start(self) -> None:
        self.count += 1

    def stop(self) -> float:
        return 1e-3 + 1e-4 * (self.count * 7 % 11)


class NoMeter:
    """Always one MiB."""

    def reset(self) -> None: ...

    def peak(self) -> int:
        return 1 << 20


@dataclass(frozen=True)
class Machine:
    """The device under test."""

    name: str  # as torch calls it
    device: str
    clock: Clock
    meter: Meter
    backends: dict[str, str]  # which backend runs in the place of "triton" and of "cuda"
    kernels: Callable[[str], Any]  # the row kernels of "triton" or "cuda"
    healthy: Callable[[], bool]  # whether the device still answers
    facts: dict[str, Any] = field(default_factory=dict)  # for the report
    peaks: Peaks | None = None  # for the roofline; None if they are not known
    dry: bool = False

    def reason(self, role: str) -> str | None:
        """Why the backend in the place of `role` cannot run; None if it can."""
        return available_backends()[self.backends[role]]

    def seconds(self, work: Callable[[], object], best_of: int = 1) -> float:
        """The fastest of `best_of` runs."""
        times = []
        for _ in range(best_of):
            self.clock.start()
            work()
            times.append(self.clock.stop())
        return min(times)

    @property
    def file(self) -> str:
        """The name as a file's."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


def gpu() -> Machine:
    """The current CUDA device; SystemExit if there is none."""
    if not torch.cuda.is_available():
        raise SystemExit(
            f"no CUDA device is visible to torch {torch.__version__} (CUDA {torch.version.cuda}): look at nvidia-smi and "
            "CUDA_VISIBLE_DEVICES. `python -m bench.gpu --dry-run` rehearses all this on a CPU"
        )
    name, same = torch.cuda.get_device_name(), {"triton": "triton", "cuda": "cuda"}
    clock, meter = EventClock(), AllocatorMeter()
    return Machine(name, "cuda", clock, meter, same, backends.load, _answers, facts(), peaks_of(name))


def stand_in() -> Machine:
    """A CPU in the place of a GPU."""
    roles = {"triton": "cpu", "cuda": "reference"}
    found = {"python": platform.python_version(), "clock": "counts; no time is real", "CUDA backend": "not asked for"}
    clock, meter = Ticks(), NoMeter()
    return Machine(
        "stand-in", "cpu", clock, meter, roles, lambda role: _out_of_place(), lambda: True, found, H100, True
    )


def _answers() -> bool:
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def facts() -> dict[str, Any]:
    """What a reader must know of the GPU and its software."""
    p: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "capability": f"{p.major}.{p.minor}",
        "multiprocessors": p.multi_processor_count,
        "memory GiB": round(p.total_memory / 2**30, 1),
        "L2 MiB": round(getattr(p, "L2_cache_size", 0) / 2**20, 1),
        "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "CUDA of torch": torch.version.cuda,
        "nvcc": _last_line("nvcc", "--version"),
        "CUDA backend": available_backends()["cuda"] or "built",
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
        "L2": f"overwritten before each timing ({FLUSHED >> 20} MiB)",
    }


def _lines(*command: str) -> list[str]:
    if shutil.which(command[0]) is None:
        return ["not found"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip().splitlines() or [f"exit status {done.returncode}"]


def _first_line(*command: str) -> str:
    return _lines(*command)[0]


def _last_line(*command: str) -> str:
    return _lines(*command)[-1]


# Kernels that leave logits or gradients where they found products, on a CPU.
WRITING = ("row_stats", "grad_logits", "fused_policy", "fused_distill", "grad_buckets")


@cache
def _out_of_place() -> SimpleNamespace:
    """The CPU's row kernels as a GPU backend's: gradients into `out`, products left as they are."""
    cpu = backends.load("cpu")

    def beside(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def run(logits: Tensor, *arguments: Any, out: Tensor | None = None, **options: Any) -> Any:
            own = logits.clone()
            if out is None:
                return kernel(own, *arguments, **options)
            result = kernel(own, *arguments, out=own, **options)
            out.copy_(own)
            return result

        return run

    def score(hidden: Tensor, weight: Tensor, chunk: Any, want: tuple[str, ...]) -> dict[str, Tensor]:
        return cpu.row_stats(hidden.float() @ weight.float().t(), chunk, want)

    written = {name: beside(getattr(cpu, name)) for name in WRITING}
    return SimpleNamespace(**written, score=score, top_k=cpu.top_k, bucket_logprobs=cpu.bucket_logprobs)
