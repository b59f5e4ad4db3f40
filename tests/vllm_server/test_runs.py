"""Whole runs on a real vLLM server: by the command line, both methods, one step ahead, and on two ranks.

The file is its own worker: torchrun runs `main` below, which is `drift` with an engine that notes what it hands over.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from conftest import MODEL, ROOT, free_url
from safetensors.torch import load_file, save_file
from test_server import CONFIG, PARITY, settings

import drift.engines.vllm
from drift import cli, store
from drift.config import dump, parse
from drift.engines.vllm import RPC, VLLMEngine, server_command
from drift.model.policy import load_policy
from drift.online import loop as online
from drift.online.branches import Branches
from drift.tasks import load_task
from drift.training import distributed

pytestmark = pytest.mark.timeout(900)
STEPS, PROMPTS, N = 3, 6, CONFIG["rollout"]["n"]
ONLINE = {"algorithm": "drift", "steps": STEPS, "prompts": PROMPTS}
ONLINE |= {"curriculum": {"warmup_steps": 1, "transition_steps": 1}, "watch": {"examples": 1}}
TINY = {key: section for key, section in CONFIG.items() if key != "online"}
TINY |= {"eval": {"turns": 2, "max_new_tokens": 8, "samples": 2}, "seeds": [0]}
TINY |= {"train": {**CONFIG["train"], "lr": 3e-3}}


class Noted(VLLMEngine):
    """Keeps the weights of every `sync`, the threads that sample, and how often weights were handed over."""

    made: ClassVar[list[Noted]] = []

    def __init__(self, policy, config, tell=None):
        self.states, self.threads = [], set()
        super().__init__(policy, config, tell)
        Noted.made.append(self)

    def sync(self):
        super().sync()
        self.states.append(self.policy.state())

    def generate(self, prompts, **options):
        self.threads.add(threading.current_thread().name)
        return super().generate(prompts, **options)


def write(folder, name, **sections):
    """The config file of a run."""
    file = folder / f"{name}.yaml"
    file.write_text(dump(parse({**TINY, "name": name, "output_dir": str(folder), **sections})))
    return str(file)


def row_gap(policy, rows):
    """Nats by which log-probs of sampled tokens on file differ from the policy's own, at most."""
    worst = 0.0
    for row in rows:
        ids, mask = torch.tensor([row["token_ids"]]), torch.tensor(row["loss_mask"]).bool()[1:]
        with policy.inference():
            logits = policy.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, :-1].float()
        own = torch.log_softmax(logits / row["temperature"], -1).gather(1, ids[0, 1:, None])[:, 0]
        worst = max(worst, float((own - torch.tensor(row["logprobs"])[1:])[mask].abs().max()))
    return worst


def check_rows(rows, policy, states, ahead):
    """Every row's log-probs are those of the weights that it names, and of no others that are there."""
    assert [row["step"] for row in rows] == [step + 1 for step in range(STEPS) for _ in range(PROMPTS * N)]
    for step in range(STEPS):
        mine = [row for row in rows if row["step"] == step + 1]
        version = max(step - ahead, 0)
        assert {(row["policy_version"], row["staleness"]) for row in mine} == {(version, step - version)}
        for number, state in enumerate(states):
            policy.restore(state)
            gap = row_gap(policy, mine)
            assert gap < PARITY if number == version else gap > 10 * PARITY, (step, number, gap)


def held(server):
    """The version of the weights that the server holds."""
    body = json.dumps({"method": "drift_state"}).encode()
    request = urllib.request.Request(server.url + RPC, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["results"][0]["version"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where runs are; `warmed` has a base in it that other runs start from."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def warmed(folder):
    """A run as docs/engines.md has it: it makes its base, and stops for want of a server."""
    file, url = write(folder, "warmed", online=ONLINE), free_url()
    run = [sys.executable, "-m", "drift.cli", "run", file, "engine.kind=vllm", f"engine.url={url}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=600)
    return file, url, done


def from_base(folder, name, **sections):
    """A run that has its base already."""
    shutil.copytree(folder / "warmed" / "base", folder / name / "base")
    return write(folder, name, **sections)


def test_an_online_run_by_the_command_line(folder, warmed, server, capsys):
    file, url, done = warmed
    assert done.returncode == 1, done.stderr[-3000:]
    assert "nobody answers" in done.stderr
    assert "Traceback" not in done.stderr
    assert f"\n  {server_command(folder / 'warmed' / 'base', url=url, cpu=True)} (docs/engines.md)" in done.stderr

    assert cli.main(["run", file, "engine.kind=vllm", f"engine.url={server.url}"]) == 0
    shown = capsys.readouterr().out
    run = folder / "warmed"
    assert "held-out problems solved" in shown
    assert "report.html" in shown
    assert "pass@" in (run / "report.html").read_text()
    rows = store.read(run / "seed-0" / "drift" / "rollouts.jsonl")
    assert [row["step"] for row in rows] == [step + 1 for step in range(STEPS) for _ in range(PROMPTS * N)]
    assert {row["staleness"] for row in rows} == {0}
    base = load_policy(MODEL.model_copy(update={"path": str(run / "base")}))
    trained = load_policy(MODEL.model_copy(update={"path": str(run / "seed-0" / "drift")}))
    first = [row for row in rows if row["step"] == 1]
    assert {row["policy_hash"] for row in first} == {base.hash()}
    assert row_gap(base, first) < PARITY
    assert held(server) == trained.hash() != base.hash()  # which the evaluation has sampled from
    summary = json.loads((run / "summary.json").read_text())
    assert all(len(summary["results"][arm]["mean_at_2"]) == 1 for arm in ("base", "drift"))


def test_an_offline_run_by_the_command_line(folder, warmed, server):
    file = from_base(folder, "offline", arms=["drift", "uniform"])
    assert cli.main(["run", file, "engine.kind=vllm", f"engine.url={server.url}"]) == 0
    run = folder / "offline"
    rows = store.read(run / "rollouts.jsonl")
    assert len(rows) == TINY["task"]["train_problems"] * N
    base = load_policy(MODEL.model_copy(update={"path": str(run / "base")}))
    assert {row["policy_hash"] for row in rows} == {base.hash()}
    assert row_gap(base, rows) < PARITY
    last = load_policy(MODEL.model_copy(update={"path": str(run / "seed-0" / "uniform")}))
    assert held(server) == last.hash() != base.hash()
    assert set(json.loads((run / "summary.json").read_text())["results"]) == {"base", "drift", "uniform"}
    assert (run / "report.html").exists()


def test_one_step_ahead(folder, warmed, server, monkeypatch):
    """The next batch is sampled on a thread while the step trains, from the weights that its rows name."""
    config = parse({**TINY, "online": ONLINE | {"ahead": 1}})
    policy = load_policy(MODEL.model_copy(update={"path": str(folder / "warmed" / "base")}))
    task, metrics = load_task(config.task), []
    ordinary, beside = Branches.accumulate, []

    def accumulate(*arguments):
        beside.append([thread.name for thread in threading.enumerate()].count("drift-ahead"))
        return ordinary(*arguments)

    class Track(online.Track):
        def log(self, step, **values):
            metrics.append(values)

    monkeypatch.setattr(Branches, "accumulate", accumulate)
    path = folder / "ahead.jsonl"
    with Noted(policy, settings(server)) as engine:
        options = {"seed": 0, "rollouts": path, "track": Track(None, progress=False)}
        online.train_online(policy, engine, task, task.problems("train"), config, **options)
    task.close()
    check_rows(store.read(path), policy, engine.states, 1)
    assert engine.threads == {"MainThread", "drift-ahead"}
    assert beside[0] == 1  # it had just been started
    assert engine.handovers == STEPS
    assert [row["online/staleness"] for row in metrics] == [0, 1, 1]
    drifted = [abs(row["online/sampler_kl"]) for row in metrics]
    assert drifted[0] < 1e-5
    assert min(drifted[1:]) > 1e-4  # which the correction is for


def main(out, arguments):
    """`drift`, on one of several ranks."""
    torch.set_num_threads(1)
    drift.engines.vllm.VLLMEngine = Noted
    ordinary = distributed.dist.destroy_process_group

    def note():
        rank, engines = distributed.rank(), Noted.made
        counts = [[len(engine.states), engine.handovers, engine.repeated] for engine in engines]
        (out / f"{rank}.json").write_text(json.dumps(counts))
        training = max(engines, key=lambda engine: len(engine.states))
        for number, state in enumerate(training.states):
            save_file(state, out / f"{rank}-{number}.safetensors")
        ordinary()

    distributed.dist.destroy_process_group = note
    sys.exit(cli.main(arguments))


def test_two_ranks(folder, warmed, server):
    """Each asks for its share of the problems, one step ahead; the first hands weights over, and nobody samples before."""
    out = folder / "noted"
    out.mkdir()
    file = from_base(folder, "ranks", online=ONLINE | {"ahead": 1})
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        __file__,
        str(out),
    ]
    command += ["run", file, "engine.kind=vllm", f"engine.url={server.url}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'support'}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-5000:]
    run = folder / "ranks"
    first, second = (json.loads((out / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == [[STEPS + 1, STEPS, 0], [1, 1, 0]]  # the training, and the evaluation
    assert second == [[STEPS + 1, 0, 0]]
    files = [[load_file(out / f"{rank}-{n}.safetensors") for n in range(1, STEPS + 1)] for rank in (0, 1)]
    assert all(torch.equal(one[k], two[k]) for one, two in zip(*files) for k in one)
    policy = load_policy(MODEL.model_copy(update={"path": str(run / "base")}))
    rows = store.read(run / "seed-0" / "drift" / "rollouts.jsonl")
    check_rows(rows, policy, files[0], 1)
    trained = load_policy(MODEL.model_copy(update={"path": str(run / "seed-0" / "drift")}))
    assert held(server) == trained.hash()
    assert len({row["prompt_id"] for row in rows if row["step"] == 1}) == PROMPTS
    assert (run / "report.html").exists()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["seed-0/drift/staleness"] for line in lines if "seed-0/drift/staleness" in line] == [0, 1, 1]


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
