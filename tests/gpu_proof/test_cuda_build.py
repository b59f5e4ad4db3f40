"""The CUDA kernels compiled for three architectures: no spills, bounded resources, 16-byte accesses; and the library loaded."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from ctypes import byref, c_int
from pathlib import Path

import pytest
import torch

from drift_kernels import _cpu
from drift_kernels.backends import available_backends, cuda, cuda_library

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
TABLE = ROOT / "build/gpu-proof/cuda-kernels.json"
ARCHITECTURES = ("80", "90a", "100a")
MODES = ("row_stats", "grad_logits", "fused_policy")
TYPES = {"float": "fp32", "__half": "fp16", "__nv_bfloat16": "bf16"}
COUNT = 20 + 7 + 5  # 2 statistics, 6 gradients, 12 policies; distillation; buckets
REGISTERS = 65_536 // (2 * 512)  # so that two blocks of 512 threads share a multiprocessor
STATIC_SHARED = 1024  # bytes; what a row on chip leaves free, see `cuda.choose`
MARKS = 16_384  # bytes more of `bucket_logprobs`


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
    """The instance as what it does, where the rows lie, which options it knows, and the type it writes."""

    def place(on_chip: str) -> str:
        return "on chip" if on_chip == "true" else "from memory"

    if match := re.search(r"row_kernel<\(.*?Mode\)(\d), (true|false), (true|false), (\w+)>", text):
        mode, on_chip, plain, kind = match.groups()
        return ", ".join((MODES[int(mode)], place(on_chip), "plain" if plain == "true" else "full", TYPES[kind]))
    if match := re.search(r"distill_kernel<(true|false), (true|false), (\w+)>", text):
        gradient, on_chip, kind = match.groups()
        return f"fused_distill, {place(on_chip)}, {TYPES[kind] if gradient == 'true' else 'value'}"
    if match := re.search(r"grad_buckets_kernel<(\w+)>", text):
        return f"grad_buckets, {TYPES[match[1]]}"
    match = re.search(r"(bucket|top_k)_kernel\(", text)
    assert match, text
    return {"bucket": "bucket_logprobs", "top_k": "top_k"}[match[1]]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Per architecture (cubins, ptxas' report); two files at a time."""
    compiler, folder = nvcc(), tmp_path_factory.mktemp("cubin")

    def compile_one(job: tuple[str, Path]) -> tuple[Path, str]:
        arch, source = job
        cubin = folder / f"{source.stem}-{arch}"
        command = [compiler, "-O3", "-std=c++17", "-cubin", f"-arch=sm_{arch}", "-Xptxas", "-v", str(source)]
        done = subprocess.run([*command, "-o", str(cubin)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return cubin, done.stdout + done.stderr

    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(compile_one, [(arch, source) for arch in ARCHITECTURES for source in SOURCES]))
    each = {arch: made[i * len(SOURCES) : (i + 1) * len(SOURCES)] for i, arch in enumerate(ARCHITECTURES)}
    return {
        arch: ([cubin for cubin, _ in files], demangled("".join(report for _, report in files)))
        for arch, files in each.items()
    }


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
        assert len(kernels) == COUNT, sorted(kernels)
        for name, used in kernels.items():
            assert used["stack"] == used["spill_stores"] == used["spill_loads"] == 0, (arch, name, used)
            assert 0 < used["registers"] <= REGISTERS, (arch, name, used)
            marks = MARKS if name == "bucket_logprobs" else 0
            assert used["static_shared"] <= STATIC_SHARED + marks, (arch, name, used)


def machine_code(cubins: list[Path]) -> dict[str, str]:
    """SASS by kernel."""
    found = {}
    for cubin in cubins:
        dump = subprocess.run([cuobjdump(), "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
        found |= {kernel_name(part): part for part in demangled(dump).split("Function : ")[1:]}
    return found


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_rows_move_sixteen_bytes_at_a_time(compiled, arch):
    cluster_barriers = dict.fromkeys(("fused_policy", "fused_distill"), 0)
    code_of = machine_code(compiled[arch][0])
    assert len(code_of) == COUNT, sorted(code_of)
    for name, code in code_of.items():
        assert re.search(r"LDG\.E\S*\.128", code), f"{name}: no 16-byte load"
        if not re.search("row_stats|value|top_k|bucket_logprobs", name):
            assert re.search(r"STG\.E\S*\.128", code), f"{name}: no 16-byte store"
        if "on chip" in name:
            assert re.search(r"STS\.128", code), f"{name}: no 16-byte store to shared memory"
            assert re.search(r"LDS\.128", code), f"{name}: no 16-byte load from shared memory"
        assert not re.search(r"\b(ATOM|ATOMG|ATOMS|RED)\b", code), f"{name}: an atomic"
        assert not re.search(r"\b(LDL|STL)\b", code), f"{name}: local memory"
        if (kernel := name.split(",")[0]) in cluster_barriers:
            cluster_barriers[kernel] += len(re.findall(r"UCGABAR_ARV", code))
    assert all((count > 0) == (arch != "80") for count in cluster_barriers.values()), cluster_barriers


# How often each vector access is written, at least: row kernels load five times a sweep (four at once, then one) and store
# five times where it is kept on chip; a pair is read and kept in both its rows.
VECTORS = {
    "rows": {"ld.global.v4": 80, "st.global.wb.v4": 30, "ld.shared.v4": 10, "st.shared.v4": 30},
    "distill": {"ld.global.v4": 20, "st.global.wb.v4": 6, "ld.shared.v4": 6, "st.shared.v4": 18},
    "buckets": {"ld.global.v4": 8, "st.global.wb.v4": 3},
}


ROUNDED = {"rows": 500, "distill": 330, "buckets": 110}


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_the_intermediate_code_has_what_the_source_says(source):
    """16-byte accesses where they are meant, reads of other blocks' shared memory, and the accurate exp."""
    command = [nvcc(), "-O3", "-std=c++17", "-ptx", "-arch=compute_90", str(source), "-o", "-"]
    ptx = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for instruction in ("mapa", "barrier.cluster.arrive", "barrier.cluster.wait"):
        assert instruction in ptx, instruction
    for vector, least in VECTORS[source.stem].items():
        assert ptx.count(vector) >= least, (vector, ptx.count(vector))
    assert not re.search(r"(ld|st)\.(global|shared)\.v2\.f32", ptx), "a vector was cut"
    assert "div.approx" not in ptx  # of --use_fast_math
    # likewise; expf scales its argument and uses ex2.approx.ftz.f32, but for expm1f, which has its own
    assert ptx.count("ex2.approx.f32") == (3 if source.stem == "buckets" else 0)
    assert "lg2.approx.f32" not in ptx
    # products that no addition may be fused with, so that a target's logit is bitwise the number in the row's sums
    assert ptx.count("mul.rn.f32") >= ROUNDED[source.stem]


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
    teacher, buckets, coefs = _cpu.Teacher(), _cpu.Buckets(), _cpu.Coefs()
    for name, *arguments in (
        ("fused_distill", coefs.address, 0, rows.address, teacher.address, 0, 0, 0, 0, 64, 1, 0),
        ("bucket_logprobs", 0, 0, 0, buckets.address, 64),
        ("grad_buckets", coefs.address, 0, buckets.address, 0, 0, 0, 0, 64),
        ("top_k", 0, buckets.address, 512, 64),
    ):
        with pytest.raises(RuntimeError, match=f"{name}: cudaErrorInvalidValue .* DRIFT_TUNING"):
            call(name, 0, 0, rows.address, *arguments)  # neither log-sum-exps nor a k
    coefs.lse = 16
    arguments = (coefs.address, 0, rows.address, teacher.address, 0, 0, 0, 0, 64, 1, 0)
    with pytest.raises(RuntimeError, match=r"fused_distill: cudaError(InsufficientDriver|NoDevice)"):
        call("fused_distill", 0, 0, rows.address, *arguments)
    buckets.k = 1
    with pytest.raises(RuntimeError, match=r"top_k: cudaError(InsufficientDriver|NoDevice)"):
        call("top_k", 0, 0, rows.address, 0, buckets.address, 512, 64)


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
