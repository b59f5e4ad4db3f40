"""Kernels on tensors that end where readable memory does: a step too far is a segmentation fault. A program, for that reason.

No sanitizer sees a masked load, and a result shows a step too far only where something lies there.
"""

import ctypes
import mmap
import random

import torch
from torch import Tensor

import drift_kernels as dk
from drift_kernels import _cpu, memory
from drift_kernels.backends import cpu
from drift_kernels.testing import make_case

PAGE = mmap.PAGESIZE
LIBC = ctypes.CDLL(None, use_errno=True)
SIZES = (1, 2, 3, 7, 8, 9, 15, 16, 17, 23, 24, 25, 31, 33, 47, 48, 49, 97, 130, 385, 513)


def empty(size: tuple[int, ...], dtype: torch.dtype, alignment: int = 1) -> Tensor:
    """Zeros, the last of them on the last bytes before a page that must not be touched."""
    count = torch.Size(size).numel() * dtype.itemsize
    count = -(-count // alignment) * alignment
    if not count:
        return torch.empty(size, dtype=dtype)
    readable = -(-count // PAGE) * PAGE
    region = mmap.mmap(-1, readable + PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(region))
    if LIBC.mprotect(ctypes.c_void_p(start + readable), ctypes.c_size_t(PAGE), 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    whole = torch.frombuffer(region, dtype=torch.uint8, count=count, offset=readable - count)
    return whole[: torch.Size(size).numel() * dtype.itemsize].view(dtype).view(size)


def at_the_edge(tensor: Tensor) -> Tensor:
    """A copy that nothing readable follows."""
    return empty(tuple(tensor.shape), tensor.dtype).copy_(tensor)


def product(drawn: random.Random, pairs: bool) -> None:
    """One of the three, of random sizes; a gap between rows, but not behind the last one."""
    kind, gap, threads = drawn.choice(("nt", "nn", "tn")), drawn.randrange(5), drawn.randint(1, 3)
    m, n, k = (drawn.choice(SIZES) for _ in range(3))
    weight = torch.bfloat16 if pairs else drawn.choice((torch.float32, torch.bfloat16, torch.float16))
    rows = torch.bfloat16 if pairs else torch.float32

    def matrix(lines: int, width: int, dtype: torch.dtype) -> Tensor:
        flat = empty((lines * (width + gap) - gap,), dtype)
        return flat.as_strided((lines, width), (width + gap, 1))

    a = matrix(*((k, m) if kind == "tn" else (m, k)), rows if kind == "nt" else torch.float32)
    b = matrix(*((n, k) if kind == "nt" else (k, n)), rows if kind == "tn" else weight)
    height, width = {"nt": (m, k), "nn": (m, n), "tn": (k, n)}[kind]
    scratch = empty((cpu.gemm_scratch_bytes(height, width, threads, rows),), torch.uint8, cpu.GEMM_ALIGNMENT)
    c = matrix(m, n, torch.float32)
    if kind == "nt":
        cpu.gemm_nt(a, b, c, scratch, threads)
    elif kind == "nn":
        cpu.gemm_nn(a, b, c, scratch, threads, pairs=pairs)
    else:
        rounded = empty((m, n), torch.bfloat16) if drawn.random() < 0.5 else None
        cpu.gemm_tn(a, b, c, scratch, threads, accumulate=drawn.random() < 0.5, scale=0.5, rounded=rounded)


def losses(T: int, D: int, V: int, dtype: torch.dtype) -> None:
    """Every op, forward and backward."""
    case = make_case(T, D, V, seed=V)
    h, w, b = (at_the_edge(t.to(dtype)).requires_grad_() for t in (case.hidden, case.weight, case.bias))
    data = dtype if dtype == torch.float64 else torch.float32
    targets = at_the_edge(case.targets)
    advantages, weights, old = (at_the_edge(t.to(data)) for t in (case.advantages, case.token_weights, case.noise - 3))
    config = dk.KernelConfig(workspace_bytes=1 << 16)
    dk.weighted_cross_entropy(h, dk.Head(w, bias=b, softcap=4.0), targets, weights, config=config).loss.backward()
    spec = dk.PolicySpec(entropy_coef=0.1, z_loss_coef=0.1)
    dk.policy_loss(h, w, targets, advantages, old_logprobs=old, spec=spec, config=config).loss.backward()
    scored = dk.linear_logprob(h, w, targets, entropy_gradient=True, config=config)
    (scored.logprobs.sum() + scored.entropy.sum()).backward()
    teacher = dk.Teacher(at_the_edge(case.hidden.to(dtype)), at_the_edge(case.weight.flip(0).to(dtype)))
    dk.distill_loss(h, dk.Head(w, bias=b), teacher, config=config).loss.backward()
    k = min(V, 5)
    with torch.no_grad():
        stored = dk.topk_logprobs(h, w, k, config=config)
    dk.distill_loss(
        h, w, dk.TeacherTopK(at_the_edge(stored.ids), at_the_edge(stored.logprobs)), config=config
    ).loss.backward()
    for tensor in (h, w):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()


if __name__ == "__main__":
    memory.empty = lambda use, size, dtype: empty(tuple(size), dtype, memory.ALIGNMENT)
    drawn = random.Random(0)
    for isa in _cpu.isas():
        _cpu.limit_isa(isa)
        for _ in range(200 if isa != "baseline" else 0):
            product(drawn, pairs=isa == "avx512" and cpu.has_bf16_gemm() and drawn.random() < 0.3)
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            for V in (1, 5, 16, 33, 64, 131):
                losses(9, 24, V, dtype)
        print(isa, "clean")
