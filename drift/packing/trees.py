"""Trajectories as prefix trees: a token that several share goes through the model once.

What is shared is decided by token ids alone, so it serves siblings of a prompt, the turns of a trajectory that are samples
of their own, branches after any turn, and a system prompt that a whole batch has in common. Sorting, cutting and layout are
C++ (csrc/trie.cpp).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch

from drift import _packing
from drift.packing.flat import IGNORE, Segment, prepare
from drift.types import Trajectory, TreeBatch

ENTRIES = ("rows", "targets", "token_weights", "turn_ids", "segment_ids", "advantages", "rollout_logprobs")  # [N]


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
        rows = [laid["rows"][bounds[member] : bounds[member + 1]] for member in members]
        packs.append(_batch([segments[member] for member in members], rows, tokens[source], starts, parents))
    return packs


def in_order(batch: TreeBatch) -> tuple[TreeBatch, torch.Tensor]:
    """The batch with its entries trajectory by trajectory, so that `rows` is no longer sorted, and their bounds [S + 1] int32.

    For losses that compare neighbours of a trajectory, and for those without `rows=`: give them hidden[batch.rows].
    """
    order = batch.segment_ids.argsort(stable=True)
    moved = {name: getattr(batch, name) for name in ENTRIES}
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    counts = torch.bincount(batch.segment_ids, minlength=len(batch.indices))
    bounds = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    moved = {name: value[order] for name, value in moved.items() if value is not None}
    return replace(batch, **moved, active=place[batch.active].sort().values), bounds


def _batch(
    segments: list[Segment], rows: list[np.ndarray], tokens: np.ndarray, starts: np.ndarray, parents: np.ndarray
) -> TreeBatch:
    kept = [np.flatnonzero(segment.targets != IGNORE) for segment in segments]
    counts = np.array([len(places) for places in kept])
    flat = np.concatenate([row[places] for row, places in zip(rows, kept)])
    order = np.argsort(flat, kind="stable")

    def entries(name: str) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([getattr(s, name)[p] for s, p in zip(segments, kept)])[order])

    def spread(values: list[float], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype).repeat_interleave(torch.from_numpy(counts))[torch.from_numpy(order)]

    sources = [segment.source for segment in segments]
    weights = entries("weights")
    positions = np.empty(len(tokens), dtype=np.int64)
    for row in rows:
        positions[row] = np.arange(len(row))
    return TreeBatch(
        input_ids=torch.from_numpy(tokens),
        position_ids=torch.from_numpy(positions),
        starts=torch.from_numpy(starts.copy()),
        parents=torch.from_numpy(parents.copy()),
        row_stops=torch.from_numpy(_row_stops(starts, parents, len(tokens))),
        rows=torch.from_numpy(flat[order]),
        targets=entries("targets"),
        token_weights=weights,
        turn_ids=entries("turn_ids"),
        segment_ids=spread(list(range(len(segments))), torch.int64),
        active=(weights != 0).nonzero().squeeze(1),
        indices=[source.index for source in sources],
        problem_ids=[source.problem_id for source in sources],
        sample_weights=torch.tensor([source.weight for source in sources], dtype=torch.float32),
        lengths=torch.tensor([len(segment.tokens) for segment in segments]),
        cut_tokens=sum(segment.cut for segment in segments),
        advantages=None
        if sources[0].advantage is None
        else spread([source.advantage or 0.0 for source in sources], torch.float32),
        rollout_logprobs=None if segments[0].logprobs is None else entries("logprobs"),
    )


def _row_stops(starts: np.ndarray, parents: np.ndarray, count: int) -> np.ndarray:
    """Of each row, one past its last descendant: where its segment's subtree ends."""
    lengths = np.diff(starts, append=count)
    stops = starts + lengths
    for segment in range(len(starts) - 1, -1, -1):
        if parents[segment] >= 0:
            stops[parents[segment]] = max(stops[parents[segment]], stops[segment])
    return np.repeat(stops, lengths)
