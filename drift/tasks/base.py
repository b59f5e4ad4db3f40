"""Problems with checkable answers: reasoning-gym generators and JSONL files, in three splits that share nothing.

A problem is its exact text, after Unicode normalisation, and its answer (`problem_id`). A looser key decides its split and
nothing else: by the key's hash, two problems with one key can never lie in two splits, whatever the sizes asked for and
whatever index they were drawn at. The key is the question with every chain of +, - and * over plain numbers put in one
order (`canonical`), so that 3 + 12, 12 + 3 and 12 - -3 stay together. Questions that generators word in several ways
around one `expression` are compared by that expression alone, and those about an unordered pair of numbers (gcd, lcm) by
the sorted numbers. Each split also draws from an index range of its own.

Left out: other symmetries (a renamed variable, a rotated maze); a task that has them needs its own key.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from typing import Literal, Protocol

from drift.scoring.sandbox import Failed
from drift.types import Problem

Split = Literal["warm", "train", "eval"]
SPLITS: tuple[Split, ...] = ("warm", "train", "eval")

NUMBER = r"\d+(?:\.\d+)?"
_RUN = re.compile(r"(?:[\d\s+*/^()-]|\.(?=\d))+")  # a stretch of arithmetic
_CHAIN = re.compile(rf"-?{NUMBER}(?:\s*[+*-]\s*-?{NUMBER})+")
_TERM = re.compile(rf"([+*-]?)\s*(-?)\s*({NUMBER})")


Verdict = bool | float | Failed


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

    def verify_many(self, pairs: Sequence[tuple[Problem, str]]) -> Sequence[Verdict]:
        """A reward for each (problem, answer), 1 or more being right; `Failed` when the scorer has none to give."""
        ...

    def close(self) -> None:
        """Let go of worker processes, if there are any."""
        ...


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


def problem_id(text: str, answer: str, copy: int = 0) -> str:
    """A problem's name: 16 hex digits for its text, 8 for its answer, and the copy's number if it is not the first.

    Both are compared as Unicode's NFC form without outer white space. Problems that share the first part ask the same, and
    answers differ.
    """
    parts = [hashlib.sha256(unicodedata.normalize("NFC", part.strip()).encode()).hexdigest() for part in (text, answer)]
    return f"{parts[0][:16]}-{parts[1][:8]}" + (f"-{copy}" if copy else "")


def split_of(key: str, warm_share: float = 0.4, eval_share: float = 0.3) -> Split:
    """The only split in which a problem with this canonical key may appear; train has what the shares leave."""
    place = int(hashlib.sha256(b"split:" + key.encode()).hexdigest()[:12], 16) / 16**12
    return "warm" if place < warm_share else "eval" if place >= 1 - eval_share else "train"
