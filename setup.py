"""The two compiled extensions; everything else is in pyproject.toml. Needs setuptools and pybind11, and no network."""

import sys

import pybind11
from setuptools import Extension, setup

COMPILE = ["-O3", "-std=c++17", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
LINK = ["-fopenmp"]
if sys.platform == "darwin":  # Apple's clang ships no OpenMP runtime
    COMPILE.remove("-fopenmp")
    LINK.remove("-fopenmp")


def extension(name: str, sources: list[str], depends: list[str]) -> Extension:
    return Extension(
        name,
        sources,
        depends=depends,
        include_dirs=["csrc", pybind11.get_include()],
        language="c++",
        extra_compile_args=COMPILE,
        extra_link_args=LINK,
    )


setup(
    ext_modules=[
        extension(
            "drift_kernels._cpu",
            ["csrc/bindings.cpp", "csrc/cpu/rows.cpp", "csrc/cpu/distill.cpp", "csrc/cpu/isa.cpp", "csrc/cpu/gemm.cpp"],
            ["csrc/policy.h", "csrc/rows.h", "csrc/cpu/sweeps.h", "csrc/cpu/isa.h", "csrc/cpu/gemm.h"],
        ),
        extension("drift._packing", ["csrc/packing.cpp"], []),
    ]
)
