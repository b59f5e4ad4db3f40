"""Trajectories laid end to end into packs of at most `max_tokens` tokens, without padding.

Which trajectory goes into which pack is best-fit-decreasing, in C++ (csrc/packing.cpp). What is trained is decided by
position, never by token id: an end-of-turn token that doubles as padding is trained like any other sampled token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from drift import _packing
from drift.types import PackedBatch, Trajectory

IGNORE = -100
LEAST, MOST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)  # weights that float32 holds


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Puts items into bins: longest first, each into the fullest bin with room. Deterministic, O(n log n).

    lengths: [n] int64, each from 1 to capacity. Returns [n] int64, the bin of each item; bins count from 0.
    Raises ValueError naming the first length out of range, TypeError if lengths are not int64.
    """
    if lengths.dtype != np.int64:
        raise TypeError(f"lengths is {lengths.dtype}; it should be int64")
    return _packing.best_fit_decreasing(np.ascontiguousarray(lengths), capacity)


def pack(
    trajectories: Sequence[Trajectory],
    max_tokens: int,
    *,
    max_length: int | None = None,
    turns: Literal["last", "assistant"] = "last",
    token_reduction: Literal["mean", "sum"] = "mean",
    min_weight: float = 0.0,
) -> list[PackedBatch]:
    """Packs trajectories for training; those of weight 0, or below `min_weight`, are left out.

    turns: which tokens are trained, those of the last assistant turn or of every one (A4). token_reduction: a trained
    token's weight is the trajectory's, divided by the number of its trained tokens ("mean") or not ("sum").
    max_length: a longer trajectory loses tokens, first what follows its last turn (it has no influence), then its
    oldest prompt tokens, as few as will do; `PackedBatch.cut_tokens` counts both. Trained turns, and the token before
    them that predicts their first one, always stay. `turn_ids` count from the trajectory's first turn, cut or not.

    Raises ValueError, naming the row and what would do, where trained turns alone exceed max_length, where what is left
    exceeds max_tokens, where nothing can be trained, and where turns, weight (what float32 cannot hold included) or
    log-probs make no sense.
    """
    segments = prepare(trajectories, max_tokens, max_length, turns, token_reduction, min_weight)
    bins = best_fit_decreasing(np.array([len(s.tokens) for s in segments], dtype=np.int64), max_tokens)
    packs: list[list[Segment]] = [[] for _ in range(bins.max(initial=-1) + 1)]
    for segment, index in zip(segments, bins):
        packs[index].append(segment)
    return [end_to_end(segments) for segments in packs]


def prepare(
    trajectories: Sequence[Trajectory],
    max_tokens: int,
    max_length: int | None,
    turns: str,
    token_reduction: str,
    min_weight: float,
) -> list[Segment]:
    """The trajectories that are trained, checked and cut to `max_length`, in their given order; see `pack`."""
    if turns not in ("last", "assistant"):
        raise ValueError(f"turns is {turns!r}; it should be 'last' or 'assistant'")
    if token_reduction not in ("mean", "sum"):
        raise ValueError(f"token_reduction is {token_reduction!r}; it should be 'mean' or 'sum'")
    for trajectory in trajectories:
        _check(trajectory)
    kept = [t for t in trajectories if t.weight != 0 and t.weight >= min_weight]
    for trajectory in kept:
        if not LEAST <= trajectory.weight <= MOST:
            held = "0" if trajectory.weight < 1 else "infinity"
            raise ValueError(
                f"{_name(trajectory)}: weight is {trajectory.weight}, which is {held} in float32; weights should lie "
                "around 1: rescale them, or leave tiny ones out by min_weight"
            )
    for name in ("advantage", "logprobs"):
        missing = [t for t in kept if getattr(t, name) is None]
        if missing and len(missing) < len(kept):
            raise ValueError(f"{_name(missing[0])} has no {name} while others have; give it to all or to none")
    return [_segment(trajectory, max_tokens, max_length, turns, token_reduction) for trajectory in kept]


@dataclass(slots=True)
class Segment:
    """One trajectory ready to be laid down; arrays are [length], aligned with targets (row i is about token i + 1)."""

    source: Trajectory
    tokens: np.ndarray  # int64
    targets: np.ndarray  # int64
    turn_ids: np.ndarray  # int32
    weights: np.ndarray  # float32
    logprobs: np.ndarray | None  # float32
    cut: int


def _name(trajectory: Trajectory) -> str:
    return f"row {trajectory.index} (problem {trajectory.problem_id})"


def _check(trajectory: Trajectory) -> None:
    name, length = _name(trajectory), len(trajectory.token_ids)
    if not (math.isfinite(trajectory.weight) and trajectory.weight >= 0):
        raise ValueError(f"{name}: weight is {trajectory.weight}; it should be finite and at least 0")
    if trajectory.logprobs is not None and len(trajectory.logprobs) != length:
        raise ValueError(f"{name}: {len(trajectory.logprobs)} logprobs for {length} tokens; there should be one each")
    previous = 0
    for turn in trajectory.turns:
        if not previous <= turn.start <= turn.stop <= length:
            raise ValueError(
                f"{name}: turn [{turn.start}, {turn.stop}) should follow the turn before it, which ends at {previous}, "
                f"and lie within the {length} tokens"
            )
        previous = turn.stop


def _segment(
    trajectory: Trajectory, max_tokens: int, max_length: int | None, turns: str, token_reduction: str
) -> Segment:
    name = _name(trajectory)
    trained = trajectory.turns[-1:] if turns == "last" else trajectory.turns
    count = sum(turn.stop - turn.start for turn in trained)
    if count == 0:
        raise ValueError(f"{name} has no token to train; give it weight 0, or leave it out")
    first = next(turn.start for turn in trained if turn.stop > turn.start) - 1
    if first < 0:
        raise ValueError(f"{name}: a trained turn starts at token 0; a prompt token should come before it")
    start, stop = _window(trajectory, first, max_length, turns)
    if stop - start > max_tokens:
        raise ValueError(
            f"{name} is {stop - start} tokens long and does not fit a pack of max_tokens {max_tokens}; "
            f"raise max_tokens, or set max_length to {max_tokens} so that its oldest prompt tokens are cut"
        )

    tokens = np.array(trajectory.token_ids[start:stop], dtype=np.int64)
    turn_ids = np.full(len(tokens), -1, dtype=np.int32)
    targets = np.full(len(tokens), IGNORE, dtype=np.int64)
    for index, turn in enumerate(trajectory.turns):
        turn_ids[max(turn.start - start - 1, 0) : max(turn.stop - start - 1, 0)] = index
    for turn in trained:
        targets[max(turn.start - start - 1, 0) : turn.stop - start - 1] = tokens[turn.start - start : turn.stop - start]
    factor = trajectory.weight / count if token_reduction == "mean" else trajectory.weight
    weights = np.where(targets != IGNORE, factor, 0.0).astype(np.float32)
    logprobs = None
    if trajectory.logprobs is not None:
        logprobs = np.array([*trajectory.logprobs[start + 1 : stop], 0.0], dtype=np.float32)
        logprobs[turn_ids < 0] = 0.0
    return Segment(trajectory, tokens, targets, turn_ids, weights, logprobs, len(trajectory.token_ids) - len(tokens))


def _window(trajectory: Trajectory, first: int, max_length: int | None, turns: str) -> tuple[int, int]:
    """The part [start, stop) that is kept; `first` is the oldest token that has to stay."""
    length = len(trajectory.token_ids)
    if max_length is None or length <= max_length:
        return 0, length
    stop = max(trajectory.turns[-1].stop, max_length)
    start = stop - max_length
    if start > first:
        remedy = "raise max_length and max_tokens, or leave the row out"
        if turns == "assistant" and len(trajectory.turns) > 1:
            remedy += ", or train turns='last' alone"
        raise ValueError(
            f"{_name(trajectory)} needs {stop - first} tokens from the one before its first trained turn to its end, "
            f"more than max_length {max_length}, and trained turns are never cut; {remedy}"
        )
    return start, stop


def end_to_end(segments: list[Segment]) -> PackedBatch:
    """One pack of them, in this order."""

    def joined(name: str) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([getattr(segment, name) for segment in segments]))

    lengths = [len(segment.tokens) for segment in segments]
    targets, turn_ids, weights = joined("targets"), joined("turn_ids"), joined("weights")
    sources = [segment.source for segment in segments]
    advantages = logprobs = None
    if sources[0].advantage is not None:
        per_segment = torch.tensor([source.advantage for source in sources], dtype=torch.float32)
        advantages = per_segment.repeat_interleave(torch.tensor(lengths)).where(targets != IGNORE, 0.0)
    if segments[0].logprobs is not None:
        logprobs = joined("logprobs")
    return PackedBatch(
        input_ids=joined("tokens"),
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        targets=targets,
        token_weights=weights,
        response_mask=turn_ids >= 0,
        turn_ids=turn_ids,
        active=((targets != IGNORE) & (weights != 0)).nonzero().squeeze(1),
        cu_seqlens=torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        indices=[source.index for source in sources],
        problem_ids=[source.problem_id for source in sources],
        sample_weights=torch.tensor([source.weight for source in sources], dtype=torch.float32),
        cut_tokens=sum(segment.cut for segment in segments),
        advantages=advantages,
        rollout_logprobs=logprobs,
    )
