"""examples/in_transformers.py runs, and does what it says."""

import runpy
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def test_the_rule_is_learnt(capsys):
    assert runpy.run_path(str(EXAMPLES / "in_transformers.py"))["main"](steps=60) > 0.9
    assert "⟦" in capsys.readouterr().out  # what is trained, off a terminal
