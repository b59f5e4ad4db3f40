"""Every script in examples/ runs, and does what it says."""

import runpy
from pathlib import Path

from drift import store
from drift.config import ModelConfig
from drift.policy import load_policy

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_drop_in_learns(capsys):
    losses = runpy.run_path(str(EXAMPLES / "drop_in.py"))["main"](steps=15)
    assert losses[-1] < 0.8 * losses[0]
    assert "loss" in capsys.readouterr().out


def test_own_rollouts_are_read_weighed_packed_and_trained(tmp_path, capsys):
    main = runpy.run_path(str(EXAMPLES / "own_rollouts.py"))["main"]
    losses = main(str(tmp_path), steps=6)
    assert len(losses) == 6
    assert losses[-1] < 0.5 * losses[0]
    rows = store.read(tmp_path / "rollouts.jsonl")
    assert len(rows) == 16
    assert "16 rows, effective sample size 82%" in capsys.readouterr().out  # (1 + 1/e)² / 2(1 + 1/e²)

    model, other = str(tmp_path / "model"), tmp_path / "other"
    assert load_policy(ModelConfig(path=model)).hash() != load_policy(ModelConfig()).hash()
    again = main(str(other), str(tmp_path / "rollouts.jsonl"), model, steps=1)
    assert again[0] < losses[0]
    assert not (other / "rollouts.jsonl").exists()
