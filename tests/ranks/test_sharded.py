"""train.shard=fsdp on 1, 2 and 4 ranks against one rank that holds everything: losses, weights, bytes, resumption."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torchrun
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from test_offline_ranks import close, skewed
from test_tree_training import family
from tiny_policy import LORA, SHAPE, Policy, config, some
from transformers.models.qwen2 import Qwen2Config

from drift.track import Track
from drift.training import distributed, sharding, trainer

UNTIED = Qwen2Config(**SHAPE | {"num_hidden_layers": 3}, tie_word_embeddings=False, initializer_range=0.2)
JOBS = {
    "tied": (lambda: Policy(), skewed, config(batch_size=5, max_tokens=40, epochs=2.0)),
    "untied": (lambda: Policy(UNTIED), skewed, config(batch_size=5, max_tokens=40, epochs=2.0, preset="exact")),
    "rows": (lambda: Policy(UNTIED), skewed, config(batch_size=5, max_tokens=40)),  # and shard_head
    "idle": (
        lambda: Policy(),
        lambda: some(3),
        config(batch_size=1, max_tokens=40),
    ),  # all ranks but one have no sample
    "checkpointing": (lambda: Policy(checkpointing=True), skewed, config(batch_size=5, max_tokens=40)),
    "trees": (lambda: Policy(), family, config(batch_size=5, max_tokens=40, tree="on", epochs=2.0)),
    "trees and rows": (lambda: Policy(UNTIED), family, config(batch_size=5, max_tokens=40, tree="on")),
    "trees and checkpointing": (
        lambda: Policy(checkpointing=True),
        family,
        config(batch_size=5, max_tokens=40, tree="on"),
    ),
    "lora": (lambda: Policy(lora=LoraConfig(**LORA)), skewed, config(batch_size=5, max_tokens=40)),
    "bfloat16": (lambda: Policy(dtype=torch.bfloat16), skewed, config(batch_size=5, max_tokens=40)),
}


class Interrupted(Exception):
    pass


def main(out):
    torch.set_num_threads(1)
    step = trainer.train_step
    with distributed.launched() as rank:
        for name, (make, rows, settings) in JOBS.items():
            policy, held, heads = make(), [], []

            def watched(spread, *args, name=name, policy=policy, held=held, heads=heads, **options):
                held.append([sharding.local_bytes(p) for p in (spread.model.parameters(), policy.model.parameters())])
                heads.append(type(spread.head().parallel).__name__ if "rows" in name else None)
                return step(spread, *args, **options)

            trainer.train_step = watched
            settings = settings.model_copy(update={"shard": "fsdp", "shard_head": "rows" in name})
            with Track(out / name, progress=False) as track:
                stats = trainer.train(policy, rows(), settings, seed=2, track=track, checkpoint_dir=out / name / "c")
            save_file(policy.weights(), out / f"{name}-{rank}.safetensors")
            (out / f"{name}-{rank}.json").write_text(json.dumps({**stats.__dict__, "held": held[0], "head": heads[-1]}))
        trainer.train_step = step
        resumed = Policy()  # from where one rank was interrupted
        settings = JOBS["tied"][2].model_copy(update={"shard": "fsdp"})
        trainer.train(resumed, skewed(), settings, seed=2, checkpoint_dir=out / "half")
        save_file(resumed.weights(), out / f"half-{rank}.safetensors")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """name → (weights, losses, gradient norms) of one rank that holds everything."""
    found, folder = {}, tmp_path_factory.mktemp("alone")
    for name, (make, rows, settings) in JOBS.items():
        policy, settings = make(), settings.model_copy(update={"tree": "off"})
        with Track(folder / name, progress=False) as track:
            stats = trainer.train(policy, rows(), settings, seed=2, track=track)
        found[name] = policy.weights(), stats.losses, norms(folder / name)
    return found


@pytest.fixture(scope="module", params=[1, 2, 4])
def out(request, tmp_path_factory):
    """(number of ranks, what they wrote)."""
    folder = tmp_path_factory.mktemp("sharded")

    class Stops(Track):
        def log(self, step, **metrics):
            if step == 3:
                raise Interrupted

    settings = JOBS["tied"][2].model_copy(update={"save_every": 2})
    with pytest.raises(Interrupted):
        trainer.train(
            Policy(), skewed(), settings, seed=2, track=Stops(None, progress=False), checkpoint_dir=folder / "half"
        )
    torchrun.run(request.param, __file__, folder)
    return request.param, folder


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def norms(folder):
    return [row["train/grad_norm"] for row in rows_of(folder)]


@pytest.mark.parametrize("name", JOBS)
def test_shards_give_the_losses_and_weights_of_one_rank(name, out, alone):
    ranks, folder = out
    weights, losses, expected = alone[name]
    half = name == "bfloat16"
    for rank in range(ranks):
        close(load_file(folder / f"{name}-{rank}.safetensors"), weights, 3e-2 if half else 1e-4)
        assert json.loads((folder / f"{name}-{rank}.json").read_text())["losses"] == pytest.approx(
            losses, rel=2e-2 if half else 1e-4
        )
    assert norms(folder / name) == pytest.approx(expected, rel=3e-2 if half else 1e-4)


def test_siblings_of_a_rank_share_their_tokens_on_trees(out):
    ranks, folder = out
    if ranks < 4:  # of five rows in a step, four ranks have one or two each
        assert max(row["train/tokens_shared"] for row in rows_of(folder / "trees")) > 0.1


def test_each_rank_holds_its_part_and_nothing_else(out):
    ranks, folder = out
    total = sum(p.numel() for p in Policy().model.parameters()) * 4
    held = [json.loads((folder / f"tied-{rank}.json").read_text())["held"] for rank in range(ranks)]
    if ranks == 1:
        return
    assert all(policy == 0 for _, policy in held)
    for spread, _ in held:
        assert total / ranks <= spread * 1.15
        assert spread <= total / ranks * 1.15  # rows do not divide evenly: padding


def test_a_head_of_counted_rows_is_never_gathered(out):
    ranks, folder = out
    names = [f"{name}-{rank}.json" for name in ("rows", "trees and rows") for rank in range(ranks)]
    heads = {json.loads((folder / name).read_text())["head"] for name in names}
    assert heads == {"NoneType" if ranks == 1 else "GatherHidden"}


def test_heads_that_cannot_be_sharded_alone_are_refused():
    with pytest.raises(ValueError, match=r"shard_head must be false.*tied"):
        sharding._own_head(Policy().model)
    with pytest.raises(ValueError, match=r"shard_head must be false.*adapter"):
        sharding._own_head(Policy(UNTIED, lora=LoraConfig(**LORA | {"target_modules": ["lm_head"]})).model)
    with pytest.raises(ValueError, match=r"shard_head must be false with shard='none'"):
        config(shard_head=True)
    with pytest.raises(ValueError, match=r"backend='triton'"):
        config(shard_head=True, shard="fsdp", backend="triton")


def test_shards_go_on_from_what_one_rank_saved(out, alone):
    ranks, folder = out
    for rank in range(ranks):
        close(load_file(folder / f"half-{rank}.safetensors"), alone["tied"][0], 1e-4)


def test_one_rank_goes_on_from_what_shards_saved(out, alone):
    _, folder = out
    policy, (_, rows, settings) = Policy(), JOBS["tied"]
    stats = trainer.train(policy, rows(), settings, seed=2, checkpoint_dir=folder / "tied" / "c")
    assert stats.losses == pytest.approx(alone["tied"][1], rel=1e-4)
    close(policy.weights(), alone["tied"][0], 1e-4)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
