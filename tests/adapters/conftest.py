"""Tests of the adapters on the trainers themselves: tiny models from a config, a tokenizer made here, no network.

`make test-adapters` runs them. Where a trainer is missing its file is left out of a plain `pytest` run, and shows as
"cannot run" in the report (`--adapters-report=FILE` writes that as a table).
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"  # also keeps TRL from reporting who trains what
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["WANDB_DISABLED"] = "true"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch

torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).parent))

NEEDS = {
    "test_trl": ("trl", "datasets", "peft"),
    "test_transformers": ("peft", "accelerate"),
    "test_verl": ("verl", "tensordict", "ray", "omegaconf"),
    "test_torchtitan": ("torchtitan", "spmd_types"),
}


def missing(file: str) -> list[str]:
    """The packages that a test file needs and that are not here."""
    needs = [packages for prefix, packages in NEEDS.items() if file.startswith(prefix)]
    return [package for packages in needs for package in packages if importlib.util.find_spec(package) is None]


collect_ignore = [path.name for path in Path(__file__).parent.glob("test_*.py") if missing(path.stem)]


def pytest_collection_modifyitems(items):
    """Trainers warn about themselves; only warnings raised in our modules are errors here."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("default"), append=False)
            item.add_marker(pytest.mark.filterwarnings("error:::drift_kernels"))
