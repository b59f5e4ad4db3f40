"""The launch rule, its file, when the backend says that it cannot run, and bf16 as the patched interpreter has it."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from bfloat16 import rounded, widened

import drift_kernels as dk
from drift_kernels import backends
from drift_kernels.backends import triton as backend
from drift_kernels.backends.triton import launch, rows, scorer
from drift_kernels.calls import HeadOptions


@pytest.mark.parametrize("vocab", [1, 100, 4096, 5000, 8191, 8192, 151_936, 262_144])
def test_rows_fit_what_a_program_takes(vocab):
    chosen = launch.row_rule(vocab)
    assert chosen.block & (chosen.block - 1) == 0
    assert chosen.block <= 4096
    assert chosen.rows == 1 or chosen.rows * vocab <= launch.LOGITS_A_PROGRAM
    assert chosen.block // (32 * chosen.warps) <= 16
    pair = launch.row_launch("fused_distill", torch.empty(1, vocab, device="meta"))
    assert pair.block & (pair.block - 1) == 0
    assert pair.block // (32 * pair.warps) == 4


def test_a_file_overrides_the_rule(tmp_path, monkeypatch):
    path = tmp_path / "tuning.json"
    path.write_text(json.dumps({"triton": {"row_stats": {"warps": 16, "block": 8192}}}))
    monkeypatch.setenv("DRIFT_TUNING", str(path))
    logits = torch.zeros(4, 10_000)
    assert launch.row_launch("row_stats", logits) == launch.Launch(8192, 16, 1, 1)
    assert launch.row_launch("grad_logits", logits) == launch.row_rule(10_000)
    for wrong in (
        {"triton": {"row_stats": {"wraps": 16}}},
        {"triton": {"rowstats": {}}},
        {"triton": {"score": {"warps": 0}}},
    ):
        other = tmp_path / f"{len(str(wrong))}.json"
        other.write_text(json.dumps(wrong))
        monkeypatch.setenv("DRIFT_TUNING", str(other))
        with pytest.raises(ValueError, match=r"wraps|rowstats|warps=0"):
            launch.score_launch(logits, "half", True, True) if "score" in str(wrong) else launch.row_launch(
                "row_stats", logits
            )


@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_results_do_not_depend_on_the_launch_but_for_rounding(blocks, monkeypatch):
    x = torch.randn(5, 1000, generator=torch.Generator().manual_seed(0))
    chunk = backend.Chunk(torch.arange(5), None, None, None, HeadOptions())
    usual = backend.row_stats(x, chunk, ("lse", "entropy"))
    monkeypatch.setattr(launch, "row_rule", lambda vocab: launch.Launch(128 << blocks, 1, 1, blocks))
    for name, values in backend.row_stats(x, chunk, ("lse", "entropy")).items():
        torch.testing.assert_close(values, usual[name])


def test_the_number_of_rows_never_compiles_another_kernel():
    """In a process of its own, where kernels are for compiling."""
    code = (
        "from drift_kernels.backends.triton import buckets, distill, rows, scorer\n"
        "for k in (rows.row_stats_kernel, rows.grad_logits_kernel, rows.fused_policy_kernel, scorer.score_kernel,\n"
        "          buckets.top_k_kernel):\n"
        "    p = {p.name: p for p in k.params}['rows']\n"
        "    assert p.do_not_specialize and not p.is_constexpr, k\n"
        "for k in (distill.fused_distill_kernel, buckets.bucket_logprobs_kernel, buckets.grad_buckets_kernel):\n"
        "    assert not {'rows', 'n'} & {p.name for p in k.params}, k  # a program takes one row\n"
    )
    environment = {"PATH": "", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert not hasattr(rows.row_stats_kernel, "params") or scorer.score_kernel is not None


def test_the_reasons_it_cannot_run_name_the_fix(monkeypatch):
    assert dk.available_backends()["triton"] is None, "the interpreter runs here"
    assert backends.resolve("triton", torch.device("cpu")) == "triton"
    assert backends.resolve("auto", torch.device("cpu")) == "cpu"
    monkeypatch.setattr(backends, "interpreted", lambda: False)
    assert "TRITON_INTERPRET=1" in dk.available_backends()["triton"]
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot run: no CUDA device.*TRITON_INTERPRET"):
        backends.resolve("triton", torch.device("cpu"))
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in dk.available_backends()["triton"]


@triton.jit
def bf16_kernel(a, b, total, product, dotted, wide, narrow, N: tl.constexpr):
    lanes = tl.arange(0, N)
    x, y = tl.load(a + lanes), tl.load(b + lanes)
    tl.store(total + lanes, x + y)
    tl.store(product + lanes, x * y)
    tl.store(narrow + lanes, tl.load(wide + lanes).to(tl.bfloat16))
    square = lanes[:, None] * N + lanes[None, :]
    column = tl.zeros([N, N], tl.bfloat16) + x[:, None]
    row = tl.zeros([N, N], tl.bfloat16) + y[None, :]
    tl.store(dotted + square, tl.dot(column, row))


def test_the_interpreter_computes_in_bfloat16_as_torch_does():
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(16, generator=g).bfloat16() for _ in range(2))
    wide = torch.randn(16, generator=g)
    wide[:4] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, float("nan"), float("inf")])
    total, product, narrow = (torch.empty(16, dtype=torch.bfloat16) for _ in range(3))
    dotted = torch.empty(16, 16)
    bf16_kernel[(1,)](a, b, total, product, dotted, wide, narrow, N=16)
    assert torch.equal(total, a + b)
    assert torch.equal(product, a * b)
    assert torch.equal(narrow[~narrow.isnan()], wide.bfloat16()[~narrow.isnan()])
    assert narrow.isnan().tolist() == wide.isnan().tolist()
    torch.testing.assert_close(dotted, 16 * a.float()[:, None] * b.float()[None, :])


def test_rounding_is_to_the_nearest_even_for_every_bf16_and_its_neighbours():
    bits = np.arange(1 << 16, dtype=np.uint32)
    values = ((bits[:, None] << 16) + np.array([0, 0x7FFF, 0x8000, 0x8001], np.uint32)).view(np.float32).ravel()
    values = values[~np.isnan(values)]
    assert np.array_equal(rounded(values), torch.from_numpy(values).bfloat16().view(torch.uint16).numpy())
    assert np.array_equal(widened(np.array([0x3F80], np.uint16)), [1.0])
