"""Trajectories as prefix trees: a token that several share goes through the model once.

What is shared is decided by token ids alone, so it serves siblings of a prompt, the turns of a trajectory that are samples
of their own, branches after any turn, and a system prompt that a whole batch has in common. Sorting, cutting and layout are
C++ (csrc/trie.cpp).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from drift import _packing
from drift.packing.flat import IGNORE, Segment, end_to_end, prepare
from drift.types import Trajectory, TreeBatch


def tree(
    trajectories: Sequence[Trajectory],
    max_tokens: int,
    *,
    max_length: int | None = None,
    turns: Literal["last", "assistant"] = "last",
    token_reduction: Literal["mean", "sum"] = "mean",
    min_weight: float = 0.0,
) -> list[TreeBatch]:
    """Packs trajectories into prefix trees of at most `max_tokens` rows in all; the arguments and errors are those of `pack`.

    A tree that does not fit is cut at the branch that shares least, and its parts are filled up again: what a pack's
    trajectories share is counted once. The order of the trajectories decides the order of equal ones alone.
    """
    segments = prepare(trajectories, max_tokens, max_length, turns, token_reduction, min_weight)
    if not segments:
        return []
    tokens = np.concatenate([segment.tokens for segment in segments])
    bounds = np.cumsum([0, *(len(segment.tokens) for segment in segments)], dtype=np.int64)
    laid = _packing.trees(tokens, bounds, max_tokens)
    packs = []
    for number in range(len(laid["member_bounds"]) - 1):
        members, source, starts, parents = (
            laid[name][laid[edges][number] : laid[edges][number + 1]]
            for name, edges in (
                ("members", "member_bounds"),
                ("source", "row_bounds"),
                ("starts", "segment_bounds"),
                ("parents", "segment_bounds"),
            )
        )
        members = np.sort(members)
        rows = [laid["rows"][bounds[member] : bounds[member + 1]] for member in members]
        packs.append(_batch([segments[member] for member in members], rows, tokens[source], starts, parents))
    return packs


@dataclass(frozen=True, eq=False)
class Prefixes:
    """Token sequences as prefix trees, and no more than that; fields as in `TreeBatch`."""

    input_ids: torch.Tensor  # [R]
    position_ids: torch.Tensor  # [R]
    starts: torch.Tensor  # [G]
    parents: torch.Tensor  # [G]
    rows: torch.Tensor  # [T] int64, of each token of the sequences, end to end, its row


def prefixes(sequences: Sequence[np.ndarray]) -> Prefixes:
    """All of the sequences in one forest: for trainers that have losses of their own. An empty sequence has no row.

    Raises ValueError if all of them are empty.
    """
    lengths = [len(sequence) for sequence in sequences]
    if not any(lengths):
        raise ValueError(f"all of {len(lengths)} sequences are empty; a forest has at least one token")
    tokens = np.concatenate([np.asarray(sequence, dtype=np.int64) for sequence in sequences if len(sequence)])
    bounds = np.cumsum([0, *filter(None, lengths)], dtype=np.int64)
    laid = _packing.trees(tokens, bounds, len(tokens))
    rows = torch.from_numpy(laid["rows"].copy())
    positions = torch.empty(len(laid["source"]), dtype=torch.int64)
    positions[rows] = torch.cat([torch.arange(length) for length in lengths])
    starts, parents = (torch.from_numpy(laid[name].copy()) for name in ("starts", "parents"))
    return Prefixes(torch.from_numpy(tokens[laid["source"]]), positions, starts, parents, rows)


def _batch(
    segments: list[Segment], rows: list[np.ndarray], tokens: np.ndarray, starts: np.ndarray, parents: np.ndarray
) -> TreeBatch:
    flat, flat_rows = end_to_end(segments), torch.from_numpy(np.concatenate(rows))
    order = np.argsort(flat_rows.numpy(), kind="stable")
    entries = torch.from_numpy(order[flat.targets.numpy()[order] != IGNORE])
    lengths = flat.cu_seqlens.diff().to(torch.int64)
    positions = torch.empty(len(tokens), dtype=torch.int64)
    positions[flat_rows] = flat.position_ids
    weights = flat.token_weights[entries]
    return TreeBatch(
        input_ids=torch.from_numpy(tokens),
        position_ids=positions,
        starts=torch.from_numpy(starts.copy()),
        parents=torch.from_numpy(parents.copy()),
        row_stops=torch.from_numpy(_row_stops(starts, parents, len(tokens))),
        rows=flat_rows[entries],
        targets=flat.targets[entries],
        token_weights=weights,
        turn_ids=flat.turn_ids[entries],
        segment_ids=torch.arange(len(segments)).repeat_interleave(lengths)[entries],
        active=(weights != 0).nonzero().squeeze(1),
        indices=flat.indices,
        problem_ids=flat.problem_ids,
        sample_weights=flat.sample_weights,
        flat=flat,
        flat_rows=flat_rows,
        cut_tokens=flat.cut_tokens,
        advantages=None if flat.advantages is None else flat.advantages[entries],
        rollout_logprobs=None if flat.rollout_logprobs is None else flat.rollout_logprobs[entries],
    )


def _row_stops(starts: np.ndarray, parents: np.ndarray, count: int) -> np.ndarray:
    """Of each row, one past its last descendant: where its segment's subtree ends."""
    lengths = np.diff(starts, append=count)
    stops = starts + lengths
    for segment in range(len(starts) - 1, -1, -1):
        if parents[segment] >= 0:
            stops[parents[segment]] = max(stops[parents[segment]], stops[segment])
    return np.repeat(stops, lengths)
