"""Prefix trees: what is in a pack, row by row, against the definition."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_trees import groups, paths

from drift import packing
from drift.packing import pack, tree
from drift.types import Trajectory, Turn

EXAMPLES = settings(max_examples=40, deadline=None, derandomize=True)


def prefixes(trajectories):
    return {tuple(t.token_ids[: i + 1]) for t in trajectories for i in range(len(t.token_ids))}


@EXAMPLES
@given(groups(rich=True), st.integers(30, 60), st.sampled_from(["last", "assistant"]))
def test_every_trajectory_is_a_path_and_its_trained_tokens_are_entries_of_the_rows_that_predict_them(made, room, turns):
    batches = tree(made, room, turns=turns)
    flat = {
        index: [piece[keep] for piece in rows]
        for batch in pack(made, room, turns=turns)
        for index, start, stop in zip(batch.indices, batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist())
        for keep in [batch.targets[start:stop] != -100]
        for rows in [
            [
                values[start:stop]
                for values in (
                    batch.targets,
                    batch.token_weights,
                    batch.turn_ids,
                    batch.advantages,
                    batch.rollout_logprobs,
                )
            ]
        ]
    }
    seen = []
    for batch in batches:
        assert len(batch.input_ids) <= room
        assert torch.equal(batch.rows, batch.rows.sort().values)
        way = paths(batch)
        assert [len(path) - 1 for path in way] == batch.position_ids.tolist()
        ids = batch.input_ids
        for place, index in enumerate(batch.indices):
            own = batch.segment_ids == place
            entries = [batch.targets, batch.token_weights, batch.turn_ids, batch.advantages, batch.rollout_logprobs]
            for values, expected in zip(entries, flat[index]):
                assert torch.equal(values[own], expected)
            for row, target in zip(batch.rows[own].tolist(), batch.targets[own].tolist()):
                path = ids[way[row]].tolist()
                assert path == made[index].token_ids[: len(path)]
                assert target == made[index].token_ids[len(path)]
        assert batch.flat.cu_seqlens.diff().tolist() == [len(made[index].token_ids) for index in batch.indices]
        assert torch.equal(batch.active, torch.arange(len(batch.targets)))
        seen += batch.indices
    assert sorted(seen) == [t.index for t in made]


@EXAMPLES
@given(groups(), st.integers(30, 60))
def test_no_prefix_is_there_twice_in_a_pack_and_every_one_is_there(made, room):
    for batch in tree(made, room):
        found = [tuple(batch.input_ids[path].tolist()) for path in paths(batch)]
        assert len(found) == len(set(found))
        assert set(found) == prefixes([made[index] for index in batch.indices])


@EXAMPLES
@given(groups())
def test_descendants_follow_their_row_up_to_row_stops(made):
    [batch] = tree(made, 10_000)
    way = paths(batch)
    for row, stop in enumerate(batch.row_stops.tolist()):
        assert [i for i, path in enumerate(way) if row in path] == list(range(row, stop))


@EXAMPLES
@given(groups())
def test_segments_are_as_long_as_their_branches_allow(made):
    """A segment has no branch inside, and none could be joined with the one before it."""
    [batch] = tree(made, 10_000)
    starts = batch.starts.tolist()
    children = {parent: batch.parents.tolist().count(parent) for parent in set(batch.parents.tolist())}
    for number, parent in enumerate(batch.parents.tolist()):
        if parent >= 0 and starts[number] == [*starts, len(batch.input_ids)][parent + 1]:
            assert children[parent] > 1


@given(groups(rich=True), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_the_order_of_trajectories_does_not_matter(made, random):
    distinct = list({tuple(t.token_ids): t for t in made}.values())
    mixed = random.sample(distinct, len(distinct))
    for one, other in zip(tree(distinct, 40), tree(mixed, 40), strict=True):
        assert sorted(one.indices) == sorted(other.indices)
        assert torch.equal(one.input_ids, other.input_ids)
        assert torch.equal(one.rows, other.rows)
        pairs = [sorted(zip(b.rows.tolist(), b.targets.tolist(), strict=True)) for b in (one, other)]
        assert pairs[0] == pairs[1]


def example(*sequences):
    return [Trajectory("p", ids, [Turn(1, len(ids))], index=i) for i, ids in enumerate(sequences)]


def test_a_tree_that_does_not_fit_is_cut_at_the_branch_that_shares_least():
    prompt = [3, 4]
    near, far = [*prompt, 5, 5, 5, 5], [*prompt, 6, 6, 6, 6]
    batches = tree(example([*near, 7], [*far, 7], [*near, 8], [*far, 8]), 9)
    assert sorted(sorted(batch.indices) for batch in batches) == [[0, 2], [1, 3]]
    assert [len(batch.input_ids) for batch in batches] == [8, 8]


def test_the_parts_of_a_tree_that_is_cut_fill_packs_by_what_they_add():
    """Ten answers of four tokens behind a prompt of twenty: six to a pack of 44 rows; by their own lengths it would be one."""
    prompt = list(range(3, 23))
    batches = tree(example(*([*prompt, 30 + i, 1, 1, 1] for i in range(10))), 44)
    assert [len(batch.indices) for batch in batches] == [6, 4]
    assert [len(batch.input_ids) for batch in batches] == [44, 36]


def test_a_shared_system_prompt_joins_groups_that_share_nothing_else():
    [batch] = tree(example([3, 3, 4, 5], [3, 3, 4, 6], [3, 3, 7, 8]), 100)
    assert batch.input_ids.tolist() == [3, 3, 4, 5, 6, 7, 8]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 3, 2, 3]
    assert batch.starts.tolist() == [0, 2, 3, 4, 5]
    assert batch.parents.tolist() == [-1, 0, 1, 1, 0]
    assert batch.row_stops.tolist() == [7, 7, 5, 4, 5, 7, 7]


def test_copies_and_a_prefix_add_no_rows_and_keep_their_entries():
    [batch] = tree(example([3, 4, 5], [3, 4, 5], [3, 4]), 100)
    assert batch.input_ids.tolist() == [3, 4, 5]
    assert batch.starts.tolist() == [0]
    assert batch.rows.tolist() == [0, 0, 0, 1, 1]
    assert batch.targets.tolist() == [4, 4, 4, 5, 5]
    assert batch.segment_ids.tolist() == [0, 1, 2, 0, 1]


@EXAMPLES
@given(groups(rich=True))
def test_the_flat_pack_beside_a_tree_holds_the_same_trajectories_and_names_their_rows(made):
    [batch] = tree(made, 10_000, turns="assistant")
    [flat] = pack(made, 10_000, turns="assistant")
    for name in ("input_ids", "position_ids", "targets", "token_weights", "turn_ids", "advantages", "cu_seqlens"):
        assert torch.equal(getattr(batch.flat, name), getattr(flat, name))
    assert batch.indices == flat.indices
    assert torch.equal(batch.input_ids[batch.flat_rows], flat.input_ids)
    assert torch.equal(batch.position_ids[batch.flat_rows], flat.position_ids)


def test_what_pack_refuses_or_leaves_out_tree_does_too():
    [kept] = tree([*example([3, 4]), Trajectory("p", [3, 5], [Turn(1, 2)], weight=0.0, index=5)], 10)
    assert kept.indices == [0]
    assert tree([], 10) == []
    with pytest.raises(ValueError, match="does not fit a pack of max_tokens 2"):
        tree(example([3, 4, 5]), 2)
    with pytest.raises(ValueError, match="no token to train"):
        tree([Trajectory("p", [3, 4], [])], 10)


def test_max_length_cuts_the_oldest_prompt_tokens_before_anything_is_shared():
    sequences = [Trajectory("p", [9, 3, 4, 5], [Turn(3, 4)]), Trajectory("p", [8, 3, 4, 6], [Turn(3, 4)], index=1)]
    [batch] = tree(sequences, 100, max_length=3)
    assert batch.input_ids.tolist() == [3, 4, 5, 6]
    assert batch.cut_tokens == 2


def test_prefixes_are_the_trees_of_plain_sequences():
    """Each distinct prefix is a row; each sequence reads back its tokens and counts its positions; an empty one has no row."""
    sequences = [np.array(x) for x in ([5, 6, 7], [], [5, 6, 8, 9], [5, 6], [4], [5, 6, 8, 9])]
    found = packing.prefixes(sequences)
    tokens = np.concatenate(sequences)
    assert len(found.input_ids) == len({tuple(x[:stop]) for x in sequences for stop in range(1, len(x) + 1)})
    assert found.input_ids[found.rows].tolist() == tokens.tolist()
    assert found.position_ids[found.rows].tolist() == [i for x in sequences for i in range(len(x))]
    with pytest.raises(ValueError, match="all of 2 sequences are empty"):
        packing.prefixes([np.array([]), np.array([])])
