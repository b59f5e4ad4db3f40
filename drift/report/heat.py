"""Responses as heat maps: every token on a ground as dark as its value, all its values in the text that hovers over it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from drift.report.online_files import Seed
from drift.report.records import Records
from drift.report.text import esc

LONGEST = 300  # tokens of one response that are shown
GAP = 90  # characters of what others said between two turns
PROMPT = 2000  # characters of the prompt, its end
LEVELS = 10
HOVER = {
    "gate": "gate",
    "bonus": "bonus",
    "rhythm": "rhythm",
    "divergence": "divergence",
    "entropy": "entropy",
    "teacher_entropy": "teacher’s",
    "logprobs": "log-prob",
    "teacher_logprobs": "teacher’s",
}


class Map(NamedTuple):
    """One way to colour tokens."""

    name: str  # of the values, and of the style
    title: str
    low: float
    high: float
    colour: str  # a variable of the style sheet


def section(records: Records, seeds: Sequence[Seed]) -> str:
    """Gate and bonus over the responses of the first, a middle and the last stored step; empty if none are stored."""
    found = next((seed for seed in seeds if seed.examples), None)
    if found is None:
        return ""
    steps = sorted({row["step"] for row in found.examples})
    steps = sorted({steps[0], steps[len(steps) // 2], steps[-1]})
    shown = [row for row in found.examples if row["step"] in steps]
    first, more = _maps(records, shown)
    blocks = "".join(
        f"<h3>Step {step}</h3>" + "".join(_example(row, first, more) for row in shown if row["step"] == step)
        for step in steps
    )
    silent, legend = "", [*first, *more]
    if any("bonus" in row for row in shown) and not any(_above(row, "bonus", 1) for row in shown):
        silent = (
            " No token below has one: it takes a right response with a teacher, on a problem of medium difficulty, and a "
            "token that the student is surer of."
        )
        legend = [m for m in legend if m.name != "bonus"]
    note = (
        '<p class="why">The darker a token, the higher its value; hover over it for all of them. Grey text was not '
        "sampled. The gate opens where student and teacher settle differently; the bonus multiplies the policy loss "
        f"there, and is left out where it is 1 throughout.{silent} From <code>{esc(found.name)}/examples.jsonl</code>, "
        "which holds more.</p>"
    )
    return f"<section><h2>Gate and bonus, token by token</h2>{note}{_legend(legend)}{blocks}</section>"


def _above(row: Mapping[str, Any], name: str, bound: float) -> bool:
    return any(isinstance(value, float) and value > bound + 1e-6 for value in row.get(name) or [])


def _maps(records: Records, rows: Sequence[Mapping[str, Any]]) -> tuple[list[Map], list[Map]]:
    """What is shown of every response that has it, and what is behind a click. High ends fit what is drawn."""
    online = records.config.online if records.config else None
    most = online.rhythm.bonus_maximum if online else 2.0

    def highest(name: str) -> float:
        values = [value for row in rows for value in row.get(name) or [] if _is_number(value)]
        return max(values, default=0.0) or 1.0

    gate, bonus = Map("gate", "gate", 0, 1, "drift"), Map("bonus", "bonus", 1, max(most, 1.0 + 1e-6), "other")
    entropy = Map("entropy", "student’s entropy, nats", 0, highest("entropy"), "uniform")
    divergence = Map("divergence", "divergence from the teacher", 0, highest("divergence"), "success")
    return [gate, bonus], [entropy, divergence]


def _legend(maps: Sequence[Map]) -> str:
    items = (
        f'<li>{esc(m.title)} <span class="muted">{m.low:.3g}</span><span class="scale {m.name}">'
        + "".join(f'<i class="h{level}"></i>' for level in range(LEVELS + 1))
        + f'</span><span class="muted">{m.high:.3g}</span></li>'
        for m in maps
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _example(row: Mapping[str, Any], first: Sequence[Map], more: Sequence[Map]) -> str:
    drawn = [m for m in first if m.name in row and not (m.name == "bonus" and not _above(row, "bonus", 1))]
    hidden = [m for m in more if m.name in row]
    if not drawn:  # no teacher
        drawn, hidden = hidden, []
    start = next((i for i, on in enumerate(row["trained"]) if on), len(row["trained"]))
    prompt = esc("".join(map(str, row["tokens"][:start]))[-PROMPT:])
    body = f'<div class="turn"><div>prompt</div><pre dir="auto" class="muted">{prompt}</pre></div>'
    body += "".join(_coloured(row, m, start) for m in drawn)
    if hidden:
        rest = "".join(_coloured(row, m, start) for m in hidden)
        body += f"<details><summary>{esc(' · '.join(m.title for m in hidden))}</summary>{rest}</details>"
    return f'<article class="trajectory">{_head(row, any(m.name == "gate" for m in drawn))}{body}</article>'


def _head(row: Mapping[str, Any], taught: bool) -> str:
    solved = row.get("solved_at")
    right = f'<span class="right">solved in turn {esc(solved)}</span>'
    outcome = right if solved else '<span class="wrong">never solved</span>'
    numbers = [
        f"<span>{label} {row[name]:.3g}</span>".replace(" -", " −")
        for name, label in (
            ("advantage", "advantage"),
            ("policy_weight", "policy weight"),
            ("distill_weight", "distillation"),
            ("rebellious_weight", "rebellious"),
        )
        if isinstance(row.get(name), (int, float))
    ]
    teacher = "" if taught else '<span class="muted">no teacher</span>'
    identity = f'<span class="id">{esc(row.get("prompt_id", ""))}</span>'
    return f"<header>{outcome}{''.join(numbers)}{teacher}{identity}</header>"


def _coloured(row: Mapping[str, Any], m: Map, start: int) -> str:
    stop = min(len(row["tokens"]), start + LONGEST)
    places = range(start, stop)
    parts = []
    for trained, group in groupby(places, key=lambda i: bool(row["trained"][i])):
        if trained:
            parts += [_token(row, m, place) for place in group]
        else:
            parts.append(_gap("".join(str(row["tokens"][place]) for place in group)))
    rest = len(row["tokens"]) - stop
    cut = f"\n<small>… and {rest:,} tokens more</small>" if rest > 0 else ""
    return f'<div class="turn"><div>{esc(m.title)}</div><pre dir="auto" class="heat {m.name}">{"".join(parts)}{cut}</pre></div>'


def _gap(text: str) -> str:
    """What stands between two turns, on a line of its own, in short."""
    text = " ".join(text.split())
    return f'<span class="gap">{esc(text if len(text) <= GAP else text[: GAP - 1] + "…")}</span>'


def _token(row: Mapping[str, Any], m: Map, place: int) -> str:
    value = row[m.name][place]
    level = round(LEVELS * min(max((value - m.low) / (m.high - m.low), 0), 1)) if _is_number(value) else 0
    said = [
        f"{label} {row[name][place]:.3g}"
        for name, label in HOVER.items()
        if name in row and _is_number(row[name][place])
    ]
    text = str(row["tokens"][place])
    shown = esc(text).replace("\n", "⏎\n")
    return f'<i class="h{level}" title="{esc(" · ".join(said))}">{shown}</i>'


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
