"""examples/in_verl.py runs, and does what it says."""

import runpy
from pathlib import Path

import tiny
from verl.trainer.ppo import core_algos

from drift_kernels.adapters import verl as adapter

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def test_the_rewarded_token_becomes_likely():
    plain, registry = type(tiny.model()).forward, dict(core_algos.POLICY_LOSS_REGISTRY)
    try:
        seen = runpy.run_path(str(EXAMPLES / "in_verl.py"))["main"](steps=30)
    finally:
        adapter.disable()
        type(tiny.model()).forward = plain
        core_algos.POLICY_LOSS_REGISTRY.clear()
        core_algos.POLICY_LOSS_REGISTRY.update(registry)
    assert seen[-1] > 5 * seen[0]
