"""The three shapes that data takes: a problem, a trajectory of token ids, a packed batch (or a tree of them).

Legend: T tokens in a pack, S segments (trajectories) in it. Spans are half open, [start, stop).
Rows of a rollout file stay plain dicts (see `drift.store`): they are what is written and read, these are what is trained.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch


@dataclass(slots=True)
class Problem:
    """One question with a checkable answer."""

    id: str  # stable: hashes of the question and of the answer
    prompt: str  # text of the user message that asks it
    answer: str  # what the verifier compares with
    metadata: dict[str, Any] = field(default_factory=dict)  # whatever the task's own scorer needs
    system: str | None = None  # text of a system message before it
    earlier: tuple[dict[str, str], ...] = ()  # messages between the two; none of them is trained


@dataclass(slots=True)
class Turn:
    """One assistant message inside `Trajectory.token_ids`."""

    start: int  # first sampled token (a template's prefill, such as <think>, lies before it)
    stop: int  # one past the last sampled token; the end-of-turn token, where it was sampled, is inside


@dataclass(slots=True)
class Trajectory:
    """One conversation as token ids, exactly as sampled."""

    problem_id: str
    token_ids: list[int]
    turns: list[Turn]  # in order; everything outside them is prompt, user, tool or template
    weight: float = 1.0  # the trajectory's importance weight (A3)
    index: int = 0  # which row of the rollout file it came from
    advantage: float | None = None
    logprobs: list[float] | None = None  # the sampler's, one a token, 0.0 outside the turns


@dataclass(slots=True)
class PackedBatch:
    """Trajectories laid end to end: nothing is padded, positions restart at each segment.

    `targets[i]` is the token after position i where that token is trained, else -100; the last position of a segment
    is always -100, so that nothing leaks into the next one. All per-token fields below are aligned with `targets`.
    """

    input_ids: torch.Tensor  # [T] int64
    position_ids: torch.Tensor  # [T] int64
    targets: torch.Tensor  # [T] int64, -100 where nothing is trained
    token_weights: torch.Tensor  # [T] float32, the factor of -logp in the loss's numerator; 0 where nothing is trained
    response_mask: torch.Tensor  # [T] bool, the target is a sampled assistant token (trained or not)
    turn_ids: torch.Tensor  # [T] int32, which assistant turn the target belongs to, -1 outside
    active: torch.Tensor  # [A] int64, positions with a target and a non-zero weight
    cu_seqlens: torch.Tensor  # [S + 1] int32
    indices: list[int]  # [S] Trajectory.index
    problem_ids: list[str]  # [S]
    sample_weights: torch.Tensor  # [S] float32, Trajectory.weight
    cut_tokens: int = 0  # prompt tokens left out so that a trajectory fits
    advantages: torch.Tensor | None = None  # [T] float32
    rollout_logprobs: torch.Tensor | None = None  # [T] float32
    old_logprobs: torch.Tensor | None = None  # [T] float32
    ref_logprobs: torch.Tensor | None = None  # [T] float32
    teacher_logprobs: torch.Tensor | None = None  # [T] float32

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch on another device."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.to(device) for k, v in moved.items() if isinstance(v, torch.Tensor)})


@dataclass(slots=True)
class TreeBatch:
    """Trajectories as prefix trees: tokens that several share are there once. R rows, N trained tokens, G segments.

    Rows lie depth first. Row j is seen by row i when j <= i and i < row_stops[j]: the descendants of a row follow it.
    The loss stays one of trajectories: a trained token is an entry, and `rows` names the row that predicts it. Entries are
    sorted by row, then by trajectory, so the entries of one trajectory are in their own order too.
    """

    input_ids: torch.Tensor  # [R] int64
    position_ids: torch.Tensor  # [R] int64, the depth of the row in its tree
    starts: torch.Tensor  # [G] int64, first row of each segment, a run of rows that the same trajectories share
    parents: torch.Tensor  # [G] int64, the segment that it continues, -1 for the beginning of a tree
    row_stops: torch.Tensor  # [R] int64, one past the last row that descends from this one
    rows: torch.Tensor  # [N] int64, sorted
    targets: torch.Tensor  # [N] int64
    token_weights: torch.Tensor  # [N] float32, as in `PackedBatch`
    turn_ids: torch.Tensor  # [N] int32, which assistant turn of its trajectory a target belongs to
    segment_ids: torch.Tensor  # [N] int64, which trajectory of `indices` an entry belongs to
    active: torch.Tensor  # [A] int64, entries of a non-zero weight
    indices: list[int]  # [S] Trajectory.index
    problem_ids: list[str]  # [S]
    sample_weights: torch.Tensor  # [S] float32, Trajectory.weight
    flat: PackedBatch  # the same trajectories end to end, in the order of `indices`
    flat_rows: (
        torch.Tensor
    )  # [T] int64, of each token of `flat` its row: hidden[flat_rows] are the hidden states of `flat`
    cut_tokens: int = 0  # prompt tokens left out so that a trajectory fits
    advantages: torch.Tensor | None = None  # [N] float32
    rollout_logprobs: torch.Tensor | None = None  # [N] float32

    def to(self, device: torch.device | str) -> TreeBatch:
        """The same batch on another device."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(
            self, **{k: v.to(device) for k, v in moved.items() if isinstance(v, (torch.Tensor, PackedBatch))}
        )


def is_whole(text: str) -> bool:
    """Whether text holds whole characters alone: JSON may spell half of a surrogate pair, which no tokenizer takes."""
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)
