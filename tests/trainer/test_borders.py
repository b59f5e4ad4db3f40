"""Packs of models whose layers keep a state: each trajectory as if alone, or refused by name before the first step."""

import copy

import families
import pytest
import torch
from tiny_policy import config, some

from drift.model import attention, borders
from drift.model.policy import Policy
from drift.packing import pack
from drift.training.optimizer import MasterAdamW
from drift.training.trainer import accumulate
from drift_kernels.packs import Layout, PackingError, check_packing, flat, leak

KEEPS = ["qwen2", "qwen3", "llama", "gemma3_text", "mixtral", "gpt2", "olmo2", "lfm2"]
MIXES = ["qwen3_5", "qwen3_next", "falcon_h1", "jamba", "minimax", "lfm2_moe", "recurrent_gemma", "nemotron_h", "rwkv"]


class Tokenizer:
    """For a policy that never asks it."""

    chat_template, eos_token_id, name_or_path = "x", 2, "none"


def policy_of(name, **options):
    model = families.tiny_model(name, attention.register("sdpa"))
    assert model is not None, f"{name} cannot be built at tiny size any more"
    return Policy(model, Tokenizer(), **options)


def loss_and_gradients(policy, groups):
    """Of trajectories packed group by group, over one denominator."""
    policy = copy.copy(policy)
    policy.model = copy.deepcopy(policy.model)
    optimizer = MasterAdamW(policy.model, config())
    total = sum(float(accumulate(policy, pack(group, 128), optimizer, 5.0, config())) for group in groups)
    return total, [parameter.grad for parameter in optimizer.parameters]


@pytest.mark.parametrize("name", KEEPS)
def test_a_pack_trains_as_each_trajectory_alone(name):
    policy, trajectories = policy_of(name), some(4, weight=1.0)
    together, apart = (loss_and_gradients(policy, g) for g in ([trajectories], [[t] for t in trajectories]))
    assert together[0] == pytest.approx(apart[0], rel=1e-4)
    other, _ = loss_and_gradients(policy, [trajectories[::-1]])
    assert together[0] == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize("name", MIXES)
def test_a_model_whose_state_crosses_a_packs_borders_is_refused_by_name(name):
    policy = policy_of(name)
    with pytest.raises(
        PackingError, match=rf"{type(policy.model).__name__} does not keep .* apart.*model.packed=false"
    ):
        loss_and_gradients(policy, [some(4, weight=1.0)])


@pytest.mark.parametrize("name", ["qwen3_5", "jamba"])
def test_without_packing_such_a_model_trains_as_each_trajectory_alone(name):
    policy, trajectories = policy_of(name, packed=False), some(4, weight=1.0)
    together, apart = (loss_and_gradients(policy, g) for g in ([trajectories], [[t] for t in trajectories]))
    assert together[0] == pytest.approx(apart[0], rel=1e-5)
    for ours, theirs in zip(together[1], apart[1]):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_every_causal_lm_of_transformers_keeps_packs_apart_or_is_refused():
    """The check agrees with packs of other lengths and tokens than its own, for every family that can be built tiny."""
    name, built, refused = attention.register("sdpa"), 0, set()
    for family in families.NAMES:
        model = families.tiny_model(family)
        if model is None:
            continue
        built += 1
        try:
            model.set_attn_implementation(name)
            passed = borders.needs_borders(model)
        except (PackingError, ValueError):
            refused.add(family)
            continue

        def forward(layout, arguments, model=model):
            return borders.run_packed(model, layout.tokens, layout.positions, layout.bounds, bool(arguments))

        with torch.no_grad():
            assert leak(forward, flat([5, 30, 17, 1, 40], 64, seed=1), borders=passed) < 1e-3, family
    assert built >= 150
    assert {*MIXES, "mamba", "mamba2", "bamba", "granitemoehybrid", "olmo_hybrid", "zaya", "bloom"} <= refused
    assert not {*KEEPS, "mistral", "phi3", "qwen2_moe", "qwen3_moe", "glm4", "smollm3", "granite"} & refused


class Smear(torch.nn.Module):
    """Adds to each token the one before it: a convolution of width two, that takes `seq_idx` if `obeys`."""

    def __init__(self, mlp, obeys):
        super().__init__()
        self.mlp, self.obeys, self.seen = mlp, obeys, []

    def forward(self, x, seq_idx=None):
        before = torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]
        if seq_idx is not None and self.obeys:
            same = torch.nn.functional.pad(seq_idx, (1, 0), value=-1)[:, :-1] == seq_idx
            before = before * same[..., None]
        return self.mlp(x + before)


def smeared(obeys):
    """A Qwen2 whose first layer has a short convolution, which gets the backbone's arguments."""
    policy = policy_of("qwen2")
    layer = policy.model.model.layers[0]
    layer.mlp = Smear(layer.mlp, obeys)
    policy.model.model.register_forward_pre_hook(
        lambda _, args, kwargs: setattr(layer.mlp, "now", kwargs.get("seq_idx")), with_kwargs=True
    )
    plain = layer.mlp.forward
    layer.mlp.forward = lambda x: plain(x, layer.mlp.now)
    return policy


def test_layers_that_take_borders_are_given_them():
    policy, trajectories = smeared(True), some(4, weight=1.0)
    assert policy.check_packing()
    packs = pack(trajectories, 128)
    assert len(packs) == 1
    alone = [
        policy.hidden(pack([t], 128)[0]) for t in sorted(trajectories, key=lambda t: packs[0].indices.index(t.index))
    ]
    torch.testing.assert_close(policy.hidden(packs[0]), torch.cat(alone), rtol=1e-4, atol=1e-5)
    with pytest.raises(PackingError, match=r"by position ids alone hidden states differ by up to .*; with its borders"):
        smeared(False).check_packing()


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5"])
def test_the_check_computes_in_float32_and_changes_nothing(name):
    policy = policy_of(name)
    model = policy.model.to(torch.bfloat16).train()
    before = {key: (value.data_ptr(), value.clone()) for key, value in model.state_dict().items()}
    seen = []
    handle = model.model.norm.register_forward_hook(lambda _, args, out: seen.append(args[0].dtype))
    try:
        policy.check_packing()
    except PackingError:
        assert name == "qwen3_5"
    handle.remove()
    assert set(seen) == {torch.float32}
    assert model.training
    assert all(module.training for module in model.modules())
    for key, value in model.state_dict().items():
        assert value.data_ptr() == before[key][0]
        assert torch.equal(value, before[key][1])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_check_takes_layouts_whose_sequences_share_rows():
    """Two answers to one prompt in one row: a forward that follows the paths passes, one that does not is refused."""
    model = policy_of("qwen2").model
    layout = Layout(
        tokens=torch.tensor([5, 6, 7, 8, 9, 10, 11]),
        positions=torch.tensor([0, 1, 2, 3, 4, 3, 4]),
        paths=(torch.tensor([0, 1, 2, 3, 4]), torch.tensor([0, 1, 2, 5, 6])),
    )
    model.set_attn_implementation("sdpa")

    def forward(part, _, obeys=True):
        sees = torch.eye(len(part.tokens), dtype=torch.bool)
        for path in part.paths:
            sees[path[:, None], path] |= torch.ones(len(path), len(path), dtype=torch.bool).tril()
        mask = sees if obeys else torch.ones_like(sees).tril()
        options = {"position_ids": part.positions[None], "attention_mask": mask[None, None], "use_cache": False}
        return model.model(input_ids=part.tokens[None], **options).last_hidden_state[0]

    check_packing(model, layout, forward, borders=[False])
    with pytest.raises(PackingError, match="Qwen2ForCausalLM"):
        check_packing(model, layout, lambda part, more: forward(part, more, obeys=False), borders=[False])


def test_a_check_that_fails_inside_a_block_puts_its_weights_back():
    model = policy_of("qwen3").model.to(torch.bfloat16)

    def fail(layout, _):
        model.model.layers[0].mlp.forward = lambda x: 1 / 0
        return model.model(input_ids=layout.tokens[None], use_cache=False).last_hidden_state

    with pytest.raises(ZeroDivisionError):
        check_packing(model, forward=fail)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
