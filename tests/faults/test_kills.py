"""A run that is killed at any instant, or asked to end, and started again by the same command ends with the same bits."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest
from killed_runs import CONFIGS, Life, config_file, differences

KILLS = int(os.environ.get("DRIFT_KILLS", "3"))  # of each kind of run; `make soak` takes more


@pytest.fixture(scope="module", params=CONFIGS)
def reference(request, tmp_path_factory):
    """(kind, folder, seconds) of a run that was let through."""
    folder = tmp_path_factory.mktemp(request.param)
    start = time.monotonic()
    life = Life(config_file(folder, request.param))
    assert life.wait() == 0, life.said()
    return request.param, folder / request.param, time.monotonic() - start


def test_a_run_killed_at_random_instants_and_during_writes_ends_with_the_same_bits(reference, tmp_path):
    kind, expected, seconds = reference
    draw = random.Random(os.environ.get("DRIFT_SEED", "0"))
    file, folder, kills, start = config_file(tmp_path, kind), tmp_path / kind, 0, time.monotonic()
    while kills < KILLS:
        life, began = Life(file), time.monotonic()
        at = began + draw.uniform(0.1, seconds)
        writing = kills % 3 == 2  # every third dies while a file or folder is being written

        def due(at=at, writing=writing):
            return time.monotonic() > at or (writing and any(folder.rglob("*.partial")))

        if (ended := life.wait(due)) is None:
            life.kill()
            kills += 1
        else:
            assert ended == 0, life.said()
            break  # it got through before its instant
        assert time.monotonic() - start < 60 * max(KILLS, 4)
    last = Life(file)
    assert last.wait() == 0, last.said()
    assert "Traceback" not in last.said()
    assert differences(folder, expected) == {}


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_step_and_leaves_a_checkpoint_whatever_save_every(reference, number, status, tmp_path):
    kind, expected, _ = reference
    file, folder = config_file(tmp_path, kind), tmp_path / kind
    life = Life(file, "train.save_every=0")
    metrics = folder / "metrics.jsonl"
    assert (
        life.wait(lambda: metrics.exists() and '/grad_norm"' in metrics.read_text().replace("warm_start/", "")) is None
    )
    os.kill(life.pid, number)
    assert life.wait(seconds=30) == status, life.said()
    assert "the same command goes on from there" in life.said()
    assert "Traceback" not in life.said()
    if "step in flight has ended" in life.said():
        assert list(folder.rglob("checkpoint-*/manifest.json"))
    again = Life(file, "train.save_every=0")
    assert again.wait() == 0, again.said()
    assert differences(folder, expected) == {}
