"""The report as Markdown, and as what the terminal shows."""

from __future__ import annotations

import json
from typing import Any


def number(value: float | None, form: str) -> str:
    """`value` by a format, or a dash."""
    return "–" if value is None else format(value, form)


def table(heads: list[str], rows: list[list[str]]) -> list[str]:
    """Markdown lines."""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (heads, *rows)]
    return [f"| {' | '.join(row)} |" for row in (cells[0], ["---"] * len(heads), *cells[1:])]


def case_lines(case: dict[str, Any]) -> list[str]:
    """A case: its caption and its table, by time; who has none comes last, with the reason."""
    if "contenders" not in case:
        return [f"### {case['name']}", f"Not measured: {case['reason']}.", ""]
    shape, shares, gemms = case["shape"], case["shares"], case["gemms"]
    caption = (
        f"T {shape['T']:,}, D {shape['D']:,}, V {shape['V']:,}, {case['dtype']}, loss: {case['loss']}. "
        f"{shares['trained']:.0%} of rows trained, {shares['read']:.0%} read, {shares['live']:.0%} with a gradient. "
        f"Gradients alone: {case['gradient_bytes'] / 2**20:,.0f} MiB. TFLOP/s count {case['flops'] / 1e12:.1f} TFLOP for all."
    )
    rows = [[f"bare GEMMs, {gemms['chunk']} rows", number(1e3 * gemms["seconds"], ".2f"), "–", "1.00", "–", "–", "–"]]
    for entry in sorted(case["contenders"], key=lambda e: (e["seconds"] is None, e["seconds"] or 0.0)):
        if entry["status"] != "ok":
            rows.append([entry["title"], f"{entry['status']}: {entry['reason']}", "–", "–", "–", "–", "–"])
            continue
        guess = case["predicted"].get(entry["name"].removeprefix("drift-"))
        peak = None if entry["peak_bytes"] is None else entry["peak_bytes"] / 2**20
        values = [number(1e3 * entry["seconds"], ".2f"), number(entry["tflops"], ".0f")]
        values += [number(entry["over_gemms"], ".2f"), number(peak, ",.0f"), number(entry["units"], ".2f")]
        rows.append([entry["title"], *values, number(None if guess is None else 1e3 * guess, ".2f")])
    heads = ["", "ms", "TFLOP/s", "× bare GEMMs", "peak MiB", "units", "predicted ms"]
    return [f"### {case['name']}", caption, "", *table(heads, rows), ""]


def tuning_lines(tuning: dict[str, Any]) -> list[str]:
    """What was tried, and what came of it."""
    if "tried" not in tuning:
        return [f"Not tried: {tuning['reason']}."]
    rows = [
        [
            t["role"],
            ", ".join(t["kernels"]),
            json.dumps(t["numbers"]) if t["numbers"] else "the rule's",
            t["reason"] or number(None if t["seconds"] is None else 1e6 * t["seconds"], ".0f"),
        ]
        for t in tuning["tried"]
    ]
    notes = [f"{role}: {reason}." for role, reason in tuning["reasons"].items()]
    found = json.dumps(tuning["file"]) if tuning["file"] else "nothing is 2 % faster than the rules"
    return [*table(["backend", "kernels", "numbers", "µs"], rows), "", *notes, f"To be written: {found}."]


def markdown(results: dict[str, Any]) -> str:
    """The whole report, as far as it goes."""
    facts = "; ".join(f"{name} {value}" for name, value in results["machine"].items())
    versions = ", ".join(f"{name} {version or 'missing'}" for name, version in results["versions"].items())
    tests = results["tests"]
    out = [f"# {results['device']}", f"{results['date']}. {facts}.", "", f"{versions}.", ""]
    if results["dry_run"]:
        out += ["**A dry run: no number here was measured.**", ""]
    out += ["## Tests", f"{tests['summary']}.", "", *(f"- {name}" for name in tests["failed"]), ""]
    out += [
        "## Benchmark",
        "Forward and backward, of score forward alone; medians of interleaved rounds. How: docs/gpu.md.",
        "",
    ]
    for case in results["cases"]:
        out += case_lines(case)
    out += [
        "## Launch choices",
        "",
        *(tuning_lines(results["tuning"]) if results["tuning"] else ["Not yet tried."]),
        "",
    ]
    return "\n".join(out)
