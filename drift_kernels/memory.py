"""Large blocks of a CPU's memory, kept from one call for the next.

The system clears every page that it hands out. That took a tenth of a call's time (dweight of a vocabulary of 65,536 by 896),
and a training step frees what the next one asks for. So the block of each use that was freed last stays here.
"""

from __future__ import annotations

import math
import weakref
from collections import deque

import numpy as np
import torch
from torch import Tensor

KEPT_FROM = 1 << 20  # bytes; malloc keeps smaller ones itself
ALIGNMENT = 64
_free: dict[str, deque[np.ndarray]] = {}


def empty(use: str, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory for that `use`: the block freed last where it is large enough, else one of huge pages (numpy's)."""
    count = math.prod(size) * dtype.itemsize
    if count < KEPT_FROM:
        return torch.empty(size, dtype=dtype)
    free = _free.setdefault(use, deque(maxlen=1))
    try:
        block = free.pop()
    except IndexError:
        block = None
    if block is None or block.nbytes < count + ALIGNMENT:
        block = None  # gone before the next one comes
        block = np.empty(count + ALIGNMENT, np.uint8)
    start = -block.ctypes.data % ALIGNMENT
    bytes_ = block[start : start + count]
    weakref.finalize(bytes_, free.append, block).atexit = False  # which the tensor's storage holds
    return torch.from_numpy(bytes_).view(dtype).view(size)


def empty_cache() -> None:
    """Gives back to the system what the CPU ops keep between calls: a workspace, and dweight's memory once it is freed."""
    for free in _free.values():
        free.clear()
