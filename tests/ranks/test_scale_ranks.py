"""`bench.scale` against two real ranks: the bytes that each holds while it trains, and those that it receives."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torchrun
from weighed import JOBS, computed, measured

from drift.training import distributed

STEPS = {"one": 1, "several": 3}  # packs of a rank


def main(out):
    torch.set_num_threads(1)
    with distributed.launched() as rank:
        for name in JOBS:
            for step, packs in STEPS.items():
                found = measured(name, packs, "fsdp")
                (out / f"{name}-{step}-{rank}.json").write_text(json.dumps(found))
        (out / f"none-{rank}.json").write_text(json.dumps(measured("bfloat16", 2, "none")))


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scale")
    torchrun.run(2, __file__, folder)
    return folder


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", JOBS)
def test_states_and_collectives_of_a_rank_are_the_formulas_to_the_byte(name, step, out, tmp_path):
    packs = STEPS[step]
    expected = computed(tmp_path, name, 2, packs, "fsdp")
    assert expected.packs == packs
    for rank in range(2):
        found = json.loads((out / f"{name}-{step}-{rank}.json").read_text())
        assert found["weights"] == expected.weights
        assert found["masters"] == expected.masters == 0
        assert found["gradients"] == expected.gradient_shares
        assert found["gradients before the last pack"] == (0 if packs == 1 else expected.gradients)
        assert found["moments"] == expected.moments_of(rank)
        assert expected.whole <= found["before"] <= expected.before
        assert found["received"] == sum(expected.received.values())
    assert expected.moments_of(0) >= expected.moments_of(1)
    parts = [json.loads((out / f"{name}-{step}-{rank}.json").read_text())["checkpoint"] for rank in range(2)]
    assert sum(parts) == expected.checkpoint


def test_a_rank_that_shares_nothing_holds_everything(out, tmp_path):
    expected = computed(tmp_path, "bfloat16", 2, 2, "none")
    for rank in range(2):
        found = json.loads((out / f"none-{rank}.json").read_text())
        states = ("weights", "masters", "gradients", "moments")
        assert {key: found[key] for key in states} == {key: expected.states[key] for key in states}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
