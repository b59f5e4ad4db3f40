"""The whole job of configs/quickstart.yaml at tiny size, from an empty folder, on one rank, two and four."""

import json

import pytest
import torchrun
from scripted_engine import quarters

from drift.config import dump, load

QUICKSTART = torchrun.ROOT / "configs" / "quickstart.yaml"


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The quickstart's settings with sizes, and a task, that take seconds."""
    folder = tmp_path_factory.mktemp("quickstart")
    tiny = quarters(folder, arms=["uniform", "drift"], seeds=[0]).model_dump(mode="json")
    changes = [f"{name}={json.dumps(tiny[name])}" for name in ("task", "warm_start", "model", "arms", "seeds", "track")]
    changes += ["rollout.n=4", "rollout.turns=3", "rollout.batch_size=16", "eval.turns=3", "train.batch_size=16"]
    (folder / "quickstart.yaml").write_text(dump(load(QUICKSTART, changes)))
    return folder


def runs(job, ranks, *changes):
    """(what was said, results of the summary, losses) of a run on so many ranks, from an empty folder."""
    empty = job / "-".join([str(ranks), *(change.replace("/", "") for change in changes)])
    empty.mkdir()
    said = torchrun.run(ranks, "-m", "drift", "run", job / "quickstart.yaml", *changes, cwd=empty)
    folder = empty / "runs" / "quickstart"
    summary = json.loads((folder / "summary.json").read_text())
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    losses = [value for row in rows for key, value in row.items() if key.endswith("/loss")]
    assert (folder / "report.html").exists()
    return said, summary["results"], losses


@pytest.fixture(scope="module")
def alone(job):
    return runs(job, 1)


@pytest.mark.parametrize(("ranks", "changes"), [(2, ()), (4, ()), (2, ("train.shard=fsdp",))])
def test_the_quickstart_from_an_empty_folder_gives_the_results_of_one_rank(job, alone, ranks, changes):
    said, results, losses = runs(job, ranks, *changes)
    assert said.count("warm start:") == 1  # one rank works and speaks
    assert losses == pytest.approx(alone[2], rel=1e-4)
    assert results == alone[1]


def test_the_online_method_sharded_gives_the_results_of_one_rank(job):
    online = "online={steps: 3, prompts: 6}"
    (_, expected, losses), (_, results, found) = runs(job, 1, online), runs(job, 2, online, "train.shard=fsdp")
    assert found == pytest.approx(losses, rel=1e-3)
    assert results == expected
