"""Problems with checkable answers, by `task.kind`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drift.tasks.base import (
    SPLITS,
    Split,
    Task,
    TaskError,
    canonical,
    normalise,
    problem_id,
    split_of,
)
from drift.tasks.framing import Framing
from drift.tasks.parsing import PARSERS, spoken
from drift.tasks.parsing import lenient as parse_answer
from drift.tasks.reasoning import ReasoningGymTask
from drift.tasks.rows import RowTask
from drift.tasks.scorers import Failed, SandboxError, Verdict

if TYPE_CHECKING:
    from drift.config import TaskConfig

__all__ = [
    "PARSERS",
    "SPLITS",
    "Failed",
    "Framing",
    "ReasoningGymTask",
    "RowTask",
    "SandboxError",
    "Split",
    "Task",
    "TaskError",
    "Verdict",
    "canonical",
    "load_task",
    "normalise",
    "parse_answer",
    "problem_id",
    "split_of",
    "spoken",
]


def load_task(config: TaskConfig) -> Task:
    """The task that `config.kind` names."""
    return ReasoningGymTask(config) if config.kind == "reasoning_gym" else RowTask(config)
