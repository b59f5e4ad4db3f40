"""KL to the starting policy against whole logits in float64, and its estimator against an enumerated KL."""

from pathlib import Path

import pytest
import tiny_policy
import torch
from peft import LoraConfig
from transformers.models.qwen2 import Qwen2Config

from drift.config import parse
from drift.training.reference import Reference, k3, score

ROOT = Path(__file__).parent.parent.parent
LOOSE = Qwen2Config(**tiny_policy.SHAPE, tie_word_embeddings=True, initializer_range=0.2)
TEMPERATURE = 0.7
CONFIG = parse(
    {
        "name": "x",
        "rollout": {"temperature": TEMPERATURE, "max_new_tokens": 8},
        "train": {"max_tokens": 64, "max_length": 64},
    }
)


def move(policy, size=0.05):
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in policy.model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=draw) * size)


def by_hand(policy, trajectories):
    """Log-probs and entropies of all assistant tokens, in float64 from whole logits, one trajectory at a time."""
    found = []
    for t in trajectories:
        with torch.no_grad():
            logits = policy.model(input_ids=torch.tensor(t.token_ids)[None]).logits[0].double() / TEMPERATURE
        logp = logits.log_softmax(-1)
        for turn in t.turns:
            for i in range(turn.start, turn.stop):
                row = logp[i - 1]
                found.append((float(row[t.token_ids[i]]), float(-(row.exp() * row).sum())))
    return [list(column) for column in zip(*found)]


def test_scores_are_those_of_whole_logits():
    policy, trajectories = tiny_policy.Policy(LOOSE), tiny_policy.some(7)
    policy.model.train()
    logprobs, entropies = score(policy, trajectories, CONFIG)
    expected = by_hand(policy, trajectories)
    for ours, theirs in zip((logprobs, entropies), expected):
        assert sorted(ours.tolist()) == pytest.approx(sorted(theirs), abs=1e-5)
    assert policy.model.training
    assert not logprobs.requires_grad
    assert [len(x) for x in score(policy, [], CONFIG)] == [0, 0]


def expected_kl(policy, start, trajectories):
    now, before = by_hand(policy, trajectories)[0], by_hand(start, trajectories)[0]
    x = torch.tensor(before) - torch.tensor(now)
    return float((x.exp() - 1 - x).mean())


@pytest.mark.parametrize("lora", [None, LoraConfig(**tiny_policy.LORA)])
def test_kl_to_the_start(lora):
    policy, trajectories = tiny_policy.Policy(LOOSE, lora=lora), tiny_policy.some(9)
    reference = Reference(policy, CONFIG)
    assert reference.kl(trajectories, 64) == 0
    move(policy)
    before = policy.weights()
    kl = reference.kl(trajectories, 64)
    start = tiny_policy.Policy(LOOSE)
    assert kl == pytest.approx(expected_kl(policy, start, trajectories), rel=1e-4)
    assert kl > 1e-3
    assert all(torch.equal(before[name], p) for name, p in policy.weights().items())
    if lora:
        with policy.model.disable_adapter():
            without, _ = score(policy, trajectories, CONFIG)
        now, _ = score(policy, trajectories, CONFIG)
        assert kl == pytest.approx(float(k3(now, without).mean()), rel=1e-5)


def test_how_far_a_training_went_on_what_the_start_had_sampled():
    policy, trajectories = tiny_policy.Policy(LOOSE), tiny_policy.some(9)
    start = policy.state()
    move(policy)
    found = Reference(policy, CONFIG, start).moved(trajectories, 64)
    (now, entropies), (before, its) = by_hand(policy, trajectories), by_hand(tiny_policy.Policy(LOOSE), trajectories)
    x = torch.tensor(now) - torch.tensor(before)
    assert found["base_kl"] == pytest.approx(float((x.exp() - 1 - x).mean()), rel=1e-4)
    assert found["entropy"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-5)
    assert found["base_entropy"] == pytest.approx(sum(its) / len(its), rel=1e-5)
    assert found["entropy"] != pytest.approx(found["base_entropy"], rel=1e-3)


def test_some_of_the_trajectories_stand_for_all():
    policy, trajectories = tiny_policy.Policy(LOOSE), tiny_policy.some(9)
    reference = Reference(policy, CONFIG)
    move(policy)
    assert reference.kl(trajectories, 4) == pytest.approx(reference.kl(trajectories[::3], 64))
    assert reference.kl(trajectories, 4) != pytest.approx(reference.kl(trajectories, 64))


def test_log_probs_that_are_there_already_spare_a_pass():
    policy, trajectories = tiny_policy.Policy(LOOSE), tiny_policy.some(9)
    reference, passes = Reference(policy, CONFIG), []
    move(policy)
    known = {}
    for t in trajectories[::3]:
        known[t.index] = score(policy, [t], CONFIG)[0]
    expected = reference.kl(trajectories, 4)
    policy.model.register_forward_pre_hook(lambda *_: passes.append(1))
    policy.causal_lm.base_model.register_forward_pre_hook(lambda *_: passes.append(1))
    assert reference.kl(trajectories, 4) == expected
    both = len(passes)
    assert reference.kl(trajectories, 4, known) == pytest.approx(expected, rel=1e-5)
    assert len(passes) - both == both / 2
    known[trajectories[3].index] = known[trajectories[3].index] - 0.5
    assert reference.kl(trajectories, 4, known) != pytest.approx(expected, rel=1e-2)


def test_the_mean_of_k3_is_the_kl():
    """Over all tokens of a vocabulary, each with its probability."""
    draw = torch.Generator().manual_seed(0)
    p, q = (torch.randn(50, generator=draw, dtype=torch.float64).log_softmax(0) for _ in range(2))
    assert float((p.exp() * k3(p, q)).sum()) == pytest.approx(float((p.exp() * (p - q)).sum()))
    assert (k3(p, q) >= 0).all()
