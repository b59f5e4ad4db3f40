"""The CUDA kernels compiled for three architectures: no spills, bounded resources, 16-byte accesses; and the library loaded."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from ctypes import byref, c_int
from pathlib import Path

import pytest
import torch

from drift_kernels import _cpu
from drift_kernels.backends import available_backends, cuda, cuda_library

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "csrc/cuda/rows.cu"
TABLE = ROOT / "build/gpu-proof/cuda-kernels.json"
ARCHITECTURES = ("80", "90a", "100a")
MODES, TYPES = (
    ("row_stats", "grad_logits", "fused_policy"),
    {"float": "fp32", "__half": "fp16", "__nv_bfloat16": "bf16"},
)
KERNEL = re.compile(r"row_kernel<\(.*?Mode\)(\d), (true|false), (true|false), (\w+)>")
REGISTERS = 65_536 // (2 * 512)  # so that two blocks of 512 threads share a multiprocessor
STATIC_SHARED = 1024  # bytes; what a row on chip leaves free, see `cuda.choose`


def nvcc() -> str:
    """nvcc's path; without it the caller's test says that it cannot run."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    found = shutil.which("nvcc") or next(
        filter(None, (shutil.which("nvcc", path=f"{h}/bin") for h in homes if h)), None
    )
    return found or pytest.skip("CANNOT RUN: no nvcc on PATH or in CUDA_HOME; the CUDA kernels were not compiled")


def cuobjdump() -> str:
    """cuobjdump's path: the toolkit's, or the one in triton's wheel."""
    bundled = [str(Path(p) / "triton/backends/nvidia/bin") for p in sys.path]
    places = [str(Path(nvcc()).parent), *bundled]
    found = next(filter(None, (shutil.which("cuobjdump", path=p) for p in places)), None)
    return found or pytest.skip("CANNOT RUN: no cuobjdump in the toolkit or in triton; machine code was not read")


def demangled(text: str) -> str:
    tool = shutil.which("c++filt") or pytest.skip("CANNOT RUN: no c++filt; kernels cannot be told apart by name")
    return subprocess.run([tool], input=text, capture_output=True, text=True, check=True).stdout


def kernel_name(text: str) -> str:
    """The instance as "mode, chip or sweeps, plain or full, type"."""
    match = KERNEL.search(text)
    assert match, text
    mode, on_chip, plain, kind = match.groups()
    parts = (
        MODES[int(mode)],
        "on chip" if on_chip == "true" else "from memory",
        "plain" if plain == "true" else "full",
    )
    return ", ".join((*parts, TYPES[kind]))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Per architecture (cubin, ptxas' report); all three are compiled side by side."""
    compiler, folder = nvcc(), tmp_path_factory.mktemp("cubin")

    def start(arch):
        command = [compiler, "-O3", "-std=c++17", "-cubin", f"-arch=sm_{arch}", "-Xptxas", "-v", str(SOURCE)]
        pipe = subprocess.PIPE
        return subprocess.Popen([*command, "-o", str(folder / arch)], stdout=pipe, stderr=subprocess.STDOUT, text=True)

    running = {arch: start(arch) for arch in ARCHITECTURES}
    reports = {arch: process.communicate()[0] for arch, process in running.items()}
    for arch, process in running.items():
        assert process.returncode == 0, reports[arch]
    return {arch: (folder / arch, demangled(reports[arch])) for arch in ARCHITECTURES}


def resources(report: str) -> dict[str, dict[str, int]]:
    """ptxas -v by kernel: registers, static shared memory, stack and spills in bytes."""
    found = {}
    for part in report.split("Compiling entry function ")[1:]:
        number = {
            "registers": r"Used (\d+) registers",
            "static_shared": r"(\d+) bytes smem",
            "stack": r"(\d+) bytes stack frame",
            "spill_stores": r"(\d+) bytes spill stores",
            "spill_loads": r"(\d+) bytes spill loads",
        }
        found[kernel_name(part)] = {k: int(m[1]) if (m := re.search(v, part)) else 0 for k, v in number.items()}
    return found


def test_no_kernel_spills_and_two_blocks_share_a_multiprocessor(compiled):
    table = {arch: resources(report) for arch, (_, report) in compiled.items()}
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    TABLE.write_text(json.dumps(table, indent=1) + "\n")
    for arch, kernels in table.items():
        assert len(kernels) == 20, sorted(kernels)  # 2 statistics + 6 gradients + 12 policies
        for name, used in kernels.items():
            assert used["stack"] == used["spill_stores"] == used["spill_loads"] == 0, (arch, name, used)
            assert 0 < used["registers"] <= REGISTERS, (arch, name, used)
            assert used["static_shared"] <= STATIC_SHARED, (arch, name, used)


def machine_code(cubin: Path) -> dict[str, str]:
    """SASS by kernel."""
    dump = subprocess.run([cuobjdump(), "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    return {kernel_name(part): part for part in demangled(dump).split("Function : ")[1:]}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_rows_move_sixteen_bytes_at_a_time(compiled, arch):
    cluster_barriers = 0
    for name, code in machine_code(compiled[arch][0]).items():
        assert re.search(r"LDG\.E\S*\.128", code), f"{name}: no 16-byte load"
        if "row_stats" not in name:
            assert re.search(r"STG\.E\S*\.128", code), f"{name}: no 16-byte store"
        if "on chip" in name:
            assert re.search(r"STS\.128", code), f"{name}: no 16-byte store to shared memory"
            assert re.search(r"LDS\.128", code), f"{name}: no 16-byte load from shared memory"
        assert not re.search(r"\b(ATOM|ATOMG|ATOMS|RED)\b", code), f"{name}: an atomic"
        assert not re.search(r"\b(LDL|STL)\b", code), f"{name}: local memory"
        cluster_barriers += len(re.findall(r"UCGABAR_ARV", code))
    assert (cluster_barriers > 0) == (arch != "80")


def test_the_intermediate_code_has_what_the_source_says():
    """16-byte accesses where they are meant, reads of other blocks' shared memory, and the accurate exp."""
    command = [nvcc(), "-O3", "-std=c++17", "-ptx", "-arch=compute_90", str(SOURCE), "-o", "-"]
    ptx = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for instruction in ("mapa", "barrier.cluster.arrive", "barrier.cluster.wait"):
        assert instruction in ptx, instruction
    # five loads a sweep (four at once, then one), and five stores where it is kept on chip
    for vector, least in {"ld.global.v4": 80, "st.global.wb.v4": 30, "ld.shared.v4": 10, "st.shared.v4": 30}.items():
        assert ptx.count(vector) >= least, (vector, ptx.count(vector))
    assert not re.search(r"(ld|st)\.(global|shared)\.v2\.f32", ptx), "a vector was cut"
    assert "div.approx" not in ptx  # of --use_fast_math
    assert "ex2.approx.f32" not in ptx  # likewise; expf scales its argument and uses ex2.approx.ftz.f32


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The CUDA library as setup.py builds it, with static cudart, for one architecture."""
    nvcc()
    folder = tmp_path_factory.mktemp("library")
    environment = os.environ | {"FORCE_CUDA": "1", "DRIFT_SKIP_CUDA_BUILD": "0", "TORCH_CUDA_ARCH_LIST": "9.0"}
    code = "import setuptools, runpy, sys; from unittest import mock; sys.argv = ['setup.py', 'build_ext', "
    code += f"'--build-lib', {str(folder)!r}, '--build-temp', {str(folder / 'temp')!r}]; "
    # only the CUDA library: what else there is takes long
    code += "setup = setuptools.setup; mock.patch('setuptools.setup', lambda **k: setup(**{**k, 'ext_modules': "
    code += "[e for e in k['ext_modules'] if e.name.endswith('_cuda')]})).start(); runpy.run_path('setup.py')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "drift_kernels/_cuda.so"


def test_the_library_needs_neither_a_driver_nor_a_cuda_runtime(library):
    needed = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"libcuda|libcudart|libtorch|libpython", needed), needed
    assert callable(cuda_library.bind(library))


@pytest.mark.skipif(torch.cuda.is_available(), reason="CANNOT RUN: there is a GPU, so the entry succeeds")
def test_an_error_comes_back_by_name_with_what_to_do(library):
    call, shared, clusters = cuda_library.bind(library), c_int(), c_int()
    with pytest.raises(RuntimeError, match=r"limits: cudaError(InsufficientDriver|NoDevice) \(.+\); .*driver|GPU"):
        call("limits", 0, byref(shared), byref(clusters))
    rows, stats = _cpu.Rows(), _cpu.Stats()
    with pytest.raises(RuntimeError, match=r"row_stats: cudaErrorInvalidValue .* DRIFT_TUNING"):
        call("row_stats", 0, 0, rows.address, stats.address, 64, 1)  # vocab 0
    rows.vocab = rows.stride = 8
    with pytest.raises(RuntimeError, match="cudaErrorInvalidValue"):
        call("row_stats", 0, 0, rows.address, stats.address, 65, 1)  # half a warp
    rows.rows, rows.logits, rows.targets = 1, 16, 16
    with pytest.raises(RuntimeError, match=r"row_stats: cudaError(InsufficientDriver|NoDevice)"):
        call("row_stats", 0, 0, rows.address, stats.address, 64, 1)


def test_a_library_of_other_sources_is_refused(library, monkeypatch):
    monkeypatch.setattr(cuda_library._cpu, "layout", 1)
    with pytest.raises(ImportError, match="different sources; build both: FORCE_CUDA=1"):
        cuda_library.bind(library)


def test_the_reason_why_the_backend_cannot_run(library, monkeypatch):
    """Not built, a torch without CUDA, no device: each by its own name."""
    monkeypatch.setattr(
        cuda, "library", missing := lambda: (_ for _ in ()).throw(ImportError("not built; FORCE_CUDA=1"))
    )
    assert available_backends()["cuda"] == "not built; FORCE_CUDA=1", missing
    monkeypatch.setattr(cuda, "library", lambda: cuda_library.bind(library))
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is built without CUDA" in (available_backends()["cuda"] or "")
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        assert re.match("no CUDA device: device_count: cudaError", available_backends()["cuda"] or "")
