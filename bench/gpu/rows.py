"""`python -m bench.gpu.rows`: torch's profiler over one training pass, or with `--small` a pass for compute-sanitizer.

On a CPU (`--device cpu`) the CPU's kernels stand in, at tiny sizes: a rehearsal, whose times mean nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

import drift_kernels as dk
from drift_kernels import available_backends

SMALL, FULL = (96, 64, 5003), (8192, 4096, 151_936)  # T, D, V
ROWS = 25  # of the profiler's table


def one_pass(device: str, backend: str, shape: tuple[int, int, int]) -> torch.Tensor:
    """The policy loss, and distillation over the likeliest tokens, with gradients."""
    T, D, V = shape
    g = torch.Generator(device).manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=g, device=device, dtype=dtype)

    hidden, weight = normal(T, D).requires_grad_(), (normal(V, D) / D**0.5).requires_grad_()
    targets = torch.randint(0, V, (T,), generator=g, device=device)
    old = torch.full((T,), -8.0, device=device)
    config = dk.KernelConfig(backend=backend)
    ones = torch.ones_like(old)
    loss = dk.policy_loss(hidden, dk.Head(weight), targets, ones, old_logprobs=old, config=config).loss
    teacher = dk.Teacher(normal(T, D), dk.Head(weight.detach()))
    for spec in (dk.DistillSpec(0.5), dk.DistillSpec(0.5, top_k=20)):
        loss = loss + dk.distill_loss(hidden, dk.Head(weight), teacher, spec=spec, config=config).loss
    loss.backward()
    return loss.detach()


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a table for each backend that can run."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.rows", description="Profiles the row kernels.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu rehearses at a tiny size")
    parser.add_argument("--small", action="store_true", help="a tiny size, without the profiler: for compute-sanitizer")
    args = parser.parse_args(argv)
    backends = ("cpu",) if args.device == "cpu" else ("triton", "cuda")
    shape = SMALL if args.small or args.device == "cpu" else FULL
    for backend in backends:
        if reason := available_backends()[backend]:
            print(f"{backend}: {reason}")
            continue
        print(f"{backend}: loss {one_pass(args.device, backend, shape):.4f}")
        if args.small:
            continue
        activities = [torch.profiler.ProfilerActivity.CPU]
        if args.device == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as profiler:
            one_pass(args.device, backend, shape)
            if args.device == "cuda":
                torch.cuda.synchronize()
        order = "cuda_time_total" if args.device == "cuda" else "cpu_time_total"
        print(profiler.key_averages().table(sort_by=order, row_limit=ROWS, max_name_column_width=60))


if __name__ == "__main__":
    main()
