"""Two real ranks under torchrun, over gloo, against one: the same weights, and nobody waits for ever.

The file is its own worker: torchrun runs `main` below, and the tests compare what it wrote with what one rank gives.
"""

import json
import sys
import time
from pathlib import Path

import pytest
import torch
import torchrun
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from test_tree_training import family
from tiny_policy import LORA, Policy, config, some

from drift.track import Track
from drift.training import checkpoint, distributed, trainer

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def skewed():
    """Nine rows in batches of five: the last batch has four; weights differ, and rows are long or short by turns."""
    rows = some(9)
    rows[2].weight = rows[5].weight = 0.0
    return rows


JOBS = {
    "samples": (lambda: Policy(), skewed, config(batch_size=5, max_tokens=40, epochs=2.0)),
    "weights": (lambda: Policy(), skewed, config(batch_size=5, max_tokens=40, epochs=2.0, preset="exact")),
    "idle": (lambda: Policy(), lambda: some(3), config(batch_size=1, max_tokens=40)),  # rank 1 never has a sample
    "bfloat16": (lambda: Policy(dtype=torch.bfloat16), skewed, config(batch_size=5, max_tokens=40)),
    "lora": (lambda: Policy(lora=LoraConfig(**LORA)), skewed, config(batch_size=5, max_tokens=40)),
    "trees": (lambda: Policy(), family, config(batch_size=5, max_tokens=40, tree="on")),  # one rank: end to end
}


class PoisonedOnRankOne(Policy):
    """A rank whose loss is not a number at its second pack."""

    calls = 0

    def hidden(self, batch):
        self.calls += 1
        poison = float("nan") if distributed.rank() == 1 and self.calls == 2 else 1.0
        return super().hidden(batch) * poison


class Interrupted(Exception):
    pass


def main(out):
    torch.set_num_threads(1)
    with distributed.launched() as rank:
        for name, (policy, rows, settings) in JOBS.items():
            policy = policy()
            if rank == 1 and name == "samples":  # a rank that loaded other weights takes rank 0's
                with torch.no_grad():
                    policy.model.model.norm.weight.add_(1.0)
            with Track(out / name, progress=False) as track:
                stats = trainer.train(policy, rows(), settings, seed=2, track=track, checkpoint_dir=out / name / "c")
            save_file(policy.weights(), out / f"{name}-{rank}.safetensors")
            (out / f"{name}-{rank}.json").write_text(json.dumps(stats.__dict__))
            assert checkpoint.latest(out / name / "c").name == f"checkpoint-{stats.steps}"

        policy, settings = PoisonedOnRankOne(), config(batch_size=8, max_tokens=512)
        stats = trainer.train(policy, some(24), settings, seed=2)
        (out / f"poisoned-{rank}.json").write_text(json.dumps(stats.__dict__))

        resumed = Policy()  # from where one rank was interrupted
        stats = trainer.train(resumed, skewed(), JOBS["samples"][2], seed=2, checkpoint_dir=out / "half")
        save_file(resumed.weights(), out / f"half-{rank}.safetensors")
        counted = distributed.sum_values(1.0, rank, 0.1)
        assert counted == [2.0, 1.0, 0.2], counted
        assert distributed.share(range(5)) == range(rank, 5, 2)
        seen = out / "was first"
        with distributed.in_turn("a file"):
            assert seen.exists() == (rank == 1)
            if rank == 0:
                time.sleep(0.5)  # the other rank would look meanwhile
                seen.touch()


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """What two ranks wrote."""
    folder = tmp_path_factory.mktemp("ranks")
    settings = JOBS["samples"][2].model_copy(update={"save_every": 2})

    class Stops(Track):
        def log(self, step, **metrics):
            if step == 3:
                raise Interrupted

    stops = Stops(None, progress=False)
    with pytest.raises(Interrupted):  # one rank begins
        trainer.train(Policy(), skewed(), settings, seed=2, track=stops, checkpoint_dir=folder / "half")
    assert checkpoint.latest(folder / "half").name == "checkpoint-2"
    torchrun.run(2, __file__, folder)
    return folder


def close(ours, theirs, tight):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=tight, msg=lambda m, n=name: f"{n}: {m}")


def norms(folder):
    return [json.loads(line)["train/grad_norm"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", JOBS)
def test_two_ranks_give_what_one_gives(name, out, tmp_path):
    policy, rows, settings = JOBS[name]
    policy = policy()
    before = policy.weights()
    with Track(tmp_path, progress=False) as track:
        settings = settings.model_copy(update={"tree": "off"})
        alone = trainer.train(policy, rows(), settings, seed=2, track=track)
    first, second = (load_file(out / f"{name}-{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(first[key], second[key]) for key in first)

    moved = max(float((now - before[key]).abs().max()) for key, now in policy.weights().items())
    assert moved > 1e-2  # so that the next line says something
    close(first, policy.weights(), 2e-2 if name == "bfloat16" else 1e-4)
    relative = 1e-2 if name == "bfloat16" else 1e-4
    assert norms(out / name) == pytest.approx(norms(tmp_path), rel=relative)  # Adam alone would forgive a factor
    for rank in (0, 1):
        stats = json.loads((out / f"{name}-{rank}.json").read_text())
        assert stats["losses"] == pytest.approx(alone.losses, rel=relative)
        for key in ("steps", "trained_tokens", "cut_tokens", "dropped", "skipped"):
            assert stats[key] == getattr(alone, key), key
        if name == "trees":
            assert stats["tokens"] < alone.tokens
        else:
            assert stats["tokens"] == alone.tokens


def test_a_rank_that_is_not_finite_stops_the_step_on_all(out):
    for rank in (0, 1):
        stats = json.loads((out / f"poisoned-{rank}.json").read_text())
        assert (stats["steps"], stats["skipped"]) == (3, 1)


def test_rank_0_alone_logs(out):
    rows = [json.loads(line) for line in (out / "samples" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["train/loss"] for row in rows] == json.loads((out / "samples-0.json").read_text())["losses"]


def test_two_ranks_go_on_from_what_one_rank_saved(out):
    policy, rows, settings = JOBS["samples"]
    policy = policy()
    trainer.train(policy, rows(), settings, seed=2)
    close(load_file(out / "half-0.safetensors"), policy.weights(), 1e-4)
    assert checkpoint.latest(out / "half").name == "checkpoint-4"


def test_one_process_needs_no_launcher():
    with distributed.launched() as rank:
        assert rank == distributed.rank() == 0
        assert distributed.world_size() == 1
        assert distributed.sum_values(1.5, 2.0) == [1.5, 2.0]
        assert distributed.share([1, 2]) == [1, 2]


def test_large_gradients_travel_in_buckets_of_one_type(monkeypatch):
    monkeypatch.setattr(distributed, "BUCKET", 10)
    sizes = [(4, torch.float32), (5, torch.float32), (2, torch.float32), (1, torch.bfloat16), (30, torch.bfloat16)]
    parameters = [torch.nn.Parameter(torch.zeros(n, dtype=dtype)) for n, dtype in sizes]
    buckets = list(distributed._buckets(parameters))
    assert [[p.numel() for p in bucket] for bucket in buckets] == [[4, 5], [2], [1], [30]]
    assert list(distributed._buckets([])) == []


if __name__ == "__main__":
    main(Path(sys.argv[1]))
