"""Counts checks that a verifier, a tool or an environment failed on, and ends a stage when they are too many.

A failed check counts as a wrong answer, so a few cost a little and many make every number of a run wrong. The stage ends when
every check of a batch failed, or more than a share of all its checks.
"""

from __future__ import annotations

from collections.abc import Sequence

ENOUGH = 8  # failed checks from which a batch, or the share, can end a stage that has had other verdicts


class CheckError(RuntimeError):
    """A verifier or an environment that fails too often; the message holds its last traceback."""


class Failures:
    """The checks of one stage. allowed: the share that may fail."""

    def __init__(self, allowed: float = 0.05) -> None:
        self.allowed, self.checks, self.failed, self.last = allowed, 0, 0, ""

    def add(self, reasons: Sequence[str]) -> None:
        """A batch of checks, each with the reason why it failed, or "". Raises CheckError when too many have."""
        failed = [reason for reason in reasons if reason]
        self.checks += len(reasons)
        self.failed += len(failed)
        if not failed:
            return
        self.last = failed[-1]
        whole = len(failed) == len(reasons)
        if whole and (self.failed == self.checks or len(failed) >= ENOUGH):
            raise CheckError(
                f"all {len(failed)} checks of a batch failed ({self.failed} of {self.checks} so far); {self._last()}"
            )
        if self.failed >= ENOUGH and self.failed > self.allowed * self.checks:
            raise CheckError(
                f"{self.failed} of {self.checks} checks failed, and task.max_failed={self.allowed} allows that share; "
                f"{self._last()}"
            )

    def _last(self) -> str:
        return (
            f"a failed check is no verdict, so the numbers would mean nothing. The last failure:\n{self.last.rstrip()}"
        )
