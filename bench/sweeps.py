"""`python -m bench.sweeps`: how time and memory go with T, V, the share of active rows, and the workspace. Two rows of plots.

Time is drift's over the bare GEMMs of the same rows (docs/benchmarks.md), memory what one call adds to what is resident, in a
process of its own. Eager torch is drawn beside it. The workspace's panel has the GEMMs' own curve: their time in chunks of
as many rows as the workspace holds, over their time in the fastest.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import memory
from bench.cases import CURVES, WORKSPACE_CASE, Case, make
from bench.measure import GemmLimit, paired, run_case
from bench.peers import CONTENDERS, Contender, drift
from bench.report import RESULTS, machine, progress

DRAWN = ("drift", "eager")
WORKSPACES = (64, 128, 256, 512, 1024)  # MiB
PICTURE = Path(__file__).parent.parent / "docs" / "benchmarks.svg"
TICKS = (0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.3, 1.5, 1.75, 2, 4, 8, 16, 32, 64)  # of times
AXES = {"T": "rows T", "V": "vocabulary V", "active": "active rows, %", "workspace": "workspace, MiB"}
SHAPES = {
    "T": "V 8,192, D 256",
    "V": "T 512, D 256",
    "active": "T 2,048, V 32,768, D 256",
    "workspace": "T 1,024, V 65,536, D 896",
}


def curve(name: str, smoke: bool, sizes: bool, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """A point for each case of the curve: time over the limit and, where it can be measured, bytes, by contender."""
    points = []
    for case in CURVES[name]:
        size = case.shrunk() if smoke else case
        found = run_case(size, [CONTENDERS[c] for c in DRAWN], 2, lambda text, case=case: say(f"{case.name}: {text}"))
        over = {entry["name"]: entry["over_limits"][0] for entry in found["contenders"]}
        points.append({"x": float(case.name.partition("=")[2]), "over": over, "bytes": {}})
    if sizes:
        for contender in DRAWN:
            say(f"{name}: memory of {contender}")
            found = dict(memory.measure(contender, [case.name for case in CURVES[name]], smoke))
            for case, point in zip(CURVES[name], points):
                point["bytes"][contender] = found.get(case.name)
    return points


def workspace_curve(smoke: bool, sizes: bool, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """A point for each workspace, and the GEMMs in chunks of as many rows as drift takes then."""
    case: Case = WORKSPACE_CASE.shrunk() if smoke else WORKSPACE_CASE
    ours = [
        Contender(
            f"drift@{mib}", f"drift, {mib} MiB", "drift-rl", CONTENDERS["drift"].units, lambda mib=mib: drift(mib << 20)
        )
        for mib in WORKSPACES
    ]
    found = run_case(case, ours, 3, lambda text: say(f"workspace: {text}"))
    problem = make(case)
    gemms = GemmLimit(problem, problem.shares(), torch.float32)
    say("workspace: GEMMs alone")
    rows = {mib: min(case.T, max(1, (mib << 20) // (4 * (case.V + 2 * case.D)))) for mib in WORKSPACES}
    times: dict[int, dict[int, float]] = {mib: {} for mib in WORKSPACES}
    best: dict[int, float] = {}
    for turn in range(3):
        best[turn] = gemms.run()
        for mib in WORKSPACES:
            times[mib][turn] = gemms.run(rows[mib])
    points = []
    for mib, entry in zip(WORKSPACES, found["contenders"]):
        over = {"drift": entry["over_limits"][0], "GEMMs": paired(times[mib], best)}
        points.append({"x": float(mib), "rows": rows[mib], "over": over, "bytes": {}})
        if sizes:
            say(f"workspace: memory with {mib} MiB")
            points[-1]["bytes"]["drift"] = dict(memory.measure(entry["name"], [case.name], smoke)).get(case.name)
    return points


def draw(results: dict[str, Any], picture: Path) -> None:
    """Time over the limit above, memory below; one column a curve."""
    import matplotlib
    import matplotlib.ticker

    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {"svg.hashsalt": "drift", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    )
    import matplotlib.pyplot as plt

    colours = {"drift": "#1f6feb", "eager": "#9a6700", "GEMMs": "#6e7781"}
    curves = results["curves"]
    figure, axes = plt.subplots(2, len(curves), figsize=(3.1 * len(curves), 5.4), squeeze=False)
    for column, (name, points) in enumerate(curves.items()):
        xs = [point["x"] for point in points]
        for row, key in enumerate(("over", "bytes")):
            ax = axes[row][column]
            for who in colours:
                ys = [point[key].get(who) for point in points]
                if all(y is None for y in ys):
                    continue
                ys = [float("nan") if y is None else y / (1 if key == "over" else 2**20) for y in ys]
                ax.plot(xs, ys, marker="o", markersize=3.5, color=colours[who], label=who)
            ax.set_xscale("log", base=2 if name != "active" else 10)
            ax.set_xticks(xs, [f"{x:,.0f}" for x in xs], rotation=45, ha="right", fontsize=7)
            ax.minorticks_off()
            if key == "over":
                ax.axhline(1.0, color="#d0d7de", linewidth=1, zorder=0)
                ax.set_title(SHAPES[name], fontsize=8)
                ax.set_yscale("log", base=2)
                low, high = ax.get_ylim()
                ax.set_yticks([y for y in TICKS if low <= y <= high and (high < 3 or y == int(y))])
                ax.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
                ax.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
            else:
                ax.set_xlabel(AXES[name])
                ax.set_ylim(bottom=0)
        axes[0][column].legend(frameon=False, fontsize=8)
    axes[0][0].set_ylabel("time over bare GEMMs")
    axes[1][0].set_ylabel("peak memory of a call, MiB")
    figure.tight_layout()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, metadata={"Date": None})
    plt.close(figure)


def table(results: dict[str, Any]) -> str:
    """Every point as markdown."""
    out = []
    for name, points in results["curves"].items():
        who = [w for w in ("drift", "GEMMs", "eager") if any(point["over"].get(w) is not None for point in points)]
        sized = [w for w in ("drift", "eager") if any(point["bytes"].get(w) is not None for point in points)]
        heads = [AXES[name], *(f"{w}, × GEMMs" for w in who), *(f"{w}, MiB" for w in sized)]
        out += [f"**{AXES[name]}** ({SHAPES[name]})", "", "| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
        for point in points:
            over = [f"{point['over'][w]:.2f}" if point["over"].get(w) is not None else "–" for w in who]
            size = [f"{point['bytes'][w] / 2**20:,.0f}" if point["bytes"].get(w) is not None else "–" for w in sized]
            out.append("| " + " | ".join([f"{point['x']:,.0f}", *over, *size]) + " |")
        out.append("")
    return "\n".join(out)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, draws docs/benchmarks.svg, writes sweeps.json and sweeps.md, and returns what the JSON holds."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.sweeps", description="Time and memory against one size at a time."
    )
    parser.add_argument("--curves", nargs="+", choices=AXES, default=list(AXES), help="which (default all)")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, and no picture in docs: does it work at all")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the numbers (default bench/results)")
    args = parser.parse_args(argv)
    date = datetime.datetime.now().astimezone().isoformat(timespec="minutes")
    sizes = memory.available() is None and not args.no_memory
    results: dict[str, Any] = {"date": date, "machine": machine(), "smoke": args.smoke, "curves": {}}
    stem = args.out / ("sweeps-smoke" if args.smoke else "sweeps")
    args.out.mkdir(parents=True, exist_ok=True)
    with progress(len(args.curves)) as (say, advance):
        for name in args.curves:
            measure = workspace_curve if name == "workspace" else partial(curve, name)
            results["curves"][name] = measure(args.smoke, sizes, say)
            stem.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
            stem.with_suffix(".md").write_text(table(results))
            advance()
    draw(results, args.out / "sweeps-smoke.svg" if args.smoke else PICTURE)
    print(table(results))
    return results


if __name__ == "__main__":
    main()
