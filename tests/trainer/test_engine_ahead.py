"""One step ahead on a server, with a stand-in for it (tests/vllm_server has the real one): which weights samples come from."""

import threading
import time

import pytest
from scripted_engine import WordTask
from test_engines import _quick, opened, policy, score, server

from drift import store
from drift.config import parse
from drift.online import train_online
from drift.online.branches import Branches

__all__ = ["_quick", "policy", "server"]  # fixtures
STEPS, TEMPERATURE = 4, 0.8
CONFIG = {
    "name": "x",
    "online": {"algorithm": "grpo", "steps": STEPS, "prompts": 2, "ahead": 1},
    "rollout": {"n": 3, "turns": 1, "max_new_tokens": 4, "temperature": TEMPERATURE},
    "train": {"lr": 1e-2, "max_tokens": 256, "max_length": 128},
}


def apart(policy, row):
    """Nats between the log-probs on file and the policy's own."""
    own = score(policy, *_split(row), row["temperature"])
    return max(abs(a - b) for a, b in zip(_split(row)[1].logprobs, own.tolist()))


def _split(row):
    first = row["turn_starts"][0]
    sample = type("S", (), {"token_ids": row["token_ids"][first:], "logprobs": row["logprobs"][first:]})
    return row["token_ids"][:first], sample


def test_rows_name_the_weights_that_they_come_from_though_the_server_dies(policy, server, tmp_path, monkeypatch):
    """It dies while a batch is sampled beside a training step: that batch is sampled again, from the weights before the step."""
    task, states, ordinary, trained = WordTask(4), [], Branches.accumulate, threading.Event()
    task.verify = lambda problem, answer: len(answer) % 2 == 0
    monkeypatch.setattr("drift.rollouts.rollout.parse_answer", lambda said, tag: said.strip() or None)
    asked = []

    def fault(choices):
        """The second batch waits for the training beside it, whose update comes next, and then the server dies."""
        assert trained.wait(30)
        server.boot()
        return choices

    def accumulate(*arguments):
        asked.append(len(states))
        done = ordinary(*arguments)
        trained.set()
        return done

    monkeypatch.setattr(Branches, "accumulate", accumulate)
    with opened(policy, server) as engine:
        sync = engine.sync

        def noted():
            sync()
            states.append(policy.state())
            if len(states) == 1:
                server.faults = [None, None, fault]  # two prompts a step

        engine.sync = noted
        path = tmp_path / "rows.jsonl"
        train_online(policy, engine, task, task.made, parse(CONFIG), seed=0, rollouts=path)
        assert engine.repeated == 1
    rows = store.read(path)
    assert [row["policy_version"] for row in rows] == [max(step - 1, 0) for step in range(STEPS) for _ in range(6)]
    assert [row["staleness"] for row in rows] == [int(step > 0) for step in range(STEPS) for _ in range(6)]
    for number, state in enumerate(states):
        policy.restore(state)
        for row in rows:
            if row["policy_version"] == number:
                assert apart(policy, row) < 1e-4
            else:
                assert apart(policy, row) > 1e-3
    assert asked == [1, 2, 3, 4]


def test_a_run_that_ends_early_waits_for_no_answer(policy, server, monkeypatch):
    """Ctrl-C in a step whose next batch hangs in the server."""
    gate, task = threading.Event(), WordTask(4)

    def interrupted(*arguments):
        until = time.monotonic() + 60
        while server.in_flight < 2 and time.monotonic() < until:
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(Branches, "accumulate", interrupted)
    monkeypatch.setattr("drift.online.ahead.PATIENCE", 0.1)

    def run():
        with opened(policy, server) as engine:
            server.faults = [None, None, gate, gate]
            train_online(policy, engine, task, task.made, parse(CONFIG), seed=0)

    with pytest.raises(KeyboardInterrupt):
        run()
    for thread in threading.enumerate():
        if thread.name.startswith("drift"):
            thread.join(10)
            assert not thread.is_alive()
    assert server.in_flight == 2  # the server's part of them
    gate.set()
