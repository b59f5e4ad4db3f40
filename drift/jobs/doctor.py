"""`drift doctor`: what is installed here, what this machine can do, and which backends run or why they do not."""

from __future__ import annotations

import importlib
import os
import platform
from importlib import metadata
from pathlib import Path

import torch

import drift_kernels

TRAIN = 'of the trainer: pip install "drift-rl[train]", or pip install -e ".[train]" in a clone'
PACKAGES = {
    **dict.fromkeys(("pydantic", "pyyaml", "rich", "matplotlib", "safetensors", "transformers", "tokenizers"), TRAIN),
    **dict.fromkeys(("reasoning-gym", "math-verify"), TRAIN),
    "httpcore2": "pip install httpcore2 (Python 3.11 or later), for engine.kind=vllm",
    "triton": "pip install triton, on Linux",
    "flash-attn": "pip install flash-attn, with CUDA",
    "peft": "pip install peft, for model.lora",
    "tensorboard": "pip install tensorboard, for track.sinks=[tensorboard]",
    "wandb": "pip install wandb, for track.sinks=[wandb]",
    "trackio": "pip install trackio, for track.sinks=[trackio]",
}  # package -> what it takes to have it
EXTENSIONS = ("drift_kernels._cpu", "drift._packing")
_ISA_FLAGS = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX-BF16"}

Finding = tuple[str, str, bool]  # what, how it stands, whether it is there


def show() -> None:
    """Print everything as three small tables; never fails on what is absent, rich included."""
    for title, findings in (("this machine", machine()), ("packages", packages()), ("backends", backends())):
        try:
            _draw(title, findings)
        except ModuleNotFoundError:  # rich comes with the extra [train]
            width = max(len(what) for what, _, _ in findings)
            print(title, *(f"{what:{width}}  {state}" for what, state, _ in findings), "", sep="\n")


def _draw(title: str, findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for what, state, there in findings:
        table.add_row(what, _plain(state) if there else f"[yellow]{_plain(state)}[/]")
    console = Console()
    console.print(table)
    console.print()


def machine() -> list[Finding]:
    """Interpreter, torch, GPU, CPU instruction sets, threads."""
    return [
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}", True),
        ("torch", torch.__version__, True),
        ("CUDA", *_cuda()),
        ("CPU", f"{_cpu_name()} · {', '.join(instruction_sets()) or 'no AVX2'}", True),
        ("threads", f"{torch.get_num_threads()} for torch, {_cores()} cores for this process", True),
    ]


def packages() -> list[Finding]:
    """Versions of what is installed, and how to get what is not; compiled extensions likewise."""
    found: list[Finding] = []
    for name, remedy in PACKAGES.items():
        try:
            found.append((name, metadata.version(name), True))
        except metadata.PackageNotFoundError:
            found.append((name, f"not installed; {remedy}", False))
    for name in EXTENSIONS:
        try:
            importlib.import_module(name)
            found.append((name, "compiled", True))
        except ImportError as error:
            found.append((name, f"does not import ({error}); install again with a C++ compiler on PATH", False))
    return found


def backends() -> list[Finding]:
    """`drift_kernels.available_backends()`."""
    return [(name, reason or "runs", reason is None) for name, reason in drift_kernels.available_backends().items()]


def instruction_sets() -> list[str]:
    """The vector extensions that matter here; off Linux what torch itself detects."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return [torch.backends.cpu.get_cpu_capability()]
    return [name for flag, name in _ISA_FLAGS.items() if flag in flags]


def _cuda() -> tuple[str, bool]:
    if torch.version.cuda is None:
        return "this torch is built without CUDA", False
    if not torch.cuda.is_available():
        return f"{torch.version.cuda} in torch, but no device is visible", False
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{torch.version.cuda}: {', '.join(names)}", True


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _plain(text: str) -> str:
    """rich reads [lora] as a style."""
    return text.replace("[", r"\[")
