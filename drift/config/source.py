"""Where rows of problems come from, and the evaluation sets of a run."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from drift.config.section import Count, Positive, Section, Share

FOLDER = r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$"
FUNCTION = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*"
SCORERS = ("exact", "math", "choice", "numeric", "tools")  # of `task.scorer`, besides module:function
COLUMNS = ("prompt", "messages", "answer", "system", "split")  # what a row of problems is read for


def known_scorer(scorer: str | None) -> None:
    """Raises ValueError for a scorer that is none of ours and no import path."""
    if scorer is not None and scorer not in SCORERS and not re.fullmatch(FUNCTION, scorer):
        raise ValueError(f"scorer {scorer!r} must be one of {', '.join(SCORERS)}, module:function, or null")


class SourceConfig(Section):
    """A file or a data set of problems, a row each (docs/data.md)."""

    path: str | None = None  # a JSONL or Parquet file; with kind dataset, a hub name or a folder
    subset: str | None = None  # of a data set on the hub, its configuration, such as main
    columns: dict[str, str] = {}  # our name to theirs: {prompt: question, answer: target}
    template: str | None = None  # the prompt, made of the row's columns: "{question}\n\n{options}"

    @model_validator(mode="after")
    def _columns_are_ours(self) -> SourceConfig:
        if unknown := sorted(self.columns.keys() - set(COLUMNS)):
            raise ValueError(
                f"columns names {', '.join(map(repr, unknown))}; keys must be among {', '.join(COLUMNS)}, and values the "
                "file's own columns"
            )
        if self.template is not None and self.columns.keys() & {"prompt", "messages"}:
            raise ValueError("template makes the prompt, and columns names one too; leave one of them out")
        return self


class EvalSet(SourceConfig):
    """One of several evaluation sets; what it does not say is the task's."""

    name: Annotated[str, Field(pattern=FOLDER)]  # of its row in tables
    kind: Literal["jsonl", "parquet", "dataset"] = "jsonl"
    split: str = "test"  # of a data set
    problems: Positive | None = None  # the first so many; null is all
    system: str | None = None  # null is the task's, here and below; "" is none
    instruction: str | None = None
    format_rule: str | None = None
    prefill: str | None = None
    parser: Literal["strict", "lenient", "whole"] | None = None
    scorer: str | None = None
    tolerance: Share | None = None

    @model_validator(mode="after")
    def _is_complete(self) -> EvalSet:
        known_scorer(self.scorer)
        if self.path is None:
            raise ValueError(f"path must name the file or the data set of the evaluation set {self.name!r}")
        return self


class ProblemsConfig(SourceConfig):
    """How many problems a task has for what."""

    train_split: str = "train"  # of a data set, as is eval_split
    eval_split: str | None = None  # null holds out eval_share of train_split
    eval_share: Share = 0.3  # of problems without a split of their own, held out for evaluation
    warm_share: Share = 0.4  # likewise, for the warm start; with model.path 0
    warm_problems: Count | None = None  # null: all there are; of a generator, at most 2,000
    train_problems: Positive | None = None  # null: all there are; of a generator, at most 192
    eval_problems: Positive | None = None  # null: all there are; of a generator, at most 1,000

    @model_validator(mode="after")
    def _shares_leave_some_to_train(self) -> ProblemsConfig:
        if self.eval_share + self.warm_share >= 1:
            raise ValueError(
                f"eval_share {self.eval_share} and warm_share {self.warm_share} leave nothing to train; their sum must be "
                "below 1"
            )
        return self
