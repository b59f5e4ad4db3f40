"""From a reply to its answer: what is thinking and what is said, and where in what is said the answer stands.

Thinking begins at `<think>` and ends at `</think>`; text before a `</think>` that nothing opened is thinking too, since some
templates open it in the prompt. A reply that ends inside its thinking says nothing. A turn that the prompt began
(`<think>`, a prefill) is read together with what began it.
"""

from __future__ import annotations

import re
from collections.abc import Callable

OPEN, CLOSE = "<think>", "</think>"
_MARK = re.compile(r"</?think>")

Parser = Callable[[str, str], str | None]


def spoken(text: str) -> str | None:
    """What a reply says outside its thinking; None when it ends inside it."""
    said, thinking, start = list[str](), False, 0
    for mark in _MARK.finditer(text):
        if mark[0] == OPEN:
            if not thinking:
                said.append(text[start : mark.start()])
            thinking = True
        else:
            if not thinking:
                said.clear()  # it was opened before the reply began
            thinking, start = False, mark.end()
    return None if thinking else "".join([*said, text[start:]])


def lenient(text: str, tag: str = "answer") -> str | None:
    """The text between the last `<tag>` and `</tag>` outside thinking, stripped; None if there is none, or an empty one."""
    said = spoken(text)
    if said is None:
        return None
    opening, closing = re.escape(f"<{tag}>"), re.escape(f"</{tag}>")
    found = re.findall(rf"{opening}((?:(?!{opening}).)*?){closing}", said, flags=re.DOTALL)
    return (found[-1].strip() or None) if found else None


def strict(text: str, tag: str = "answer") -> str | None:
    """The published rule: the first `<think>…</think><tag>…</tag>`, only white space between; anything else is None.

    Several actions may be separated by a double bar; the first counts.
    """
    pattern = rf"<think>(?:(?!<think>).)*?</think>\s*{re.escape(f'<{tag}>')}(.*?){re.escape(f'</{tag}>')}"
    found = re.search(pattern, text, flags=re.DOTALL)
    return next((part.strip() for part in found[1].split("||") if part.strip()), None) if found else None


def whole(text: str, tag: str = "answer") -> str | None:
    """All that is said outside thinking, stripped: for answers without a tag, such as tool calls; None if that is nothing."""
    return (spoken(text) or "").strip() or None


PARSERS: dict[str, Parser] = {"strict": strict, "lenient": lenient, "whole": whole}
