"""Which option an answer chooses: a letter that stands where a choice stands, and only one.

>>> option("(B)"), option("B. Paris"), option("The answer is **C**."), option("c")
('B', 'B', 'C', 'C')
>>> option("A or B"), option("not B"), option("A dog"), option("I think")
(None, None, None, None)
"""

from __future__ import annotations

import re

from drift.scoring.answers import LONGEST, clean

_OPTION = re.compile(
    r"(?:the\s+)?(?:(?:correct|right|best)\s+)?(?:(?:option|choice|answer)\s*(?:is)?\s*:?\s*)?"
    r"(?:[([]\s*([A-Ja-j])\s*[)\]]|([A-Ja-j])(?:\s*\)(?=\s*$))?)"
    r"(?P<rest>\s*[.):]\s+\S.*|\s+[-–—]\s+\S.*|(?<=[)\]])\s+\S.*)?",
    re.IGNORECASE | re.DOTALL,
)
_OTHER = re.compile(
    r"(?:\b(?:and|or|not|neither|nor)\b|[,/&])\s*(?:(?:option|choice)\s+)?[([]?\s*[A-J]\s*[)\]]?(?![A-Za-z'’])"
)


def option(answer: str) -> str | None:
    """The letter from A to J that the whole answer chooses; None for no letter, for several, and for "not B".

    The option's text may follow its letter ("B. Paris", "(B) Paris", "B - Paris"). A letter inside a sentence chooses
    nothing: "A dog" and "I think so" hold words.
    """
    if len(answer) > LONGEST:
        return None
    found = _OPTION.fullmatch(clean(answer))
    if found is None or _OTHER.search(found["rest"] or ""):
        return None
    return (found[1] or found[2]).upper()


def chosen(gold: str, answer: str) -> bool:
    """Whether the answer chooses the gold option; a gold answer that is no option is compared as text."""
    wanted = option(gold)
    if wanted is None:
        return bool(gold.strip()) and clean(gold).casefold() == clean(answer[: LONGEST + 1]).casefold()
    return option(answer) == wanted
