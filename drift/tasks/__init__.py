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
    parse_answer,
    problem_id,
    rules,
    split_of,
    with_rules,
)
from drift.tasks.jsonl import JsonlTask
from drift.tasks.reasoning import ReasoningGymTask

if TYPE_CHECKING:
    from drift.config import TaskConfig

__all__ = [
    "SPLITS",
    "JsonlTask",
    "ReasoningGymTask",
    "Split",
    "Task",
    "TaskError",
    "canonical",
    "load_task",
    "normalise",
    "parse_answer",
    "problem_id",
    "rules",
    "split_of",
    "with_rules",
]


def load_task(config: TaskConfig) -> Task:
    """The task that `config.kind` names."""
    return ReasoningGymTask(config) if config.kind == "reasoning_gym" else JsonlTask(config)
