"""Online on several ranks: the gradient of a batch, the reference's KL, and the trajectories of one rank, sampled by many."""

import json
import sys
from pathlib import Path

import pytest
import tiny_policy
import torch
import torchrun
from test_online import config, conversations, play_through
from test_reference import CONFIG, LOOSE, move

from drift import store
from drift.config.algorithms import ALGORITHMS
from drift.model.policy import load_policy
from drift.online.branches import Branches, denominators
from drift.online.curriculum import Phase
from drift.online.teacher import Teacher
from drift.rhythm import StepMean
from drift.rollouts import rollout
from drift.training import distributed
from drift.training.optimizer import MasterAdamW
from drift.training.reference import Reference

RANKS = 2
MOST = (64, 1)  # one trajectory leaves a rank without any


def play(folder, ahead, steps=4):
    """Four steps of four problems, into FOLDER/AHEAD.jsonl; whatever a random model says is an answer."""
    rollout.parse_answer = lambda said, tag: said.strip() or None
    made = config(folder, online={"distill": {"top_k": None}, "ahead": ahead, "steps": steps}, train={"save_every": 2})
    return play_through(made, folder / f"checkpoints-{ahead}", rollouts=folder / f"{ahead}.jsonl")


def main(folder):
    torch.set_num_threads(1)
    rollout.parse_answer = lambda said, tag: said.strip() or None
    with distributed.launched() as rank:
        made = config(folder / str(rank), online={"distill": {"top_k": None}})
        gradients = []
        for share in (distributed.share, list):
            policy, other = load_policy(made.model, seed=0), load_policy(made.model, seed=1)
            optimizer = MasterAdamW(policy.model, made.train)
            teacher = Teacher(policy.model.named_parameters(), made.online.teacher)
            teacher.load_state_dict({"shadow": other.state(), "updates": 0, "skipped": 0})
            branches = Branches(policy, optimizer, made, ALGORITHMS["drift"], StepMean(), StepMean())
            samples = conversations(policy)
            divide_by = denominators(samples, made.online)
            branches.accumulate(share(samples), Phase("both", 1.0), teacher, divide_by)
            if share is not list:
                distributed.sum_gradients(optimizer.parameters)
                branches.difference.advance(distributed.sum_values)
            else:
                branches.difference.advance()
            gradients.append(([p.grad for p in optimizer.parameters], branches.difference.value))
        for ours, theirs in zip(*(found for found, _ in gradients)):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
        assert gradients[0][1] == pytest.approx(gradients[1][1], rel=1e-5)
        assert distributed.gather([rank] * (rank + 1)) == [0, 1, 1]
        reference = Reference(policy := tiny_policy.Policy(LOOSE), CONFIG)
        move(policy)
        said = {"kl": [reference.kl(tiny_policy.some(9), most) for most in MOST]}
        for ahead in (0, 1):
            policy, stats = play(folder, ahead)
            said[f"ahead-{ahead}"] = [policy.hash(), stats.rewards]
        play(folder / "one rank began", 0)
        (folder / f"rank-{rank}.json").write_text(json.dumps(said))


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """What two ranks wrote."""
    folder, before = tmp_path_factory.mktemp("online"), rollout.parse_answer
    try:
        begun = folder / "one rank began"
        begun.mkdir()
        stops_after(2, begun)
        torchrun.run(RANKS, __file__, folder)
        (folder / "alone").mkdir()
        play(folder / "alone", 0)
        play(folder / "alone", 1)
    finally:
        rollout.parse_answer = before
    return folder


def stops_after(steps, folder):
    """One rank's training, as far as its checkpoint of that step."""
    from drift.training import checkpoint

    class Stopped(Exception):
        pass

    save = checkpoint.save

    def saved(*args, **options):
        save(*args, **options)
        raise Stopped

    checkpoint.save = saved
    try:
        with pytest.raises(Stopped):
            play(folder, 0)
    finally:
        checkpoint.save = save
    assert checkpoint.latest(folder / "checkpoints-0").name == f"checkpoint-{steps}"


def sampled(path):
    """Token ids of every trajectory, in the order of the file."""
    return [[row["step"], row["prompt_id"], row["traj_idx"], row["token_ids"]] for row in store.read(path)]


def by_name(path):
    """The same by step, problem and place: which rank writes first does not matter."""
    return sorted(sampled(path))


def test_ranks_stay_together_and_say_the_same(out):
    said = [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(RANKS)]
    assert said[0] == said[1]
    assert said[0]["ahead-0"][0] != said[0]["ahead-1"][0]  # sampling ahead is another training


@pytest.mark.parametrize("ahead", [0, 1])
def test_two_ranks_sample_the_trajectories_of_one(out, ahead):
    rows = store.read(out / f"{ahead}.jsonl")
    assert [(row["step"], row["staleness"]) for row in rows] == [
        (step, ahead * (step > 1)) for step in (1, 2, 3, 4) for _ in range(16)
    ]
    assert by_name(out / f"{ahead}.jsonl") == by_name(out / "alone" / f"{ahead}.jsonl")


def test_a_training_that_one_rank_began_goes_on_with_the_same_trajectories_on_two(out):
    assert by_name(out / "one rank began" / "0.jsonl") == by_name(out / "alone" / "0.jsonl")


def test_the_reference_gives_the_same_kl(out):
    reference = Reference(policy := tiny_policy.Policy(LOOSE), CONFIG)
    move(policy)
    alone = [reference.kl(tiny_policy.some(9), most) for most in MOST]
    for rank in range(RANKS):
        said = json.loads((out / f"rank-{rank}.json").read_text())
        assert said["kl"] == pytest.approx(alone, rel=1e-5)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
