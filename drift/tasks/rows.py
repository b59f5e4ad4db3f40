"""Problems from rows, of a file or a data set, checked by the scorer that `task.scorer` names."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from itertools import count
from typing import TYPE_CHECKING, Any

from drift.tasks.base import SPLITS, Split, TaskError, canonical, problem_id, split_of
from drift.tasks.framing import Framing
from drift.tasks.scorers import Scorer, Verdict, load_scorer
from drift.tasks.source import Row, read
from drift.types import Problem, is_whole

if TYPE_CHECKING:
    from drift.config import TaskConfig

logger = logging.getLogger(__name__)
COMPLAINTS = 20  # that are shown; the rest is counted


class RowTask:
    """Rows of a prompt and an "answer" and, if wanted, "split" ("warm", "train" or "eval") and "system" (docs/data.md).

    The prompt is text, "prompt", or a conversation that ends with a user, in "prompt" or "messages". Without "split" a
    row goes where its key's hash sends it; a source that names one must name it in every row. A row with the text and
    the answer of an earlier one counts once, or is a problem of its own with `task.duplicates` keep. A problem that
    seems to be in two splits is logged as a warning, with both places. Asking for more problems than a split holds is an
    error; all bad rows are named in one.
    """

    def __init__(self, config: TaskConfig, scorer: Scorer | None = None) -> None:
        if config.path is None:
            raise TaskError(f"task.path is not set, which task.kind={config.kind!r} reads; set it")
        self.config = config
        self.answer_tag, self.framing = config.answer_tag, Framing.of(config)
        self._splits: dict[str, dict[str, Problem]] = {split: {} for split in SPLITS}
        self._named: bool | None = None  # whether rows say their split
        self._seen: dict[tuple[str, str], tuple[str, str]] = {}  # (key, answer): the split and place it was at first
        splits = {"train": config.train_split, "eval": config.eval_split} if config.eval_split else None
        splits = splits or {"": config.train_split}
        complaints = list[str]()
        for where, number, row in read(config, splits):
            try:
                self._add(where, number, row)
            except TaskError as error:
                complaints.append(str(error))
        if complaints:
            more = len(complaints) - COMPLAINTS
            raise TaskError("\n".join(complaints[:COMPLAINTS] + ([f"and {more} more rows"] if more > 0 else [])))
        self.scorer = scorer or load_scorer(config)

    def _add(self, where: str, number: int, row: Row) -> None:
        row = {key: value for key, value in row.items() if not (key == "system" and value is None)}
        if "answer" not in row and ":" in (self.config.scorer or ""):
            row["answer"] = ""  # the user's function may need none
        *earlier, prompt = _conversation(row, where)
        for name in ("answer", *(("system",) if "system" in row else ())):
            row[name] = _text(row, name, where)
        named = "split" in row
        if self._named not in (None, named):
            raise TaskError(
                f"{where}: 'split' is {'there' if named else 'missing'}, unlike above; all rows say it, or none"
            )
        self._named = named
        system = row.get("system", self.framing.system)
        if earlier and earlier[0]["role"] == "system":
            system = earlier.pop(0)["content"]
        question, answer = "\n".join(message["content"] for message in (*earlier, prompt)), row["answer"]
        key = canonical(question)
        split = row.get("split", split_of(key, self.config.warm_share, self.config.eval_share))
        if split not in SPLITS:
            raise TaskError(f"{where}: 'split' is {split!r}; it must be one of {list(SPLITS)}")
        first, before = self._seen.setdefault((key, answer.strip()), (split, where))
        if first != split:
            logger.warning(
                "%s: this problem looks like the one at %s, which is in split %r; this one is in %r",
                where,
                before,
                first,
                split,
            )
        copies = (problem_id(question, answer, copy) for copy in count())
        name = next(copies)
        while self.config.duplicates == "keep" and name in self._splits[split]:
            name = next(copies)
        rest = {
            key: value for key, value in row.items() if key not in ("prompt", "messages", "answer", "system", "split")
        }
        text = self.framing.prompt(prompt["content"])
        problem = Problem(name, text, answer, {"line": number, **rest}, system, tuple(earlier))
        self._splits[split].setdefault(name, problem)

    def problems(self, split: Split) -> list[Problem]:
        """The first `task.{split}_problems` of the split in the source's order, null being all; TaskError for fewer."""
        count, found = getattr(self.config, f"{split}_problems"), list(self._splits[split].values())
        if count is not None and len(found) < count:
            held = ", ".join(f"{len(self._splits[other])} {other}" for other in SPLITS if self._splits[other])
            raise TaskError(
                f"task.{split}_problems={count}: {self.config.path} holds {len(found)} distinct problems for this split "
                f"({held or 'none at all'}); ask for "
                f"fewer, leave the number out for all there are, add rows, or give each row a 'split'"
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


def _conversation(row: Row, where: str) -> list[dict[str, str]]:
    """The row's prompt as messages, the last of them the user's."""
    given = row.get("messages") if "prompt" not in row and "messages" in row else row.get("prompt")
    if not isinstance(given, list):
        return [{"role": "user", "content": _text(row, "prompt", where)}]
    roles = []
    for place, message in enumerate(given):
        fits = isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        if not fits or not is_whole(message["content"]):
            raise TaskError(
                f"{where}: message {place + 1} of the prompt is {message!r}; it must have the texts role, content"
            )
        roles.append(message["role"])
    if not roles or roles[-1] != "user" or "system" in roles[1:]:
        raise TaskError(
            f"{where}: the messages of the prompt have the roles {roles}; they must end with user, and a system message "
            "must come first"
        )
    return [{"role": message["role"], "content": message["content"]} for message in given]


def _text(row: Row, name: str, where: str) -> str:
    value: Any = row.get(name)
    if isinstance(value, list | dict) and name == "answer":
        return json.dumps(value, ensure_ascii=False)
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        found = repr(value) if name in row else f"missing; the row has {', '.join(map(repr, row)) or 'no columns'}"
        columns = f"; task.columns={{{name}: THEIR_NAME}} says which column it is" if name not in row else ""
        raise TaskError(f"{where}: {name!r} is {found}; it must be text or a number{columns}")
    if not is_whole(str(value)):
        raise TaskError(f"{where}: {name!r} is {value!r}, which holds half a character; spell it whole")
    return str(value)
