"""The compiled extensions; everything else is in pyproject.toml. Needs setuptools and pybind11, and no network.

Without a C++ compiler (CXX, or c++, g++ or clang++ on PATH) the package is installed without extensions, and computes in
plain torch; DRIFT_SKIP_CPU_BUILD=1 asks for that. The CUDA library is built if there are nvcc and a driver, for those of
the default GPUs that nvcc knows; an nvcc that fails leaves it out. FORCE_CUDA=1 builds it without a driver, and fails if it
cannot be built; DRIFT_SKIP_CUDA_BUILD=1 leaves it out. CUDA_HOME names the toolkit, TORCH_CUDA_ARCH_LIST the GPUs
("8.0;9.0+PTX"), MAX_JOBS how many of them are compiled for at a time.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError
from setuptools.modified import newer_group

COMPILE = ["-O3", "-g0", "-std=c++17", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
LINK = ["-fopenmp"]
if sys.platform == "darwin":  # Apple's clang ships no OpenMP runtime
    COMPILE.remove("-fopenmp")
    LINK.remove("-fopenmp")

CUDA = "drift_kernels._cuda"
HOME = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
NVCC = shutil.which("nvcc", path=f"{HOME}/bin" if HOME else f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
FLAGS = ["-O3", "-std=c++17", "-shared", "-cudart", "static", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
GPUS = "8.0;9.0+PTX;10.0"  # PTX of 9.0, so that GPUs to come have clusters too
FOLDERS = {"configs": "*.yaml", "examples": "*.py"}  # copied into the installed package `drift`


def is_set(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def wants_cuda(nvcc: str | None) -> bool:
    force, skip = is_set("FORCE_CUDA"), is_set("DRIFT_SKIP_CUDA_BUILD")
    if force and not skip and not nvcc:
        raise SystemExit("FORCE_CUDA=1 needs nvcc: it is neither on PATH nor in CUDA_HOME")
    driver = os.path.exists("/proc/driver/nvidia/version") or shutil.which("nvidia-smi")
    return not skip and bool(nvcc and (force or driver))


def has_compiler() -> bool:
    named = os.environ.get("CXX", "").split()
    return any(shutil.which(name) for name in (named[:1] or ("c++", "g++", "clang++")))


def parse_gpus(text: str) -> list[tuple[str, bool]]:
    """("90", True) for 9.0+PTX, and so on."""
    gpus = []
    for gpu in text.replace(" ", ";").strip(";").split(";"):
        if not (match := re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", gpu)):
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST has {gpu!r}; capabilities look like 9.0, 9.0a or 9.0+PTX")
        gpus.append((match[1] + match[2], bool(match[3])))
    return gpus


def chosen_gpus(nvcc: str) -> list[tuple[str, bool]]:
    """Those of TORCH_CUDA_ARCH_LIST, else the default ones that this nvcc compiles for."""
    if named := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return parse_gpus(named)
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = set(re.findall(r"compute_(\w+)", listed))
    gpus = [(arch, ptx) for arch, ptx in parse_gpus(GPUS) if arch in known]
    if not gpus:
        raise RuntimeError(f"{nvcc} compiles for none of {GPUS}; it knows {', '.join(sorted(known)) or 'no GPU'}")
    return gpus


def gencode(gpus: list[tuple[str, bool]]) -> list[str]:
    flags = []
    for arch, ptx in gpus:
        flags += [f"-gencode=arch=compute_{arch},code=sm_{arch}"]
        flags += [f"-gencode=arch=compute_{arch},code=compute_{arch}"] if ptx else []
    return flags


class BuildExtensions(build_ext):
    """nvcc for the CUDA library, which is no Python module and has a plain name; the usual compiler for the rest."""

    def get_ext_filename(self, fullname: str) -> str:
        plain = fullname.split(".")[-1] == "_cuda"
        return fullname.replace(".", "/") + ".so" if plain else super().get_ext_filename(fullname)

    def build_extension(self, ext: Extension) -> None:
        if ext.name != CUDA:
            return super().build_extension(ext)
        library = Path(self.get_ext_fullpath(ext.name))
        if not self.force and not newer_group([*ext.sources, *ext.depends], str(library)):
            return
        try:
            self.compile_cuda(library, ext.sources)
        except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
            library.unlink(missing_ok=True)
            raise CompileError(f"the CUDA library was not built: {error}") from error  # a warning if ext.optional

    def compile_cuda(self, library: Path, sources: list[str]) -> None:
        library.parent.mkdir(parents=True, exist_ok=True)
        jobs = ["--threads", os.environ.get("MAX_JOBS", "0")]
        gpus = gencode(chosen_gpus(str(NVCC)))
        subprocess.run([str(NVCC), *FLAGS, *jobs, *gpus, "-o", str(library), *sources], check=True)


class BuildPython(build_py):
    """The package with the shipped configs and examples inside, for `drift init` and `drift run quickstart`."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # they are read from the clone
            return
        for folder, pattern in FOLDERS.items():
            target = Path(self.build_lib, "drift", folder)
            target.mkdir(parents=True, exist_ok=True)
            for path in sorted(Path(folder).rglob(pattern)):
                copy = target / path.relative_to(folder)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, copy)


def files(*patterns: str) -> list[str]:
    return sorted(str(path) for pattern in patterns for path in Path("csrc").glob(pattern))


def extension(name: str, sources: list[str]) -> Extension:
    options = {"extra_compile_args": COMPILE, "extra_link_args": LINK, "language": "c++"}
    includes, headers = ["csrc", pybind11.get_include()], files("*.h", "cpu/*.h")
    return Extension(name, sources, include_dirs=includes, depends=headers, **options)


modules = []
if has_compiler() and not is_set("DRIFT_SKIP_CPU_BUILD"):
    modules.append(extension("drift_kernels._cpu", files("bindings.cpp", "cpu/*.cpp")))
    modules.append(extension("drift._packing", files("packing.cpp", "trie.cpp")))
else:
    print("drift: no C++ compiler was used; the package computes in plain torch (backend='reference')", file=sys.stderr)
if wants_cuda(NVCC):
    modules.append(
        Extension(CUDA, files("cuda/*.cu"), depends=files("*.h", "cuda/*.h"), optional=not is_set("FORCE_CUDA"))
    )
setup(ext_modules=modules, cmdclass={"build_ext": BuildExtensions, "build_py": BuildPython})
