"""Proof of the GPU kernels on a machine without a GPU. Triton's kernels run in its interpreter, chosen before it is imported.

A program that reads far outside a tensor crashes the interpreter, and with it pytest: that too is a failed test.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import pytest


@pytest.fixture(scope="session", autouse=True)
def interpreter():
    """bf16 as the hardware has it, and infinities without numpy's warnings."""
    triton = pytest.importorskip("triton")
    assert triton.knobs.runtime.interpret, "TRITON_INTERPRET came too late"
    import bfloat16

    bfloat16.install()
    with np.errstate(all="ignore"):
        yield
