"""Measures of a training: a batch in numbers, a step's outcome, running counts, and the names in the log."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from drift.training import layout
from drift.types import PackedBatch, Trajectory, TreeBatch


class Stopwatch:
    """Seconds since it was made: by the wall clock, and of this process on all its processors."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        """By the names of the log. The second does not depend on other work on the machine."""
        return {"step_time": time.perf_counter() - self._wall, "step_cpu_time": time.process_time() - self._cpu}


@dataclass
class TrainStats:
    """The counts of a training, over all ranks."""

    steps: int = 0  # optimizer steps, skipped ones included
    tokens: int = 0  # that went through the model
    trained_tokens: int = 0  # that the loss read
    cut_tokens: int = 0  # left out so that a trajectory fits
    dropped: int = 0  # trajectories of weight 0 met, which cost no compute
    skipped: int = 0  # steps without an update, since loss or gradient was not finite
    skipped_in_a_row: int = 0  # up to the last step
    seconds: float = 0.0  # wall clock, that of earlier runs included
    losses: list[float] = field(default_factory=list)  # one a step

    def count(self, totals: Totals, result: StepResult, seconds: float) -> None:
        """Adds a step."""
        self.steps += 1
        self.tokens += int(totals.tokens)
        self.trained_tokens += int(totals.trained_tokens)
        self.cut_tokens += int(totals.cut_tokens)
        self.dropped += int(totals.samples - totals.packed)
        self.skipped += result.skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if result.skipped else 0
        self.seconds += seconds
        self.losses.append(result.loss)


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, the same on every rank."""

    loss: float
    grad_norm: float  # before clipping
    skipped: bool  # not finite: neither weights nor moments have moved
    stop: int = 0  # the signal by which a rank was asked to end, 0 for none


@dataclass(frozen=True)
class Totals:
    """A batch in numbers: one rank's part of it, or the sum over all."""

    samples: float  # trajectories, those of weight 0 included
    weight: float  # Σw
    squared_weight: float  # Σw²
    tokens: float
    trained_tokens: float
    cut_tokens: float
    packed: float  # trajectories that went into a pack
    flat_tokens: float  # of those, shared ones as often as they occur
    pairs: float  # of a token and one that it sees, which is attention's work
    flat_pairs: float  # without sharing

    @property
    def ess(self) -> float:
        """Effective sample size (A3), as a share of the samples."""
        return self.weight**2 / self.squared_weight / self.samples if self.squared_weight else 0.0


def measure(mine: Sequence[Trajectory], packs: Sequence[PackedBatch | TreeBatch]) -> Totals:
    """This rank's part of a batch: its trajectories, and the packs they went into."""
    flats = [layout.end_to_end(p) for p in packs]
    return Totals(
        samples=len(mine),
        weight=math.fsum(t.weight for t in mine),
        squared_weight=math.fsum(t.weight**2 for t in mine),
        tokens=sum(len(p.input_ids) for p in packs),
        trained_tokens=sum(len(p.active) for p in packs),
        cut_tokens=sum(p.cut_tokens for p in packs),
        packed=sum(len(p.indices) for p in packs),
        flat_tokens=sum(len(p.input_ids) for p in flats),
        pairs=sum(int((p.position_ids + 1).sum()) for p in packs),
        flat_pairs=sum(int((p.position_ids + 1).sum()) for p in flats),
    )


def metrics(
    stats: TrainStats, totals: Totals, result: StepResult, lr: float, took: dict[str, float]
) -> dict[str, float]:
    """The metrics of a step, by the names other trainers use; `took` is the reading of a `Stopwatch` at its end."""
    return {
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "lr": lr,
        "ess": totals.ess,
        "num_tokens": stats.tokens,
        "trained_tokens": stats.trained_tokens,
        "cut_tokens": stats.cut_tokens,
        "dropped": stats.dropped,
        "tokens_shared": 1 - totals.tokens / totals.flat_tokens if totals.flat_tokens else 0.0,
        "attention_shared": 1 - totals.pairs / totals.flat_pairs if totals.flat_pairs else 0.0,
        "skipped_steps": stats.skipped,
        **took,
        "perf/tokens_per_second": totals.tokens / took["step_time"],
        "perf/peak_memory": _peak_memory(),
    }


def _peak_memory() -> float:
    """GiB: this process's allocations on its GPU, or its resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
