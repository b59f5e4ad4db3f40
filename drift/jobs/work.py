"""What a command works on: the task, the evaluation sets, and everything that is wrong with them, before a model is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from drift.config import Config, EvalSet, TaskConfig
from drift.rollouts.environments import load_environment
from drift.tasks import SandboxError, Task, TaskError, load_task
from drift.types import Problem

T = TypeVar("T")


@dataclass(slots=True)
class Work:
    """Close it, so that scorers end."""

    task: Task
    sets: dict[str, Task] = field(default_factory=dict)  # by name; empty when the task's own problems are evaluated

    @property
    def evaluations(self) -> dict[str, tuple[Task, list[Problem]]]:
        """The problems of each evaluation set; the task's own under the name ""."""
        return {name: (task, task.problems("eval")) for name, task in (self.sets or {"": self.task}).items()}

    def close(self) -> None:
        """Ends the scorers."""
        for task in (self.task, *self.sets.values()):
            task.close()


def prepare(config: Config, *, train: bool = True, evaluate: bool = True) -> Work:
    """Loads the task, the evaluation sets and the environment of a run. train, evaluate: which problems will be needed.

    Raises TaskError with all complaints, a line each: rows that cannot be read, and splits that hold too few problems.
    """
    complaints = list[str]()

    def tried(call: Callable[[], T], where: str = "") -> T | None:
        try:
            return call()
        except (TaskError, SandboxError) as error:
            complaints.extend(f"{where}{line}" for line in str(error).splitlines())
        return None

    task, sets = tried(lambda: load_task(config.task)), dict[str, Task]()
    if config.rollout.environment is not None:
        tried(lambda: load_environment(config.rollout.environment or ""))
    for one in config.eval.sets if evaluate else ():
        where = f"eval.sets, {one.name!r}: "
        loaded = tried(lambda one=one: load_task(of_set(config.task, one)), where)
        if loaded is not None:
            sets[one.name] = loaded
            tried(lambda loaded=loaded: _some(loaded, "eval"), where)
    if task is not None:
        warm = config.warm_start.enabled and config.model.path is None
        wanted = ["warm"] * warm + ["train"] * train + ["eval"] * (evaluate and not config.eval.sets)
        for split in wanted:
            tried(lambda split=split: _some(task, split))
    if complaints or task is None:
        for opened in ([task] if task else []) + list(sets.values()):
            opened.close()
        raise TaskError("\n".join(complaints))
    return Work(task, sets)


def _some(task: Task, split: Any) -> None:
    if not task.problems(split):
        raise TaskError(
            f"no problem is left for the split {split!r}; add rows, give rows a 'split', or change task.eval_share"
        )


def of_set(task: TaskConfig, one: EvalSet) -> TaskConfig:
    """The task's settings with those of an evaluation set in their place; all its rows are evaluated."""
    own = ("system", "instruction", "format_rule", "prefill", "parser", "scorer", "tolerance")
    said = {key: getattr(one, key) for key in own if getattr(one, key) is not None}
    source = {key: getattr(one, key) for key in ("kind", "path", "subset", "columns", "template")}
    sizes = {"eval_problems": one.problems, "train_problems": None, "train_split": one.split, "eval_split": None}
    shares = {"eval_share": 1.0, "warm_share": 0.0}
    return task.model_copy(update={**said, **source, **sizes, **shares})
