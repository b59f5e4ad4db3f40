"""Packed attention: each segment as if alone, nothing leaks, and outside the context transformers' own sdpa."""

import sys
import types
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from tiny_policy import SHAPE, VOCAB, causal_lm
from transformers import AutoModelForCausalLM
from transformers.models.gemma import GemmaConfig
from transformers.models.gemma2 import Gemma2Config
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.models.llama import LlamaConfig
from transformers.models.qwen2 import Qwen2Config
from transformers.models.qwen3 import Qwen3Config

from drift.model import attention

LENGTHS = [7, 1, 12, 7, 3]
CONFIGS = {
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "qwen2-window": lambda: Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=8),
    "llama": lambda: LlamaConfig(**SHAPE),
    "gemma": lambda: GemmaConfig(**SHAPE, head_dim=8),
    "gemma3": lambda: Gemma3TextConfig(
        **SHAPE,
        head_dim=8,
        query_pre_attn_scalar=20,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention"],
    ),
}
EACH = pytest.mark.parametrize("kind", CONFIGS)


def load(kind, implementation=None, dtype=torch.float64):
    return causal_lm(CONFIGS[kind](), implementation, dtype)


def pack(seed=0, lengths=LENGTHS):
    ids = torch.randint(3, VOCAB, (1, sum(lengths)), generator=torch.Generator().manual_seed(seed))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return ids, torch.cat([torch.arange(n) for n in lengths])[None], cu_seqlens


def hidden(model, ids, positions, cu_seqlens):
    with attention.segments(cu_seqlens):
        return model.model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state[0]


def gradients(model):
    return [p.grad.clone() for p in model.model.parameters()]


@EACH
def test_packed_equals_each_segment_alone_with_gradients(kind):
    model, alone = load(kind), load(kind, "sdpa")
    ids, positions, cu_seqlens = pack()
    direction = torch.randn(sum(LENGTHS), 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    packed = hidden(model, ids, positions, cu_seqlens)
    each = torch.cat([alone.model(input_ids=s, use_cache=False).last_hidden_state[0] for s in ids.split(LENGTHS, 1)])
    (packed * direction).sum().backward()
    (each * direction).sum().backward()

    torch.testing.assert_close(packed, each, rtol=0, atol=1e-12)
    tight = 1e-5 if kind.startswith("gemma") else 1e-10  # Gemma's norms are float32 inside, whatever the model is
    for ours, theirs in zip(gradients(model), gradients(alone)):
        torch.testing.assert_close(ours, theirs, rtol=tight, atol=tight)


@EACH
def test_a_segment_leaves_the_others_bitwise_alone(kind):
    model = load(kind, dtype=torch.float32)
    ids, positions, cu_seqlens = pack()
    changed, (start, stop) = ids.clone(), (cu_seqlens[2], cu_seqlens[3])
    changed[0, start:stop] = (changed[0, start:stop] + 5) % (VOCAB - 3) + 3

    leaves = []
    for x in (ids, changed):
        embedded = model.model.embed_tokens(x).detach().requires_grad_()
        with attention.segments(cu_seqlens):
            out = model.model(inputs_embeds=embedded, position_ids=positions, use_cache=False).last_hidden_state[0]
        out.square().sum().backward()
        leaves.append((out.detach(), embedded.grad[0]))
    for before, after in zip(*leaves):
        assert torch.equal(before[:start], after[:start])
        assert torch.equal(before[stop:], after[stop:])
        assert not torch.equal(before[start:stop], after[start:stop])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["qwen3", "gemma3"])
def test_checkpointed_layers_are_recomputed_with_the_segments_of_their_own_forward(kind, reentrant):
    model, checkpointed = load(kind).train(), load(kind).train()
    checkpointed.activation_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed.enable_input_require_grads()
    first, other = pack(), pack(seed=3, lengths=[5, 25])

    hidden(model, *first).square().sum().backward()
    loss = hidden(checkpointed, *first).square().sum()
    with attention.segments(other[2]), torch.no_grad():  # other packs come and go before the backward pass
        checkpointed.model(input_ids=other[0], position_ids=other[1], use_cache=False)
    loss.backward()

    for plain, again in zip(gradients(model), gradients(checkpointed)):
        torch.testing.assert_close(plain, again, rtol=0, atol=0)


def test_a_backward_pass_inside_another_context_still_uses_its_own_segments():
    model, checkpointed = load("qwen2").train(), load("qwen2").train()
    checkpointed.activation_checkpointing_enable({"use_reentrant": False})
    first = pack()
    hidden(model, *first).square().sum().backward()
    loss = hidden(checkpointed, *first).square().sum()
    with attention.segments(torch.tensor([0, 30], dtype=torch.int32)):
        loss.backward()
    for plain, again in zip(gradients(model), gradients(checkpointed)):
        assert torch.equal(plain, again)


@EACH
def test_generate_with_left_padding_equals_plain_sdpa(kind):
    model, plain = load(kind, dtype=torch.float32).eval(), load(kind, "sdpa", dtype=torch.float32).eval()
    ids = torch.randint(3, VOCAB, (3, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[1, :1] = 0
    ids[mask == 0] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_logits": True, "eos_token_id": None, "pad_token_id": 0}
    ours, theirs = model.generate(ids, **options), plain.generate(ids, **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert all(torch.equal(a, b) for a, b in zip(ours.logits, theirs.logits))


def test_the_context_closes_after_an_error_and_nests():
    outer, inner = pack()[2], torch.tensor([0, 2], dtype=torch.int32)
    with attention.segments(outer), pytest.raises(ZeroDivisionError), attention.segments(inner):
        raise ZeroDivisionError
    model = load("qwen2")
    ids = pack()[0]
    plain = load("qwen2", "sdpa").model(input_ids=ids, use_cache=False).last_hidden_state
    assert torch.equal(model.model(input_ids=ids, use_cache=False).last_hidden_state, plain)


@pytest.mark.parametrize("bounds", [[0], [1, 5], [0, 4, 4, 9], [0, 6, 3], [[0, 3]]])
def test_bad_bounds_are_refused(bounds):
    with pytest.raises(ValueError, match="cu_seqlens"), attention.segments(torch.tensor(bounds)):
        pass


def test_calls_that_are_not_packed_are_refused():
    model, (ids, positions, cu_seqlens) = load("qwen2"), pack()
    with attention.segments(cu_seqlens):
        with pytest.raises(ValueError, match=r"\[1, 30\] ids and no cache"):
            model.model(input_ids=ids[:, :9], use_cache=False)
        with pytest.raises(ValueError, match=r"queries \[2, 30\]"):
            model.model(input_ids=ids.expand(2, -1), use_cache=False)
        with pytest.raises(ValueError, match="attention_mask"):
            model.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        dense = torch.ones(1, 1, 30, 30, dtype=torch.bool)
        with pytest.raises(RuntimeError, match="leak"):
            model.model(input_ids=ids, attention_mask=dense, position_ids=positions, use_cache=False)


def test_models_that_ask_for_more_are_refused_in_words():
    name = attention.register("sdpa")
    with pytest.raises(ValueError, match="Gemma2"):
        AutoModelForCausalLM.from_config(Gemma2Config(**SHAPE, head_dim=8), attn_implementation=name)
    both_ways = Gemma3TextConfig(**SHAPE, head_dim=8, use_bidirectional_attention=True)
    model, (ids, positions, cu_seqlens) = AutoModelForCausalLM.from_config(both_ways, attn_implementation=name), pack()
    with attention.segments(cu_seqlens), pytest.raises(ValueError, match="not causal"):
        model.model(input_ids=ids, position_ids=positions, use_cache=False)

    q = torch.randn(1, 2, 4, 8)
    mask, module = attention.Segments(torch.tensor([0, 4], dtype=torch.int32), (4,)), torch.nn.Identity()
    for option, value in {"softcap": 50.0, "s_aux": q, "position_bias": q, "is_causal": False}.items():
        with pytest.raises(ValueError, match=option.replace("is_causal", "not causal")):
            attention._sdpa_forward(module, q, q, q, mask, **{option: value})
    with pytest.raises(ValueError, match="local over None tokens and its sliding_window is 4"):
        attention._sdpa_forward(module, q, q, q, mask, sliding_window=4)


def reference_varlen(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softcap, **options):
    """flash-attn's function in plain torch, with its conventions: [T, H, d], window (left, right) inclusive."""
    assert cu_seqlens_q.dtype == torch.int32
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    bounds, pieces = cu_seqlens_q.tolist(), []
    assert max_seqlen_q == max_seqlen_k == max(b - a for a, b in pairwise(bounds))
    assert softcap == 0.0
    assert options["causal"]
    for a, b in pairwise(bounds):
        behind = torch.arange(b - a)[:, None] - torch.arange(b - a)
        left = options["window_size"][0]
        mask = (behind >= 0) & (behind <= left if left >= 0 else True)
        x, y, z = (t[a:b].transpose(0, 1)[None] for t in (q, k, v))
        out = F.scaled_dot_product_attention(x, y, z, mask, scale=options["softmax_scale"], enable_gqa=True)
        pieces.append(out[0].transpose(0, 1))
    return torch.cat(pieces)


@pytest.fixture
def flash_attn(monkeypatch):
    """A machine that has flash-attn and CUDA, as far as `register` looks."""
    module = types.ModuleType("flash_attn")
    module.__spec__ = types.SimpleNamespace(name="flash_attn")
    module.flash_attn_varlen_func = reference_varlen
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@EACH
def test_varlen_calls_flash_attn_by_its_conventions(kind, flash_attn):
    name = attention.register("varlen")
    assert name == attention.register("auto", device="cuda:0", dtype=torch.bfloat16) == "drift_varlen"
    ours, theirs = load(kind, name, torch.bfloat16), load(kind, "drift_sdpa", torch.bfloat16)
    torch.testing.assert_close(hidden(ours, *pack()), hidden(theirs, *pack()), rtol=0.02, atol=0.02)
    with pytest.raises(ValueError, match=r"float16 and bfloat16, not torch\.float32"):
        hidden(load(kind, name, torch.float32), *pack())


def test_auto_takes_what_can_run_and_varlen_says_why_it_cannot(flash_attn, monkeypatch):
    assert attention.register("auto", device="cpu") == "drift_sdpa"
    assert attention.register("auto", dtype=torch.float32) == "drift_sdpa"
    with pytest.raises(ValueError, match=r"'varlen' cannot run: the model is in torch.float32"):
        attention.register("varlen", dtype=torch.float32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert attention.register("auto") == "drift_sdpa"
    with pytest.raises(ValueError, match="no CUDA device"):
        attention.register("varlen")
    monkeypatch.delitem(sys.modules, "flash_attn")
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install flash-attn"):
        attention.register("varlen")
    with pytest.raises(ValueError, match="'flash' should be one of auto, varlen, sdpa"):
        attention.register("flash")
