"""How the report writes text and numbers. Every function returns HTML; `esc` is the only way in for foreign text."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence

from drift.report.intervals import Difference

THIN = "\N{NARROW NO-BREAK SPACE}"


def esc(text: object) -> str:
    """Text for HTML: markup escaped, control characters shown as their pictures."""
    visible = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", lambda m: chr(0x2400 + ord(m[0])) if m[0] < " " else "␡", str(text))
    return html.escape(visible)


def percent(share: float) -> str:
    """0.4567 -> 45.7 %."""
    return f"{100 * share:.1f}{THIN}%"


def points(difference: Difference) -> str:
    """A difference of shares in percentage points, with its standard error if there is one."""
    text = f"{100 * difference.mean:+.1f}".replace("-", "−")
    return text if math.isnan(difference.stderr) else f"{text}{THIN}±{THIN}{100 * difference.stderr:.1f}"


def duration(seconds: float) -> str:
    """75.2 -> 1 min 15 s."""
    if seconds < 59.5:
        return f"{seconds:.1f}{THIN}s" if seconds < 10 else f"{seconds:.0f}{THIN}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}{THIN}h {minutes:02d}{THIN}min"
    return f"{minutes}{THIN}min {rest:02d}{THIN}s"


def count_of(number: int, one: str, many: str) -> str:
    """1 -> one seed, 3 -> 3 seeds."""
    return f"one {one}" if number == 1 else f"{number:,} {many}"


def tile(label: str, value: str, note: str = "") -> str:
    """One number to look at, with what it is above it."""
    return f'<div class="tile"><span>{label}</span><strong>{value}</strong><span>{note}</span></div>'


def tiles(items: Sequence[str]) -> str:
    """A row of `tile`s."""
    return f'<div class="tiles">{"".join(items)}</div>'


def table(columns: Sequence[str], rows: Iterable[str]) -> str:
    """Rows of `<tr>` under the names of their columns; it scrolls by itself where it is too wide."""
    head = "".join(f"<th>{column}</th>" for column in columns)
    body = "".join(rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def figures(items: Sequence[tuple[str, str]]) -> str:
    """(svg, caption) pairs, side by side if there is room."""
    drawn = (
        f"<figure>{svg}{f'<figcaption>{caption}</figcaption>' if caption else ''}</figure>" for svg, caption in items
    )
    return f'<div class="figures">{"".join(drawn)}</div>'
