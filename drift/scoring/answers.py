"""Whether an answer is right, by the kind of the gold answer: the gold answer is read first, and the answer as a whole.

1. Markdown, LaTeX's dressing, quotes, a lead such as "The answer is", and trailing punctuation are stripped (`clean`).
2. Words, single letters, dates, times, versions, phone numbers, ranges and numerals with leading zeros are text: equal up
   to case and white space, never worked out.
3. A number is compared as a number (`drift.scoring.numbers`); an answer that has still to be worked out ("10 - 3") is not one.
4. Several parts (commas, "and", "or", ±) need all parts and no more, in any order; in brackets of the same kind and, in
   round and square ones, in the same order.
5. The rest is algebra, for the function `equal` to compare; words in an answer make it wrong without asking.

Left out: units that are converted, and synonyms.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence

from drift.scoring import numbers

LONGEST = 4000  # characters of an answer; a longer one is wrong
Equal = Callable[[str, str], bool]  # (gold, answer) as LaTeX
_SIGNS = {ord(sign): "-" for sign in "−–‐‑‒﹣－"} | dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff"))
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_LATEX = [
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\left(?![A-Za-z])|\\right(?![A-Za-z])|\\displaystyle(?![A-Za-z])"), ""),
    (re.compile(r"\\[,;:! ]|\\q?quad(?![A-Za-z])"), " "),
    (re.compile(r"\\([$%#&])"), r"\1"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\([{}])"), r"\1"),
    (re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}"), r" \1 "),
]
_WRAPPED = [
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"\*\*\*((?:(?!\*).)+)\*\*\*",
        r"\*\*((?:(?!\*\*).)+)\*\*",
        r"\*((?:(?!\*).)+)\*",
        r"__((?:(?!__).)+)__",
        r"_((?:(?!_).)+)_",
        r"```\w*\n((?:(?!```).)+)```",
        r"`((?:(?!`).)+)`",
        r"\$\$([^$]+)\$\$",
        r"\$([^$]+)\$",
        r"\\\(((?:(?!\\\().)+)\\\)",
        r"\\\[((?:(?!\\\[).)+)\\\]",
        r'"([^"]+)"',
        r"“([^”]+)”",
        r"'([^']+)'",
        r"‘([^’]+)’",
    )
]
_LEAD = re.compile(
    r"(?:(?:so|thus|therefore|hence)\b,?\s*)?(?:(?:the|my)\s+)?(?:final\s+|correct\s+)?answer\s*(?:is\s*:?|:|=)\s*|#+\s+|=\s*",
    re.IGNORECASE,
)
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_FIXED = re.compile(  # digits that are a name: dates, times, versions, phone numbers, ranges, codes
    r"\d+(?:[-/.:]\d+){2,}|\d+[-:]\d+(?:\s*[ap]\.?m\.?)?|0\d+|\d+/0+|\+?\(?\d[\d().-]*(?:\s[\d().-]+)*-[\d().-]*\d",
    re.IGNORECASE,
)
_FUNCTIONS = "arcsin arccos arctan sinh cosh tanh sin cos tan cot sec csc log ln exp sqrt pi infinity inf oo"
_FUNCTIONS += " min max gcd lcm det mod"
_NAMES = re.compile(rf"\\[A-Za-z]+|\b(?:{'|'.join(_FUNCTIONS.split())})(?![A-Za-z])")
_WORD = re.compile(r"[^\W\d_]{2,}")
_JOINED = re.compile(r"\s+(?:and|or)\s+|\s*;\s*|,\s*(?:and|or)\s+", re.IGNORECASE)
_GIVES = re.compile(r"[A-Za-z](?:_\{?\w\}?)?\s*=\s*(?=[^=])")
_LETTERS = re.compile(
    r"[([]?[^\W\d_][)\]]?|[^\W\d_](?:\s[^\W\d_])+|\d+_\{?\d+\}?"
)  # a letter, several, a numeral's base
_BRACKETS = {"(": ")", "[": "]", "{": "}"}


def right(gold: str, answer: str, equal: Equal) -> bool:
    """Whether the answer is the gold one. equal: asked for what only algebra can tell."""
    if len(answer) > LONGEST or not answer.strip() or not gold.strip():
        return False
    return _same(clean(gold), clean(answer), equal)


def exact(gold: str, answer: str) -> bool:
    """Whether both are the same text after stripping, lower-casing and dropping white space: the published rule."""
    return bool(gold.strip()) and "".join(gold.split()).lower() == "".join(answer.split()).lower()


def numeric(gold: str, answer: str, tolerance: float, equal: Equal) -> bool:
    """`right`, and a gold number that is not whole within a relative tolerance."""
    if len(answer) > LONGEST or not answer.strip():
        return False
    one, other = numbers.read(_given(clean(gold))), numbers.read(_given(clean(answer)))
    if one is not None and other is not None and not _FIXED.fullmatch(clean(gold)):
        return numbers.close(one, other, tolerance)
    return right(gold, answer, equal)


def clean(text: str) -> str:
    """The text without what only dresses it."""
    text = re.sub(r"[⁰¹²³⁴-⁹⁻]+", lambda found: f"^{{{found[0].translate(_SUPERSCRIPTS)}}}", text)
    text = re.sub(r"(?<=\d)(?=[¼½¾⅐-⅞])", " ", text)
    text = unicodedata.normalize("NFKC", text.translate(_SIGNS)).translate({0x2044: "/", 0x2212: "-"})
    for pattern, plain in _LATEX:
        text = pattern.sub(plain, text)
    text = re.sub(r"\s+\^", "^", text)
    for _ in range(12):  # layers of dressing
        before, text = text, text.strip()
        for pattern in _WRAPPED:
            if found := pattern.fullmatch(text):
                text = found[1].strip()
        if (found := _BOXED.match(text)) and _closing(text, found.end() - 1) == len(text) - 1:
            text = text[found.end() : -1]
        if found := _LEAD.match(text):
            text = text[found.end() :]
        ends = text[-1:] in (".", ",", ";", ":", "。") and text[-2:-1] != text[-1:]
        if ends or (text[-1:] == "!" and text[-2:-1].isalpha() and len(text) > 2):  # not 5!, nor 0.33...
            text = text[:-1]
        if text == before:
            break
    return " ".join(text.split())


def _same(gold: str, answer: str, equal: Equal) -> bool:
    if _fold(gold) == _fold(answer):
        return True
    if not gold or not answer or _is_text(gold):
        return False
    number = numbers.read(_given(gold))
    if number is not None:
        other = numbers.read(_given(answer))
        return other is not None and numbers.same(number, other)
    if _words(answer):
        return False
    bracket = gold[0] if gold[0] in _BRACKETS and _closing(gold, 0) == len(gold) - 1 else ""
    if bracket and len(inner := _split(_inside(gold))) > 1:
        if answer[0] != bracket or answer[-1] != gold[-1]:
            return False
        return _all_same(inner, _split(_inside(answer)), equal, ordered=bracket != "{")
    wanted, given = _split(gold), _split(answer)
    if len(wanted) > 1 or len(given) > 1:
        return _all_same(wanted, given, equal, ordered=False)
    if _is_equation(gold) != _is_equation(answer):
        return _same(_given(gold), _given(answer), equal) if _given(gold) != gold or _given(answer) != answer else False
    return equal(gold, answer)


def _all_same(gold: Sequence[str], answer: Sequence[str], equal: Equal, ordered: bool) -> bool:
    if len(gold) != len(answer):
        return False
    if ordered:
        return all(_same(one, other, equal) for one, other in zip(gold, answer))
    left = list(answer)
    for one in gold:
        place = next((i for i, other in enumerate(left) if _same(one, other, equal)), None)
        if place is None:
            return False
        del left[place]
    return True


def _fold(text: str) -> str:
    """Letters without case; white space only between letters or digits."""
    if len(text) == 3 and text[0] in "([" and text[2] in ")]" and text[1].isalpha():  # an option: (A)
        text = text[1]
    return re.sub(r"\s+(?!\w)|(?<!\w)\s+", "", text.casefold())


def _is_text(gold: str) -> bool:
    return bool(_words(gold) or _FIXED.fullmatch(gold) or _LETTERS.fullmatch(gold))


def _words(text: str) -> bool:
    """Whether the text holds words, rather than symbols, functions, joined parts and numbers with their units."""
    if numbers.read(_given(text)) is not None:
        return False
    parts = _split(text)
    if len(parts) > 1:
        return any(_words(part) for part in parts)
    return bool(_WORD.search(_NAMES.sub(" ", text)))


def _is_equation(text: str) -> bool:
    return "=" in text


def _given(text: str) -> str:
    """What a single letter is said to be equal to, if the text says that and no more."""
    found = _GIVES.match(text)
    return text[found.end() :] if found and "=" not in text[found.end() :] else text


def _split(text: str) -> list[str]:
    """The parts between commas, "and" and "or" outside brackets; two for a leading ±. The commas in 1,331 split nothing."""
    if found := re.fullmatch(r"(?:±|\\pm)\s*((?:(?!±|\\pm).)+)", text):
        return [found[1], f"-{found[1]}"]
    if numbers.read(text) is not None:
        return [text]
    parts, depth, start, i = list[str](), 0, 0, 0
    while i < len(text):
        if text[i] in "([{":
            depth += 1
        elif text[i] in ")]}":
            depth -= 1
        elif (depth == 0 and (found := _JOINED.match(text, i))) or (depth == 0 and text[i] == ","):
            parts.append(text[start:i])
            start = i = found.end() if found else i + 1
            continue
        i += 1
    parts.append(text[start:])
    return [part.strip() for part in parts] if all(part.strip() for part in parts) else [text]


def _inside(text: str) -> str:
    return text[1:-1].removesuffix("\\")


def _closing(text: str, place: int) -> int:
    """Where the bracket at `place` is closed by any other, since (0, 1] is one interval; -1 for nowhere."""
    depth = 0
    for i in range(place, len(text)):
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if depth == 0:
            return i
    return -1
