"""Training on prefix trees gives the numbers of training on flat packs: losses, outputs, metrics, gradients, weights."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from preset_specs import PRESET_SPECS
from random_trees import groups
from tiny_policy import LORA, SHAPE, VOCAB, Policy, config, some
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.models.qwen2 import Qwen2Config

import drift_kernels as dk
from drift.config import Config
from drift.packing import pack, tree
from drift.training import layout, reference, trainer
from drift.training.optimizer import MasterAdamW
from drift.types import Trajectory, Turn

EXAMPLES = {"deadline": None, "derandomize": True, "phases": [Phase.explicit, Phase.generate]}
CAPPED = Gemma3TextConfig(**SHAPE, head_dim=8, final_logit_softcapping=2.0, initializer_range=0.2)


@pytest.fixture(scope="module")
def policy():
    return Policy()


def close(ours, theirs):
    """To fp32 noise, which grows with the largest element of a tensor.

    Where terms cancel, as in the gradient of keys that see one token, it grows with the terms: 3e-7 of the largest gradient.
    """
    assert ours.keys() == theirs.keys()
    largest = max(float(want.abs().max()) for want in theirs.values() if want.numel())
    for name, want in theirs.items():
        scale = max(float(want.abs().max()), 1e-2 * largest, 1e-3) if want.numel() else 1.0
        torch.testing.assert_close(ours[name], want, rtol=3e-5, atol=3e-5 * scale, msg=lambda m, n=name: f"{n}: {m}")


def family(count=8, seed=0, **options):
    """`count` conversations, of which each begins as an earlier one does."""
    numbers = torch.Generator().manual_seed(seed)
    made = some(count, seed, turns=3, **options)
    for i, one in enumerate(made[1:], 1):
        other = made[int(torch.randint(0, i, (), generator=numbers))]
        keep = int(torch.randint(1, 12, (), generator=numbers))
        shared = min(keep, len(one.token_ids) - 1, len(other.token_ids))
        one.token_ids[:shared] = other.token_ids[:shared]
    return made


def gradient(policy, trajectories, options, on):
    chosen = config(**options, tree="on" if on else "off")
    optimizer = MasterAdamW(policy.model, chosen)
    batches = layout.packs(policy, trajectories, chosen, turns=chosen.turns, token_reduction=chosen.token_reduction)
    assert all(hasattr(batch, "flat") is on for batch in batches)
    loss = trainer.accumulate(policy, batches, optimizer, 3.0, chosen)
    found = {name: m.grad.clone() for name, m in optimizer.masters.items() if m.grad is not None}
    optimizer.zero()
    return {"loss": loss} | found


@settings(max_examples=12, **EXAMPLES)
@given(made=groups(vocabulary=12), turns=st.sampled_from(["last", "assistant"]), room=st.sampled_from([30, 64, 512]))
def test_any_tree_has_the_loss_and_the_gradient_of_flat_packs(policy, made, turns, room):
    options = {"turns": turns, "max_tokens": room, "max_length": 30}
    close(gradient(policy, made, options, True), gradient(policy, made, options, False))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Policy(lora=LoraConfig(**LORA)),
        lambda: Policy(checkpointing=True),
        lambda: Policy(CAPPED),
        lambda: Policy(Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=5, max_window_layers=1)),
    ],
    ids=["lora", "checkpointing", "softcap", "sliding-window"],
)
def test_adapters_checkpointing_caps_and_windows_change_nothing(make):
    model = make()
    close(
        gradient(model, family(), {"turns": "assistant"}, True),
        gradient(model, family(), {"turns": "assistant"}, False),
    )


@pytest.mark.parametrize("options", [{}, {"preset": "exact"}, {"max_tokens": 40, "max_length": 40}])
def test_two_steps_of_adamw_end_at_the_same_weights_and_count_the_same(options):
    runs = []
    for way in ("off", "on"):
        model = Policy()
        stats = trainer.train(model, family(), config(**options, lr=1e-3, tree=way), seed=1, steps=2)
        runs.append((model.weights(), stats))
    (flat, before), (shared, after) = runs
    for name in flat:
        torch.testing.assert_close(
            shared[name], flat[name], rtol=0, atol=2e-5
        )  # Adam divides noise by itself: 2 % of lr
    assert after.losses == pytest.approx(before.losses, rel=1e-5)
    assert after.trained_tokens == before.trained_tokens
    assert after.tokens < before.tokens


SPECS = {
    **PRESET_SPECS,
    "clip_cov": dk.PolicySpec.preset(
        "clip_cov", cov_share=1.0, cov_bounds=(-0.1, 5.0)
    ),  # else it draws tokens by place
    "kl_cov": dk.PolicySpec.preset("kl_cov", cov_share=0.3),
    "sequence": dk.PolicySpec(aggregation="sequence_mean_token_mean"),
    "corrected": dk.PolicySpec.preset("grpo", correction="token_truncate", correction_bounds=(0.0, 2.0)),
    "corrected by sequence": dk.PolicySpec.preset("dapo", correction="sequence_mask", correction_bounds=(0.5, 2.0)),
    "kl": dk.PolicySpec(kl_coef=0.1, entropy_coef=0.01),
}


@pytest.mark.parametrize("name", SPECS)
@settings(max_examples=4, **EXAMPLES)
@given(made=groups(vocabulary=12, rich=True))
def test_every_policy_loss_is_the_same_with_its_outputs_and_metrics(policy, name, made):
    spec = SPECS[name]
    [shared], [flat] = tree(made, 10_000, turns="assistant"), pack(made, 10_000, turns="assistant")
    weight = policy.head()
    found = []
    for batch in (flat, shared):
        is_tree = batch is shared
        keys = {"rows": batch.rows, "segment_ids": batch.segment_ids} if is_tree else {"cu_seqlens": batch.cu_seqlens}
        old = batch.rollout_logprobs + 0.1 * torch.sin(batch.targets.float())
        hidden = policy.hidden(batch)
        out = dk.policy_loss(
            hidden,
            weight,
            batch.targets,
            batch.advantages,
            old_logprobs=old,
            ref_logprobs=old - 0.05,
            rollout_logprobs=batch.rollout_logprobs,
            token_weights=batch.token_weights,
            spec=spec,
            outputs=("logprobs", "entropy", "ratio"),
            **keys,
        )
        out.loss.backward()
        gradients = {n: p.grad.clone() for n, p in policy.model.named_parameters()}
        policy.model.zero_grad()
        values = out.outputs
        if is_tree:
            order = batch.segment_ids.argsort(stable=True)
            values = {n: v[order] for n, v in values.items()}
        else:
            values = {n: v[batch.targets != -100] for n, v in values.items()}
        metrics = {
            n: torch.stack([torch.as_tensor(x, dtype=torch.float64) for x in pair]) for n, pair in out.metrics.items()
        }
        found.append({"loss": out.loss.detach(), **gradients, **values, **metrics})
    close(found[1], found[0])


@pytest.mark.parametrize("name", ["kl", "jsd", "top_k", "hybrid"])
def test_distillation_from_a_teacher_is_the_same_with_rows_gathered(policy, name):
    made = family()
    for i, one in enumerate(made):
        one.advantage, one.logprobs = 0.5 - i % 2, None
    spec = {"kl": dk.DistillSpec(alpha=1.0), "top_k": dk.DistillSpec(top_k=4)}.get(name, dk.DistillSpec(alpha=0.5))
    [shared], [flat] = tree(made, 10_000, turns="assistant"), pack(made, 10_000, turns="assistant")
    weight, other = policy.head(), torch.randn(VOCAB, 32, generator=torch.Generator().manual_seed(3)) * 0.3
    found = []
    for batch in (flat, shared):
        hidden = layout.hidden_states(policy, batch)
        with torch.no_grad():
            teacher = dk.Teacher(layout.hidden_states(policy, batch) * 1.1, other)
        if name == "hybrid":
            out = dk.self_distill_loss(
                hidden, weight, flat.targets, teacher, flat.advantages, distill_weights=None, policy_weights=None
            )
        else:
            out = dk.distill_loss(hidden, weight, teacher, flat.token_weights, targets=flat.targets, spec=spec)
        out.loss.backward()
        found.append({"loss": out.loss.detach()} | {n: p.grad.clone() for n, p in policy.model.named_parameters()})
        policy.model.zero_grad()
    close(found[1], found[0])


def test_scores_of_a_reference_are_the_same(policy):
    made = family()
    found = []
    for way in ("off", "on"):
        settings = Config(name="x", train={"tree": way}, rollout={"max_new_tokens": 8})
        logprobs, entropies = reference.score(policy, made, settings)
        found.append({"logprobs": logprobs.sort().values, "entropies": entropies.sort().values})
    close(found[1], found[0])


def test_auto_takes_a_tree_if_it_saves_enough_and_says_how_much():
    model, alike = Policy(), [Trajectory("p", [3, 4, 5, 6, 7, 8, 3 + i], [Turn(6, 7)], index=i) for i in range(4)]
    apart = [Trajectory("p", [3 + i, 4, 5, 6, 7, 8, 9], [Turn(6, 7)], index=i) for i in range(4)]
    assert all(hasattr(b, "flat") for b in layout.packs(model, alike, config(tree="auto")))
    assert not any(hasattr(b, "flat") for b in layout.packs(model, apart, config(tree="auto")))
    assert layout.saved(layout.packs(model, alike, config(tree="on"))) == pytest.approx(1 - 10 / 28)
    assert layout.saved(layout.packs(model, alike, config(tree="off"))) == 0


class Recorder:
    def __init__(self):
        self.logged = {}

    def say(self, text):
        raise AssertionError(text)

    def log(self, step, **values):
        self.logged[step] = values

    def progress(self, *_):
        from drift.track import Track

        return Track(None, progress=False).progress("x", 1)


def test_the_log_says_what_is_shared():
    alike = [Trajectory("p", [3, 4, 5, 6, 7, 8, 3 + i], [Turn(6, 7)], index=i) for i in range(4)]
    track = Recorder()
    trainer.train(Policy(), alike, config(tree="on"), seed=0, track=track, steps=1)
    assert track.logged[1]["train/tokens_shared"] == pytest.approx(1 - 10 / 28)
    assert track.logged[1]["train/attention_shared"] == pytest.approx(1 - (21 + 4 * 7) / (4 * 28))


def test_a_model_whose_layers_mix_tokens_otherwise_is_refused_by_name_and_left_flat_by_auto():
    class Convolved(Policy):
        def hidden(self, batch):
            out = super().hidden(batch)
            return out + 0.5 * torch.nn.functional.pad(out, (0, 0, 1, 0))[:-1]

    alike = [Trajectory("p", [3, 4, 5, 6, 7, 8, 3 + i], [Turn(6, 7)], index=i) for i in range(4)]
    with pytest.raises(ValueError, match=r"train\.tree is on, but Qwen2ForCausalLM mixes tokens"):
        layout.packs(Convolved(), alike, config(tree="on"))
    assert not any(hasattr(b, "flat") for b in layout.packs(Convolved(), alike, config(tree="auto")))


def test_dropout_is_refused_since_siblings_would_share_it():
    dropping = Policy(lora=LoraConfig(**LORA, lora_dropout=0.1))
    with pytest.raises(ValueError, match="dropout"):
        layout.packs(dropping, family(), config(tree="on"))
