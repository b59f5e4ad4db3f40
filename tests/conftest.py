"""One thread for every test and for the processes that tests start: tensors here are tiny, waiting threads slow a busy
machine down a hundredfold, and the last bits of a sum depend on how many threads made it.

Tests that are about threads set their own.

Fresh memory is filled with NaN, so that what is read before it is written shows.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)


def pytest_configure():
    """After the conftests of folders, since it imports Triton, and gpu_proof says how Triton is to run."""
    torch.use_deterministic_algorithms(True)  # which fills what torch.empty returns
