"""Attention over prefix trees: every path as if alone, with gradients, and the GPU's masks against the definition."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from random_trees import groups, paths
from tiny_policy import SHAPE, causal_lm
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.models.llama import LlamaConfig
from transformers.models.qwen2 import Qwen2Config
from transformers.models.qwen3 import Qwen3Config

from drift.model import attention, trees
from drift.packing import tree
from drift.types import Trajectory, Turn

WINDOWS = ["sliding_attention", "full_attention"]
CONFIGS = {
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "qwen2-wide-window": lambda: Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=60, max_window_layers=1),
    "qwen2-window": lambda: Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=3, max_window_layers=1),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=8),
    "llama": lambda: LlamaConfig(**SHAPE | {"num_key_value_heads": 4}),
    "gemma3": lambda: Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=5, layer_types=WINDOWS),
}
EACH = pytest.mark.parametrize("kind", CONFIGS)
FORESTS = groups(depth=4)


@pytest.fixture(scope="module")
def pairs():
    """Of each kind a model with our attention and the same with transformers' own, in float64, made once."""
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = [causal_lm(CONFIGS[kind](), name, torch.float64) for name in (None, "sdpa")]
        return made[kind]

    return get


def hidden(model, batch):
    with attention.layout(batch):
        return model.model(
            input_ids=batch.input_ids[None], position_ids=batch.position_ids[None], use_cache=False
        ).last_hidden_state[0]


def gradients(model):
    found = [p.grad.clone() for p in model.model.parameters()]
    model.zero_grad()
    return found


def small():
    """Three levels, a copy, a prefix, and two trees."""
    ids = [[3, 4, 5, 6], [3, 4, 5, 7, 8], [3, 4, 5, 7, 9], [3, 4, 5, 7, 9], [3, 4], [5, 6, 3], [5, 4]]
    [batch] = tree([Trajectory("p", row, [Turn(1, len(row))], index=i) for i, row in enumerate(ids)], 1000)
    return batch


def compare(kind, batch, models):
    """Hidden states of a tree's rows, and gradients by a random direction, against each leaf's path by itself."""
    ours, alone = models
    way = paths(batch)
    leaves = [path for row, path in enumerate(way) if not any(path == other[:-1] for other in way[row + 1 :])]
    directions = torch.randn(len(way), 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    packed = hidden(ours, batch)
    (packed * directions).sum().backward()
    done, loss = set(), torch.zeros(())
    for path in leaves:
        each = alone.model(input_ids=batch.input_ids[path][None], use_cache=False).last_hidden_state[0]
        torch.testing.assert_close(packed[path], each, rtol=0, atol=1e-5 if kind.startswith("gemma") else 1e-6)
        new = [i for i, row in enumerate(path) if row not in done]
        loss = loss + (each[new] * directions[path][new]).sum()
        done |= set(path)
    loss.backward()
    for mine, theirs in zip(gradients(ours), gradients(alone)):
        # torch's kernel keeps log-sum-exps in float32, whatever its inputs are
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=2e-6 * float(theirs.abs().max().clamp(min=10)))


@EACH
def test_a_tree_equals_each_path_alone_with_gradients(kind, pairs):
    compare(kind, small(), pairs(kind))


@settings(max_examples=15, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(made=FORESTS, kind=st.sampled_from(["qwen3", "qwen2-window", "llama"]))
def test_any_tree_equals_each_path_alone_with_gradients(made, kind, pairs):
    [batch] = tree(made, 10_000)
    compare(kind, batch, pairs(kind))


@pytest.mark.parametrize("kind", ["qwen3", "gemma3"])
def test_a_branch_leaves_its_siblings_bitwise_alone(kind, pairs):
    model, _ = pairs(kind)
    batch = small()
    before = hidden(model, batch)
    for segment, start in enumerate(batch.starts.tolist()):
        changed = small()
        changed.input_ids[start] = 11
        after = hidden(model, changed)
        touched = {i for i, path in enumerate(paths(batch)) if start in path}
        assert [i for i in range(len(after)) if not torch.equal(before[i], after[i])] == sorted(touched), segment


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["qwen3", "gemma3"])
def test_checkpointed_layers_are_recomputed_with_their_own_tree(kind, reentrant):
    model, checkpointed = (causal_lm(CONFIGS[kind]()).train() for _ in range(2))
    checkpointed.activation_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed.enable_input_require_grads()
    hidden(model, small()).square().sum().backward()
    loss = hidden(checkpointed, small()).square().sum()
    other = tree([Trajectory("p", [3, 4, 5], [Turn(1, 3)]), Trajectory("p", [3, 6], [Turn(1, 2)], index=1)], 9)[0]
    with torch.no_grad():
        hidden(checkpointed, other)
    loss.backward()
    for plain, again in zip(gradients(model), gradients(checkpointed)):
        torch.testing.assert_close(plain, again, rtol=0, atol=0)


def test_half_precision_is_as_close_to_float64_as_a_path_alone_is():
    torch.manual_seed(0)
    batch = small()
    exact = [torch.randn(1, heads, len(batch.input_ids), 16, dtype=torch.float64) for heads in (4, 2, 2)]
    shape = trees.Tree.of(batch.starts.tolist(), batch.parents.tolist(), len(batch.input_ids))
    want = trees.attend(*exact, shape, None, None)
    found = trees.attend(*(x.bfloat16() for x in exact), shape, None, None)
    assert found.dtype == torch.bfloat16
    rounded = trees.attend(*(x.bfloat16().double() for x in exact), shape, None, None)
    assert (found - rounded).abs().max() < 4 * 2**-8 * want.abs().max()


@pytest.mark.parametrize(
    ("starts", "parents", "rows"),
    [([0, 2], [-1, 1], 4), ([0, 2], [1, -1], 4), ([1, 2], [-1, 0], 4), ([0, 2, 2], [-1, 0, 0], 4), ([0], [-1, 0], 2)],
)
def test_segments_that_are_no_tree_are_refused(starts, parents, rows):
    with pytest.raises(ValueError, match="must"), attention.tree(torch.tensor(starts), torch.tensor(parents), rows):
        pass


def test_a_tree_of_two_branches_whose_child_comes_after_the_other_branch_is_refused():
    with pytest.raises(ValueError, match="depth first"):
        trees.Tree.of([0, 1, 2, 3], [-1, 0, 0, 1], 4)


def test_dropped_attention_weights_are_refused():
    model = causal_lm(Qwen2Config(**SHAPE, attention_dropout=0.5)).train()
    with pytest.raises(ValueError, match=r"train\.tree=off"):
        hidden(model, small())


def test_a_call_with_other_tokens_than_the_tree_has_is_refused(pairs):
    model, _ = pairs("qwen3")
    with pytest.raises(ValueError, match="pack of 4 tokens"), attention.tree(torch.tensor([0]), torch.tensor([-1]), 4):
        model.model(input_ids=torch.tensor([[3, 4, 5]]), use_cache=False)


# --- the GPU's forms, on a CPU ---


def dense(shape):
    """[R, R]: which row sees which, by following parents."""
    seen = torch.zeros(shape.total, shape.total, dtype=torch.bool)
    positions = shape.positions()
    for number, span in enumerate(shape.spans):
        for row in range(span.start, span.stop):
            for above in shape.path(number):
                seen[row, above.start : min(above.stop, row + 1)] = True
    if shape.window is not None:
        seen &= positions[:, None] - positions < shape.window
    return seen


@settings(max_examples=40, deadline=None, derandomize=True)
@given(made=groups(most=20), window=st.sampled_from([None, 1, 3, 100]), block=st.sampled_from([1, 2, 4, 16, 128]))
def test_the_block_mask_says_what_the_definition_says(made, window, block):
    [batch] = tree(made, 10_000)
    shape = trees.Tree.of(batch.starts.tolist(), batch.parents.tolist(), len(batch.input_ids)).with_window(window)
    want = dense(shape)
    rows = torch.arange(shape.total)
    assert torch.equal(trees.visible(shape)(0, 0, rows[:, None], rows), want)
    mask = trees.block_mask(shape, block=block)
    count = -(-shape.total // block)
    covered = torch.zeros(count, count, dtype=torch.bool)
    for numbers, indices, whole in (
        (mask.kv_num_blocks, mask.kv_indices, False),
        (mask.full_kv_num_blocks, mask.full_kv_indices, True),
    ):
        for row in range(count):
            for column in indices[0, 0, row, : numbers[0, 0, row]].tolist():
                part = want[row * block : (row + 1) * block, column * block : (column + 1) * block]
                assert not covered[row, column]
                covered[row, column] = True
                assert bool(part.all()) if whole else window is not None or bool(part.any())
    padded = F.pad(want, (0, count * block - shape.total, 0, count * block - shape.total))
    needed = padded.view(count, block, count, block).any(3).any(1)
    assert bool((covered >= needed).all())


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 3, 100])
def test_attention_is_softmax_over_what_a_row_sees(groups, softcap, window):
    batch = small()
    shape = trees.Tree.of(batch.starts.tolist(), batch.parents.tolist(), len(batch.input_ids)).with_window(window)
    tensors = [x.double().requires_grad_() for x in projections(shape, groups)]
    query, key, value = (x if x.shape[1] == 4 else x.repeat_interleave(4 // groups, 1) for x in tensors)
    scores = query @ key.transpose(-1, -2) * 0.25
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    want = (scores.masked_fill(~dense(shape), -torch.inf).softmax(-1) @ value).transpose(1, 2)
    found = trees.attend(*tensors, shape, 0.25, softcap)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-6)
    direction = torch.randn_like(want)
    for ours, theirs in zip(
        torch.autograd.grad((found * direction).sum(), tensors), torch.autograd.grad((want * direction).sum(), tensors)
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def projections(shape, groups=2):
    torch.manual_seed(1)
    return [torch.randn(1, heads, shape.total, 16) for heads in (4, groups, groups)]


def wide_tree():
    """More than a block of rows, so that some blocks are seen whole, in part, or not at all."""
    numbers = torch.Generator().manual_seed(0)

    def some(count):
        return torch.randint(3, 1000, (count,), generator=numbers).tolist()

    prompt = some(150)
    rows = [[*prompt, *middle, *some(40)] for middle in (some(30), some(30)) for _ in range(4)]
    [batch] = tree([Trajectory("p", row, [Turn(1, len(row))], index=i) for i, row in enumerate(rows)], 1000)
    return trees.Tree.of(batch.starts.tolist(), batch.parents.tolist(), len(batch.input_ids))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 50])
def test_flex_attention_gives_what_the_cpu_gives(softcap, window):
    shape = wide_tree().with_window(window)
    query, key, value = projections(shape)
    with torch.no_grad():
        found = trees.flex(query, key, value, shape, 0.25, softcap, compiled=False)
        want = trees.attend(query, key, value, shape, 0.25, softcap)
    torch.testing.assert_close(found.transpose(1, 2), want, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
def test_flex_attention_with_a_soft_cap_compiles_on_a_cpu():
    shape = wide_tree()
    query, key, value = projections(shape)
    with torch.no_grad():
        found = trees.flex(query, key, value, shape, 0.25, 1.5)
        want = trees.attend(query, key, value, shape, 0.25, 1.5)
    torch.testing.assert_close(found.transpose(1, 2), want, rtol=1e-5, atol=1e-5)


def plain_varlen(query, key, value, *, cu_seqlens_q, cu_seqlens_k, causal, window_size, softmax_scale, softcap, **_):
    """flash-attn's documented meaning: queries are aligned with the last keys of their sequence."""
    assert causal
    parts = []
    for q, k, v in zip(
        *(x.split(b.diff().tolist()) for x, b in ((query, cu_seqlens_q), (key, cu_seqlens_k), (value, cu_seqlens_k)))
    ):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * softmax_scale
        scores = softcap * (scores / softcap).tanh() if softcap else scores
        behind = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
        hidden = (behind < 0) | (behind > (window_size[0] if window_size[0] >= 0 else len(k)))
        parts.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v))
    return torch.cat(parts)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 50])
def test_the_varlen_call_describes_the_tree(monkeypatch, softcap, window):
    fake = types.ModuleType("flash_attn")
    fake.flash_attn_varlen_func = plain_varlen
    monkeypatch.setitem(sys.modules, "flash_attn", fake)
    shape = wide_tree().with_window(window)
    tensors = [x.requires_grad_() for x in projections(shape)]
    found = trees.varlen(*tensors, shape, 0.25, softcap)
    ours = torch.autograd.grad(found.square().sum(), tensors)
    want = trees.attend(*tensors, shape, 0.25, softcap)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(ours, torch.autograd.grad(want.square().sum(), tensors)):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
