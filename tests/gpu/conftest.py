"""On a GPU: every test here is marked `gpu`, and skipped with the reason where there is none.

DRIFT_GPU_REHEARSAL=1 runs those that are not about CUDA itself on CPU tensors, the CPU's backends in the places of the
GPU's, so that no test fails of a slip of its own on the day.
"""

import os
from pathlib import Path

import pytest
import torch

from drift_kernels import available_backends

REHEARSAL = os.environ.get("DRIFT_GPU_REHEARSAL") == "1"
HERE = Path(__file__).parent
STAND_INS = {"triton": "cpu", "cuda": "reference"}
POISON = 64 << 20  # elements of NaN left behind in the allocator's blocks


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.filterwarnings("default"))  # torch's own, of prototypes and compilers
            if not torch.cuda.is_available() and not REHEARSAL:
                item.add_marker(pytest.mark.skip(reason="no CUDA device is visible to torch"))


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    """Each GPU backend's name, or its stand-in's."""
    name = STAND_INS[request.param] if REHEARSAL else request.param
    if reason := available_backends()[name]:
        pytest.skip(f"{name}: {reason}")
    return name


@pytest.fixture
def device():
    return "cpu" if REHEARSAL else "cuda"


@pytest.fixture
def cuda():
    """For what a CPU has nothing of."""
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA itself")


@pytest.fixture(autouse=True)
def as_users_run():
    """Without torch's deterministic mode, which would hide what does not repeat; fresh memory holds NaN nevertheless."""
    torch.use_deterministic_algorithms(False)
    if torch.cuda.is_available():
        large = torch.full((POISON,), float("nan"), device="cuda")
        small = [torch.full((1 << 16,), float("nan"), device="cuda") for _ in range(64)]
        del large, small
    yield
    torch.use_deterministic_algorithms(True)
