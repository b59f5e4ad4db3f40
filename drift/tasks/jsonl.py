"""Problems from a JSON Lines file, checked by the scorer that `task.scorer` names."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drift.tasks.base import SPLITS, Split, TaskError, canonical, problem_id, split_of
from drift.tasks.framing import Framing
from drift.tasks.scorers import Scorer, Verdict, load_scorer
from drift.types import Problem, is_whole

if TYPE_CHECKING:
    from drift.config import TaskConfig

logger = logging.getLogger(__name__)


class JsonlTask:
    """Lines of {"prompt", "answer"} and, if wanted, "split" ("warm", "train" or "eval") and "system", scored by `task.scorer`.

    Without "split" a row goes where its key's hash sends it; a file that names one must name it in every row. A row with the
    text and the answer of an earlier one counts once, or is a problem of its own with `task.duplicates` keep. What
    looks like the same problem in two splits is logged as a warning, with both lines. Asking for more problems than a
    split holds is an error.
    """

    def __init__(self, config: TaskConfig, scorer: Scorer | None = None) -> None:
        if config.path is None:
            raise TaskError("task.path is not set: task.kind='jsonl' needs a file of {'prompt', 'answer'} lines")
        self.config = config
        self.answer_tag, self.framing = config.answer_tag, Framing.of(config)
        self._splits: dict[str, dict[str, Problem]] = {split: {} for split in SPLITS}
        self._named: bool | None = None  # whether rows say their split
        self._seen: dict[tuple[str, str], tuple[str, int]] = {}  # (key, answer): the split and line it was on first
        for line, row in _json_lines(Path(config.path)):
            self._add(line, row)
        self.scorer = scorer or load_scorer(config)

    def _add(self, line: int, row: dict[str, Any]) -> None:
        where = f"{self.config.path}:{line}"
        for name in ("prompt", "answer", *(("system",) if "system" in row else ())):
            if not isinstance(row.get(name), str | int | float) or isinstance(row[name], bool):
                found = repr(row[name]) if name in row else f"missing beside {', '.join(map(repr, row)) or 'nothing'}"
                raise TaskError(f"{where}: {name!r} is {found}; it must be text or a number")
            if not is_whole(str(row[name])):
                raise TaskError(f"{where}: {name!r} is {row[name]!r}, which holds half a character; spell it whole")
        named = "split" in row
        if self._named not in (None, named):
            raise TaskError(
                f"{where}: 'split' is {'there' if named else 'missing'}, unlike above; all rows say it, or none"
            )
        self._named = named
        prompt, answer = str(row["prompt"]), str(row["answer"])
        key = canonical(prompt)
        split = row.get("split", split_of(key))
        if split not in SPLITS:
            raise TaskError(f"{where}: 'split' is {split!r}; it must be one of {list(SPLITS)}")
        first, before = self._seen.setdefault((key, answer.strip()), (split, line))
        if first != split:
            logger.warning(
                "%s: this problem looks like the one on line %d, which is in split %r; this one is in %r",
                where,
                before,
                first,
                split,
            )
        copies = (problem_id(prompt, answer, copy) for copy in count())
        name = next(copies)
        while self.config.duplicates == "keep" and name in self._splits[split]:
            name = next(copies)
        system = str(row["system"]) if "system" in row else self.framing.system
        problem = Problem(name, self.framing.prompt(prompt), answer, {"line": line}, system)
        self._splits[split].setdefault(name, problem)

    def problems(self, split: Split) -> list[Problem]:
        """The first `task.{split}_problems` of the split in the file's order; TaskError when there are fewer."""
        count, found = getattr(self.config, f"{split}_problems"), list(self._splits[split].values())
        if len(found) < count:
            raise TaskError(
                f"task.{split}_problems={count}: {self.config.path} holds {len(found)} distinct problems for this "
                f"split; ask for fewer, add rows, or give each row a 'split'"
            )
        return found[:count]

    def verify(self, problem: Problem, answer: str) -> bool:
        """Whether the scorer finds the answer right."""
        return float(self.verify_many([(problem, answer)])[0]) >= 1

    def verify_many(self, pairs: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        """The scorer's reward for each pair."""
        return self.scorer.score(pairs)

    def close(self) -> None:
        """Ends the scorer's workers."""
        self.scorer.close()


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if not path.is_file():
        raise TaskError(f"task.path={str(path)!r} is not a file")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:
                raise TaskError(f"{path}:{number}: not JSON in UTF-8: {error}") from error
            if not isinstance(row, dict):
                raise TaskError(f"{path}:{number}: a {type(row).__name__}; each line must be an object")
            yield number, row
