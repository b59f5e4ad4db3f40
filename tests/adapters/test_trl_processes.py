"""Two processes have the loss of one, or of TRL's two: global denominators, gradients through DDP's and FSDP2's hooks."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from test_trl_swap import TIMES

pytestmark = pytest.mark.timeout(1200)  # processes import what they need one after another on a busy machine

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


def logs_agree(a: Path, b: Path) -> None:
    logs, logs2 = (json.loads((folder / "logs.json").read_text()) for folder in (a, b))
    assert len(logs) == len(logs2) > 2
    for x, y in zip(logs, logs2):
        assert x.keys() == y.keys()
        for key in x.keys() - TIMES:
            assert math.isclose(x[key], y[key], rel_tol=1e-3, abs_tol=1e-4), (key, x[key], y[key])


@pytest.mark.parametrize("what", ["sft", "trainer"])
def test_two_processes_are_one(what, tmp_path):
    alone, together = run(what, tmp_path / "1", 1, 6), run(what, tmp_path / "2", 2, 3)
    assert tiny.differences(alone, together) < 2e-4
    start = tiny.weights_of(tiny.model(tied=what == "trainer"))
    assert tiny.differences(start, alone) > 1e-2


@pytest.mark.parametrize("way", ["enable", "ours"])
def test_sft_in_two_processes_is_trls(way, tmp_path):
    theirs, ours = (run(f"plain_sft:{w}", tmp_path / w, 2, 3) for w in ("trl", way))
    assert tiny.differences(theirs, ours) < 2e-4
    logs_agree(tmp_path / "trl", tmp_path / way)
    assert tiny.differences(run(f"plain_sft:{way}", tmp_path / "1", 1, 6), ours) < 2e-4


@pytest.mark.parametrize(
    ("loss_type", "way"), [("dapo", "enable"), ("dapo", "ours"), ("bnpo", "ours"), ("grpo", "ours")]
)
def test_grpo_in_two_processes_is_trls(loss_type, way, tmp_path):
    """Each process samples for itself: TRL's own two are what to compare with."""
    theirs, ours = (run(f"grpo:{w}:{loss_type}", tmp_path / w, 2, 4) for w in ("trl", way))
    assert tiny.differences(theirs, ours) < 1e-3
    assert tiny.differences(tiny.weights_of(tiny.model()), ours) > 1e-2
    logs_agree(tmp_path / "trl", tmp_path / way)


CASES = [(head, through) for head in ("alone", "together", "tied") for through in ("model", "compute_loss_func")]


@pytest.mark.parametrize(("head", "through"), [*CASES, ("resharded", "model")])
def test_under_fsdp2_gradients_are_those_of_one_process(head, through, tmp_path):
    what = f"sharded:{head}:{through}"
    assert tiny.differences(run(what, tmp_path / "1", 1, 6), run(what, tmp_path / "2", 2, 3)) < 2e-4


def test_a_root_that_reshards_leaves_compute_loss_func_no_head(tmp_path):
    with pytest.raises(AssertionError, match="lm_head is sharded where the loss is made"):
        run("sharded:resharded:compute_loss_func", tmp_path / "1", 2, 3)
