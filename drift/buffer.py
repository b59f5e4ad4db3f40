"""The success buffer (arXiv 2606.30345; B4): verified answers to past problems, served as demonstrations later.

    >>> from drift.buffer import BufferConfig, SuccessBuffer
    >>> buffer = SuccessBuffer(BufferConfig(problems=1000))
    >>> buffer.add("p1", "<think>7 and 8 …</think>It is 15.", score=1.0, step=3)
    True
    >>> [entry.text for entry in buffer.demonstrations("p1", k=1, exclude="It is 15.")]
    ['<think>7 and 8 …</think>It is 15.']

Texts are kept and compared as they were sampled, thinking included: four derivations of one answer are four entries.
Thinking is stripped when a text is shown (`drift.online.reprompt`).

A problem's entries are ordered by (score, step), best first; or by (step, score) with `prefer_recent`. If two are
equal, the earlier one stays first: a new entry has to be better to replace an entry, or another problem. A batch is
offered as a whole (`add_batch`), and problems leave once a batch, by a heap of their best entries with lazy deletion:
an add costs the logarithm of how many there are.

Left out: sharing between ranks. Give every rank all successes of a batch in one order, or keep the buffer on one.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from drift.config.online import BufferConfig

__all__ = ["BufferConfig", "Entry", "SuccessBuffer"]

_Key = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Entry:
    """One verified answer."""

    text: str  # as it was sampled
    score: float
    step: int  # at which it was sampled
    entropy: float | None = None  # nats a token, of the sequence it ended; None if nobody measured it

    @property
    def length(self) -> int:
        """Characters of text."""
        return len(self.text)


@dataclass(slots=True)
class _Shelf:
    entries: list[Entry]  # best first
    number: int  # grows with the problems that ever came in


class SuccessBuffer:
    """problem id → its best entries. Add verified successes only; the buffer cannot tell."""

    def __init__(self, config: BufferConfig) -> None:
        self.config = config
        self._shelves: dict[str, _Shelf] = {}
        self._heap: list[
            tuple[_Key, int, str]
        ] = []  # (best entry's key, −number, problem); stale ones stay for a while
        self._numbers = count()
        self._counts = dict.fromkeys(("added", "refused", "evicted", "asked", "served"), 0)

    def __len__(self) -> int:
        """How many problems it knows."""
        return len(self._shelves)

    def add(self, problem_id: str, text: str, score: float, step: int, entropy: float | None = None) -> bool:
        """A batch of one success; returns whether it is now in the buffer (`add_batch`)."""
        return self.add_batch([(problem_id, Entry(text, score, step, entropy))])[0]

    def add_batch(self, successes: Sequence[tuple[str, Entry]]) -> list[bool]:
        """Offers verified answers, as (problem id, entry); says of each whether it is in the buffer after the batch.

        Refused: a score below `min_score`, a text without content, a text that is there already with no lower score and
        no older step, and one that is worse than a full set of entries or problems.
        Raises ValueError for a score that is not finite.
        """
        for problem_id, entry in successes:
            if not math.isfinite(entry.score):
                raise ValueError(f"score is {entry.score} for problem {problem_id!r}; it must be finite")
        for problem_id, entry in successes:
            low = self.config.min_score is not None and entry.score < self.config.min_score
            if entry.text.strip() and not low:
                self._place(problem_id, entry)
        self._evict()
        kept = [any(e is entry for e in self._entries(problem_id)) for problem_id, entry in successes]
        self._counts["added"] += sum(kept)
        self._counts["refused"] += len(kept) - sum(kept)
        return kept

    def _entries(self, problem_id: str) -> list[Entry]:
        shelf = self._shelves.get(problem_id)
        return shelf.entries if shelf else []

    def _place(self, problem_id: str, entry: Entry) -> None:
        shelf = self._shelves.get(problem_id)
        if shelf is None:
            shelf = self._shelves[problem_id] = _Shelf([], next(self._numbers))
        before = self._key(shelf.entries[0]) if shelf.entries else None
        old = next((other for other in shelf.entries if other.text == entry.text), None)
        if old is not None:
            if entry.score <= old.score and entry.step <= old.step:
                return
            shelf.entries.remove(old)
        shelf.entries.append(entry)
        shelf.entries.sort(key=self._key, reverse=True)  # stable: of equals, the newcomer is last
        del shelf.entries[self.config.entries :]
        if self._key(shelf.entries[0]) != before:
            self._push(problem_id, shelf)

    def _key(self, entry: Entry) -> _Key:
        return (entry.step, entry.score) if self.config.prefer_recent else (entry.score, entry.step)

    def _push(self, problem_id: str, shelf: _Shelf) -> None:
        heapq.heappush(self._heap, (self._key(shelf.entries[0]), -shelf.number, problem_id))
        if len(self._heap) > 2 * len(self._shelves) + 1024:  # mostly stale
            self._heap = [(self._key(s.entries[0]), -s.number, name) for name, s in self._shelves.items()]
            heapq.heapify(self._heap)

    def _evict(self) -> None:
        while len(self._shelves) > self.config.problems:
            key, number, problem_id = heapq.heappop(self._heap)
            shelf = self._shelves.get(problem_id)
            if shelf is not None and -shelf.number == number and self._key(shelf.entries[0]) == key:
                del self._shelves[problem_id]
                self._counts["evicted"] += 1

    def demonstrations(
        self,
        problem_id: str,
        k: int,
        exclude: str | None = None,
        *,
        step: int | None = None,
        epoch: int | None = None,
        by_entropy: bool = False,
    ) -> list[Entry]:
        """Up to `k` entries of the problem, best first, without the text `exclude` (a sample's own, as sampled).

        step, epoch: the present ones; before `start_step` or `start_epoch` nothing is served. by_entropy: the entries of
        highest sequence entropy first; those without one come last. Raises ValueError if such a start is configured and
        the present step or epoch is missing.
        """
        for name, now, start in (
            ("step", step, self.config.start_step),
            ("epoch", epoch, self.config.start_epoch),
        ):
            if start and now is None:
                raise ValueError(f"{name} is missing: the buffer serves from start_{name} {start} on; give {name}=…")
            if start and now is not None and now < start:
                return []
        served = [entry for entry in self._entries(problem_id) if entry.text != exclude]
        if by_entropy:
            served.sort(key=lambda entry: -math.inf if entry.entropy is None else entry.entropy, reverse=True)
        served = served[:k]
        self._counts["asked"] += 1
        self._counts["served"] += bool(served)
        return served

    def metrics(self) -> dict[str, float]:
        """problems, entries and fill (of `config.problems`) now; calls of `add` and `demonstrations` since the start.

        added, refused: by `add`. evicted: problems. asked, served: calls that reached the problem, that found an entry.
        """
        entries = sum(len(shelf.entries) for shelf in self._shelves.values())
        fill = len(self._shelves) / self.config.problems
        return {"problems": len(self._shelves), "entries": entries, "fill": fill, **self._counts}

    def state_dict(self) -> dict[str, Any]:
        """All entries and counts, as JSON holds them; the order of the problems matters."""
        shelves = {
            name: [[entry.text, entry.score, entry.step, entry.entropy] for entry in shelf.entries]
            for name, shelf in self._shelves.items()
        }
        return {"problems": shelves, "counts": dict(self._counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what `state_dict` gave; under other settings entries are ordered, and the worst left out, again."""
        self._shelves, self._heap, self._numbers = {}, [], count()
        for name, entries in state["problems"].items():
            shelf = _Shelf([Entry(*values) for values in entries], next(self._numbers))
            shelf.entries.sort(key=self._key, reverse=True)
            del shelf.entries[self.config.entries :]
            self._shelves[name] = shelf
            self._push(name, shelf)
        self._evict()
        self._counts = dict(state["counts"])
