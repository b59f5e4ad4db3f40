"""Two ranks of which one, or both with their launcher, are killed at any instant: the same command ends with the same bits."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torchrun
from killed_runs import ONLINE, config_file, differences

KILLS = int(os.environ.get("DRIFT_KILLS", "3"))
KINDS = {
    "online": {"online": {**ONLINE, "steps": 8}},
    "offline": {
        "arms": ["drift"],
        "train": {"lr": 5e-4, "schedule": "linear", "batch_size": 4, "epochs": 2.0, "save_every": 1},
    },
}
LOST = r"(rank \d is gone|the store that the ranks share is gone|the ranks did not meet within .*)"
EARLY = r"stopped\. What was finished is kept"  # torchrun's SIGTERM came before the ranks had met
MET = re.compile(r"^(warm start: |model .*; run folder )", re.MULTILINE)  # the first rank's words after that
GOES_ON = "; the same command goes on from "


def explains(sentence: str, said: str) -> bool:
    """Whether a rank's last words tell why it ended; that it was told to stop is enough before the ranks have met."""
    return re.match(f"({LOST if MET.search(said) else f'{LOST}|{EARLY}'}){GOES_ON}", sentence) is not None


def start(file: Path) -> subprocess.Popen:
    return torchrun.start(2, "-m", "drift", "run", file)


def whole(file: Path) -> float:
    """Seconds of a run that ends well."""
    began = time.monotonic()
    status, said = torchrun.finish(start(file), 200)
    assert status == 0, said[-3000:]
    return time.monotonic() - began


@pytest.fixture(scope="module", params=KINDS)
def reference(request, tmp_path_factory):
    """(kind, folder, seconds) of a run on two ranks that was let through."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder / request.param, whole(config_file(folder, request.param, **KINDS[request.param]))


def kill(process: subprocess.Popen, rank: int | None) -> None:
    """SIGKILL, to one rank or to all of them and the launcher."""
    if rank is None:
        for one in (0, 1):
            with suppress(ProcessLookupError, AssertionError):
                os.kill(torchrun.pid_of(process, one), signal.SIGKILL)
        os.killpg(process.pid, signal.SIGKILL)
    else:
        with suppress(ProcessLookupError):  # it ended just now
            os.kill(torchrun.pid_of(process, rank), signal.SIGKILL)


def test_ranks_killed_at_random_instants_end_with_the_same_bits(reference, tmp_path):
    kind, expected, seconds = reference
    draw = random.Random(os.environ.get("DRIFT_SEED", "0"))
    file, folder = config_file(tmp_path, kind, **KINDS[kind]), tmp_path / kind
    for number in range(KILLS):
        process, rank = start(file), (1, 0, None)[number % 3]
        at = time.monotonic() + draw.uniform(0.3, 0.9) * seconds
        while time.monotonic() < at and process.poll() is None:
            time.sleep(0.01)
        if process.poll() is not None:
            assert torchrun.finish(process)[0] == 0
            break  # it got through before its instant
        kill(process, rank)
        status, said = torchrun.finish(process, 90)
        if rank is None or status == 0:
            continue
        for sentence in torchrun.sentences(said):
            assert explains(sentence, said), said[-3000:]
    whole(file)
    assert differences(folder, expected) == {}


def test_the_words_of_a_stop_count_only_before_the_ranks_have_met():
    stopped = f"stopped. What was finished is kept{GOES_ON}checkpoint 3"
    assert explains(stopped, "drift: run x: model embedded tiny model in float32, run folder x\n")
    assert not explains(stopped, "model embedded tiny model: 9 parameters, cpu, float32; run folder x\n")
    assert explains(f"rank 1 is gone{GOES_ON}checkpoint 3", "warm start: 40% of the check problems solved\n")
