"""The figures of a report, as SVG text that lives inside a page: its colours, its fonts, nothing from elsewhere.

matplotlib draws with stand-in colours, which are then replaced by the page's CSS variables, so that one drawing serves
light, dark and paper. Figures are 4.4 inches wide: at a phone's width they shrink by a sixth, and stay legible.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from drift.report.records import Results, Sampled, ordered

_STAND_INS = {
    "#010101": "var(--ink)",
    "#020202": "var(--muted)",
    "#030303": "var(--line)",
    "#040404": "var(--base)",
    "#050505": "var(--uniform)",
    "#060606": "var(--success)",
    "#070707": "var(--drift)",
    "#080808": "var(--other)",
}
INK, MUTED, LINE, BASE, UNIFORM, SUCCESS, DRIFT, OTHER = _STAND_INS
_PERCENT = FuncFormatter(lambda share, _: f"{round(100 * share, 6):g}%")
COLOURS = {"base": BASE, "uniform": UNIFORM, "success_only": SUCCESS, "drift": DRIFT}
MARKERS = {"base": "s", "uniform": "^", "success_only": "D", "drift": "o"}

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "drift",
    "font.size": 9.5,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "figure.constrained_layout.use": True,
}


def by_turn(results: Mapping[str, Results]) -> str:
    """Share solved within 1..k turns, the mean over seeds with a band of one standard error."""

    def draw(axes: Axes) -> None:
        longest = 1
        for arm, result in results.items():
            table = np.asarray(result.by_turn, dtype=float)  # [seeds, turns]
            if not table.size:
                continue
            turns, colour = np.arange(1, table.shape[1] + 1), COLOURS.get(arm, OTHER)
            longest = max(longest, table.shape[1])
            mean = table.mean(0)
            axes.plot(turns, mean, color=colour, marker=MARKERS.get(arm, "x"), markersize=5, label=_no_math(arm, 16))
            if len(table) > 1:
                spread = table.std(0, ddof=1) / math.sqrt(len(table))
                axes.fill_between(turns, mean - spread, mean + spread, color=colour, alpha=0.18, linewidth=0)
        axes.set_xticks(range(1, longest + 1))
        axes.set_xlabel("turns allowed")
        axes.yaxis.set_major_formatter(_PERCENT)
        lines = sorted(axes.get_lines(), key=lambda line: -float(np.ravel(line.get_ydata())[-1]))  # as they end
        axes.legend(handles=lines, loc="center left", bbox_to_anchor=(1.0, 0.5))

    return _svg("Solved within so many turns", draw)


def by_seed(results: Mapping[str, Results], turns: int) -> str:
    """multi@k of every seed in every arm: a line is a seed, a bar the mean of an arm."""

    def draw(axes: Axes) -> None:
        arms = list(results)
        table = np.asarray([results[arm].multi for arm in arms], dtype=float)  # [arms, seeds]
        for seed in table.T:
            axes.plot(range(len(arms)), seed, color=LINE, linewidth=1.2, zorder=1)
        for place, arm in enumerate(arms):
            colour = COLOURS.get(arm, OTHER)
            axes.scatter([place] * table.shape[1], table[place], s=26, color=colour, zorder=3, alpha=0.75, linewidth=0)
            axes.plot([place - 0.2, place + 0.2], [table[place].mean()] * 2, color=colour, linewidth=3, zorder=4)
        axes.set_xticks(range(len(arms)), [_no_math(arm, 13) for arm in arms])
        axes.set_xlim(-0.45, len(arms) - 0.55)
        axes.grid(axis="x", visible=False)
        axes.yaxis.set_major_formatter(_PERCENT)

    return _svg(f"multi@{turns}, seed by seed", draw)


def returns_histogram(sampled: Sequence[Sampled]) -> str:
    """Returns of all trajectories, solved and not."""
    values = np.array([value for part in sampled for value in part.returns])
    solved = np.array([row["t_star"] is not None for part in sampled for row in part.rows])

    def draw(axes: Axes) -> None:
        edges = np.linspace(values.min() - 0.025, values.max() + 0.025, 32).tolist()
        both = [values[solved], values[~solved]]
        axes.hist(both, edges, stacked=True, color=[DRIFT, BASE], label=["solved", "never solved"], linewidth=0)
        axes.set_xlabel("return R")
        axes.set_ylabel("trajectories")
        axes.grid(axis="x", visible=False)
        axes.legend(loc="best")

    return _svg("Returns", draw)


def weights_histogram(sampled: Sequence[Sampled]) -> str:
    """Importance weights on a log scale: the share of trajectories, and of all weight, in each bar."""
    weights = np.array([weight for part in sampled for weight in part.weights])

    def draw(axes: Axes) -> None:
        lowest = 1e-6
        edges = np.logspace(math.log10(lowest), math.log10(max(2.0, weights.max() * 1.1)), 30).tolist()
        shown = np.clip(weights, lowest * 1.0001, None)
        kinds = ((np.full(len(weights), 1 / len(weights)), BASE, "of trajectories"),)
        if weights.sum() > 0:
            kinds += ((weights / weights.sum(), DRIFT, "of all weight"),)
        for share, colour, label in kinds:
            axes.hist(shown, edges, weights=share, color=colour, alpha=0.7, label=label, linewidth=0)
        axes.axvline(1.0, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_xscale("log")
        axes.set_xlabel(r"weight w (1 is average; ≤ 1e-6 in the first bar)")
        axes.yaxis.set_major_formatter(_PERCENT)
        axes.grid(axis="x", visible=False)
        axes.legend(loc="upper left")

    return _svg("Importance weights", draw)


def ess_histogram(sampled: Sequence[Sampled]) -> str:
    """Effective sample size of each prompt's group, as a share of it."""
    values = np.array([share for part in sampled for share in part.ess_by_group])

    def draw(axes: Axes) -> None:
        axes.hist(values, np.linspace(0, 1, 26).tolist(), color=DRIFT, alpha=0.85, linewidth=0)
        if len(values):
            axes.axvline(values.mean(), color=INK, linewidth=1, linestyle=(0, (4, 3)))
            axes.annotate(
                f"mean {values.mean():.0%}",
                (values.mean(), 1.0),
                (4 if values.mean() < 0.75 else -4, -8),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                ha="left" if values.mean() < 0.75 else "right",
                fontsize=9,
            )
        axes.set_xlabel("(Σw)² / (n Σw²)")
        axes.set_ylabel("groups")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.xaxis.set_major_formatter(_PERCENT)
        axes.grid(axis="x", visible=False)

    return _svg("Effective sample size, group by group", draw)


def group_histogram(sampled: Sequence[Sampled]) -> str:
    """How many trajectories of a group solved its problem; groups at 0 teach nothing about being right."""
    solved = [[part.rows[i]["t_star"] is not None for i in group] for part in sampled for group in part.groups]
    size = max(map(len, solved))
    counts = np.bincount([sum(group) for group in solved], minlength=size + 1)

    def draw(axes: Axes) -> None:
        axes.bar(range(size + 1), counts, color=[BASE] + [DRIFT] * size, width=0.85, linewidth=0)
        axes.set_xlabel(f"trajectories solved, of {size}")
        axes.set_ylabel("groups")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.grid(axis="x", visible=False)

    return _svg("How often a prompt was solved", draw)


def curve(metric: str, series: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """One metric over steps: a thin line a series, and the mean of each arm that has several seeds."""

    def draw(axes: Axes) -> None:
        by_arm: dict[str, list[np.ndarray]] = {}
        for name, points in sorted(series.items()):
            by_arm.setdefault(arm_of(name), []).append(thin(np.asarray(points, dtype=float)))
        for arm in ordered(by_arm):
            runs = by_arm[arm]
            colour, label = COLOURS.get(arm, OTHER), _no_math(arm, 16) or None
            if len(runs) == 1:
                axes.plot(runs[0][:, 0], runs[0][:, 1], color=colour, linewidth=1.5, label=label, **_dot(runs[0]))
                continue
            for run in runs:
                axes.plot(run[:, 0], run[:, 1], color=colour, linewidth=0.7, alpha=0.3)
            steps = np.unique(np.concatenate([run[:, 0] for run in runs]))
            there = [np.interp(steps, run[:, 0], run[:, 1], left=np.nan, right=np.nan) for run in runs]
            kept = ~np.isnan(there).all(0)
            axes.plot(steps[kept], np.nanmean(np.array(there)[:, kept], 0), color=colour, linewidth=1.8, label=label)
        axes.set_xlabel("step")
        axes.margins(x=0.02)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        if len(by_arm) > 1:
            axes.legend(loc="best")

    return _svg(metric, draw, height=2.5)


Runs = Sequence[Sequence[tuple[int, float]]]  # one curve a seed
Phases = Sequence[tuple[str, float, float]]  # (name, first step, last step), shaded


def lines(
    title: str,
    series: Mapping[str, tuple[str, Runs]],
    *,
    phases: Phases = (),
    shares: bool = False,
    smooth: int = 1,
) -> str:
    """Label → (colour, curves): a thin line a seed, and thick their mean, over `smooth` steps if that is more than 1."""

    def draw(axes: Axes) -> None:
        for label, (colour, runs) in series.items():
            drawn = [thin(np.asarray(run, dtype=float)) for run in runs]
            steps, mean = _mean(drawn)
            for run in drawn if len(drawn) > 1 or smooth > 1 else ():
                axes.plot(run[:, 0], run[:, 1], color=colour, linewidth=0.7, alpha=0.3)
            dot = _dot(np.stack([steps, mean], 1))
            axes.plot(steps, _smoothed(mean, smooth), color=colour, linewidth=1.7, label=_no_math(label, 26), **dot)
        if shares:
            axes.yaxis.set_major_formatter(_PERCENT)
            low, high = axes.get_ylim()
            axes.set_ylim(max(low, -0.02), min(high, 1.02))
        _shade(axes, phases)
        _finish(axes, len(series) > 1)
        if not any(value for _, runs in series.values() for run in runs for _, value in run):
            _say_zero(axes)

    return _svg(title, draw)


def _say_zero(axes: Axes) -> None:
    """A label in place of an axis, if every value is 0."""
    axes.set_ylim(-1, 1)
    axes.set_yticks([0], ["0"])
    axes.text(0.5, 0.6, "0 in every step", transform=axes.transAxes, ha="center")


def stacked(title: str, parts: Mapping[str, tuple[str, Runs]], *, phases: Phases = (), shares: bool = False) -> str:
    """Label → (colour, curves), laid on each other from the bottom; the mean over seeds."""

    def draw(axes: Axes) -> None:
        means = [_mean([thin(np.asarray(run, dtype=float)) for run in runs]) for _, runs in parts.values()]
        steps = means[0][0]
        height = np.zeros_like(steps)
        for (label, (colour, _)), (others, mean) in zip(parts.items(), means):
            top = height + np.interp(steps, others, mean)
            axes.fill_between(steps, height, top, color=colour, alpha=0.6, linewidth=0, label=_no_math(label, 26))
            height = top
        axes.set_ylim(0, None)
        axes.margins(x=0)
        _shade(axes, phases)
        if shares:
            axes.yaxis.set_major_formatter(_PERCENT)
        _finish(axes, True)

    return _svg(title, draw)


def _mean(runs: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and the mean over the runs that have come so far."""
    steps = np.unique(np.concatenate([run[:, 0] for run in runs]))
    there = np.array([np.interp(steps, run[:, 0], run[:, 1], left=np.nan, right=np.nan) for run in runs])
    kept = ~np.isnan(there).all(0)
    return steps[kept], np.nanmean(there[:, kept], 0)


def _smoothed(values: np.ndarray, width: int) -> np.ndarray:
    """Means of up to `width` values around each."""
    sides = [(max(0, i - width // 2), i + (width + 1) // 2) for i in range(len(values))]
    return np.array([values[start:stop].mean() for start, stop in sides])


def _shade(axes: Axes, phases: Phases) -> None:
    if not phases:
        return
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.1 * (high - low))  # room for the names
    for place, (name, start, stop) in enumerate(phases):
        axes.axvspan(start - 0.5, stop + 0.5, color=MUTED, alpha=0.13 - 0.07 * place, linewidth=0, zorder=0)
        where = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "color": MUTED, "fontsize": 8}
        axes.annotate(name, (start - 0.5, 1.0), (3, -10), **where)


def _finish(axes: Axes, legend: bool) -> None:
    axes.set_xlabel("step")
    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    if legend and isinstance(axes.figure, Figure):
        labels = [str(line.get_label()) for line in axes.get_legend_handles_labels()[0]]
        columns = len(labels) if sum(map(len, labels)) + 5 * len(labels) < 50 else 2
        axes.figure.legend(loc="outside lower center", ncols=columns, handlelength=1.4, columnspacing=1.2)


def intervals(rows: Sequence[tuple[str, str, float, float, float]], title: str, xlabel: str) -> Figure:
    """Points with intervals, one line a row of (label, arm, mean, low, high), for the study. Plain colours."""
    with mpl.rc_context({**_STYLE, **_plain_style()}):
        figure = Figure(figsize=(6.4, 0.9 + 0.42 * len(rows)))
        axes = figure.subplots()
        for place, (_, arm, mean, low, high) in enumerate(rows):
            colour = PLAIN.get(COLOURS.get(arm, OTHER))
            axes.plot([low, high], [place, place], color=colour, linewidth=2.5, solid_capstyle="round")
            axes.plot([mean], [place], color=colour, marker=MARKERS.get(arm, "o"), markersize=8)
            axes.annotate(f"{mean:.1%}", (mean, place), (0, 7), textcoords="offset points", ha="center", fontsize=9)
        axes.set_yticks(range(len(rows)), [row[0] for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.75)
        axes.set_xlabel(xlabel)
        axes.set_title(title)
        axes.xaxis.set_major_formatter(_PERCENT)
        axes.grid(axis="y", visible=False)
        return figure


PLAIN = {
    INK: "#1b1f24",
    MUTED: "#59636e",
    LINE: "#d1d9e0",
    BASE: "#8b949e",
    UNIFORM: "#0072b2",
    SUCCESS: "#00916b",
    DRIFT: "#d1490c",
    OTHER: "#9a5bd0",
}


def _plain_style() -> dict[Any, Any]:
    plain = {key: PLAIN[value] for key, value in _STYLE.items() if isinstance(value, str) and value in PLAIN}
    return {**plain, "svg.fonttype": "path", "figure.facecolor": "white"}


def arm_of(series: str) -> str:
    """The arm that a series' name mentions, or the name without its seed."""
    parts = [part for part in series.split("/") if not re.fullmatch(r"seed-\d+", part)]
    return next((part for part in parts if part in COLOURS), "/".join(parts))


def thin(points: np.ndarray, most: int = 400) -> np.ndarray:
    """[N, 2] points as at most `most`: means of equal stretches, so that a long run draws a small page."""
    if len(points) <= most:
        return points
    edges = np.linspace(0, len(points), most + 1).astype(int)
    return np.add.reduceat(points, edges[:-1]) / np.diff(edges)[:, None]


def _dot(run: np.ndarray) -> dict[str, Any]:
    return {"marker": "o", "markersize": 4} if len(run) == 1 else {}


def _svg(title: str, draw: Callable[[Axes], None], height: float = 2.9) -> str:
    """An <svg> element for the page: stand-in colours become variables, unused ids go, used ones are made unique."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(4.4, height))
        axes = figure.subplots()
        axes.set_title(_no_math(title))
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for stand_in, variable in _STAND_INS.items():
        text = text.replace(stand_in, variable)
    prefix = re.sub(r"\W+", "-", title)
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda m: f' id="{prefix}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(url\(#|href="#)', rf"\1{prefix}-", text)
    head = re.search(r"<svg[^>]*>", text)
    view = re.search(r'viewBox="([^"]+)"', head[0] if head else "")
    if head is None or view is None:
        raise ValueError("matplotlib wrote an SVG without a view box; the report's figures rely on it")
    label = f'role="img" aria-label="{_attribute(title)}"'
    opening = f'<svg viewBox="{view[1]}" {label} xmlns:xlink="http://www.w3.org/1999/xlink">'
    return opening + text[head.end() :].strip()


def _no_math(text: str, longest: int = 40) -> str:
    """Short enough for a figure, and plain: matplotlib reads text between dollar signs as mathematics."""
    return (text if len(text) <= longest else text[: longest - 1] + "…").replace("$", r"\$")


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
