"""Faults of the Triton kernels that the interpreter hides: lanes that a mask leaves undefined, 32-bit offsets, kernels compiled
again for another alignment, fused multiply-adds, the device of a launch; and the product that only a GPU has."""

import ast
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from row_oracle import make_rows
from test_triton_rows import SPECS, check_policy

from drift_kernels import gpu_sweep
from drift_kernels.backends import triton as backend
from drift_kernels.backends.triton import launch

ROOMS = sorted(p for p in Path(backend.__file__).parent.glob("*.py") if "@triton.jit" in p.read_text())


def loads_without_other(text: str) -> list[int]:
    """Lines of masked loads whose lanes outside the mask are undefined on a GPU; the interpreter has zeros there."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "tl.load"
        and "mask" in {k.arg for k in node.keywords}
        and "other" not in {k.arg for k in node.keywords}
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


@pytest.mark.parametrize("name", ["ppo", "everything"])
def test_rows_of_products_and_gradients_may_lie_apart_differently(name, monkeypatch):
    rows = make_rows(4, 300, seed=41)
    monkeypatch.setattr(
        type(rows), "out", lambda self, dtype: torch.full((6, 450), float("nan"), dtype=dtype)[1:-1, :300]
    )
    check_policy(rows, SPECS[name])


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
