"""Signs of trouble in a training: steps that are not finite, gradient norms that jump, few effective samples, a sampler
whose log-probs differ from the policy's.

A step whose loss or gradient is not finite changes nothing. It is counted, and its batch is written to
`skipped/` in the run's folder, one trajectory a line with its token ids, turns and weight.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Protocol

from drift import files
from drift.training.meter import StepResult
from drift.types import Trajectory

WINDOW = 50  # finite steps whose gradient norms the next one is compared with
LEAST = 10  # of them, before anything is said
CLIPPED = 0.5  # share of importance ratios beyond their clip that is too many


class TrainingError(RuntimeError):
    """A training whose steps are not finite; the message names the batch and the remedy."""


class Counts(Protocol):
    """`TrainStats` and `OnlineStats` are some."""

    steps: int
    skipped: int
    skipped_in_a_row: int


class Guards:
    """Looks at every step of one training; `warnings` are the last step's, for the log's reader.

    spike: how many times the median of recent gradient norms is too much. low_ess: share of the batch that is too few.
    gap: distance in nats, averaged over tokens, between the sampler's log-probs and the policy's that is too much.
    """

    def __init__(self, spike: float, low_ess: float, gap: float) -> None:
        self.spike, self.low_ess, self.gap = spike, low_ess, gap
        self._norms: deque[float] = deque(maxlen=WINDOW)
        self._few = False

    def warnings(self, result: StepResult, ess: float | None = None, sampler_kl: float | None = None) -> list[str]:
        """One line for each sign of trouble in the step.

        ess: effective sample size as a share of the batch. sampler_kl: mean of the sampler's log-prob − the policy's.
        """
        said = []
        if not result.skipped:
            usual = median(self._norms) if len(self._norms) >= LEAST else math.inf
            if result.grad_norm > self.spike * usual:
                said.append(f"the gradient norm jumps to {result.grad_norm:.3g}, from a median of {usual:.3g}")
            self._norms.append(result.grad_norm)
        few = ess is not None and 0 < ess < self.low_ess
        if few and not self._few:  # once, until it has been better
            said.append(f"the effective sample size is {ess:.1%} of the batch: a few trajectories outweigh all others")
        self._few = few
        return said if sampler_kl is None else said + ratio_warnings(sampler_kl, self.gap)


def ratio_warnings(sampler_kl: float, gap: float, clipped: float = 0.0) -> list[str]:
    """One line for each sign that importance ratios explode. clipped: share of the trajectories whose ratio is clipped."""
    said = []
    if not abs(sampler_kl) <= gap:
        said.append(
            f"the sampler's log-probs are {sampler_kl:+.3g} nats a token from the policy's: the two are not the same "
            "model, or the importance ratios explode"
        )
    if clipped > CLIPPED:
        said.append(
            f"the importance ratios explode: {clipped:.0%} of the trajectories that another policy sampled have one "
            "beyond weights.off_policy_clip, so their weights say little about this policy; sample anew"
        )
    return said


def keep_batch(
    folder: Path | None, prefix: str, step: int, result: StepResult, batch: Sequence[Trajectory]
) -> Path | None:
    """Writes a skipped step's batch into `folder`/skipped; returns the file, or None without a folder."""
    if folder is None:
        return None
    path = folder / "skipped" / f"{prefix.replace('/', '-')}-step-{step}.jsonl"
    head = {"step": step, "loss": repr(result.loss), "grad_norm": repr(result.grad_norm)}
    rows = [
        {
            "prompt_id": t.problem_id,
            "index": t.index,
            "weight": t.weight,
            "token_ids": list(t.token_ids),
            "turns": [[turn.start, turn.stop] for turn in t.turns],
        }
        for t in batch
    ]
    with files.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, "".join(json.dumps(row) + "\n" for row in (head, *rows)))
    return path


def check_row(counts: Counts, limit: int, prefix: str, result: StepResult, saved: Path | None) -> None:
    """Raises TrainingError after `limit` skipped steps in a row. saved: the checkpoint of the last finite weights."""
    if counts.skipped_in_a_row < limit:
        return
    raise TrainingError(
        f"{prefix}: {counts.skipped_in_a_row} steps in a row were skipped, up to step {counts.steps}, since their loss "
        f"({result.loss}) or gradient norm ({result.grad_norm}) was not finite. The weights are those after the last "
        f"finite step{f', in {saved}' if saved else ''}; the batches are in skipped/. Lower train.lr, or look at those "
        "batches; the same command tries the next step (train.max_skipped)"
    )


def check_end(counts: Counts, prefix: str) -> None:
    """Raises TrainingError if not one step of the training was finite."""
    if counts.steps and counts.skipped == counts.steps:
        raise TrainingError(
            f"{prefix}: all {counts.steps} steps were skipped, since no loss or gradient was finite: nothing was trained. "
            "Lower train.lr, or look at the batches in skipped/"
        )
