"""examples/in_torchtitan.py runs, and does what it says."""

import runpy
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def test_the_debug_model_learns_a_batch(monkeypatch):
    from torchtitan.models import llama3

    monkeypatch.setattr(llama3, "get_attention_config", llama3.get_attention_config)  # the example sets it
    losses = runpy.run_path(str(EXAMPLES / "in_torchtitan.py"))["main"](steps=10)
    assert losses[-1] < 0.3 * losses[0]
