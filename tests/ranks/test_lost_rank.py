"""A rank that is killed or stopped ends the others within a bound, in one sentence; the same command goes on."""

import json
import os
import signal

import pytest
import torchrun
from scripted_engine import quarters

from drift.config import dump

BOUND = 5.0  # seconds: train.timeout of these runs


@pytest.fixture
def command(tmp_path):
    """A run that trains for minutes, from random weights, with a checkpoint after every step."""
    train = {"epochs": 2000.0, "save_every": 1, "timeout": BOUND}
    made = quarters(tmp_path, seeds=[0], arms=["uniform"], warm_start={"enabled": False}, train=train)
    (tmp_path / "run.yaml").write_text(dump(made))
    return ["-m", "drift", "run", tmp_path / "run.yaml"]


def training(folder):
    return any(folder.glob("runs/digits/seed-0/uniform/round-0/checkpoint-*/state.json"))


@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_the_others_end_in_one_sentence_and_the_same_command_goes_on(way, command, tmp_path):
    process = torchrun.start(2, *command)
    torchrun.wait_for(lambda: training(tmp_path), process)
    rank_0, rank_1 = (torchrun.pid_of(process, rank) for rank in (0, 1))
    os.kill(rank_1, way)
    torchrun.wait_for(lambda: not os.path.exists(f"/proc/{rank_0}") or ended(rank_0), process, timeout=90)
    if way == signal.SIGSTOP:
        os.kill(rank_1, signal.SIGKILL)  # torchrun would give it 30 seconds
    status, said = torchrun.finish(process)
    assert status != 0
    [sentence] = torchrun.sentences(said)
    assert sentence.startswith("rank 1 is gone; the same command goes on from checkpoint "), sentence
    number = int(sentence.split("checkpoint ")[1].split()[0])

    process = torchrun.start(2, *command)
    round_0 = tmp_path / "runs/digits/seed-0/uniform/round-0"
    torchrun.wait_for(lambda: latest(round_0) > number, process)
    os.killpg(process.pid, signal.SIGKILL)
    torchrun.finish(process)
    lines = (tmp_path / "runs" / "digits" / "metrics.jsonl").read_text().splitlines()
    steps = [row["step"] for row in map(json.loads, lines) if "seed-0/uniform/loss" in row]
    assert number + 1 in steps
    assert steps.count(1) == 1


def latest(folder):
    return max((int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*[0-9]")), default=0)


def ended(pid):
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rsplit(")", 1)[1].split()[0] == "Z"
