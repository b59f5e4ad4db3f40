"""Every script in examples/ runs, and does what it says."""

import runpy
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_drop_in_learns(capsys):
    losses = runpy.run_path(str(EXAMPLES / "drop_in.py"))["main"](steps=15)
    assert losses[-1] < 0.8 * losses[0]
    assert "loss" in capsys.readouterr().out
