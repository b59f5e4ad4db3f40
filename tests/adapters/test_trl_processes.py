"""Two processes have the loss of one: denominators are global, and gradients pass through DDP's and FSDP2's hooks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

SCRIPT = Path(__file__).parent / "two_processes.py"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent.parent)}  # this checkout, installed or not


def run(what: str, folder: Path, processes: int, size: int) -> dict[str, torch.Tensor]:
    folder.mkdir()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    start = torchrun if processes > 1 else [sys.executable]
    done = subprocess.run(
        [*start, str(SCRIPT), what, str(folder), str(size)], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "end.pt")


@pytest.mark.parametrize("what", ["sft", "trainer", "sharded"])
def test_two_processes_are_one(what, tmp_path):
    alone, together = run(what, tmp_path / "1", 1, 6), run(what, tmp_path / "2", 2, 3)
    assert tiny.differences(alone, together) < 2e-4
    start = tiny.weights_of(tiny.model(tied=what == "trainer"))
    assert tiny.differences(start, alone) > 1e-2
