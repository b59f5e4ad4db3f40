"""The compiled extensions; everything else is in pyproject.toml. Needs setuptools and pybind11, and no network.

The CUDA library is built where there are nvcc and a driver. FORCE_CUDA=1 builds it without a driver, and fails without nvcc;
DRIFT_SKIP_CUDA_BUILD=1 leaves it out. CUDA_HOME names the toolkit, TORCH_CUDA_ARCH_LIST the GPUs ("8.0;9.0+PTX"), MAX_JOBS
how many of them are compiled for at a time.
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
from setuptools.modified import newer_group

COMPILE = ["-O3", "-std=c++17", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
LINK = ["-fopenmp"]
if sys.platform == "darwin":  # Apple's clang ships no OpenMP runtime
    COMPILE.remove("-fopenmp")
    LINK.remove("-fopenmp")

CUDA = "drift_kernels._cuda"
HOME = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
NVCC = shutil.which("nvcc", path=f"{HOME}/bin" if HOME else f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
FLAGS = ["-O3", "-std=c++17", "-shared", "-cudart", "static", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
GPUS = "8.0;9.0+PTX;10.0"  # PTX of 9.0, so that GPUs to come have clusters too


def wanted(nvcc: str | None) -> bool:
    force, skip = (os.environ.get(name, "0") not in ("", "0") for name in ("FORCE_CUDA", "DRIFT_SKIP_CUDA_BUILD"))
    if force and not skip and not nvcc:
        raise SystemExit("FORCE_CUDA=1 needs nvcc: it is neither on PATH nor in CUDA_HOME")
    driver = os.path.exists("/proc/driver/nvidia/version") or shutil.which("nvidia-smi")
    return not skip and bool(nvcc and (force or driver))


def gencode(gpus: str) -> list[str]:
    flags = []
    for gpu in gpus.replace(" ", ";").strip(";").split(";"):
        if not (match := re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", gpu)):
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST has {gpu!r}; capabilities look like 9.0, 9.0a or 9.0+PTX")
        arch = match[1] + match[2]
        flags += [f"-gencode=arch=compute_{arch},code=sm_{arch}"]
        flags += [f"-gencode=arch=compute_{arch},code=compute_{arch}"] if match[3] else []
    return flags


class Build(build_ext):
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
        library.parent.mkdir(parents=True, exist_ok=True)
        gpus = gencode(os.environ.get("TORCH_CUDA_ARCH_LIST") or GPUS)
        jobs = ["--threads", os.environ.get("MAX_JOBS", "0")]
        subprocess.check_call([str(NVCC), *FLAGS, *jobs, *gpus, "-o", str(library), *ext.sources])


def files(*patterns: str) -> list[str]:
    return sorted(str(path) for pattern in patterns for path in Path("csrc").glob(pattern))


def extension(name: str, sources: list[str]) -> Extension:
    options = {"extra_compile_args": COMPILE, "extra_link_args": LINK, "language": "c++"}
    includes, headers = ["csrc", pybind11.get_include()], files("*.h", "cpu/*.h")
    return Extension(name, sources, include_dirs=includes, depends=headers, **options)


modules = [
    extension("drift_kernels._cpu", files("bindings.cpp", "cpu/*.cpp")),
    extension("drift._packing", files("packing.cpp", "trie.cpp")),
]
if wanted(NVCC):
    modules.append(Extension(CUDA, files("cuda/*.cu"), depends=files("*.h", "cuda/*.h")))
setup(ext_modules=modules, cmdclass={"build_ext": Build})
