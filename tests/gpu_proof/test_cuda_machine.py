"""Faults of the CUDA kernels that the values of the usual build cannot show: the device and stream of a launch, and GPUs
without clusters."""

from __future__ import annotations

import ctypes

import mutants
import pytest
import test_cuda_values as values
import torch
from emulate import STREAM, build, launches, running

from drift_kernels.backends import cuda
from drift_kernels.backends.cuda import Launch

A100 = ("-D__CUDA_ARCH__=800",)


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


CHECKS = {
    "launches": (check_launches, ()),
    "without clusters": (check_without_clusters, A100),
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
}


@pytest.mark.parametrize("name", CHECKS)
def test_launches_and_gpus_without_clusters(name, tmp_path):
    check, options = CHECKS[name]
    assert mutants.outcome(check, build(tmp_path, level="-O0", options=options)) == ""


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_them_is_seen(name, tmp_path):
    check, *change = MISTAKES[name]
    check, options = CHECKS[check]
    library = build(tmp_path, changes=(tuple(change),), within="cuda/rows.cu", level="-O0", options=options)
    assert mutants.outcome(check, library), "not seen"
