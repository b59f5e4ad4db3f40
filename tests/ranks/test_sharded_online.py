"""train.shard=fsdp with `online` on 1, 2 and 4 ranks against one rank that holds everything: samples, weights, resumption."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
import torchrun
from safetensors.torch import load_file, save_file
from scripted_engine import WordTask
from test_offline_ranks import close
from test_online import config

from drift import store
from drift.engines.hf import HFEngine
from drift.model.policy import load_policy
from drift.online.loop import train_online
from drift.rollouts import rollout
from drift.track import Track
from drift.training import distributed

LORA = {"rank": 4, "alpha": 8}
JOBS = {  # name → (online, sections)
    "ema": ({}, {}),
    "ahead": ({"ahead": 1}, {}),
    "trust_region": ({"teacher": {"weights": "trust_region", "mix": 0.3}}, {}),
    "weight_mix": ({"teacher": {"weights": "weight_mix", "mix": 0.3}, "watch": {"every": 0}}, {}),
    "frozen": ({"teacher": {"weights": "frozen"}}, {}),
    "server": ({}, {}),  # which has weights of its own
    "grpo": ({"algorithm": "grpo"}, {}),
    "lora": ({}, {"model": {"lora": LORA}}),
    "checkpointing": ({}, {"model": {"gradient_checkpointing": True}}),
    "bfloat16": ({"steps": 1}, {"model": {"dtype": "bfloat16"}}),
    "trees": ({}, {}),
}
WEIGHTS = 1e-4


class Stops(Exception):
    pass


class Apart:
    """An engine with weights of its own, which it takes up in `sync`; meanwhile a spread policy holds none."""

    def __init__(self, policy):
        self.policy, self.own = policy, copy.deepcopy(policy)
        self.engine = HFEngine(self.own)

    def sync(self):
        with torch.no_grad():
            for own, parameter in zip(self.own.model.parameters(), self.policy.model.parameters(), strict=True):
                own.copy_(parameter)

    def generate(self, prompts, **options):
        held = sum(parameter.numel() for parameter in self.policy.model.parameters())
        assert (held == 0) == (distributed.world_size() > 1)
        assert self.policy.head().weight.dtype == torch.float32  # as an engine may ask meanwhile
        return self.engine.generate(prompts, **options)


class Breaks(Track):
    """Interrupts after a step's row is logged."""

    def __init__(self, step):
        super().__init__(None, progress=False)
        self.step = step

    def log(self, step, **metrics):
        if step == self.step:
            raise Stops


def play(folder, name, shard, track=None):
    """The policy after four steps of four problems; trajectories in FOLDER/NAME.jsonl, checkpoints every two steps."""
    online, sections = JOBS[name]
    algorithm = online.get("algorithm", "drift")
    train = {"save_every": 2, "shard": shard, "max_tokens": 128, "max_length": 128}
    train["tree"] = "on" if name == "trees" and shard != "none" else "off"
    made = config(folder / "task", algorithm, online={"distill": {"top_k": None}} | online, train=train, **sections)
    policy, task = load_policy(made.model, seed=0), WordTask(4)
    task.verify = lambda problem, answer: len(answer) % 2 == 0
    with Track(folder / f"{name}-log", progress=False) as own:
        options = {"track": track or own, "checkpoint_dir": folder / name, "rollouts": folder / f"{name}.jsonl"}
        engine = Apart(policy) if name == "server" else HFEngine(policy)
        train_online(policy, engine, task, task.problems("train"), made, seed=3, **options)
    return policy


def weights(policy):
    return {name: p.detach().clone() for name, p in policy.model.named_parameters()}


def main(out):
    torch.set_num_threads(1)
    rollout.parse_answer = lambda said, tag: said.strip() or None
    with distributed.launched() as rank:
        for name in JOBS:
            save_file(weights(play(out, name, "fsdp")), out / f"{name}-{rank}.safetensors")
        save_file(weights(play(out / "half", "ema", "fsdp")), out / f"half-{rank}.safetensors")


@pytest.fixture(scope="module", autouse=True)
def talkative():
    """An untrained model never writes an answer's tags: what it says counts as one."""
    before, rollout.parse_answer = rollout.parse_answer, lambda said, tag: said.strip() or None
    yield
    rollout.parse_answer = before


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """(folder, name → weights) of one rank that holds everything."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, {name: weights(play(folder, name, "none")) for name in JOBS}


@pytest.fixture(scope="module", params=[1, 2, 4])
def out(request, tmp_path_factory):
    """(number of ranks, what they wrote)."""
    folder = tmp_path_factory.mktemp("sharded")
    with pytest.raises(Stops):  # one rank begins
        play(folder / "half", "ema", "none", Breaks(3))
    torchrun.run(request.param, __file__, folder, timeout=400)
    return request.param, folder


def sampled(path):
    """Token ids and routed weights of every trajectory, by step, problem and place."""
    return sorted([row["step"], row["prompt_id"], row["traj_idx"], row["token_ids"]] for row in store.read(path))


def logged(folder, *names):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [[row.get(f"online/{name}") for name in names] for row in rows]


@pytest.mark.parametrize("name", JOBS)
def test_shards_give_the_samples_and_weights_of_one_rank(name, out, alone):
    ranks, folder = out
    where, expected = alone
    assert sampled(folder / f"{name}.jsonl") == sampled(where / f"{name}.jsonl")
    for rank in range(ranks):
        tight = 3e-2 if name == "bfloat16" else WEIGHTS
        close(load_file(folder / f"{name}-{rank}.safetensors"), expected[name], tight)
    columns = ["loss", "grad_norm", "watch/reference_kl", "teacher/distance", "teacher_kl"]
    ours, theirs = (logged(place / f"{name}-log", *columns) for place in (folder, where))
    relative = 3e-2 if name == "bfloat16" else 1e-3
    for own, other in zip(ours, theirs, strict=True):
        assert own == [value if value is None else pytest.approx(value, rel=relative, abs=1e-5) for value in other]


def test_shards_go_on_from_what_one_rank_saved(out, alone):
    ranks, folder = out
    assert sampled(folder / "half" / "ema.jsonl") == sampled(alone[0] / "ema.jsonl")
    for rank in range(ranks):
        close(load_file(folder / f"half-{rank}.safetensors"), alone[1]["ema"], WEIGHTS)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
