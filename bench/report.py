"""`python -m bench.report`: every contender on every case, side by side, to the terminal and to bench/results.

Left out: a chart (six numbers a case read better as a table), and any pass or fail. Ratios are reported and decide nothing.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch._inductor import config as inductor

from bench import memory
from bench.cases import CASES
from bench.measure import OURS, run_case
from bench.peers import CONTENDERS
from drift_kernels import _cpu  # pyright: ignore[reportAttributeAccessIssue]

RESULTS = Path(__file__).parent / "results"
# Memory costs a run more of everything; the cases left out hold what these hold, at other shares of rows.
MEMORY_CASES = ("dense", "ppo")
HELD = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
ISA = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX-BF16"}


def machine() -> dict[str, Any]:
    """What the numbers were taken on."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    model = re.search(r"model name\s*:\s*(.+)", text)
    flags = re.search(r"flags\s*:\s*(.+)", text)
    present = set(flags[1].split()) if flags else set()
    return {
        "cpu": model[1] if model else platform.processor() or platform.machine(),
        "isa": [name for flag, name in ISA.items() if flag in present],
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
    }


def versions(packages: Sequence[str]) -> dict[str, str | None]:
    """Installed versions; None if a package is missing."""
    found: dict[str, str | None] = {}
    for package in sorted(set(packages) | {"torch", "drift-rl"}):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def _number(value: float | None, form: str = ".2f") -> str:
    return "–" if value is None else format(value, form)


def headings(case: dict) -> list[str]:
    """Of a case's table."""
    return ["", "units", "seconds", *(f"× {limit['title']}" for limit in case["limits"]), "× drift", "peak MiB"]


def lines(case: dict) -> list[list[str]]:
    """A case's table: the limits, then contenders by time, then those without one."""
    empty = ["–"] * len(case["limits"])
    table = []
    for limit in case["limits"]:
        title = f"bare {limit['title']}, {limit['chunk']} rows"
        table.append([title, f"{case['limit_units']:.2f}", f"{limit['seconds']:.3f}", *empty, "–", "–"])
    for entry in sorted(case["contenders"], key=lambda e: (e["seconds"] is None, e["seconds"] or 0.0)):
        peak = None if entry["peak_bytes"] is None else entry["peak_bytes"] / 2**20
        if entry["status"] == "ok":
            once = " (one run)" if len(entry["times"]) == 1 else ""
            over = [_number(value) for value in entry["over_limits"]]
            row = [f"{entry['units']:.2f}", f"{entry['seconds']:.3f}{once}", *over, _number(entry["over_drift"])]
            table.append([entry["title"], *row, _number(peak, ",.0f")])
        else:
            table.append([entry["title"], "–", f"{entry['status']}: {entry['reason']}", *empty, "–", "–"])
    return table


def caption(case: dict) -> str:
    """A case in a sentence, and the headline."""
    shape, shares = case["shape"], case["shares"]
    text = f"T {shape['T']:,}, D {shape['D']:,}, V {shape['V']:,}, {case['dtype']}. "
    text += (
        f"{shares['trained']:.0%} of rows trained, {shares['read']:.0%} read, {shares['live']:.0%} with a gradient. "
    )
    text += f"Gradients alone: {case['gradient_bytes'] / 2**20:,.0f} MiB."
    if case["speedup"] is not None:
        fastest = next(e["title"] for e in case["contenders"] if e["name"] == case["fastest_peer"])
        text += f" Fastest peer: {fastest}, {case['speedup']:.2f} × drift's time."
    return text


def markdown(results: dict) -> str:
    """The whole report."""
    where = results["machine"]
    held = "; everything held to AVX2" if results.get("isa") == "avx2" else ""
    found = ", ".join(f"{name} {version or 'missing'}" for name, version in results["versions"].items())
    out = [
        f"{where['cpu']} ({', '.join(where['isa']) or where['torch_isa']}{held}), {where['threads']} threads, "
        f"{results['date']}. {found}. Python {where['python']}.",
        "",
    ]
    for case in results["cases"]:
        out += [f"### {case['name']}", caption(case), ""]
        heads = headings(case)
        out += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
        out += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines(case)]
        out.append("")
    return "\n".join([*out, *summary(results["cases"])])


def summary(cases: list[dict]) -> list[str]:
    """All cases in one table of times over drift's: the one that docs/benchmarks.md quotes."""

    def row(title: str, cells: Iterable[str]) -> str:
        return "| " + " | ".join([title, *cells]) + " |"

    ours, entries = CONTENDERS[OURS].title, [{entry["title"]: entry for entry in case["contenders"]} for case in cases]
    out = ["### All cases", "Time over drift's, paired; (n): one run.", "", row("", [case["name"] for case in cases])]
    out.append("|" + "---|" * (len(cases) + 1))
    out.append(row("drift, seconds", [_number(by_title[ours]["seconds"], ".3f") for by_title in entries]))
    for i, title in enumerate(("fp32", "bf16")):
        ratios = [[*by_title[ours]["over_limits"], None][i:][:1] for by_title in entries]
        out.append(row(f"drift ÷ bare GEMMs, {title}", [_number(ratio) for [ratio] in ratios]))
    for title in entries[0]:
        if title != ours:
            shown = ((_number(by_title[title]["over_drift"]), by_title[title]["once"]) for by_title in entries)
            out.append(row(title, [f"({text})" if once and text != "–" else text for text, once in shown]))
    return [*out, ""]


def show(console: Console, case: dict) -> None:
    """A case's table on the terminal."""
    console.print(f"\n[bold]{case['name']}[/bold]  {caption(case)}", highlight=False)
    table = Table()
    for i, head in enumerate(headings(case)):
        table.add_column(head, justify="left" if i == 0 else "right", no_wrap=i != 2)
    for row in lines(case):
        table.add_row(*row, style="bold" if row[0] == CONTENDERS[OURS].title else None)
    console.print(table)


def measure_memory(results: dict, smoke: bool, report: Callable[[str], None]) -> None:
    """Fills in `peak_bytes` of everyone who has a time."""
    wanted = {case["name"]: case for case in results["cases"] if smoke or case["name"] in MEMORY_CASES}
    entries = {(name, entry["name"]): entry for name, case in wanted.items() for entry in case["contenders"]}
    for contender in CONTENDERS:
        cases = [name for name in wanted if entries.get((name, contender), {}).get("status") == "ok"]
        if cases and not CONTENDERS[contender].once:
            report(CONTENDERS[contender].title)
            for name, peak in memory.measure(contender, cases, smoke):
                entries[name, contender]["peak_bytes"] = peak


def save(results: dict, stem: Path) -> None:
    """Writes both forms; after each case, so that a run cut short leaves what it had."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    stem.with_suffix(".md").write_text(markdown(results))


@contextmanager
def progress(total: int) -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    """(say what is being done, one step further): a bar on a terminal, lines elsewhere."""
    console, began = Console(stderr=True), time.monotonic()
    if not console.is_terminal:
        yield lambda text: console.print(f"{time.monotonic() - began:6.0f} s  {text}", highlight=False), lambda: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=total)
        yield lambda text: bar.update(task, description=text), lambda: bar.advance(task)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description="Losses side by side.")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=CONTENDERS,
        default=list(CONTENDERS),
        metavar="NAME",
        help=", ".join(CONTENDERS),
    )
    parser.add_argument("--rounds", type=int, default=5, help="of timing, at most (default 5)")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it work at all")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    parser.add_argument(
        "--isa",
        choices=["native", "avx2"],
        default="native",
        help="avx2: torch, its libraries and drift as on a CPU without AVX-512; memory is left out",
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the report (default bench/results)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict:
    """Measures, prints, writes cpu.md and cpu.json (smoke.* with --smoke), and returns what the JSON holds."""
    args = _arguments(argv)
    held = args.isa == "avx2"
    if held and any(os.environ.get(name) != value for name, value in HELD.items()):  # libraries read them as they load
        os.environ.update(HELD)
        os.execv(sys.executable, [sys.executable, "-m", "bench.report", *(sys.argv[1:] if argv is None else argv)])
    if held:
        _cpu.limit_isa("avx2")
        inductor.cpp.simdlen = 256  # bits, of what torch.compile makes for the contenders that use it
    console = Console()
    if not console.is_terminal:
        console.width = 120
    contenders = [CONTENDERS[name] for name in dict.fromkeys([OURS, *args.contenders])]
    results: dict[str, Any] = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
        "machine": machine(),
        "versions": versions([contender.package for contender in contenders]),
        "rounds": args.rounds,
        "smoke": args.smoke,
        "isa": args.isa,
        "memory": memory.available() or ("not asked for" if args.no_memory or held else "measured"),
        "cases": [],
    }
    stem = args.out / (("smoke" if args.smoke else "cpu") + ("-avx2" if held else ""))
    with progress(len(args.cases) + 1) as (say, advance):
        for name in dict.fromkeys(args.cases):
            case = CASES[name].shrunk() if args.smoke else CASES[name]
            found = run_case(
                case,
                contenders,
                args.rounds,
                lambda text, name=name: say(f"{name}: {text}"),
                half_limit=not held,
            )
            results["cases"].append(found)
            save(results, stem)
            advance()
        if results["memory"] == "measured":
            measure_memory(results, args.smoke, lambda text: say(f"memory: {text}"))
            save(results, stem)
        advance()
    for case in results["cases"]:
        show(console, case)
    console.print(f"{stem.with_suffix('.md')} · {stem.with_suffix('.json')}")
    return results


if __name__ == "__main__":
    main()
