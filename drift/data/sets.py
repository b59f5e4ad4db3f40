"""The published sets: hub name, splits, instruction, scorer, and one function a set from its row to ours.

Instructions, option letters and how a right answer is read are those of the public evaluation code of arXiv 2605.31455;
SciKnowEval and the tool-use set are read as the public training code of arXiv 2601.20802 reads them.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
MATH = "You are solving Math problems. Only give the final answer between <answer> and </answer>."
LETTERS = (
    "You are solving multiple-choice questions. Only give the final answer letter ({}) between <answer> and </answer>."
)
_ANSWER = re.compile(r"The answer is: (.*?)$", re.DOTALL)
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")


class Skip(Exception):
    """A row that the set leaves out, such as a type that is not asked for."""


@dataclass(frozen=True, slots=True)
class PublishedSet:
    """One set. `read` takes a row to {"prompt", "answer"} and what else ours has; it raises Skip, KeyError or ValueError."""

    hub: str  # its name there
    splits: dict[str, str]  # ours ("train", "eval") to its own
    read: Callable[[Row], Row]
    scorer: str  # of `task.scorer` or of an evaluation set
    subsets: tuple[str, ...] = ()  # configurations, read one after another; empty: the only one
    instruction: str | None = None
    parser: str | None = None  # in place of the task's
    duplicates: str = "merge"


def _text(row: Row, *names: str) -> str:
    """The first of the columns that is there, as stripped text. Raises ValueError if it is empty, KeyError if there is none."""
    name = next((name for name in names if row.get(name) is not None), None)
    if name is None:
        raise KeyError(names[0])
    text = str(row[name]).strip()
    if not text:
        raise ValueError(f"{name!r} is empty")
    return text


def boxed(text: str) -> str | None:
    r"""What the last \boxed{…} of a solution holds; None if there is none, or its brace never closes."""
    places = list(_BOXED.finditer(text))
    if not places:
        return None
    depth, start = 1, places[-1].end()
    for place in range(start, len(text)):
        depth += (text[place] == "{") - (text[place] == "}")
        if depth == 0:
            return text[start:place].strip()
    return None


def options(question: str, choices: Any) -> str:
    """The question, then a line for each option: "A. …"."""
    lines = [f"{chr(65 + number)}. {choice}" for number, choice in enumerate(choices)]
    return "\n".join([question, *lines])


def letter(answer: Any, count: int) -> str:
    """The letter of an answer that is a letter or an option's number from 0. Raises ValueError for anything else."""
    if isinstance(answer, str) and not answer.strip().isdecimal():
        found = answer.strip().upper()
        number = ord(found) - 65 if len(found) == 1 else -1
    else:
        number = int(answer)
    if not 0 <= number < count:
        raise ValueError(f"the answer {answer!r} names none of {count} options")
    return chr(65 + number)


def _metamath(row: Row) -> Row:
    kind = str(row["type"])
    if not kind.startswith("MATH_"):
        raise Skip(f"type {kind}")
    found = _ANSWER.search(str(row["response"]))
    if found is None or not found[1].strip():
        raise ValueError("'response' has no 'The answer is: …'")
    return {"prompt": _text(row, "query"), "answer": found[1].strip()}


def _math(row: Row) -> Row:
    given = str(row.get("answer") or "").strip()
    answer = boxed(given) or given or boxed(str(row.get("solution") or ""))
    if not answer:
        raise ValueError(r"neither 'answer' nor a \boxed{…} in 'solution' gives the answer")
    return {"prompt": _text(row, "problem"), "answer": answer}


def _theorem(row: Row) -> Row:
    if row.get("Picture") not in (None, "", "None"):
        raise Skip("a picture, which a text model cannot see")
    answer = row["Answer"] if "Answer" in row else row["answer"]
    return {"prompt": _text(row, "Question", "question"), "answer": str(answer).strip()}


def _gpqa(row: Row) -> Row:
    question = _text(row, "Question", "question")
    right = _text(row, "Correct Answer")
    choices = [right, *(_text(row, f"Incorrect Answer {number}") for number in (1, 2, 3))]
    order = list(range(len(choices)))  # shuffled as published, by the question alone
    seed = hashlib.md5(str(row.get("id") or row.get("question") or question).encode()).hexdigest()[:8]
    random.Random(int(seed, 16)).shuffle(order)
    prompt = options(question, [choices[place] for place in order])
    return {"prompt": prompt, "answer": chr(65 + order.index(0))}


def _choices(row: Row) -> Row:
    choices = row["choices"] if row.get("choices") is not None else row["options"]
    answer = row["answer"] if row.get("answer") is not None else row["answer_index"]
    return {"prompt": options(_text(row, "question"), choices), "answer": letter(answer, len(choices))}


def _sciknoweval(row: Row) -> Row:
    if "choices" in row:  # as on the hub
        if str(row.get("type", "mcq")).lower() not in ("mcq-4-choices", "mcq-2-choices", "mcq"):
            raise Skip(f"type {row['type']}")
        labels, texts = row["choices"]["label"], row["choices"]["text"]
        lines = "\n".join(f"{label}: {text}" for label, text in zip(labels, texts))
        prompt = f"{_text(row, 'question')}\n\n{lines}\nPlease reason step by step."
        return {"prompt": prompt, "answer": _text(row, "answerKey"), "system": SCIKNOWEVAL}
    return {"prompt": str(row["prompt"]), "answer": _text(row, "answer"), "system": str(row["system"])}


SCIKNOWEVAL = """
Given a question and four options, please select the right answer. Respond in the following format:
<reasoning>
...
</reasoning>
<answer>
...
</answer>

For the answer, only output the letter corresponding to the correct option (A, B, C, or D), and nothing else. Do not restate \
the answer text. For example, if the answer is "A", just output:
<answer>
A
</answer>
"""


def _tool_use(row: Row) -> Row:
    answer = row["answer"]
    made: Row = {"prompt": str(row["prompt"]), "answer": answer if isinstance(answer, str) else list(answer)}
    return made | ({"system": str(row["system"])} if row.get("system") else {})


_SUBJECTS = ("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra")
SETS = {
    "metamathqa": PublishedSet(
        "meta-math/MetaMathQA", {"train": "train"}, _metamath, "exact", instruction=MATH, duplicates="keep"
    ),
    "math-500": PublishedSet("HuggingFaceH4/MATH-500", {"eval": "test"}, _math, "math", instruction=MATH),
    "theoremqa": PublishedSet("TIGER-Lab/TheoremQA", {"eval": "test"}, _theorem, "numeric", instruction=MATH),
    "gpqa": PublishedSet(
        "Idavidrein/gpqa", {"eval": "train"}, _gpqa, "choice", ("gpqa_diamond",), LETTERS.format("A-D")
    ),
    "mmlu-redux": PublishedSet(
        "edinburgh-dawg/mmlu-redux-2.0", {"eval": "test"}, _choices, "choice", ("*",), LETTERS.format("A-D")
    ),
    "hendrycks-math": PublishedSet(
        "EleutherAI/hendrycks_math", {"eval": "test"}, _math, "math", (*_SUBJECTS, "precalculus"), MATH
    ),
    "mmlu-pro": PublishedSet(
        "TIGER-Lab/MMLU-Pro", {"eval": "test"}, _choices, "choice", instruction=LETTERS.format("A-J")
    ),
    "sciknoweval": PublishedSet("hicai-zju/SciKnowEval", {"train": "test"}, _sciknoweval, "choice"),
    "tooluse": PublishedSet("", {"train": "train", "eval": "test"}, _tool_use, "tools", parser="whole"),
}
