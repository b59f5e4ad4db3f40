"""Choices made by the GPU: the backend of "auto", the workspace, buffers of equal length. The GPU is a stand-in."""

import pytest
import torch

import drift_kernels as dk
from drift_kernels import backends, gpu_sweep
from drift_kernels.calls import Call

GPU = torch.device("cuda", 0)
GB = 10**9


@pytest.mark.parametrize(
    ("capability", "built", "chosen"),
    [((9, 0), True, "cuda"), ((10, 0), True, "cuda"), ((8, 9), True, "triton"), ((9, 0), False, "triton")],
)
def test_auto_takes_cuda_on_gpus_with_clusters_if_it_is_built(monkeypatch, capability, built, chosen):
    reasons = {"cuda": None if built else "not built", "triton": None}
    monkeypatch.setattr(backends, "_reason", reasons.get)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    assert backends.resolve("auto", GPU) == chosen


def test_auto_scores_by_triton_if_it_can(monkeypatch):
    monkeypatch.setattr(backends, "load", lambda name: name)
    monkeypatch.setattr(backends, "_reason", {"triton": None}.get)
    assert backends.scorer("auto", "cuda") == "triton"
    assert backends.scorer("cuda", "cuda") == "cuda"
    monkeypatch.setattr(backends, "_reason", {"triton": "not installed"}.get)
    assert backends.scorer("auto", "cuda") == "cuda"


@pytest.fixture
def free(monkeypatch):
    """A GPU with 30 GB that the driver has, and 10 GB that torch keeps and does not use; the number of queries."""
    queries = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: queries.append(device) or (30 * GB, 80 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 15 * GB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 5 * GB)
    return queries


def test_the_workspace_is_a_share_of_the_free_memory(free):
    workspace = gpu_sweep.workspace_of(Call(), GPU)
    assert workspace == 8 << 30
    assert free == [GPU]
    T, D, V = 8192, 4096, 151_936
    assert gpu_sweep.flushes(T, *gpu_sweep.capacity(workspace, V, D, 2, True)) == 1
    assert gpu_sweep.flushes(T, *gpu_sweep.capacity(1 << 30, V, D, 2, True)) == 4


def test_the_callers_workspace_wins_and_nothing_is_asked(free):
    assert gpu_sweep.workspace_of(Call(config=dk.KernelConfig(workspace_bytes=12345)), GPU) == 12345
    assert gpu_sweep.workspace_of(Call(), torch.device("cpu")) == 1 << 30
    assert not free


def test_nothing_is_asked_while_a_graph_is_captured(free, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert gpu_sweep.workspace_of(Call(), GPU) == 1 << 30
    assert not free


def test_little_free_memory_leaves_the_least_workspace():
    assert gpu_sweep.workspace_share(0) == gpu_sweep.workspace_share(7 << 30) == 1 << 30
    assert gpu_sweep.workspace_share(8 << 30) == 2 << 30


@pytest.mark.parametrize(("count", "room", "even"), [(4096, 2560, 2048), (8192, 2308, 2048), (700, 2308, 700)])
def test_buffers_are_equally_full(count, room, even):
    assert gpu_sweep.even_room(count, 512, room) == even
