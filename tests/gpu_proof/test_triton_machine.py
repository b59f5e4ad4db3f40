"""Faults of the Triton kernels that the interpreter hides: lanes that a mask leaves undefined, 32-bit offsets, kernels compiled
again for another alignment, fused multiply-adds, the device of a launch; and the product that only a GPU has."""

import ast
import mmap
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton.language as tl
from teacher_oracle import make_pair
from torch import Tensor
from triton.runtime.interpreter import TensorHandle

from drift_kernels import gpu_sweep
from drift_kernels.backends import triton as backend
from drift_kernels.backends.contract import BucketSlopes, Chunk, Coefs, TeacherChunk
from drift_kernels.backends.triton import launch, scorer
from drift_kernels.calls import HeadOptions
from drift_kernels.formulas import Tokens
from drift_kernels.spec import PolicySpec

ROOMS = sorted(p for p in Path(backend.__file__).parent.glob("*.py") if "@triton.jit" in p.read_text())


def loads_without_other(text: str) -> list[int]:
    """Lines of masked loads whose lanes outside the mask are undefined on a GPU; the interpreter has zeros there."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "tl.load"
        and (len(node.args) > 1 or "mask" in {k.arg for k in node.keywords})
        and (len(node.args) < 3 and "other" not in {k.arg for k in node.keywords})
    ]


def narrow_offsets(text: str) -> list[str]:
    """Row numbers of 32 bits: row · stride passes 2³¹ at 14,000 rows of 151,936."""
    wide = r"tl\.program_id\(0\)(?!\.to\(tl\.int64\))"
    return [line.strip() for line in text.splitlines() if re.search(wide, line) and "row0 =" not in line]


@pytest.mark.parametrize("room", ROOMS, ids=lambda p: p.stem)
def test_masked_loads_name_the_other_value_and_rows_are_numbered_in_64_bits(room):
    text = room.read_text()
    assert loads_without_other(text) == []
    assert narrow_offsets(text) == []
    if "other=" in text:
        assert loads_without_other(re.sub(r", other=[^)]*\)", ")", text, count=1)), "the check can fail"
    if ".to(tl.int64) * ROWS" in text:
        assert narrow_offsets(text.replace(".to(tl.int64) * ROWS", " * ROWS", 1)), "the check can fail"


FAR = 1_200_000_000  # elements between rows: a stride of 32 bits, and an offset of 33 bits from the third row on


def near(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A copy, row behind row."""
    return like.to(dtype or like.dtype, copy=True)


def far(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A copy with rows FAR apart, and zeros at an offset that has wrapped; only the pages that are touched exist."""
    dtype, (rows, columns), before = dtype or like.dtype, like.shape, 2**31
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
    memory = mmap.mmap(-1, (before + rows * FAR) * dtype.itemsize, flags=flags)
    return torch.frombuffer(memory, dtype=dtype).as_strided((rows, columns), (FAR, 1), before).copy_(like)


def typed_range(*bounds):
    """`range` whose numbers have the type of its bounds, as the compiler has it; the interpreter's are Python's."""
    kinds = [bound.dtype for bound in bounds if isinstance(bound, tl.tensor)]
    kind = tl.int64 if tl.int64 in kinds else tl.int32
    for number in range(*map(int, bounds)):
        yield tl.tensor(TensorHandle(np.array([number], f"int{kind.primitive_bitwidth}"), kind), kind)


def from_rows(place: Callable[..., Tensor]) -> dict[str, Tensor]:
    """What every kernel makes of rows that `place` has laid out."""
    pair = make_pair(4, 40, seed=41, some=False)
    chunk, weights = pair.student.chunk, pair.weights
    x, y, nothing = place(pair.student.x), place(pair.teacher.x), torch.zeros(4, 40)
    lse, its = (backend.row_stats(rows, chunk, ("lse",))["lse"] for rows in (x, y))
    coefs, taught = Coefs(lse, pair.coefs["logprobs"]), TeacherChunk(y, pair.teacher.chunk, its)
    ids = backend.top_k(x, chunk, None, 4, 3)
    logprobs, rest = backend.bucket_logprobs(x, chunk, None, lse, ids, True)
    buckets = BucketSlopes(ids, torch.ones(4, 3), rest, torch.ones(4))
    outs = [place(nothing, torch.bfloat16) for _ in range(4)]
    backend.grad_logits(x, chunk, coefs, raw=True, out=outs[0])
    backend.fused_policy(x, chunk, PolicySpec(), Tokens(weights), ("loss",), out=outs[1])
    values, _ = backend.fused_distill(x, chunk, coefs, taught, weights, 0.5, out=outs[2])
    backend.grad_buckets(x, chunk, coefs, None, buckets, out=outs[3])
    hidden, weight = place(nothing[:, :24].cos()), place(nothing[:, :24].add(torch.arange(4)[:, None]))
    few = Chunk(torch.arange(4), None, None, None, HeadOptions())
    scores = backend.score(hidden, weight, few, ("logprobs",))
    found = {"lse": lse, "its": its, "ids": ids, "logprobs": logprobs, "rest": rest, "divergence": values, **scores}
    return found | dict(zip(("grad_logits", "fused_policy", "fused_distill", "grad_buckets"), outs))


def check_far_rows(described: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scorer, "has_descriptors", lambda *operands: described)
        for module in (backend.kernels, backend.buckets):
            patch.setattr(module, "range", typed_range, raising=False)
        found, wanted = from_rows(far), from_rows(near)
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


@pytest.mark.parametrize("described", [False, True])
def test_rows_begin_beyond_two_to_the_31(described):
    check_far_rows(described)


COMPILED_ONCE = """
import sys, os
sys.path[:0] = [os.path.join(os.getcwd(), "tests/gpu_proof")]
import torch
import aot
from drift_kernels import backends, driver
import drift_kernels as dk
from drift_kernels.calls import Call
from drift_kernels.formulas import Tokens
from drift_kernels.tensors import Inputs

def kinds(lengths):
    "What the just-in-time compiler tells apart in the launches of one pass over rows of these numbers of targets."
    T, V, D = len(lengths), 64, 16
    rows = torch.repeat_interleave(torch.arange(T), torch.tensor(lengths))
    M = len(rows)
    tokens = Tokens(*(torch.rand(M) for _ in range(4)))
    targets = torch.randint(0, V, (M,))
    x = Inputs(torch.randn(T, D), torch.randn(V, D), None, targets, rows, None, torch.ones(T), tokens)
    spec = dk.PolicySpec(entropy_coef=0.1)
    config = dk.KernelConfig(backend="triton", workspace_bytes=40_000)
    call = Call(spec=spec, config=config, outputs=("logprobs",), need_hidden=True)
    found = {}
    for kernel, chosen, arguments in aot.captured(lambda: driver.fused(x, call, torch.ones(()))):
        found.setdefault(kernel.__name__, set()).add(aot.specialisation(kernel, arguments))
    return found

backends.resolve = lambda *arguments: "triton"  # nothing runs
a, b = kinds([1, 2, 3, 1, 5] * 40), kinds([3, 1, 1, 2, 4] * 39 + [1])
assert a == b, set(a) ^ set(b)
assert all(len(found) == 1 for found in a.values()), {name: len(found) for name, found in a.items()}
assert a, "nothing was launched"
"""


def test_a_batch_of_another_raggedness_compiles_nothing():
    environment = {"PYTHONPATH": ":".join(sys.path), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILED_ONCE], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_only_the_scorers_products_are_fused_with_additions():
    """Elsewhere a target's logit, by scalar code, must be the number that vector code put into the row's sums."""
    assert not launch.options(launch.row_rule(151_936))["enable_fp_fusion"]
    assert not launch.options(launch.key_rule(151_936))["enable_fp_fusion"]
    assert launch.options(launch.score_rule(8192, "half", (9, 0), True, True))["enable_fp_fusion"]


def test_a_kernel_is_launched_on_the_device_of_its_rows(monkeypatch):
    entered = []

    @contextmanager
    def device(index):
        entered.append(index)
        yield
        entered.append("left")

    monkeypatch.setattr(torch.cuda, "device", device)
    second = SimpleNamespace(device=torch.device("cuda", 1))
    kernel = {(3,): lambda **arguments: entered.append(arguments["V"])}
    launch.run(kernel, (3,), second, launch.Launch(128, 4), {"V": 7})  # pyright: ignore[reportArgumentType]
    assert entered == [second.device, 7, "left"]


def test_each_device_has_a_capability_of_its_own(monkeypatch):
    current = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=current: (8 + device.index, 0))
    found = [launch.capability.__wrapped__(torch.device("cuda", index)) for index in (0, 1, 0)]
    assert found == [(8, 0), (9, 0), (8, 0)]


class Half:
    """A 16-bit matrix on a GPU, as far as `multiply` looks."""

    device, dtype = torch.device("cuda"), torch.bfloat16

    def __init__(self, values):
        self.values = values


def gpu_products(monkeypatch):
    """torch.mm and torch.addmm of `Half`s as CUDA has them: fp32 out, of operands of one 16-bit type."""

    def mm(a, b, *, out_dtype, out):
        assert out_dtype == out.dtype == torch.float32
        assert isinstance(a, Half)
        assert isinstance(b, Half)
        return out.copy_(a.values.double() @ b.values.double())

    def addmm(base, a, b, *, beta=1, alpha=1.0, out_dtype, out):
        assert out_dtype == out.dtype == torch.float32
        assert isinstance(a, Half)
        assert isinstance(b, Half)
        kept = beta * base.double() if beta else 0.0  # beta 0 passes over a NaN
        return out.copy_(kept + alpha * (a.values.double() @ b.values.double()))

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", addmm)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_product_of_16_bit_operands_on_a_gpu_by_value(add, scale, monkeypatch):
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*shape, generator=g) for shape in ((3, 5), (5, 4)))
    before = torch.randn(3, 4, generator=g) if add else torch.full((3, 4), float("nan"))
    exact = scale * (a.double() @ b.double()) + (before.double() if add else 0.0)
    gpu_products(monkeypatch)
    out = before.clone()
    found = gpu_sweep.multiply(Half(a), Half(b), out, add=add, scale=scale)  # pyright: ignore[reportArgumentType]
    assert found is out
    torch.testing.assert_close(out, exact.float())
