"""examples/in_trl.py runs, and does what it says."""

import runpy
from pathlib import Path


def test_the_heavy_rows_win():
    example = Path(__file__).parent.parent.parent / "examples" / "in_trl.py"
    assert runpy.run_path(str(example))["main"](steps=60) > 0.8
