"""The trajectories that a report shows in full: a few that say most about returns and weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from drift.report.online_files import Seed
from drift.report.records import Records, Sampled
from drift.report.text import esc

LONGEST = 4000  # characters of one message that are shown
ROUTED = {  # of a stored row of an online run, if it is there
    "advantage": "A =",
    "pass_rate": "pass rate",
    "policy_weight": "policy",
    "distill_weight": "distillation",
    "rebellious_weight": "rebellious",
    "staleness": "staleness",
}


def section(records: Records) -> str:
    """Siblings of one prompt from heavy to light, then a group nobody solved, then an answer that was not parsed."""
    if not records.sampled:
        return ""
    part = records.sampled[0]
    every_turn = records.config is not None and records.config.train.turns == "assistant"
    blocks = [_block(title, part, numbers, every_turn) for title, numbers in choose(part)]
    trained = "turns that are trained are" if every_turn else "turn that is trained is"
    return (
        "<section><h2>Trajectories to read</h2>"
        f'<p class="why">From <code>{esc(part.source)}</code>. R is the return, w the weight; the {trained} marked.</p>'
        f"{''.join(blocks)}</section>"
    )


def of_online(seeds: Sequence[Seed]) -> str:
    """Siblings of the last stored step of an online run, best first; empty if no trajectories were stored."""
    found = next((seed for seed in seeds if seed.last), None)
    if found is None:
        return ""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in found.last:
        groups.setdefault(row["prompt_id"], []).append(row)
    ranked = sorted(groups.values(), key=lambda group: -len({row["t_star"] for row in group}))
    blocks = []
    for group in ranked[:2]:
        ordered = sorted(group, key=lambda row: (row["t_star"] is None, row["t_star"] or 0, len(row["messages"])))
        picked = [ordered[0], ordered[len(ordered) // 2], ordered[-1]][: len(ordered)]
        shown = "".join(_trajectory(row, _routed(row), True) for row in picked)
        blocks.append(f"<h3>{len(picked)} siblings of {len(group)}</h3>{shown}")
    return (
        f'<section><h2>Trajectories to read</h2><p class="why">From step {found.last[0]["step"]} of '
        f"<code>{esc(found.name)}/rollouts.jsonl</code>; every assistant turn is trained.</p>{''.join(blocks)}</section>"
    )


def _routed(row: dict[str, Any]) -> str:
    """What the row says of how it was trained on."""
    known = {name: label for name, label in ROUTED.items() if type(row.get(name)) in (int, float)}
    numbers = [f"{label} {row[name]:.3g}".replace(" -", " −") for name, label in known.items()]
    taught = "" if row.get("had_teacher", True) else '<span class="muted">no teacher</span>'
    return "".join(f"<span>{text}</span>" for text in numbers) + taught


def choose(part: Sampled) -> list[tuple[str, list[int]]]:
    """(heading, row numbers) pairs; the same file gives the same choice."""
    chosen: list[tuple[str, list[int]]] = []
    stars = [[part.rows[i]["t_star"] for i in group] for group in part.groups]
    mixed = [group for group, found in zip(part.groups, stars) if any(found) and not all(found)]
    if mixed:
        group = max(mixed, key=lambda g: len({part.rows[i]["t_star"] for i in g}))
        by_weight = sorted(group, key=lambda i: -part.weights[i])
        solved = [i for i in by_weight if part.rows[i]["t_star"]]
        siblings = sorted({by_weight[0], solved[-1], by_weight[-1]}, key=by_weight.index)
        chosen.append((f"{len(siblings)} siblings of {len(group)}, from heaviest to lightest", siblings))
    unsolved = [group for group, found in zip(part.groups, stars) if not any(found)]
    if unsolved:
        group = max(unsolved, key=lambda g: max(part.weights[i] for i in g))
        chosen.append(("From a group that nobody solved", [max(group, key=lambda i: part.weights[i])]))
    seen = {i for _, numbers in chosen for i in numbers}
    unparsed = (i for i, row in enumerate(part.rows) if i not in seen and len(_answers(row)) < len(_turns(row)))
    if (number := next(unparsed, None)) is not None:
        chosen.append(("With an answer that could not be parsed", [number]))
    if not chosen:
        chosen.append(("Always solved", part.groups[0][:2]))
    return chosen


def _turns(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [message for message in row["messages"] if message["role"] == "assistant"]


def _answers(row: dict[str, Any]) -> list[str]:
    return row.get("answer_norms") or []


def _block(title: str, part: Sampled, numbers: list[int], every_turn: bool) -> str:
    shown = "".join(_weighed(part, i, every_turn) for i in numbers)
    return f"<h3>{title}</h3>{shown}"


def _weighed(part: Sampled, i: int, every_turn: bool) -> str:
    head = f"<b>w = {part.weights[i]:.3g}</b><b>R = {part.returns[i]:.3f}</b>"
    return _trajectory(part.rows[i], head, every_turn, trained=part.weights[i] > 0)


def _trajectory(row: dict[str, Any], head: str, every_turn: bool, trained: bool = True) -> str:
    star, number = row["t_star"], len(_turns(row))
    outcome = (
        f'<span class="right">solved in turn {esc(star)}</span>' if star else '<span class="wrong">never solved</span>'
    )
    sibling = f" · trajectory {esc(row['traj_idx'])}" if row.get("traj_idx") is not None else ""
    head = f'<header>{head}{outcome}<span class="id">{esc(row["prompt_id"])}{sibling}</span></header>'
    turns, turn = [], 0
    for message in row["messages"]:
        turn += message["role"] == "assistant"
        marked = trained and message["role"] == "assistant" and (every_turn or turn == number)
        turns.append(_message(message, turn, row["verifier"].get(f"t{turn}"), marked))
    return f'<article class="trajectory">{head}{"".join(turns)}</article>'


def _message(message: dict[str, Any], turn: int, verdict: Any, trained: bool) -> str:
    content = str(message["content"])
    rest = len(content) - LONGEST
    text = esc(content[:LONGEST]) + (f"\n<small>… and {rest:,} characters more</small>" if rest > 0 else "")
    role, kind, label = message["role"], "turn", esc(message["role"])
    if role == "assistant":
        kind += " assistant" + " trained" * trained
        outcome = '<span class="right">right</span>' if verdict else '<span class="wrong">wrong</span>'
        label = f"<div>turn {turn}</div><div>{outcome}</div>" + '<div class="tag">trained</div>' * trained
    return f'<div class="{kind}"><div>{label}</div><pre dir="auto">{text}</pre></div>'
