"""Data-parallel training under torchrun: gradients and denominators are summed over the ranks.

Sums, not means: a step's loss is divided by a denominator that is global already (A4), so that ranks may hold different
numbers of samples and packs. Gradients meet once a step, after the last pack of each rank: a rank with fewer packs, or
none, waits there and nowhere else. Without torchrun there is one rank and every function here returns at once.

Collectives have a limit of minutes, and one that fails ends the rank with a `RankLost`. Where one rank works and the
others wait, `meet` has no limit (`drift.training.presence`).
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from drift import interrupts
from drift.training.presence import Presence, RankLost

BUCKET = 32 << 20  # elements that one reduction carries


_presence: Presence | None = None  # of this process, inside `launched`
_alone = False  # inside `alone`
_where: list[Callable[[], str | None]] = []  # of the `resuming` blocks that this process is in


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if _running() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if _running() else 1


def device() -> torch.device:
    """This rank's GPU, or the CPU if torch sees none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def launched(timeout: float = 600.0) -> Iterator[int]:
    """Joins the process group that torchrun describes, and leaves it at the end; yields the rank.

    Does nothing in a process that torchrun did not start. NCCL carries tensors on GPUs, gloo those on the CPU.
    timeout: seconds that a collective may wait for the slowest rank. Raises RankLost when one does not come.
    """
    global _presence
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or _running():
        yield rank()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    backend, limit = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timedelta(seconds=timeout)
    store, number, count = next(dist.rendezvous("env://"))
    dist.init_process_group(
        backend, store=dist.PrefixStore("group", store), rank=number, world_size=count, timeout=limit
    )
    _presence = Presence(dist.PrefixStore("presence", store), number, count, timeout)
    try:
        with _told_when_lost(), resuming(lambda: None):
            yield number
    finally:
        _presence.close()
        _presence = None
        dist.destroy_process_group()


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process counts as the only one: what one rank does while the others wait for it in `meet`."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


@contextmanager
def resuming(where: Callable[[], str | None]) -> Iterator[None]:
    """Inside, a collective that fails raises RankLost, which says `where()` the same command goes on from."""
    _where.append(where)
    try:
        yield
    except RankLost as error:
        if error.where is not None:
            raise
        raise RankLost(error.what, where()) from None
    except RuntimeError as error:
        if _presence is None or not _of_a_collective(error):
            raise
        late = f"the ranks did not meet within train.timeout={_presence.limit:g} seconds"
        raise RankLost(_presence.lost() or f"{late}; raise it if one needs longer ({error})", where()) from error
    finally:
        _where.remove(where)


def meet(what: str) -> None:
    """Returns once every rank has come here, however long that takes; raises RankLost if one is gone.

    what: the work that the last one to come has to do, for those that wait to say.
    """
    if world_size() > 1 and _presence is not None:
        _presence.meet(what)


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
    for bucket in _buckets([p for p in parameters if not isinstance(p, DTensor)]):  # FSDP has summed what it shards
        gradients = [parameter.grad for parameter in bucket if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, piece in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
            gradient.copy_(piece.view_as(gradient))


def broadcast(tensors: Sequence[torch.Tensor]) -> None:
    """Gives every rank the values that rank 0 holds, in place; sharded tensors have them already."""
    if world_size() > 1:
        for tensor in tensors:
            if not isinstance(tensor, DTensor):
                dist.broadcast(tensor.data, src=0)


@contextmanager
def in_turn(what: str) -> Iterator[None]:
    """The first rank goes through the body, then all others. Every rank enters; an error of the first keeps them out."""
    if rank() > 0:
        meet(what)
    yield
    if rank() == 0:
        meet(what)


def _running() -> bool:
    return not _alone and dist.is_available() and dist.is_initialized()


def _of_a_collective(error: RuntimeError) -> bool:
    """Gloo's errors have no type of their own."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


@contextmanager
def _told_when_lost() -> Iterator[None]:
    """torchrun ends the other ranks by SIGTERM when one is lost: inside, that raises RankLost (`drift.interrupts`)."""

    def cause() -> BaseException | None:
        lost = _presence.lost() if _presence is not None else None
        return RankLost(lost, _where[-1]()) if lost else None  # at any instant, also while a block is being left

    interrupts.causes.append(cause)
    try:
        with _ended_when_lost(cause):
            yield
    finally:
        interrupts.causes.remove(cause)


@contextmanager
def _ended_when_lost(cause: Callable[[], BaseException | None]) -> Iterator[None]:
    """For a process whose SIGTERM nobody handles."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def end(number: int, frame: Any) -> None:
        if _presence is not None and _presence.ending:
            return
        raise cause() or SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


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
