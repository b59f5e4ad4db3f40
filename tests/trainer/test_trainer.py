"""The trainer against a plain loop over whole logits, and what a step may not depend on."""

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from tiny_policy import LORA, SHAPE, Policy, config, some, trajectory
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.models.granite import GraniteConfig
from transformers.models.qwen2 import Qwen2Config

from drift.packing import pack
from drift.track import Track
from drift.training import checkpoint, trainer
from drift.training.optimizer import MasterAdamW, learning_rate

# peft 0.21 asks transformers 5.24 for an attribute under its old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def packs_of(trajectories, settings):
    return pack(trajectories, settings.max_tokens, turns=settings.turns, token_reduction=settings.token_reduction)


def gradient(policy, trajectories, settings, parts=1):
    """Loss and gradients of one batch, packed in `parts` independent calls, by the trainer's own code."""
    optimizer = MasterAdamW(policy.model, settings)
    total = len(trajectories) if settings.normalize == "samples" else math.fsum(t.weight for t in trajectories)
    loss = torch.zeros(())
    for part in range(parts):
        loss += trainer.accumulate(policy, packs_of(trajectories[part::parts], settings), optimizer, total, settings)
    gradients = {name: m.grad.clone() for name, m in optimizer.masters.items() if m.grad is not None}
    optimizer.zero()
    return loss, gradients


def published_loss(policy, trajectories, settings):
    """A4 word by word: each trajectory alone, whole logits, the model's own head."""
    numerator, denominator = torch.zeros((), dtype=torch.float64), 0.0
    for t in trajectories:
        logits = policy.model(input_ids=torch.tensor([t.token_ids]), use_cache=False).logits[0].double()
        logp = logits.log_softmax(-1)
        chosen = [
            logp[position - 1, t.token_ids[position]]
            for turn in (t.turns[-1:] if settings.turns == "last" else t.turns)
            for position in range(turn.start, turn.stop)
        ]
        cost = -torch.stack(chosen).sum()
        numerator = numerator + t.weight * (cost / len(chosen) if settings.token_reduction == "mean" else cost)
        denominator += 1.0 if settings.normalize == "samples" else t.weight
    return numerator / denominator


def close(ours, theirs, tight=2e-5):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=tight, atol=tight, msg=lambda m, n=name: f"{n}: {m}")


CAPPED = Gemma3TextConfig(**SHAPE, head_dim=8, final_logit_softcapping=2.0, initializer_range=0.2)
SCALED = GraniteConfig(**SHAPE, logits_scaling=0.25, embedding_multiplier=2.0, initializer_range=0.2)


@pytest.mark.parametrize(
    ("settings", "model"),
    [
        (config(), None),
        (config(preset="exact"), None),
        (config(turns="assistant", normalize="weights"), None),
        (config(turns="last", token_reduction="sum"), None),
        (config(), CAPPED),
        (config(), SCALED),
    ],
)
def test_loss_and_gradient_are_the_published_ones(settings, model):
    policy, trajectories = Policy(model), some(6)
    loss, ours = gradient(policy, trajectories, settings)
    reference = published_loss(policy, trajectories, settings)
    reference.backward()
    torch.testing.assert_close(loss.double(), reference.detach(), rtol=1e-5, atol=1e-6)
    close(ours, {name: p.grad for name, p in policy.model.named_parameters()})


@pytest.fixture(scope="module")
def shared_policy():
    return Policy()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_the_gradient_does_not_depend_on_split_packing_or_order(shared_policy, data):
    normalize = data.draw(st.sampled_from(["samples", "weights"]))
    reduction = data.draw(st.sampled_from(["mean", "sum"]))
    trajectories = some(data.draw(st.integers(6, 10)), data.draw(st.integers(0, 99)), turns=3)
    if data.draw(st.booleans()):
        trajectories[0].weight = 0.0
    base = config(normalize=normalize, token_reduction=reduction, turns="assistant", max_tokens=512, max_length=64)
    loss, whole = gradient(shared_policy, trajectories, base)

    order = data.draw(st.permutations(trajectories))
    other = base.model_copy(update={"max_tokens": data.draw(st.sampled_from([40, 64, 512]))})
    again, parts = gradient(shared_policy, order, other, parts=data.draw(st.integers(1, 4)))
    torch.testing.assert_close(loss, again, rtol=1e-5, atol=1e-6)
    close(whole, parts)


def test_a_dropped_trajectory_leaves_its_term_out_and_nothing_else():
    """Steps and denominators as with it: a tiny weight and none differ by that weight's term alone."""
    runs = []
    for weight in (0.0, 1e-7):
        trajectories = some(10)
        trajectories[3].weight = trajectories[7].weight = weight
        policy = Policy()
        stats = trainer.train(policy, trajectories, config(lr=1e-3), seed=1)
        runs.append((stats, policy.weights()))
    (without, ours), (with_, theirs) = runs
    assert without.steps == with_.steps == 3
    assert (without.dropped, with_.dropped) == (2, 0)
    assert without.losses == pytest.approx(with_.losses, rel=1e-5)
    close(ours, theirs, 1e-4)


def test_an_epoch_meets_every_trajectory_once_and_epochs_differ():
    def epoch(number, seed=5):
        return [i for step in range(3) for i in trainer._batch(10, 4, seed, 3 * number + step)]

    assert [len(trainer._batch(10, 4, 5, step)) for step in range(3)] == [4, 4, 2]
    assert sorted(epoch(0)) == sorted(epoch(1)) == list(range(10))
    assert epoch(0) != epoch(1)
    assert epoch(0) == epoch(0)
    assert epoch(0) != epoch(0, seed=6)


@pytest.mark.parametrize(
    ("options", "steps", "count"),
    [({"epochs": 2.0}, None, 6), ({"epochs": 0.5}, None, 2), ({"epochs": 1e-12}, None, 1), ({}, 7, 7)],
)
def test_steps_follow_from_epochs_or_are_given(options, steps, count):
    stats = trainer.train(Policy(), some(10), config(**options), seed=0, steps=steps)
    assert stats.steps == len(stats.losses) == count


def test_training_lowers_the_loss_counts_and_logs(tmp_path):
    trajectories = some(8, weight=1.0)
    with Track(tmp_path, progress=False) as track:
        stats = trainer.train(
            Policy(), trajectories, config(batch_size=8, epochs=20.0), seed=0, track=track, prefix="x"
        )
    assert stats.losses[-1] < 0.5 * stats.losses[0]
    assert stats.tokens == 20 * sum(len(t.token_ids) for t in trajectories)
    assert stats.trained_tokens == 20 * sum(t.turns[-1].stop - t.turns[-1].start for t in trajectories)
    assert stats.skipped == stats.cut_tokens == 0
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert [row["x/loss"] for row in rows] == stats.losses
    assert rows[0]["x/lr"] == pytest.approx(0.005)
    assert rows[0]["x/ess"] == pytest.approx(1.0)
    names = ["grad_norm", "num_tokens", "perf/tokens_per_second", "perf/peak_memory", "step_time"]
    assert all(row[f"x/{name}"] > 0 for row in rows for name in names)


def test_effective_sample_size_and_cut_tokens_are_those_of_the_batch(tmp_path):
    trajectories = some(4, turns=3)
    for t, weight in zip(trajectories, (1.0, 3.0, 0.0, 0.0)):
        t.weight = weight
    room = max(len(t.token_ids) for t in trajectories[:2]) - 1
    with Track(tmp_path, progress=False) as track:
        stats = trainer.train(Policy(), trajectories, config(max_length=room), seed=0, track=track)
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row["train/ess"] == pytest.approx(16 / 10 / 4)
    assert row["train/cut_tokens"] == stats.cut_tokens == sum(max(len(t.token_ids) - room, 0) for t in trajectories[:2])


def test_what_cannot_be_trained_is_said_before_the_first_step():
    policy = Policy()
    before = policy.weights()
    with pytest.raises(ValueError, match="none to train on"):
        trainer.train(policy, [], config(), seed=0)
    with pytest.raises(ValueError, match="every weight is 0"):
        trainer.train(policy, some(5, weight=0.0), config(), seed=0)
    with pytest.raises(ValueError, match=r"max_length 4.*raise max_length and max_tokens"):
        trainer.train(policy, [*some(9), trajectory(9, torch.Generator(), turns=3)], config(max_tokens=4), seed=0)
    with pytest.raises(ValueError, match="steps 0"):
        trainer.train(policy, some(5), config(), seed=0, steps=0)
    assert all(torch.equal(before[name], now) for name, now in policy.weights().items())


def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path, capsys):
    class Broken(Policy):
        calls = 0

        def hidden(self, batch):
            self.calls += 1
            out = super().hidden(batch)
            return out * float("nan") if self.calls == 2 else out

    kept = []

    class Watch(Track):
        def log(self, step, **metrics):
            kept.append(policy.weights())
            super().log(step, **metrics)

    policy = Broken()
    with Watch(tmp_path, progress=False) as track:
        stats = trainer.train(policy, some(12), config(max_tokens=256), seed=0, track=track)
    assert (stats.steps, stats.skipped) == (3, 1)
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])
    assert not torch.equal(kept[1]["model.norm.weight"], kept[2]["model.norm.weight"])
    assert "step 2 is skipped: loss nan" in capsys.readouterr().err


def test_small_steps_are_not_lost_in_bfloat16():
    policy = Policy(dtype=torch.bfloat16)
    before = policy.weights()
    settings = config(lr=2e-5, warmup_ratio=0.0, weight_decay=0.0, batch_size=8)
    trainer.train(policy, some(8), settings, seed=0, steps=60)
    name = "model.layers.0.mlp.up_proj.weight"  # entries near 0.2, where a bf16 step is 8e-4: 40 of ours
    moved = (policy.weights()[name] - before[name]).float().abs()
    assert policy.model.dtype == torch.bfloat16
    assert (moved > 0).float().mean() > 0.3

    full = Policy()
    full.model.load_state_dict({k: v.float() for k, v in before.items()}, strict=False)
    trainer.train(full, some(8), settings, seed=0, steps=60)
    drift = full.weights()[name] - before[name].float()
    ours = (policy.weights()[name] - before[name]).float()
    assert torch.nn.functional.cosine_similarity(drift.flatten(), ours.flatten(), 0) > 0.6


def test_gradients_add_up_in_float32_over_the_packs():
    trajectories, many = some(8, weight=1.0), config(max_tokens=40)
    assert len(packs_of(trajectories, many)) > 2
    loss, ours = gradient(Policy(dtype=torch.bfloat16), trajectories, many)
    exact = Policy()
    exact.model.load_state_dict(Policy(dtype=torch.bfloat16).weights(), strict=False)
    reference, theirs = gradient(exact, trajectories, many)
    assert all(g.dtype == torch.float32 for g in ours.values())
    assert float(loss) == pytest.approx(float(reference), rel=0.02)
    for name in theirs:
        assert torch.nn.functional.cosine_similarity(ours[name].flatten(), theirs[name].flatten(), 0) > 0.99, name


def test_norms_and_biases_do_not_decay():
    policy = Policy()
    before = policy.weights()
    optimizer = MasterAdamW(policy.model, config(weight_decay=0.5))
    for master in optimizer.parameters:
        master.grad = torch.zeros_like(master)
    optimizer.step(0.1)
    for name, now in policy.weights().items():
        factor = 1.0 if name.endswith(("norm.weight", "bias")) else 0.95
        torch.testing.assert_close(now, before[name] * factor, rtol=1e-6, atol=1e-8)


def test_a_batch_whose_every_row_was_dropped_is_still_a_step():
    policy, settings = Policy(), config(warmup_ratio=0.0)
    optimizer = MasterAdamW(policy.model, settings)
    result = trainer.train_step(policy, [], optimizer, 1.0, settings)
    assert (result.loss, result.grad_norm, result.skipped) == (0.0, 0.0, False)
    counts = [int(state) for name, state in optimizer.state_dict().items() if name.endswith("/step")]
    assert counts == [1] * len(optimizer.parameters)


def test_the_gradient_is_clipped_and_its_norm_reported():
    moved = []
    for clip in (1e9, 1e-12):
        policy, settings = Policy(), config(grad_clip=clip, weight_decay=0.0)
        optimizer, before = MasterAdamW(policy.model, settings), policy.weights()
        _, gradients = gradient(policy, some(4), settings)
        result = trainer.train_step(policy, packs_of(some(4), settings), optimizer, 4.0, settings)
        norm = math.sqrt(math.fsum(float(g.double().square().sum()) for g in gradients.values()))
        assert result.grad_norm == pytest.approx(norm, rel=1e-4)
        moved.append(max(float((now - before[n]).abs().max()) for n, now in policy.weights().items()))
    assert moved[0] == pytest.approx(1e-2, rel=0.01)  # Adam's first step is lr, whatever the scale …
    assert moved[1] < 1e-5  # … until its epsilon weighs in


def test_learning_rates():
    def rates(total, **options):
        return [learning_rate(step, total, config(lr=1.0, **options)) for step in range(total)]

    assert rates(10, warmup_ratio=0.4) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1])
    assert rates(4, warmup_ratio=0.0, schedule="linear") == pytest.approx([1, 0.75, 0.5, 0.25])
    assert rates(5, warmup_ratio=0.2, schedule="cosine") == pytest.approx([1, 1, 0.8535533, 0.5, 0.1464466])
    assert rates(1, warmup_ratio=1.0, schedule="cosine") == [1.0]
    assert rates(6, warmup_ratio=0.5, warmup_steps=2) == pytest.approx([0.5, 1, 1, 1, 1, 1])
    assert rates(2, warmup_steps=0) == [1.0, 1.0]


def test_lora_moves_only_the_adapters():
    policy = Policy(lora=LoraConfig(**LORA))
    before = policy.weights()
    stats = trainer.train(policy, some(8), config(), seed=0, steps=10)
    assert stats.losses[-1] < stats.losses[0]
    changed = {name for name, now in policy.weights().items() if not torch.equal(now, before[name])}
    assert changed == {name for name in before if "lora_" in name}
    assert not policy.head().weight.requires_grad


@pytest.mark.parametrize("lora", [None, LORA])
def test_gradient_checkpointing_gives_the_same_gradient(lora):
    gradients = []
    for checkpointing in (False, True):
        policy = Policy(lora=lora and LoraConfig(**lora), checkpointing=checkpointing)
        policy.model.train()
        gradients.append(gradient(policy, some(6), config(max_tokens=40))[1])
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(plain, gradients[1][name]) for name, plain in gradients[0].items())
    assert any(g.count_nonzero() for g in gradients[0].values())


# --- resuming ---


class Interrupted(Exception):
    pass


class StopsAt(Track):
    """A run that is killed while it logs a step."""

    def __init__(self, step):
        super().__init__(None, progress=False)
        self.stop = step

    def log(self, step, **metrics):
        if step == self.stop:
            raise Interrupted


RESUMABLE = {
    "plain": lambda: Policy(),
    "bfloat16": lambda: Policy(dtype=torch.bfloat16),
    "dropout": lambda: Policy(lora=LoraConfig(**LORA, lora_dropout=0.3)),
}


@pytest.mark.parametrize("kind", RESUMABLE)
def test_a_resumed_training_equals_an_uninterrupted_one_bitwise(kind, tmp_path):
    settings = config(save_every=2, schedule="cosine", epochs=2.0)
    whole = RESUMABLE[kind]()
    expected = trainer.train(whole, some(10), settings, seed=3)

    killed = RESUMABLE[kind]()
    with pytest.raises(Interrupted):
        trainer.train(killed, some(10), settings, seed=3, track=StopsAt(5), checkpoint_dir=tmp_path)
    (tmp_path / "checkpoint-5.partial").mkdir()  # torn while it was written
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoint-4"

    torch.manual_seed(99)  # whatever state the new process is in
    resumed = RESUMABLE[kind]()
    stats = trainer.train(resumed, some(10), settings, seed=3, checkpoint_dir=tmp_path)
    assert stats.losses == expected.losses
    assert dataclasses.replace(stats, seconds=0) == dataclasses.replace(expected, seconds=0)
    assert all(torch.equal(now, whole.weights()[name]) for name, now in resumed.weights().items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-6"]

    done = RESUMABLE[kind]()
    again = trainer.train(done, some(10), settings, seed=3, checkpoint_dir=tmp_path)
    assert again == stats
    assert all(torch.equal(now, whole.weights()[name]) for name, now in done.weights().items())


def test_dropout_draws_from_its_own_generator():
    policy = RESUMABLE["dropout"]()
    torch.manual_seed(7)
    state = torch.get_rng_state()
    trainer.train(policy, some(4), config(), seed=0)
    assert torch.equal(state, torch.get_rng_state())


def test_each_step_draws_its_own_dropout():
    def draw(seed, step):
        with trainer.seeded(seed, step, policy.model):
            return torch.rand(3).tolist()

    policy = Policy()
    assert draw(0, 1) == draw(0, 1)
    assert len({tuple(draw(seed, step)) for seed in range(3) for step in range(3)}) == 9


def test_the_model_is_left_in_the_mode_it_came_in():
    policy = Policy()
    modes = []
    for mode in (True, False):
        policy.model.train(mode)
        trainer.train(policy, some(4), config(), seed=0)
        modes.append(policy.model.training)
    assert modes == [True, False]


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    trainer.train(Policy(), some(4), config(), seed=0, checkpoint_dir=tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match=r"seed was 0 and is 1.*remove"):
        trainer.train(Policy(), some(4), config(), seed=1, checkpoint_dir=tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match=r"lr was 0\.01 and is 0\.02"):
        trainer.train(Policy(), some(4), config(lr=0.02), seed=0, checkpoint_dir=tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match="trajectories was"):
        trainer.train(Policy(), some(4, seed=1), config(), seed=0, checkpoint_dir=tmp_path)
    wider = Qwen2Config(**(SHAPE | {"intermediate_size": 48}), tie_word_embeddings=True)
    with pytest.raises(checkpoint.CheckpointError, match="another model"):
        trainer.train(Policy(wider), some(4), config(), seed=0, checkpoint_dir=tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match="names differ"):
        trainer.train(Policy(lora=LoraConfig(**LORA)), some(4), config(), seed=0, checkpoint_dir=tmp_path)


def test_a_model_with_nothing_to_train_is_refused():
    policy = Policy()
    policy.model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        trainer.train(policy, some(4), config(), seed=0)


@pytest.mark.parametrize("normalize", ["samples", "weights"])
def test_min_weight_leaves_out_terms_and_nothing_else(normalize):
    """One step with some weights below min_weight: the gradient of the kept terms over the denominator of all."""
    trajectories = some(4)
    for t, weight in zip(trajectories, (0.1, 2.0, 0.05, 1.5)):
        t.weight = weight
    settings, steps = config(normalize=normalize, grad_clip=1e9), []
    for some_of, least in ((trajectories, 0.5), ([t for t in trajectories if t.weight >= 0.5], 0.0)):
        losses = []
        stats = trainer.train(Policy(), some_of, settings, seed=0, min_weight=least)
        losses.append(stats.losses[0])
        steps.append((stats, losses[0]))
    (ours, loss), (_, other) = steps
    assert ours.dropped == 2
    whole = 4 if normalize == "samples" else 3.65
    alone = 2 if normalize == "samples" else 3.5
    assert loss * whole == pytest.approx(other * alone, rel=1e-5)
    with pytest.raises(ValueError, match="below min_weight"):
        trainer.train(Policy(), some_of, settings, seed=0, min_weight=9.0)
