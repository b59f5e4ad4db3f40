"""Docstrings as Markdown: a line "name  description" in two columns becomes an item of a list, with its continuation lines."""

from __future__ import annotations

import re
from typing import Any

import griffe

COLUMNS = re.compile(r"^(?P<indent> *)(?P<name>[A-Za-z_][\w.]*(?:, [A-Za-z_][\w.]*)*)  +(?P<text>\S.*)$")


def as_markdown(text: str) -> str:
    lines: list[str] = []
    column: int | None = None  # where the descriptions of the list in progress begin
    for line in text.splitlines():
        match = COLUMNS.match(line)
        if match and not line.lstrip().startswith(">>>"):
            if column is None and lines and lines[-1]:
                lines.append("")
            column = match.start("text")
            lines.append(f"- `{match['name']}` – {match['text']}")
        elif column is not None and line.startswith(" " * max(column - 1, 2)):
            lines[-1] += " " + line.strip()
        else:
            if column is not None and line:
                lines.append("")
            column = None
            lines.append(line)
    return "\n".join(lines)


class Docstrings(griffe.Extension):
    """Applies `as_markdown` to each docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
