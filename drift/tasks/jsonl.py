"""Problems from a JSON Lines file, checked by math-verify."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drift.tasks.base import SPLITS, Split, TaskError, canonical, problem_id, split_of
from drift.tasks.mathverify import MathVerifier
from drift.types import Problem, is_whole

if TYPE_CHECKING:
    from drift.config import TaskConfig


class JsonlTask:
    """Lines of {"prompt", "answer"} (and, if wanted, "split": "warm" | "train" | "eval"), verified by math-verify.

    Without "split" a row goes where its key's hash sends it; a file that names one must name it in every row, and the
    same problem in two splits is an error. Asking for more problems than a split holds is one too.
    """

    def __init__(self, config: TaskConfig, verifier: MathVerifier | None = None) -> None:
        if config.path is None:
            raise TaskError("task.path is not set: task.kind='jsonl' needs a file of {'prompt', 'answer'} lines")
        self.config = config
        self.answer_tag = config.answer_tag
        self._verifier = verifier or MathVerifier()
        self._splits: dict[str, dict[str, Problem]] = {split: {} for split in SPLITS}
        self._named: bool | None = None  # whether rows say their split
        for line, row in _json_lines(Path(config.path)):
            self._add(line, row)

    def _add(self, line: int, row: dict[str, Any]) -> None:
        where = f"{self.config.path}:{line}"
        for name in ("prompt", "answer"):
            if not isinstance(row.get(name), str | int | float) or isinstance(row[name], bool):
                found = repr(row[name]) if name in row else f"missing beside {', '.join(map(repr, row)) or 'nothing'}"
                raise TaskError(f"{where}: {name!r} is {found}; it has to be text or a number")
            if not is_whole(str(row[name])):
                raise TaskError(f"{where}: {name!r} is {row[name]!r}, which holds half a character; spell it whole")
        named = "split" in row
        if self._named not in (None, named):
            raise TaskError(
                f"{where}: 'split' is {'there' if named else 'missing'}, unlike above; all rows say it, or none"
            )
        self._named = named
        key = canonical(str(row["prompt"]))
        split = row.get("split", split_of(key))
        if split not in SPLITS:
            raise TaskError(f"{where}: 'split' is {split!r}; it has to be one of {list(SPLITS)}")
        elsewhere = [other for other in SPLITS if other != split and key in self._splits[other]]
        if elsewhere:
            raise TaskError(f"{where}: this problem (or a symmetric form of it) is in split {elsewhere[0]!r} already")
        problem = Problem(problem_id(key), str(row["prompt"]), str(row["answer"]), {"line": line})
        before = self._splits[split].setdefault(key, problem)
        if before.answer.strip() != problem.answer.strip():
            raise TaskError(
                f"{where}: this problem (or a symmetric form of it) has the answer {problem.answer!r} here and "
                f"{before.answer!r} on line {before.metadata['line']}; keep one of them"
            )

    def problems(self, split: Split) -> list[Problem]:
        """The first `task.{split}_problems` of the split in the file's order; TaskError when there are fewer."""
        count, found = getattr(self.config, f"{split}_problems"), list(self._splits[split].values())
        if len(found) < count:
            raise TaskError(
                f"task.{split}_problems={count}: {self.config.path} holds {len(found)} distinct problems for this "
                f"split (symmetric forms count once); ask for fewer, add rows, or give each row a 'split'"
            )
        return found[:count]

    def verify(self, problem: Problem, answer: str) -> bool:
        """math-verify in a subprocess; what does not answer in time counts as wrong."""
        return self._verifier.verify(problem.answer, answer)

    def verify_many(self, pairs: Sequence[tuple[Problem, str]]) -> list[bool]:
        """`verify` over the pool of workers."""
        return self._verifier.verify_many([(problem.answer, answer) for problem, answer in pairs])

    def close(self) -> None:
        """End the workers."""
        self._verifier.close()


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
                raise TaskError(f"{path}:{number}: a {type(row).__name__}; each line has to be an object")
            yield number, row
