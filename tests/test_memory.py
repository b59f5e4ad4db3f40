"""Peak memory at a real vocabulary: the high-water mark of a fresh process."""

import os
import subprocess
import sys

import pytest

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
