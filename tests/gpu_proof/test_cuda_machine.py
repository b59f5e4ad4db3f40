"""Faults of the CUDA kernels that the values of the usual build cannot show: the device and stream of a launch, GPUs without
clusters, and multiplications that the compiler fuses with an addition."""

from __future__ import annotations

import ctypes
import platform

import mutants
import pytest
import test_cuda_values as values
import torch
from emulate import STREAM, build, launches, running

from drift_kernels.backends import cuda
from drift_kernels.backends.cuda import Launch
from drift_kernels.formulas import Tokens
from drift_kernels.spec import PolicySpec

A100 = ("-D__CUDA_ARCH__=800",)
FUSED = ("-ffp-contract=fast", "-mfma", "-O2")  # inlined, so that there is something to fuse
needs_fma = pytest.mark.skipif(platform.machine() != "x86_64", reason="CANNOT RUN: -mfma is an option for x86-64")


def state(library) -> list[int]:
    """[device of the last launch, its stream, the current device, reads and writes of attributes]."""
    found = (ctypes.c_int64 * 4)()
    ctypes.CDLL(str(library)).simt_last(found)
    return list(found)


def check_launches(library, monkeypatch) -> None:
    case, on = values.Case(1, 13_001, "plain", "one"), Launch(256, 1, True)  # 51 KiB: more than without the attribute
    with running(library, monkeypatch) as choose:
        for device in (0, 1, 0):
            choose(clusters=device == 0)
            monkeypatch.setattr(cuda, "choose", lambda *a: on)
            case.fused(values.SPEC, torch.empty(1, 13_001))
            launched, stream, current, _ = state(library)
            assert (launched, stream, current) == (device, STREAM, 0), (
                "device or stream of the launch, or the device after it"
            )
        asked = state(library)[3]
        case.fused(values.SPEC, torch.empty(1, 13_001))
        assert state(library)[3] == asked, "attributes are read once for each kernel and device"
        choose(clusters=False)
        monkeypatch.setattr(cuda, "choose", lambda *a: Launch(64, 2, False))
        with pytest.raises(RuntimeError, match="cudaErrorInvalidClusterSize"):
            cuda.row_stats(case.x, case.chunk, ("lse",))
        assert state(library)[2] == 0, "the current device after an error"


def check_without_clusters(library, monkeypatch) -> None:
    """Every kernel as an A100 runs it: one block a row."""
    with running(library, monkeypatch) as choose:
        for order in values.ORDERS:
            choose(order, clusters=False)
            for on_chip in (False, True):
                case = values.Case(5, 1001, "everything", "csr", seed=3)
                out = torch.full((5, 1001), float("nan"))
                with monkeypatch.context() as patch:
                    launches(patch, threads=96, cluster=1, on_chip=on_chip)
                    outputs, _ = case.fused(values.SPEC, out)
                values.check_statistics(case, outputs)
                own, exact = (
                    values.gradient_of(lambda x: case.policy(x, values.SPEC)["loss"].sum(), x)  # noqa: B023
                    for x in (case.x, case.x.double())
                )
                values.check("gradient", out, own, exact, case.scale)


def check_contraction(library, monkeypatch) -> None:
    """The target's logit is the number that went into the row's maximum and sums, whatever the compiler fuses."""
    V = 67
    with running(library, monkeypatch):
        for head in ("rows", "everything"):
            case = values.Case(40, V, head, "one", seed=9)
            case.y = case.logits(case.x).argmax(-1)
            case.y[::2] = (case.y[::2] + 1) % V
            outputs = cuda.row_stats(case.x, case.chunk, ("is_top1", "logprobs"))
            assert outputs["is_top1"].tolist() == [0.0, 1.0] * 20, "is_top1"
            sure = values.Case(40, V, head, "one", seed=10)
            sure.x = torch.zeros(40, V)
            sure.y = torch.arange(40)
            sure.x[sure.y, sure.y] = torch.linspace(300.0, 400.0, 40)
            if head == "everything":
                sure.bias, sure.head = torch.zeros(V), values.HeadOptions(logit_scale=1.3)
            out = torch.empty(40, V)
            cuda.fused_policy(sure.x, sure.chunk, PolicySpec(), Tokens(torch.full((40,), 0.37)), ("loss",), out=out)
            assert not out.any(), "the gradient of a sure row is not 0"


CHECKS = {
    "launches": (check_launches, ()),
    "without clusters": (check_without_clusters, A100),
    "contraction": (check_contraction, FUSED),
}
MISTAKES = {  # name: (check, file below csrc, text, its replacement)
    "the default stream": ("launches", "cuda/launch.h", "config.stream = stream;", "config.stream = nullptr;"),
    "the device is not set": ("launches", "cuda/launch.h", "error = cudaSetDevice(device);", "error = cudaSuccess;"),
    "the device is not restored": ("launches", "cuda/launch.h", "cudaSetDevice(before);", "cudaSuccess;"),
    "attributes of another device": (
        "launches",
        "cuda/launch.h",
        "all.find({kernel, device})",
        "all.find({kernel, 0})",
    ),
    "a block that is the second of its cluster": (
        "without clusters",
        "cuda/device.h",
        "unsigned rank() const { return 0; }",
        "unsigned rank() const { return 1; }",
    ),
    "a cluster of two without a second block": (
        "without clusters",
        "cuda/device.h",
        "unsigned size() const { return 1; }",
        "unsigned size() const { return 2; }",
    ),
    "no barrier where there is no cluster": (
        "without clusters",
        "cuda/device.h",
        "void sync() const { __syncthreads(); }",
        "void sync() const {}",
    ),
    "a product that may be fused": (
        "contraction",
        "cuda/logits.h",
        "if (PLAIN) return __fmul_rn(x, flat);",
        "if (PLAIN) return x * flat;",
    ),
    "a product with bias that may be fused": (
        "contraction",
        "cuda/logits.h",
        "return __fmul_rn(u, inverse);",
        "return u * inverse;",
    ),
}


@needs_fma
@pytest.mark.parametrize("name", CHECKS)
def test_launches_older_gpus_and_fused_products(name, tmp_path):
    check, options = CHECKS[name]
    assert mutants.outcome(check, build(tmp_path, level="-O0", options=options)) == ""


@needs_fma
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_them_is_seen(name, tmp_path):
    check, *change = MISTAKES[name]
    check, options = CHECKS[check]
    library = build(tmp_path, changes=(tuple(change),), within="cuda/rows.cu", level="-O0", options=options)
    assert mutants.outcome(check, library), "not seen"
