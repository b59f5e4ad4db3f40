"""What must not change any op: how a batch is split, ordered, packed, padded or chunked, and rows that nothing reads.

Loss, gradients of every leaf, outputs and metrics, in double. Policy losses by preset: `test_invariances`.
"""

from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_cases import LEAVES, OPS, ROW_BYTES, close, joined, make, run

import drift_kernels as dk

ALONE = [name for name, op in OPS.items() if op.alone]
batches = st.builds(make, st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 2**20))
needs = st.sampled_from([LEAVES, ("hidden",)])  # all of it, and a frozen head
asked = st.booleans()
quick = settings(
    max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)


@pytest.mark.parametrize("name", OPS)
@given(batch=batches, rows=st.integers(1, 40), needs=needs, asked=asked)
@quick
def test_chunk_size(name, batch, rows, needs, asked):
    config = dk.KernelConfig(workspace_bytes=ROW_BYTES * rows)
    close(run(name, batch, None, needs, asked, config), run(name, batch, None, needs, asked))


@pytest.mark.parametrize("name", OPS)
@given(batch=batches, cuts=st.sets(st.integers(1, 4)), needs=needs, asked=asked)
@quick
def test_splitting_into_micro_batches_with_a_global_normalizer(name, batch, cuts, needs, asked):
    """Every sequence alone, too."""
    edges = [0, *sorted(cut for cut in cuts if cut < len(batch.lengths)), len(batch.lengths)]
    parts = [batch.sequences(list(range(a, b)))[0] for a, b in pairwise(edges)]
    close(joined([run(name, part, 7.0, needs, asked) for part in parts]), run(name, batch, 7.0, needs, asked))


@pytest.mark.parametrize("name", OPS)
@given(batch=batches, shuffle=st.randoms(use_true_random=False), asked=asked)
@quick
def test_packing_order(name, batch, shuffle, asked):
    order = list(range(len(batch.lengths)))
    shuffle.shuffle(order)
    other, index = batch.sequences(order)
    close(run(name, other, None, outputs=asked), run(name, batch, None, outputs=asked).at(index))


@pytest.mark.parametrize("name", ALONE)
@given(batch=batches, seed=st.integers(0, 99), rows=st.integers(1, 40), asked=asked)
@quick
def test_permuting_rows(name, batch, seed, rows, asked):
    index = torch.randperm(sum(batch.lengths), generator=torch.Generator().manual_seed(seed))
    config = dk.KernelConfig(workspace_bytes=ROW_BYTES * rows)
    other = run(name, batch.take(index, batch.lengths), None, outputs=asked, config=config)
    close(other, run(name, batch, None, outputs=asked).at(index))


@pytest.mark.parametrize("name", OPS)
@given(batch=batches, needs=needs, asked=asked)
@quick
def test_padding_against_packing(name, batch, needs, asked):
    padded, where = run(name, batch.padded(), None, needs, asked), batch.places
    close(padded.at(where), run(name, batch, None, needs, asked))
    outside = torch.ones(len(batch.lengths), max(batch.lengths), dtype=torch.bool).index_put(where, torch.tensor(False))
    assert not any(value[outside].any() for value in padded.tokens.values())


@pytest.mark.parametrize("name", ALONE)
@given(batch=batches, rows=st.integers(1, 40), needs=needs, zero=st.sampled_from(["weight", "mask", "both"]))
@quick
def test_dropping_tokens_that_nothing_reads(name, batch, rows, needs, zero):
    """Masked, or of weight 0: they may as well not be there, given the denominator; and no gradient reaches them."""
    weightless = batch.tokens["token_weights"] == 0
    if name.startswith("self"):
        weightless &= batch.tokens["policy_weights"] == 0
    dropped = (weightless & (zero != "mask")) | ((batch.tokens["targets"] < 0) & (zero != "weight"))
    keep = (~dropped).nonzero()[:, 0]
    config = dk.KernelConfig(workspace_bytes=ROW_BYTES * rows)
    whole = run(name, batch, 7.0, needs, config=config)
    fewer = run(name, batch.take(keep, [len(keep)]), 7.0, needs, config=config)
    close(fewer, whole.at(keep), metrics=False)
    if OPS[name].gradient:
        assert not whole.tokens["hidden"][dropped].any()


@pytest.mark.parametrize("name", [name for name in OPS if name not in ALONE])
def test_a_sequence_split_over_two_calls_would_differ(name):
    """These do read more than a token, so that the tests above could fail for them."""
    differences = []
    for seed in range(10):
        batch = make([8], seed)
        halves = [run(name, batch.take(torch.arange(a, a + 4), [4])).loss for a in (0, 4)]
        differences.append(abs(sum(halves) - run(name, batch).loss))
    assert max(differences) > 1e-6
