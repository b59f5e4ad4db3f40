"""Data-parallel training under torchrun: every rank holds the model, gradients and denominators are summed.

Sums, not means: a step's loss is divided by a denominator that is global already (A4), so that ranks may hold different
numbers of samples and packs. Gradients meet once a step, after the last pack of each rank: a rank with fewer packs, or
none, waits there and nowhere else. Without torchrun there is one rank and every function here returns at once.

Left out: sharding the model over ranks (FSDP2). A sharded model is one that no rank can sample from alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

BUCKET = 32 << 20  # elements that one reduction carries


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if _running() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if _running() else 1


def device() -> torch.device:
    """This rank's GPU, or the CPU where torch sees none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def launched(timeout: float = 1800.0) -> Iterator[int]:
    """Joins the process group that torchrun describes, and leaves it at the end; yields the rank.

    Does nothing in a process that torchrun did not start. NCCL carries tensors on GPUs, gloo those on the CPU.
    timeout: seconds that a collective may wait for the slowest rank.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or _running():
        yield rank()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def share(items: Sequence) -> Sequence:
    """This rank's part of what all ranks see: every world_size-th item. Parts differ by one item at most."""
    return items[rank() :: world_size()]


def sum_values(*values: float) -> list[float]:
    """Each value summed over the ranks, in float64. Every rank calls this, with as many values."""
    if world_size() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def gather(items: Sequence) -> list:
    """Every rank's items, rank 0's first. Every rank calls this; items are pickled."""
    if world_size() == 1:
        return list(items)
    parts: list = [None] * world_size()
    dist.all_gather_object(parts, list(items))
    return [item for part in parts for item in part]


def sum_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Leaves in each `.grad` the sum over the ranks; no gradient counts as zeros. All ranks, the same parameters."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if world_size() == 1:
        return
    for bucket in _buckets(parameters):
        gradients = [parameter.grad for parameter in bucket if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, piece in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
            gradient.copy_(piece.view_as(gradient))


def broadcast(tensors: Sequence[torch.Tensor]) -> None:
    """Gives every rank the values that rank 0 holds, in place."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.data, src=0)


def barrier() -> None:
    """Returns once every rank has come here."""
    if world_size() > 1:
        dist.barrier()


@contextmanager
def in_turn() -> Iterator[None]:
    """The first rank goes through the body, then all others. Every rank enters; an error of the first keeps them out."""
    if rank() > 0:
        barrier()
    yield
    if rank() == 0:
        barrier()


def _running() -> bool:
    return dist.is_available() and dist.is_initialized()


def _buckets(parameters: Sequence[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    """Neighbours of one type, up to BUCKET elements together (a larger parameter goes alone)."""
    bucket: list[torch.nn.Parameter] = []
    for parameter in parameters:
        size = sum(p.numel() for p in bucket) + parameter.numel()
        if bucket and (size > BUCKET or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket
