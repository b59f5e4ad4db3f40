"""How the CUDA kernels are launched, what their binding refuses, and that the emulation itself catches what it should."""

from __future__ import annotations

import ctypes
import itertools
import json
import math
import subprocess

import pytest
import torch
from emulate import FLAGS, H100_SHARED, ORDERS, SIMT, build, running, translate
from test_cuda_values import Case

from drift_kernels.backends import cuda
from drift_kernels.backends.cuda import Launch
from drift_kernels.backends.tuning import VARIABLE
from drift_kernels.backends.tuning import _read as tuning_file
from drift_kernels.formulas import Tokens
from drift_kernels.spec import PolicySpec

A100_SHARED = 166_912


@pytest.fixture
def rule():
    cuda.choose.cache_clear()
    yield cuda.choose
    cuda.choose.cache_clear()


@pytest.mark.parametrize(
    ("vocabulary", "twice", "shared", "clusters", "expected"),
    [
        (151_936, True, H100_SHARED, True, Launch(512, 8, True)),  # Qwen
        (128_256, True, H100_SHARED, True, Launch(512, 8, True)),  # Llama 3
        (32_000, True, H100_SHARED, True, Launch(512, 2, True)),  # Llama 2
        (262_144, True, H100_SHARED, True, Launch(512, 8, True)),  # Gemma 3: one block a multiprocessor
        (1_000_000, True, H100_SHARED, True, Launch(512, 1, False)),
        (32_000, True, A100_SHARED, False, Launch(512, 1, True)),
        (151_936, True, A100_SHARED, False, Launch(512, 1, False)),
        (151_936, False, H100_SHARED, True, Launch(512, 1, False)),
        (1000, True, H100_SHARED, True, Launch(64, 1, True)),
        (1, True, H100_SHARED, True, Launch(32, 1, True)),
    ],
)
def test_the_rule(rule, vocabulary, twice, shared, clusters, expected):
    assert rule(vocabulary, twice, shared, clusters) == expected


@pytest.mark.parametrize(
    ("vocabulary", "shared", "clusters", "expected"),
    [
        (151_936, H100_SHARED, True, Launch(512, 8, True)),  # one block a multiprocessor
        (32_000, H100_SHARED, True, Launch(512, 4, True)),
        (262_144, H100_SHARED, True, Launch(512, 1, False)),
        (20_000, A100_SHARED, False, Launch(512, 1, True)),
        (32_000, A100_SHARED, False, Launch(512, 1, False)),
        (1, H100_SHARED, True, Launch(32, 1, True)),
    ],
)
def test_the_rule_for_a_pair_of_rows(rule, vocabulary, shared, clusters, expected):
    assert rule(vocabulary, True, shared, clusters, True) == expected
    assert rule(vocabulary, False, shared, clusters, True) == rule(vocabulary, False, shared, clusters)


@pytest.mark.parametrize("pair", [False, True])
def test_what_the_rule_keeps_on_chip_fits(rule, pair):
    """Slices and static shared memory within a block's limit, and as many blocks as hold the rows if any do."""
    for shared, clusters in ((H100_SHARED, True), (A100_SHARED, False), (49_152, False)):
        for vocabulary in range(1, 500_000, 997):
            how = rule(vocabulary, True, shared, clusters, pair)
            bytes_of = {n: (1 + pair) * 4 * (math.ceil(math.ceil(vocabulary / n) / 32) * 32 + 4) + 1024 for n in (1, 8)}
            if how.on_chip:
                columns = math.ceil(math.ceil(vocabulary / how.cluster) / 32) * 32
                assert (1 + pair) * 4 * (columns + 4) + 1024 <= shared, vocabulary
            else:
                assert bytes_of[8 if clusters else 1] + 300 > shared, vocabulary


def test_two_blocks_fit_on_a_multiprocessor_by_the_rule(rule):
    """Slices, static shared memory and the system's KiB of two blocks, in the 228 KiB of an H100's multiprocessor."""
    for vocabulary in range(1000, 229_000, 997):
        how = rule(vocabulary, True, H100_SHARED, True)
        columns = math.ceil(math.ceil(vocabulary / how.cluster) / 32) * 32
        assert how.on_chip
        assert 2 * (4 * (columns + 4) + 1024 + 1024) <= 228 * 1024, vocabulary


def test_a_tuning_file_overrides_the_rule(rule, tmp_path, monkeypatch):
    path = tmp_path / "tuning.json"
    path.write_text(json.dumps({"cuda": {"threads": 256, "cluster": 4}, "triton": {"anything": 1}}))
    monkeypatch.setenv(VARIABLE, str(path))
    assert rule(151_936, True, H100_SHARED, True) == Launch(256, 4, True)
    assert rule(151_936, True, H100_SHARED, True, True) == Launch(512, 8, True), "a pair has choices of its own"
    own = tmp_path / "pair.json"
    own.write_text(json.dumps({"cuda": {"threads": 256, "fused_distill": {"cluster": 1, "on_chip": False}}}))
    monkeypatch.setenv(VARIABLE, str(own))
    rule.cache_clear()
    assert rule(151_936, True, H100_SHARED, True, True) == Launch(512, 1, False)
    assert rule(151_936, True, H100_SHARED, True) == Launch(256, 8, True)
    own.write_text(json.dumps({"cuda": {"fused_distill": {"blocks": 1}}}))
    tuning_file.cache_clear()
    rule.cache_clear()
    with pytest.raises(ValueError, match=r"'fused_distill' is \{'blocks': 1\}; it takes threads, cluster, on_chip"):
        rule(151_936, True, H100_SHARED, True, True)
    other = tmp_path / "wrong.json"
    other.write_text('{"cuda": {"warps": 4}}')
    monkeypatch.setenv(VARIABLE, str(other))
    rule.cache_clear()
    with pytest.raises(ValueError, match="'cuda' has no key 'warps'; it takes threads, cluster, on_chip"):
        rule(151_936, True, H100_SHARED, True)
    lists = tmp_path / "lists.json"
    lists.write_text("[1]")
    monkeypatch.setenv(VARIABLE, str(lists))
    with pytest.raises(ValueError, match="must hold"):
        rule(151_936, True, H100_SHARED, True)


def test_what_the_binding_refuses(tmp_path, monkeypatch):
    case, spec = Case(3, 40, "plain", "one"), PolicySpec()
    wide = torch.zeros(3, 80)
    refused = [
        (TypeError, "float64; this backend takes float32", case.x.double(), torch.zeros(3, 40)),
        (ValueError, "must be rows of adjacent columns", wide[:, ::2], torch.zeros(3, 40)),
        (TypeError, "out is torch.float64", case.x, torch.zeros(3, 40).double()),
        (ValueError, "must be rows like the logits", case.x, torch.zeros(3, 41)),
        (ValueError, "out overlaps the logits", wide[:, :40], wide[:, 20:60]),
    ]
    with running(build(tmp_path, level="-O0"), monkeypatch) as choose:
        for error, says, x, out in refused:
            with pytest.raises(error, match=says):
                cuda.fused_policy(x, case.chunk, spec, Tokens(), ("loss",), out=out)
        monkeypatch.setattr(cuda, "choose", lambda *a: Launch(512, 16, False))
        with pytest.raises(RuntimeError, match=r"row_stats: cudaErrorInvalidValue .*DRIFT_TUNING"):
            cuda.row_stats(case.x, case.chunk, ("lse",))
        choose(clusters=False)
        monkeypatch.setattr(cuda, "choose", lambda *a: Launch(64, 2, False))
        with pytest.raises(RuntimeError, match=r"cudaErrorInvalidClusterSize .*smaller cluster"):
            cuda.row_stats(case.x, case.chunk, ("lse",))
    with pytest.raises(ValueError, match="logits are on cpu; this backend takes tensors on a CUDA device"):
        cuda.row_stats(case.x, case.chunk, ("lse",))


# ---- the emulation

KERNELS = r"""
#include <cooperative_groups.h>
#include <cuda_runtime.h>
namespace cg = cooperative_groups;
__global__ void reverse(float* out, int mode) {
  extern __shared__ float dynamic[];
  __shared__ float fixed[64];
  const int t = threadIdx.x, n = blockDim.x;
  if (mode == 1 && t >= 32) return;                    // exited threads count as arrived
  fixed[t] = t, dynamic[t] = 2 * t;
  if (mode == 2 && t < 16) __syncthreads();            // not all of a warp, then another barrier
  if (mode == 3 && t < 16) __shfl_xor_sync(~0u, t, 1); // not all lanes of its mask
  if (mode != 4) __syncthreads();                      // 4: forgotten
  const int from = mode == 1 ? 31 - t : n - 1 - t;
  out[blockIdx.x * n + t] = fixed[from] + dynamic[from];
}
__global__ void neighbour(float* out, int mode) {
  __shared__ float mine[32];
  cg::cluster_group cluster = cg::this_cluster();
  mine[threadIdx.x] = 100 * cluster.block_rank() + threadIdx.x;
  if (mode != 1) cluster.sync();
  const unsigned next = (cluster.block_rank() + 1) % cluster.num_blocks();
  out[blockIdx.x * 32 + threadIdx.x] = cluster.map_shared_rank(mine, next)[31 - threadIdx.x];
  if (mode != 2) cluster.sync();
}
extern "C" __attribute__((visibility("default"))) const char* run(int which, float* out, int mode) {
  cudaLaunchAttribute a{cudaLaunchAttributeClusterDimension, {{which ? 2u : 1u, 1, 1}}};
  cudaLaunchConfig_t c{dim3(which ? 4 : 2), dim3(which ? 32 : 64), 64 * sizeof(float), nullptr, &a, 1};
  const cudaError_t error = cudaLaunchKernelEx(&c, which ? neighbour : reverse, out, mode);
  return error ? cudaGetErrorString(error) : "";
}
"""


@pytest.fixture(scope="module")
def emulation(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simt")
    (folder / "kernels.cpp").write_text(translate(KERNELS, itertools.count(1)))
    subprocess.run(
        ["g++", *FLAGS, "-shared", f"-I{SIMT}", str(folder / "kernels.cpp"), "-o", str(folder / "k.so")], check=True
    )
    library = ctypes.CDLL(str(folder / "k.so"))
    library.run.restype, library.run.argtypes = ctypes.c_char_p, (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)

    def run(which: int, mode: int, order: int):
        out = torch.zeros(128)
        library.simt_set(order, H100_SHARED, 1)
        return library.run(which, out.data_ptr(), mode).decode(), out

    return run


def test_blocks_and_clusters_are_emulated(emulation):
    t = torch.arange(64.0)
    block, cluster = 3 * (63 - t), 31 - torch.arange(32.0)
    for order in ORDERS:
        assert emulation(0, 0, order)[0] == ""
        assert torch.equal(emulation(0, 0, order)[1], block.repeat(2))
        assert torch.equal(emulation(0, 1, order)[1][:32], 3 * cluster), "exited threads count as arrived"
        assert torch.equal(emulation(1, 0, order)[1], torch.cat([100 + cluster, cluster]).repeat(2))


def test_the_emulation_sees_what_is_wrong(emulation):
    for order in ORDERS:
        assert "a barrier is reached at lines" in emulation(0, 2, order)[0]
        assert "is not reached by all lanes of its mask" in emulation(0, 3, order)[0]
        said, out = emulation(0, 4, order)  # shared memory starts as NaN, so that what was not written shows
        assert said == ""
        assert out.isnan().any()
        assert emulation(1, 1, order)[1].isnan().any()
        assert "read after that block has ended" in emulation(1, 2, order)[0]
