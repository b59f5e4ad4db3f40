"""Faults of the CUDA kernels that the values of the usual build cannot show: the device and stream of a launch, and GPUs
without clusters."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import SimpleNamespace

import mutants
import pytest
import test_cuda_values as values
import torch
from distill_case import Pair
from emulate import H100_SHARED, STREAM, build, launches, running

from drift_kernels.backends import cuda
from drift_kernels.backends.contract import BucketSlopes, Coefs, TeacherChunk
from drift_kernels.backends.cuda import Launch

A100 = ("-D__CUDA_ARCH__=800",)


def state(library) -> list[int]:
    """[device of the last launch, its stream, the current device, reads and writes of attributes]."""
    found = (ctypes.c_int64 * 4)()
    ctypes.CDLL(str(library)).simt_last(found)
    return list(found)


def entries() -> dict[str, Callable[[], object]]:
    """Every entry of the library that launches a kernel."""
    case, pair = values.Case(2, 33, "plain", "one"), Pair(2, 33, some=False)
    x, chunk, lse, out = pair.student.x, pair.student.chunk, pair.student.lse(), torch.empty(2, 33)
    teacher = TeacherChunk(pair.teacher.x, pair.teacher.chunk, pair.teacher.lse())
    ids = torch.zeros(2, 1, dtype=torch.int64)
    slopes = BucketSlopes(ids, torch.ones(2, 1))

    def distill(out):
        return cuda.fused_distill(x, chunk, Coefs(lse), teacher, pair.weights, 0.5, out=out)

    return {
        "row_stats": lambda: cuda.row_stats(x, chunk, ("lse",)),
        "partial_stats": lambda: cuda.partial_stats(x, chunk, ("lse",)),
        "grad_logits": lambda: cuda.grad_logits(x, chunk, Coefs(lse), raw=True, out=out),
        "fused_policy": lambda: case.fused(values.SPEC, out),
        "fused_policy, no gradient": lambda: case.fused(values.SPEC, None),
        "fused_distill": lambda: distill(out),
        "fused_distill, no gradient": lambda: distill(None),
        "top_k": lambda: cuda.top_k(x, chunk, None, 2, 1),
        "bucket_logprobs": lambda: cuda.bucket_logprobs(x, chunk, None, lse, ids, True),
        "grad_buckets": lambda: cuda.grad_buckets(x, chunk, Coefs(lse), None, slopes, out=out),
    }


def check_launches(library, monkeypatch) -> None:
    case, on = values.Case(1, 13_001, "plain", "one"), Launch(256, 1, True)  # 51 KiB: more than without the attribute
    with running(library, monkeypatch) as choose:
        limits = cuda._limits
        for name, call in entries().items():
            for device in (1, 0):
                choose(clusters=device == 0)
                asked = []
                with monkeypatch.context() as patch:
                    patch.setattr(cuda, "_limits", lambda of: asked.append(of) or limits(of))  # noqa: B023
                    call()
                assert state(library)[:3] == [device, STREAM, 0], f"{name}: device, stream, or the device after it"
                assert asked == [device], f"{name}: the device whose limits are asked"
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


def check_limits(library, monkeypatch) -> None:
    """Each device's own; the emulated second one has a KiB of shared memory less."""
    limits = cuda._limits.__wrapped__
    with running(library, monkeypatch):
        assert [limits(device) for device in (0, 1)] == [(H100_SHARED, True), (H100_SHARED - 1024, True)]
        assert state(library)[2] == 0


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
    "limits": (check_limits, ()),
    "without clusters": (check_without_clusters, A100),
}
MISTAKES = {  # name: (check, file below csrc, text, its replacement)
    "the default stream": ("launches", "cuda/launch.h", "config.stream = stream;", "config.stream = nullptr;"),
    "the device is not set": ("launches", "cuda/launch.h", "error = cudaSetDevice(device);", "error = cudaSuccess;"),
    "the device is not restored": ("launches", "cuda/launch.h", "cudaSetDevice(before);", "cudaSuccess;"),
    "the default stream, a pair of rows": (
        "launches",
        "cuda/distill.cu",
        "const auto s = static_cast<cudaStream_t>(stream);",
        "const cudaStream_t s = nullptr;",
    ),
    "the default stream, buckets": (
        "launches",
        "cuda/buckets.cu",
        "static_cast<cudaStream_t>(stream)",
        "nullptr",
    ),
    "limits of another device": (
        "limits",
        "cuda/rows.cu",
        "cudaDevAttrMaxSharedMemoryPerBlockOptin, device)",
        "cudaDevAttrMaxSharedMemoryPerBlockOptin, 0)",
    ),
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
    within = change[0] if change[0].endswith(".cu") else "cuda/rows.cu"
    library = build(tmp_path, changes=(tuple(change),), within=within, level="-O0", options=options)
    assert mutants.outcome(check, library), "not seen"


def test_the_device_and_the_stream_are_those_of_the_rows(monkeypatch):
    def stream(index=None):
        return SimpleNamespace(cuda_stream=100 + (3 if index is None else index))

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    assert cuda._device_and_stream(torch.device("cuda", 1)) == (1, 101)
    assert cuda._device_and_stream(torch.device("cuda")) == (3, 103)
