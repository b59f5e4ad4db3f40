"""The rows that count. Rows that nothing reads are dropped before the first GEMM: most of a multi-turn batch.

T hidden rows; N entries (targets), N = T unless several entries share a hidden row (`rows`). A `Plan` keeps the entries that
something reads, and their hidden rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import overload

import torch
from torch import Tensor

from drift_kernels.calls import Call, DistillCall
from drift_kernels.divergences import DistillTokens
from drift_kernels.formulas import Tokens
from drift_kernels.tensors import Inputs

KAPPA = 1.5  # constant of the chunk-size model, as `python -m bench.chunks` measures it
# A caller who asks for one of these reads every unmasked row.
DENSE_OUTPUTS = frozenset({"logprobs", "entropy", "lse", "is_top1", "mean_logits", "log_sum_sq_probs", "kl", "ratio"})


@dataclass(frozen=True)
class Plan:
    """Entries and hidden rows that take part, in order."""

    count: int  # R, hidden rows that take part
    index: Tensor | None  # [R] int64, indices of these hidden rows; None: all T
    entries: Tensor | None  # [M] int64, indices of the entries; None: all N
    row_ptr: Tensor | None  # [R + 1] int64, entries of each kept row (CSR); None: one each
    edges: Tensor | None = None  # row_ptr on the CPU

    @staticmethod
    def of(mask: Tensor, rows: Tensor | None) -> Plan:
        """The plan for the entries in `mask` [N]; `rows` [N] int64 sorted, or None if entry i reads hidden row i.

        One read from a GPU.
        """
        if rows is None:
            entries = mask.nonzero().squeeze(1)
            everything = entries.numel() == mask.numel()
            return (
                Plan(entries.numel(), None, None, None) if everything else Plan(entries.numel(), entries, entries, None)
            )
        device, total = rows.device, mask.numel()
        if device.type != "cpu":
            mask, rows = torch.stack((mask.to(torch.int64), rows)).cpu()
            mask = mask != 0
        entries = mask.nonzero().squeeze(1)
        index, counts = torch.unique_consecutive(rows[entries], return_counts=True)
        row_ptr = torch.zeros(index.numel() + 1, dtype=torch.int64)
        torch.cumsum(counts, 0, out=row_ptr[1:])
        kept = None if entries.numel() == total else entries.to(device, non_blocking=True)
        on_device = [values.to(device, non_blocking=True) for values in (index, row_ptr)]
        return Plan(index.numel(), on_device[0], kept, on_device[1], row_ptr)

    @overload
    def take_entries(self, values: Tensor) -> Tensor: ...
    @overload
    def take_entries(self, values: None) -> None: ...
    @overload
    def take_entries(self, values: Tensor | None) -> Tensor | None: ...

    def take_entries(self, values: Tensor | None) -> Tensor | None:
        """The kept entries [M] of [N] values."""
        return values if values is None or self.entries is None else values[self.entries]

    def entries_of(self, start: int, stop: int) -> tuple[int, int]:
        """[first, last) of the kept entries, for rows [start, stop) of the plan."""
        if self.edges is None:
            return start, stop
        return int(self.edges[start]), int(self.edges[stop])

    def take_rows(self, values: Tensor | None) -> Tensor | None:
        """The kept hidden rows [R] of [T] values."""
        return values if values is None or self.index is None else values[self.index]


def unmasked(targets: Tensor, active: Tensor | None, ignore_index: int) -> Tensor:
    """[N] bool: the entry has a target and lies in `active`."""
    mask = targets != ignore_index
    return mask if active is None else mask & torch.zeros_like(mask).index_fill(0, active, True)


def counting(targets: Tensor, active: Tensor | None, tokens: Tokens, call: Call) -> Tensor:
    """[N] bool: something reads the entry.

    An entry is read unless its target is ignored, it lies outside `active`, or both hold: no requested output reads it,
    and its loss is zero whatever its log-prob (weight 0; advantage 0 without another term). If a loss reads other tokens,
    an entry is read as long as any of those counts.
    """
    mask, spec = unmasked(targets, active, call.head.ignore_index), call.spec
    if DENSE_OUTPUTS.intersection(call.outputs) or spec.scope == "batch":
        return mask
    counts = mask
    if tokens.weights is not None:
        counts = counts & (tokens.weights != 0)
    if tokens.advantages is not None and spec.vanishes:
        advantaged = mask & (tokens.advantages != 0)
        counts = counts & (_of_a_sequence(advantaged, tokens) if spec.traits.mean_advantage else advantaged)
    if not spec.reads_sequences:
        return counts
    return mask & _of_a_sequence(counts, tokens)


def _of_a_sequence(entries: Tensor, tokens: Tokens) -> Tensor:
    """Entries of the sequences that hold one of `entries` [N] bool."""
    assert tokens.segments is not None
    assert tokens.lengths is not None
    alive = torch.zeros_like(tokens.lengths, dtype=torch.bool)
    return alive.index_put_((tokens.segments[entries],), entries.new_ones(()))[tokens.segments]


def distillation_rows(x: Inputs, lessons: DistillTokens, call: DistillCall) -> tuple[Tensor, Tensor]:
    """[T] bool each: the row needs the student's logits; it needs the teacher's too."""
    mask = unmasked(x.targets, x.active, call.student.head.ignore_index)
    teacher = mask if lessons.taught is None else mask & lessons.taught
    if not (call.teach_all or call.exploration) and lessons.weights is not None:
        teacher = teacher & (lessons.weights != 0)
    if call.policy:
        return teacher | counting(x.targets, x.active, x.tokens, call.student), teacher
    return (mask if DENSE_OUTPUTS.intersection(call.student.outputs) else teacher), teacher


def can_use_active_as_plan(rows: Tensor | None, call: Call, backend: str) -> bool:
    """Whether `active` is the plan, so that a GPU is not waited for. It is not if

    - the backend is "cpu": reading values costs nothing there, and masked entries of `active` are dropped;
    - entries share hidden rows: how many rows there are must be read;
    - the loss reads several tokens: a masked one among them would count.
    """
    return backend != "cpu" and rows is None and call.spec.scope == "token"


def check_targets(kept: Tensor, vocabulary: int, ignore_index: int) -> None:
    """IndexError unless all targets of the entries that count lie in the vocabulary."""
    if kept.numel() and not 0 <= int(kept.min()) <= int(kept.max()) < vocabulary:
        raise IndexError(
            f"targets hold {int(kept.min())}…{int(kept.max())}, but the vocabulary is [0, {vocabulary}); "
            f"mask positions with ignore_index={ignore_index}"
        )


def check_temperature(kept: Tensor | None) -> None:
    """ValueError unless the temperatures of the rows that count are positive. NaN may pass: it shows."""
    if kept is not None and bool((kept <= 0).any()):
        raise ValueError(f"temperature holds {float(kept.min())}; it must be positive: score greedy samples with 1.0")


def check_finite(tokens: Tokens, entries: Tensor | slice = slice(None)) -> None:
    """ValueError naming the first of `tokens` that holds a NaN or an infinity at `entries`, those that count."""
    values = {
        "advantages": tokens.advantages,
        "old_logprobs": tokens.old,
        "ref_logprobs": tokens.ref,
        "rollout_logprobs": tokens.rollout,
        "token_weights": tokens.weights,
    }
    for name, value in values.items():
        bad = 0 if value is None else int((~torch.isfinite(value[entries])).sum())
        if bad:
            raise ValueError(
                f"{name} has {bad} non-finite values on rows that count; mask them with ignore_index or weight 0"
            )


def chunk_rows(count: int, width: int, limit: int) -> int:
    """How many of `count` rows of `width` to a chunk: √(κ·count·width), at most the `limit` that the workspace holds.

    A chunk costs by itself (dweight is fetched and stored once more), and a larger buffer for logits costs pages to be
    cleared: both in proportion to the vocabulary, which drops out. `bench/chunks.py` has the model and measures κ.
    """
    return max(1, min(limit, int((KAPPA * count * width) ** 0.5)))


def even_spans(count: int, largest: int) -> list[tuple[int, int]]:
    """[0, count) cut into the fewest spans of at most `largest` rows, all about equally long."""
    pieces = -(-count // max(largest, 1))
    edges = [count * i // pieces for i in range(pieces + 1)] if pieces else [0]
    return list(pairwise(edges))


def sequence_spans(
    segments: Tensor | None, count: int, aim: int, largest: int, *, shared: bool
) -> list[tuple[int, int]]:
    """[0, count) rows cut into spans of about `aim` rows that no sequence crosses; only one sequence may exceed `largest`.

    `segments` [count] names the sequence of each row. Without it, if it is not in order, or if sequences share rows
    (`shared`), there is one span.
    """
    if not count:
        return []
    if segments is None or shared or bool((segments.diff() < 0).any()):
        return [(0, count)]
    lengths = torch.unique_consecutive(segments, return_counts=True)[1].tolist()
    aim = -(-count // -(-count // aim))  # so that spans are about equally long
    spans, start, size = [], 0, 0
    for length in lengths:
        if size and (size >= aim or size + length > largest):
            spans.append((start, start + size))
            start, size = start + size, 0
        size += length
    return [*spans, (start, start + size)]
