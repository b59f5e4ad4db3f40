"""`python -m bench.picture`: the README's picture, time and memory of one case, from bench/results/cpu.json. Measures nothing."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results/cpu.json"
PICTURE = Path(__file__).parents[1] / "docs/speed.svg"
CASE = "ppo"
SHOWN = {"drift": "drift", "apple": "Apple CCE", "eager": "eager", "liger": "Liger", "trl": "TRL", "verl": "verl"}
OURS, OTHERS, TEXT = "#1f6feb", "#8b949e", "#57606a"  # TEXT can be read on white and on black


def main(source: Path = RESULTS, target: Path = PICTURE) -> None:
    """Writes the picture."""
    case = next(case for case in json.loads(source.read_text())["cases"] if case["name"] == CASE)
    entries = {entry["name"]: entry for entry in case["contenders"] if entry["status"] == "ok"}
    rows = sorted((name for name in SHOWN if name in entries), key=lambda name: entries[name]["seconds"])
    with mpl.rc_context({"svg.hashsalt": "drift", "font.size": 11, "text.color": TEXT, "axes.labelcolor": TEXT}):
        figure = Figure(figsize=(9, 0.42 * len(rows) + 0.9), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        bars(left, "seconds", rows, [entries[name]["seconds"] for name in rows], "{:.2f}")
        measured = [name for name in rows if entries[name]["peak_bytes"]]
        bars(
            right,
            "MiB added",
            rows,
            [entries[name]["peak_bytes"] / 2**20 if name in measured else 0 for name in rows],
            "{:,.0f}",
        )
        left.set_yticks(range(len(rows)), [SHOWN[name] for name in rows], color=TEXT)
        left.invert_yaxis()
        figure.savefig(target, metadata={"Date": None}, transparent=True)


def bars(axes: Axes, title: str, rows: list[str], values: list[float], form: str) -> None:
    """One bar a contender, with its value."""
    drawn = axes.barh(range(len(rows)), values, color=[OURS if name == "drift" else OTHERS for name in rows])
    axes.bar_label(drawn, [form.format(value) if value else "–" for value in values], padding=4, color=TEXT)
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xticks([])
    axes.margins(x=0.18)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)


if __name__ == "__main__":
    main()
