"""The collectives of heads that are spread over ranks. What is added is added in the order of the ranks, so results repeat."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from drift_kernels.calls import Share


def group_of(share: Share) -> dist.ProcessGroup:
    """The process group by its name. Raises ValueError if there is none of that name."""
    from torch.distributed.distributed_c10d import _resolve_process_group

    try:
        return _resolve_process_group(share.group)  # pyright: ignore[reportArgumentType]
    except (RuntimeError, KeyError, ValueError) as error:
        raise ValueError(f"group={share.group!r} is no process group of this process: {error}") from None


def gather(values: Tensor, share: Share) -> Tensor:
    """[n, …] of values […], whose shape is the same on all n ranks."""
    group, plain = group_of(share), values.contiguous()
    if not plain.numel():
        return plain.new_empty((group.size(), *plain.shape))
    raw = plain.reshape(-1).view(torch.uint8)  # whatever the dtype
    parts = [torch.empty_like(raw) for _ in range(group.size())]
    dist.all_gather(parts, raw, group=group)
    return torch.stack(parts).view(plain.dtype).reshape(group.size(), *plain.shape)


def gather_rows(values: Tensor, counts: list[int], share: Share) -> Tensor:
    """[Σ counts, …] of values [own count, …], in the order of the ranks; travels padded to the largest count."""
    padded = values.new_zeros((max(counts), *values.shape[1:]))
    padded[: values.shape[0]] = values
    parts = gather(padded, share)
    return torch.cat([part[:count] for part, count in zip(parts, counts)])


def total(values: Tensor, share: Share) -> Tensor:
    """The sum over the ranks of values […], the same bits on all of them. Each rank adds up one n-th of the elements."""
    n, flat = group_of(share).size(), values.reshape(-1)
    piece = -(-flat.numel() // n)
    padded = flat.new_zeros(piece * n)
    padded[: flat.numel()] = flat
    own = reduce_rows(padded, [piece] * n, share)
    return gather(own, share).reshape(-1)[: flat.numel()].reshape(values.shape)


def reduce_rows(values: Tensor, counts: list[int], share: Share) -> Tensor:
    """Of the sum over the ranks of values [Σ counts, …] the own rows [own count, …]: an all-to-all, added up here."""
    group = group_of(share)
    own = counts[group.rank()]
    received = values.new_empty((group.size() * own, *values.shape[1:]))
    if sum(counts):
        dist.all_to_all_single(received, values.contiguous(), [own] * group.size(), counts, group=group)
    parts = received.reshape(group.size(), own, *values.shape[1:])
    result = parts[0].clone()
    for part in parts[1:]:
        result += part
    return result


def checksum(tensors: Iterable[Tensor | None]) -> int:
    """Of the bytes of tensors on a CPU."""
    crc = 0
    for tensor in tensors:
        if tensor is not None:
            crc = zlib.crc32(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data, crc)
    return crc


def agree(numbers: list[int], same: str, share: Share) -> list[list[int]]:
    """The numbers of every rank; raises ValueError on all of them unless `same`, which says what is computed, is one text."""
    sent = torch.tensor([zlib.crc32(same.encode()), *numbers], dtype=torch.int64)
    rows = gather(sent, share).tolist()
    if len({row[0] for row in rows}) > 1:
        raise ValueError(
            f"the ranks of group {share.group!r} made different calls (other options, targets, per-token values or gradients "
            f"wanted); each must make the same one. This rank's: {same}"
        )
    return [row[1:] for row in rows]
