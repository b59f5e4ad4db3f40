"""Problems with checkable answers: reasoning-gym generators and JSONL files, in three splits that share nothing.

A problem's split is decided by the hash of its canonical key, so two problems with the same key can never lie in two
splits, whatever the sizes asked for and whatever index they were drawn at. The key is the question with every chain of
+, - and * over plain numbers put in one order (`canonical`): 3 + 12, 12 + 3 and 12 - -3 are one problem. Questions
that generators word in several ways around one `expression` are compared by that expression alone, and those about an
unordered pair of numbers (gcd, lcm) by the sorted numbers. Each split also draws from an index range of its own.

Left out: other symmetries (a renamed variable, a rotated maze); a task that has them needs its own key.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from drift.mathverify import MathVerifier
from drift.types import Problem, is_whole

if TYPE_CHECKING:
    from drift.config import TaskConfig

Split = Literal["warm", "train", "eval"]
SPLITS: tuple[Split, ...] = ("warm", "train", "eval")
_SHARE_ENDS = {"warm": 0.4, "train": 0.7, "eval": 1.0}  # of the key's hash, read as a number in [0, 1)
_INDEX_RANGE = 10_000_000  # generator items that belong to one split of one seed
_UNORDERED = ("gcd", "lcm")  # generators whose numbers may be given in any order

_NUMBER = r"\d+(?:\.\d+)?"
_RUN = re.compile(r"(?:[\d\s+*/^()-]|\.(?=\d))+")  # a stretch of arithmetic
_CHAIN = re.compile(rf"-?{_NUMBER}(?:\s*[+*-]\s*-?{_NUMBER})+")
_TERM = re.compile(rf"([+*-]?)\s*(-?)\s*({_NUMBER})")


class TaskError(ValueError):
    """A task that cannot supply what was asked of it."""


class Task(Protocol):
    """What the rest of drift needs of a task."""

    answer_tag: str

    def problems(self, split: Split) -> list[Problem]:
        """The problems of one split, always the same ones in the same order."""
        ...

    def verify(self, problem: Problem, answer: str) -> bool:
        """Whether `answer` (the text between the answer tags) is right."""
        ...

    def verify_many(self, pairs: Sequence[tuple[Problem, str]]) -> list[bool]:
        """`verify` for each (problem, answer)."""
        ...

    def close(self) -> None:
        """Let go of worker processes, if there are any."""
        ...


def parse_answer(text: str, tag: str = "answer") -> str | None:
    """The text between the last `<tag>` and `</tag>` after any `</think>`, stripped; None if missing or empty."""
    said = text.rsplit("</think>", 1)[-1]
    opening, closing = re.escape(f"<{tag}>"), re.escape(f"</{tag}>")
    found = re.findall(rf"{opening}((?:(?!{opening}).)*?){closing}", said, flags=re.DOTALL)
    return (found[-1].strip() or None) if found else None


def rules(tag: str = "answer") -> str:
    """What a model that was not trained on the format is told about it."""
    return (
        f"Think step by step first if you like, inside <think> and </think>. Then answer inside <{tag}> and </{tag}>."
    )


def with_rules(problems: Sequence[Problem], tag: str) -> list[Problem]:
    """The problems as they are put to a model that was not trained on the format."""
    return [replace(problem, prompt=f"{problem.prompt}\n\n{rules(tag)}") for problem in problems]


def normalise(text: str) -> str:
    """Strip, lower-case, drop white space (A2): what counts as the same answer."""
    return "".join(text.split()).lower()


def canonical(text: str) -> str:
    """`text` with each chain of +, - and * over plain numbers in one order: products sorted, then signed terms sorted.

    A stretch of arithmetic with brackets, division or powers in it is left as it is: reordering could change its value.
    """
    plain = text.translate({ord("×"): "*", ord("·"): "*", ord("−"): "-"})
    return " ".join(_RUN.sub(lambda match: _reordered(match.group()), plain).lower().split())


def _reordered(run: str) -> str:
    return f" {_ordered(run.strip())} " if _CHAIN.fullmatch(run.strip()) else run


def _ordered(chain: str) -> str:
    terms: list[tuple[int, list[str]]] = []
    for operator, minus, number in _TERM.findall(chain):
        sign = -1 if minus else 1
        number = number.lstrip("0") or "0"
        if operator == "*":
            terms[-1] = (terms[-1][0] * sign, [*terms[-1][1], number])
        else:
            terms.append((-sign if operator == "-" else sign, [number]))
    return " ".join(sorted(("+" if sign > 0 else "-") + "*".join(sorted(factors)) for sign, factors in terms))


def problem_id(key: str) -> str:
    """Sixteen hex digits of the canonical key's SHA-256."""
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def split_of(key: str) -> Split:
    """The only split in which a problem with this canonical key may appear."""
    place = int(hashlib.sha256(b"split:" + key.encode()).hexdigest()[:12], 16) / 16**12
    return next(split for split in SPLITS if place < _SHARE_ENDS[split])


class ReasoningGymTask:
    """Any reasoning-gym generator, by name and options; right means that its scorer pays exactly 1.

    A problem's metadata is the generator's whole entry, which is what its scorer reads.
    `scorer_errors` counts answers on which the generator's own scorer raised; they count as wrong.
    """

    def __init__(self, config: TaskConfig) -> None:
        from reasoning_gym.factory import DATASETS

        if config.name not in DATASETS:
            raise TaskError(f"task.name={config.name!r} is no reasoning-gym generator; there are: {sorted(DATASETS)}")
        self.config = config
        self.answer_tag = config.answer_tag
        self.scorer_errors = 0
        self._scorer = self._generator("train", size=1)
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
            return " ".join(sorted(re.findall(_NUMBER, entry["question"])))
        return canonical(entry["question"])

    def problems(self, split: Split) -> list[Problem]:
        """`task.{split}_problems` distinct problems; TaskError when the generator has too few."""
        if split not in self._cache:
            self._cache[split] = self._draw(split, getattr(self.config, f"{split}_problems"))
        return self._cache[split]

    def _draw(self, split: Split, count: int) -> list[Problem]:
        draws = min(4000 + 16 * count, _INDEX_RANGE)  # a split gets at least three draws in ten
        generator, found = self._generator(split, draws), dict[str, Problem]()
        last_new, patience = 0, 2000 + 4 * count  # draws without a new problem before the well counts as dry
        for index in range(draws):
            if len(found) == count:
                return list(found.values())
            if index - last_new > patience:
                break
            entry = generator[index]
            key = self._key(entry)
            if split_of(key) == split and key not in found:
                last_new = index
                found[key] = Problem(problem_id(key), entry["question"], str(entry["answer"]), entry)
        raise TaskError(
            f"task.{split}_problems={count}: the generator {self.config.name!r} with options {self.config.options!r} "
            f"has only {len(found)} distinct problems for this split (symmetric forms count once); widen its options "
            f"or ask for fewer"
        )

    def verify(self, problem: Problem, answer: str) -> bool:
        """Whether the generator's scorer pays exactly 1.0 for the stripped answer."""
        try:
            return self._scorer.score_answer(answer.strip(), problem.metadata) == 1.0
        except (
            Exception
        ):  # scorers are third-party code that meets any text a model can write: a raise is a wrong answer
            self.scorer_errors += 1
            return False

    def verify_many(self, pairs: Sequence[tuple[Problem, str]]) -> list[bool]:
        """`verify` for each pair, one after another."""
        return [self.verify(problem, answer) for problem, answer in pairs]

    def close(self) -> None:
        """Nothing to let go of."""


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


def load_task(config: TaskConfig) -> Task:
    """The task that `config.kind` names."""
    return ReasoningGymTask(config) if config.kind == "reasoning_gym" else JsonlTask(config)
