"""Packing against plain Python: nothing lost, nothing over capacity, every target where it belongs."""

import bisect
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drift.packing import best_fit_decreasing, pack
from drift.types import Trajectory, Turn

# --- bins ---


def plain_best_fit_decreasing(lengths, capacity):
    """Room left in each bin, by a search through all of them."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [index for index, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda index: rooms[index])] -= length
        else:
            rooms.append(capacity - length)
    return rooms


@given(st.integers(1, 60), st.data())
def test_bins_are_those_of_the_plain_algorithm(capacity, data):
    lengths = np.array(data.draw(st.lists(st.integers(1, capacity), max_size=60)), dtype=np.int64)
    bins = best_fit_decreasing(lengths, capacity)
    assert bins.dtype == np.int64
    assert bins.shape == lengths.shape
    loads = np.bincount(bins, lengths).astype(int).tolist() if len(bins) else []
    assert sorted(capacity - load for load in loads) == sorted(plain_best_fit_decreasing(lengths.tolist(), capacity))
    assert np.array_equal(bins, best_fit_decreasing(lengths, capacity))


def test_many_lengths_fill_their_bins():
    lengths = np.random.default_rng(0).integers(1, 2001, 20_000)
    bins = best_fit_decreasing(lengths, 8192)
    loads = np.bincount(bins, lengths)
    assert loads.max() <= 8192
    assert loads.sum() == lengths.sum()
    assert len(loads) == math.ceil(lengths.sum() / 8192)  # no packing does with fewer


@pytest.mark.parametrize(
    ("lengths", "said"), [([3, 0], r"lengths\[1\] is 0"), ([9], r"lengths\[0\] is 9.*capacity, 8")]
)
def test_lengths_out_of_range(lengths, said):
    with pytest.raises(ValueError, match=said):
        best_fit_decreasing(np.array(lengths), 8)


def test_lengths_of_another_kind():
    with pytest.raises(TypeError, match="lengths is float64; it should be int64"):
        best_fit_decreasing(np.array([1.0]), 8)
    with pytest.raises(ValueError, match="one dimension"):
        best_fit_decreasing(np.ones((2, 2), dtype=np.int64), 8)
    strided = np.array([5, 1, 5, 1, 3, 1])[::2]
    assert best_fit_decreasing(strided, 8).tolist() == [0, 1, 1]


# --- packs ---


def trajectory(*pieces, weight=1.0, index=0, **more):
    """From (prompt tokens, sampled tokens) pairs; an odd one out at the end is a tail. Token ids count up from 100."""
    position, turns = 0, []
    for number, piece in enumerate(pieces):
        if number % 2:
            turns.append(Turn(position, position + piece))
        position += piece
    base = 100 + 1000 * index
    return Trajectory(f"p{index}", list(range(base, base + position)), turns, weight=weight, index=index, **more)


def test_layout_by_hand():
    first = trajectory(
        2, 2, 1, 3, 1, weight=1.5, index=1
    )  # 100..108 + 1000, turns [2, 4) and [5, 8), one token of tail
    second = trajectory(1, 2, weight=0.5, index=2)
    (batch,) = pack([second, first], 12)
    assert batch.indices == [2, 1]
    assert batch.problem_ids == ["p2", "p1"]
    assert batch.input_ids.tolist() == [2100, 2101, 2102, *range(1100, 1109)]
    assert batch.position_ids.tolist() == [0, 1, 2, *range(9)]
    assert batch.cu_seqlens.tolist() == [0, 3, 12]
    no = -100
    assert batch.targets.tolist() == [2101, 2102, no, no, no, no, no, 1105, 1106, 1107, no, no]
    assert batch.turn_ids.tolist() == [0, 0, -1, -1, 0, 0, -1, 1, 1, 1, -1, -1]
    assert batch.response_mask.tolist() == [turn >= 0 for turn in batch.turn_ids.tolist()]
    assert batch.token_weights.tolist() == [0.25, 0.25, 0, 0, 0, 0, 0, 0.5, 0.5, 0.5, 0, 0]
    assert batch.active.tolist() == [0, 1, 7, 8, 9]
    assert batch.sample_weights.tolist() == [0.5, 1.5]
    assert batch.cut_tokens == 0
    assert batch.rollout_logprobs is None
    assert batch.advantages is None

    (batch,) = pack([second, first], 12, turns="assistant", token_reduction="sum")
    assert batch.targets.tolist() == [2101, 2102, no, no, 1102, 1103, no, 1105, 1106, 1107, no, no]
    assert batch.token_weights.tolist() == [0.5, 0.5, 0, 0, 1.5, 1.5, 0, 1.5, 1.5, 1.5, 0, 0]
    (batch,) = pack([first], 12, turns="assistant")
    assert batch.token_weights[1].item() == pytest.approx(1.5 / 5)


def test_types():
    (batch,) = pack([trajectory(2, 2, logprobs=[0.0, 0.0, -1.0, -2.0], advantage=1.0)], 8)
    kinds = {
        torch.int64: ("input_ids", "position_ids", "targets", "active"),
        torch.int32: ("turn_ids", "cu_seqlens"),
        torch.float32: ("token_weights", "sample_weights", "rollout_logprobs", "advantages"),
        torch.bool: ("response_mask",),
    }
    for kind, names in kinds.items():
        assert {getattr(batch, name).dtype for name in names} == {kind}


def test_logprobs_and_advantages_stand_beside_their_targets():
    first = trajectory(1, 1, 1, 2, index=1, advantage=-2.0, logprobs=[0.0, -1.0, 0.0, -2.0, -3.0])
    second = trajectory(
        1, 1, index=2, advantage=3.0, logprobs=[-9.0, -4.0]
    )  # what lies outside a turn is not passed on
    (batch,) = pack([first, second], 8)
    assert batch.rollout_logprobs.tolist() == [-1.0, 0.0, -2.0, -3.0, 0.0, -4.0, 0.0]
    assert batch.advantages.tolist() == [0.0, 0.0, -2.0, -2.0, 0.0, 3.0, 0.0]


@pytest.mark.parametrize("name", ["advantage", "logprobs"])
def test_half_given_fields_are_refused(name):
    value = {"advantage": 1.0, "logprobs": [0.0, -1.0]}[name]
    with pytest.raises(ValueError, match=f"row 2 .* has no {name} while others have"):
        pack([trajectory(1, 1, index=1, **{name: value}), trajectory(1, 1, index=2)], 8)


def test_weight_zero_never_enters():
    batches = pack([trajectory(3, 2, weight=0.0, index=1), trajectory(3, 2, index=2), trajectory(9, 9, weight=0.0)], 8)
    assert [batch.indices for batch in batches] == [[2]]
    assert pack([trajectory(3, 2, weight=0.0)], 8) == []
    assert pack([], 8) == []


def test_oldest_prompt_tokens_are_cut_and_counted():
    long = trajectory(10, 3, 2, 4, index=1, logprobs=[-float(i) for i in range(19)])  # 19 tokens, last turn [15, 19)
    (batch,) = pack([long, trajectory(1, 2, index=2, logprobs=[0.0, -1.0, -2.0])], 16, max_length=8)
    assert batch.input_ids[:8].tolist() == long.token_ids[11:]
    assert batch.position_ids[:8].tolist() == list(range(8))
    assert batch.targets[:8].tolist() == [-100, -100, -100, *long.token_ids[15:], -100]
    assert batch.turn_ids[:8].tolist() == [
        0,
        -1,
        -1,
        1,
        1,
        1,
        1,
        -1,
    ]  # of the first turn's tokens one is still a target
    assert batch.rollout_logprobs[:8].tolist() == [-12.0, 0.0, 0.0, -15.0, -16.0, -17.0, -18.0, 0.0]
    assert batch.cut_tokens == 11


def test_tail_goes_before_the_prompt_does():
    tailed = trajectory(5, 3, 4)  # 12 tokens
    for max_length, tokens in ((12, range(12)), (10, range(10)), (8, range(8)), (6, range(2, 8)), (4, range(4, 8))):
        (batch,) = pack([tailed], 12, max_length=max_length)
        assert batch.input_ids.tolist() == [100 + token for token in tokens]
        assert batch.cut_tokens == 12 - max_length
        assert batch.targets[batch.active].tolist() == [105, 106, 107]


def test_trained_turn_is_never_cut():
    long = trajectory(5, 4, 2, 3, index=7)
    assert pack([long], 20, max_length=4)[0].cut_tokens == 10
    with pytest.raises(ValueError, match=r"row 7 \(problem p7\) needs 4 tokens .* max_length 3, .*; raise max_length"):
        pack([long], 20, max_length=3)
    assert pack([long], 20, max_length=10, turns="assistant")[0].cut_tokens == 4
    with pytest.raises(ValueError, match=r"row 7 .* needs 10 tokens .*or train turns='last' alone"):
        pack([long], 20, max_length=9, turns="assistant")


def test_too_long_for_a_pack():
    with pytest.raises(
        ValueError, match=r"row 3 .* is 9 tokens long .* max_tokens 8; raise max_tokens, or set max_length"
    ):
        pack([trajectory(6, 3, index=3)], 8)
    with pytest.raises(ValueError, match=r"row 3 .* is 9 tokens long"):
        pack([trajectory(8, 3, index=3)], 8, max_length=9)
    assert pack([trajectory(8, 3)], 8, max_length=8)[0].cut_tokens == 3


def broken(**changes):
    made = trajectory(3, 2, index=4)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (broken(weight=math.nan), "row 4 .*: weight is nan"),
        (broken(weight=-1.0), "weight is -1.0; it should be finite and at least 0"),
        (broken(weight=1e308), r"row 4 .*: weight is 1e\+308, which is infinity in float32; .* around 1"),
        (broken(weight=1e-60), r"row 4 .*: weight is 1e-60, which is 0 in float32; .* min_weight"),
        (broken(turns=[]), "row 4 .* has no token to train"),
        (broken(turns=[Turn(1, 2), Turn(3, 3)]), "has no token to train"),
        (broken(turns=[Turn(0, 2)]), "a trained turn starts at token 0"),
        (broken(turns=[Turn(3, 6)]), r"turn \[3, 6\) should .* within the 5 tokens"),
        (broken(turns=[Turn(1, 4), Turn(3, 5)]), r"turn \[3, 5\) should follow the turn before it, which ends at 4"),
        (broken(turns=[Turn(4, 3)]), r"turn \[4, 3\)"),
        (broken(logprobs=[0.0]), "1 logprobs for 5 tokens"),
    ],
)
def test_senseless_trajectory(bad, said):
    with pytest.raises(ValueError, match=said):
        pack([bad], 8)


def test_a_tiny_weight_may_be_left_out():
    assert pack([broken(weight=1e-60)], 8, min_weight=1e-6) == []
    assert pack([broken(weight=2e-38)], 8)[0].token_weights.max() > 0


def test_senseless_option():
    with pytest.raises(ValueError, match="turns is 'first'; it should be 'last' or 'assistant'"):
        pack([], 8, turns="first")
    with pytest.raises(ValueError, match="token_reduction is 'max'"):
        pack([], 8, token_reduction="max")


@st.composite
def trajectories(draw):
    made = []
    for index in range(draw(st.integers(0, 12))):
        pieces = []
        for _ in range(draw(st.integers(1, 4))):
            pieces += [draw(st.integers(1, 6)), draw(st.integers(1, 5))]
        pieces += draw(st.lists(st.integers(1, 3), max_size=1))
        weight = draw(st.sampled_from([0.0, 0.25, 1.0, 3.5]))
        one = trajectory(*pieces, weight=weight, index=index)
        one.logprobs = [-float(token) for token in one.token_ids]
        made.append(one)
    return made


@given(trajectories(), st.integers(6, 50), st.sampled_from(["last", "assistant"]), st.sampled_from(["mean", "sum"]))
def test_whatever_is_packed_can_be_read_back(given_ones, max_length, turns, token_reduction):
    def needed(one):
        last = one.turns[-1]
        return last.stop - (last if turns == "last" else one.turns[0]).start + 1

    max_tokens = max(max_length, 64)
    given_ones = [one for one in given_ones if needed(one) <= max_length]
    options = {"max_length": max_length, "turns": turns, "token_reduction": token_reduction}
    batches = pack(given_ones, max_tokens, **options)
    by_index = {one.index: one for one in given_ones}
    assert sorted(i for batch in batches for i in batch.indices) == [one.index for one in given_ones if one.weight]

    cut = 0
    for batch in batches:
        length = len(batch.input_ids)
        assert 0 < length <= max_tokens
        assert batch.cu_seqlens[0] == 0
        assert batch.cu_seqlens[-1] == length
        covered = torch.zeros(length, dtype=torch.bool)
        for s, index in enumerate(batch.indices):
            one = by_index[index]
            start, stop = batch.cu_seqlens[s : s + 2].tolist()
            assert not covered[start:stop].any()
            covered[start:stop] = True
            assert stop - start == min(len(one.token_ids), max_length)
            tokens = batch.input_ids[start:stop].tolist()
            first = one.token_ids.index(tokens[0])
            assert tokens == one.token_ids[first : first + len(tokens)]
            assert batch.position_ids[start:stop].tolist() == list(range(stop - start))
            cut += len(one.token_ids) - len(tokens)

            trained = one.turns[-1:] if turns == "last" else one.turns
            targets = batch.targets[start:stop]
            expected = [one.token_ids[i] for turn in trained for i in range(turn.start, turn.stop)]
            assert targets[targets != -100].tolist() == expected
            assert targets[-1] == -100
            for i in range(start, stop - 1):  # row i is about token i + 1
                position = one.token_ids.index(batch.input_ids[i + 1].item())
                at = bisect.bisect_right([turn.start for turn in one.turns], position) - 1
                inside = at >= 0 and position < one.turns[at].stop
                assert batch.turn_ids[i] == (at if inside else -1)
                assert batch.rollout_logprobs[i] == (-batch.input_ids[i + 1].item() if inside else 0.0)
                assert batch.targets[i] in (-100, batch.input_ids[i + 1])
            weight = batch.token_weights[start:stop].double().sum().item()
            assert weight == pytest.approx(one.weight * (len(expected) if token_reduction == "sum" else 1), rel=1e-6)
            assert batch.sample_weights[s] == one.weight
            assert batch.problem_ids[s] == one.problem_id
        assert covered.all()
        assert torch.equal(batch.response_mask, batch.turn_ids >= 0)
        assert torch.equal(batch.active, (batch.targets != -100).nonzero().squeeze(1))
        assert torch.equal(batch.token_weights != 0, batch.targets != -100)
    assert cut == sum(batch.cut_tokens for batch in batches)

    again = pack(given_ones, max_tokens, **options)
    assert [batch.indices for batch in again] == [batch.indices for batch in batches]


def test_batch_moves_whole():
    (batch,) = pack([trajectory(2, 2)], 8)
    moved = batch.to("cpu")
    assert moved.indices == batch.indices
    assert torch.equal(moved.targets, batch.targets)
