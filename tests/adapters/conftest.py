"""Tests of the adapters on the trainers themselves: tiny models from a config, a tokenizer made here, no network.

`make test-adapters` runs them. Where a trainer is missing its file is left out of a plain `pytest` run, and shows as
"cannot run" in the report (`--adapters-report=FILE` writes that).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import sys
import warnings
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


# They warn while being imported, which collection takes for errors; and what cannot be imported cannot run.
IMPORTS = {"test_torchtitan": "torchtitan.models.common.linear", "test_verl": "verl.workers.config"}
_broken: dict[str, str] = {}


def missing(file: str) -> str:
    """Why a test file cannot run here; empty where it can."""
    for prefix, packages in NEEDS.items():
        absent = [package for package in packages if importlib.util.find_spec(package) is None]
        if file.startswith(prefix):
            return f"{', '.join(absent)} not installed" if absent else _broken.get(prefix, "")
    return ""


for prefix, module in IMPORTS.items():
    if not missing(prefix):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                importlib.import_module(module)
            except ImportError as error:
                _broken[prefix] = f"{module} does not import: {error}"


collect_ignore = [path.name for path in Path(__file__).parent.glob("test_*.py") if missing(path.stem)]


def pytest_addoption(parser):
    parser.addoption("--adapters-report", help="a file for the list of results")


def pytest_configure(config):
    config.addinivalue_line("markers", "is_training_test: transformers' own, of the tests in its source distribution")


def pytest_collection_modifyitems(items):
    """Trainers warn about themselves; only warnings raised in our modules are errors here."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("default"), append=False)
            item.add_marker(pytest.mark.filterwarnings("error:::drift_kernels"))


_results: dict[str, str] = {}


def pytest_runtest_logreport(report):
    name = report.nodeid.split("adapters/")[-1]
    if report.skipped:
        _results[name] = (
            f"cannot run  {name}: {report.longrepr[2].removeprefix('Skipped: ').removeprefix('cannot run: ')}"
        )
    elif report.failed:
        _results[name] = f"FAIL        {name}"
    elif report.when == "call":
        _results[name] = f"pass        {name}"


def _version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"no {package}"


def pytest_terminal_summary(terminalreporter, config):
    lines = [_results[name] for name in sorted(_results)]
    for name in collect_ignore:
        lines.append(f"cannot run  {name}: {missing(Path(name).stem)}")
    if not any(name.startswith("test_") for name in _results):
        return
    packages = ("torch", "transformers", "trl", "peft", "accelerate", "verl", "torchtitan")
    lines.insert(0, f"Python {sys.version.split()[0]}, " + ", ".join(map(_version, packages)))
    target = config.getoption("--adapters-report")
    if target is None:
        return
    terminalreporter.write_sep("=", "adapters")
    terminalreporter.write_line("\n".join(lines))
    Path(target).write_text("\n".join(lines) + "\n")
