"""Peak memory at a real vocabulary, the high-water mark of a fresh process; and memory that calls hand on to each other."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import drift_kernels as dk
from drift_kernels import _cpu, memory
from drift_kernels.testing import make_case

SCRIPT = """
import re, sys, torch
import drift_kernels as dk
dtype = getattr(torch, sys.argv[1])
T, D, V, workspace = 600, 64, int(sys.argv[2]), 256 << 20
spec, cu = dk.PolicySpec.preset(sys.argv[3]), torch.tensor([0, 30, 400, 600])   # some sequences are longer than a chunk
hidden = torch.randn(T, D).to(dtype).requires_grad_()
weight = (torch.randn(V, D) * 0.05).to(dtype).requires_grad_()
targets, advantages = torch.randint(0, V, (T,)), torch.randn(T)
some = (hidden[:99], weight[:999], targets[:99] % 999, advantages[:99])   # threads, libraries and both passes are up
small = dk.policy_loss(*some, spec=spec, cu_seqlens=torch.tensor([0, 9, 99]), config=dk.KernelConfig(workspace_bytes=1 << 17))
small.loss.backward()
hidden.grad = weight.grad = None
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
open("/proc/self/clear_refs", "w").write("5")   # the high-water mark starts from what is resident now
before = peak()
config = dk.KernelConfig(workspace_bytes=workspace)
dk.policy_loss(hidden, weight, targets, advantages, spec=spec, cu_seqlens=cu, config=config).loss.backward()
by_right = 2 * T * D * 4 + V * D * 4 + (V * D * 2 if dtype != torch.float32 else 0)   # dhidden twice, dweight's sum, dweight
print((peak() - before - by_right) / workspace)
"""


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["ppo", "gspo"])
@pytest.mark.parametrize("V", ["151936", "262144"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_stays_within_the_workspace(dtype, V, preset):
    env = os.environ | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", SCRIPT, dtype, V, preset], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert 0.3 < float(done.stdout) <= 1.05, f"peak over what is there by right: {done.stdout.strip()} of the workspace"


SIZE = (300, 1001)  # of fp32: above `memory.KEPT_FROM`


@pytest.fixture
def cold(monkeypatch):
    """Nothing kept."""
    monkeypatch.setattr(memory, "_free", {})


def test_a_freed_block_is_taken_again_and_only_then(cold):
    first, other = memory.empty("a", SIZE, torch.float32), memory.empty("a", SIZE, torch.float32)
    address = other.data_ptr()
    assert first.data_ptr() != address
    assert address % 64 == 0
    view = other[5:, 7]
    del other
    assert memory.empty("a", SIZE, torch.float32).data_ptr() != address, "a view still lives"
    memory.empty_cache()
    del view
    assert memory.empty("b", SIZE, torch.float32).data_ptr() != address, "another use"
    again = memory.empty("a", (600, 1000), torch.bfloat16)
    assert again.data_ptr() == address
    assert (again.shape, again.dtype, again.is_contiguous()) == ((600, 1000), torch.bfloat16, True)


def test_a_block_too_small_makes_room_for_a_larger_one(cold):
    memory.empty("a", SIZE, torch.float32)
    assert memory._free["a"][0].nbytes < 8 * 300 * 1001
    memory.empty("a", SIZE, torch.float64)
    assert [block.nbytes >= 8 * 300 * 1001 for block in memory._free["a"]] == [True]


def test_little_is_not_kept_and_the_cache_can_be_emptied(cold):
    memory.empty("a", (10, 10), torch.float32)
    assert not memory._free
    memory.empty("a", SIZE, torch.float32)
    dk.empty_cache()
    assert not memory._free["a"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("workspace", [4 << 20, 256 << 20])
def test_what_earlier_calls_left_there_changes_nothing(dtype, workspace, cold):
    """Blocks of NaN handed on; a gradient that is still held is left alone."""
    case = make_case(300, 64, 9001, masked=0.3, dtype=dtype)

    def run():
        h, w, _ = case.leaves(dtype)
        config = dk.KernelConfig(workspace_bytes=workspace)
        loss = dk.weighted_cross_entropy(h, w, case.targets, case.token_weights, config=config).loss
        return loss, *torch.autograd.grad(0.5 * loss, (h, w))

    first = run()
    copies = [value.clone() for value in first]
    for block in (block for free in memory._free.values() for block in free):
        block.fill(0xFF)
    second = run()
    for a, b, c in zip(first, second, copies):
        assert torch.equal(a, c)
        assert torch.equal(b, c)
    assert second[2].data_ptr() != first[2].data_ptr()
    address = second[2].data_ptr()
    del second, b
    assert run()[2].data_ptr() == address


@pytest.mark.skipif(sys.platform == "win32", reason="needs mprotect")
def test_kernels_touch_nothing_behind_their_tensors():
    """In a process that the first byte too far would end."""
    script = Path(__file__).parents[1] / "support" / "guard_pages.py"
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=250)
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr[-3000:]}"
    assert run.stdout.split("\n")[:-1] == [f"{isa} clean" for isa in _cpu.isas()]
