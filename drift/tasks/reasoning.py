"""Problems of reasoning-gym's generators, drawn so that the splits share nothing, and checked by the generators' scorers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from drift.tasks.base import NUMBER, SPLITS, Split, TaskError, canonical, problem_id, split_of
from drift.tasks.framing import Framing
from drift.tasks.scorers import Verdict, load_scorer
from drift.types import Problem

if TYPE_CHECKING:
    from drift.config import TaskConfig

MOST = {"warm": 2000, "train": 192, "eval": 1000}  # problems, if a run does not say how many: a generator has no end
_INDEX_RANGE = 10_000_000  # generator items that belong to one split of one seed
_UNORDERED = ("gcd", "lcm")  # generators whose numbers may be given in any order


class ReasoningGymTask:
    """Any reasoning-gym generator, by name and options; right means that its scorer pays exactly 1, if `task.scorer` is null.

    A problem's metadata is the generator's whole entry, which is what its scorer reads, in a worker without rights.
    Raises TaskError for a scorer that evaluates answers when the system cannot take a worker's rights away.
    """

    def __init__(self, config: TaskConfig) -> None:
        from reasoning_gym.factory import DATASETS

        if config.name not in DATASETS:
            raise TaskError(f"task.name={config.name!r} is no reasoning-gym generator; there are: {sorted(DATASETS)}")
        self.config = config
        self.answer_tag, self.framing = config.answer_tag, Framing.of(config)
        self._generator("train", size=1)  # options that do not suit it are named now
        self.scorer = load_scorer(config)
        self._cache: dict[str, list[Problem]] = {}

    def _generator(self, split: Split, size: int) -> Any:
        """The generator whose item 0 is the first index of the split's range (item i of seed s is Random(s + i))."""
        from reasoning_gym.factory import create_dataset

        offset = (self.config.seed * len(SPLITS) + SPLITS.index(split)) * _INDEX_RANGE
        try:
            return create_dataset(self.config.name, **{**self.config.options, "size": size, "seed": offset})
        except (TypeError, AssertionError, ValueError) as error:
            options = self.config.options
            raise TaskError(
                f"task.options={options!r} does not suit the generator {self.config.name!r}: {error}"
            ) from error

    def _key(self, entry: dict[str, Any]) -> str:
        expression = entry["metadata"].get("expression")
        if isinstance(expression, str):
            return canonical(expression)
        if self.config.name in _UNORDERED:
            return " ".join(sorted(re.findall(NUMBER, entry["question"])))
        return canonical(entry["question"])

    def problems(self, split: Split) -> list[Problem]:
        """`task.{split}_problems` distinct problems, null being at most MOST; TaskError when the generator has too few."""
        if split not in self._cache:
            self._cache[split] = self._draw(split, getattr(self.config, f"{split}_problems"))
        return self._cache[split]

    def _draw(self, split: Split, asked: int | None) -> list[Problem]:
        count = MOST[split] if asked is None else asked
        draws = min(4000 + 16 * count, _INDEX_RANGE)  # a split gets at least three draws in ten
        generator, found = self._generator(split, draws), dict[tuple[str, str], Problem]()
        last_new, patience = 0, 2000 + 4 * count  # draws without a new problem before the well counts as dry
        for index in range(draws):
            if len(found) == count:
                return list(found.values())
            if index - last_new > patience:
                break
            entry = generator[index]
            key, answer = self._key(entry), str(entry["answer"])
            if split_of(key, self.config.warm_share, self.config.eval_share) == split and (key, answer) not in found:
                last_new = index
                name, prompt = problem_id(entry["question"], answer), self.framing.prompt(entry["question"])
                found[key, answer] = Problem(name, prompt, answer, entry, self.framing.system)
        if (asked is None and found) or len(found) == count:
            return list(found.values())
        raise TaskError(
            f"task.{split}_problems={count}: the generator {self.config.name!r} with options {self.config.options!r} "
            f"has only {len(found)} distinct problems for this split (symmetric forms count once); widen its options "
            f"or ask for fewer"
        )

    def verify(self, problem: Problem, answer: str) -> bool:
        """Whether the scorer finds the answer right."""
        return float(self.verify_many([(problem, answer)])[0]) >= 1

    def verify_many(self, pairs: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        """The scorer's reward for each pair."""
        return self.scorer.score(pairs)

    def close(self) -> None:
        """Ends the scorer's workers."""
        self.scorer.close()
