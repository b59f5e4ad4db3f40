"""Does it hold up? A config over many seeds, with intervals bootstrapped over seeds and problems.

Writes study.json, study.md and study.svg beside the run's own files. Two measures of doubt are given, since they answer
different questions: the standard error of the paired difference over seeds (would another set of seeds agree, on these
problems), and the bootstrapped interval (would other seeds on other problems of the kind).
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from drift import files
from drift.config import Config, ConfigError
from drift.jobs import run
from drift.report import plots
from drift.report.intervals import bootstrap, interval, paired_difference
from drift.report.records import Records, read

REPLICATES = 10_000


def study(config: Config) -> dict[str, Any]:
    """Runs every seed of `config` (finished ones are not run again), then `analyse`s the folder. Returns study.json.

    Raises ValueError if the config names fewer than two seeds, ConfigError if it names several evaluation sets.
    """
    if len(config.seeds) < 2:
        raise ValueError(
            f"seeds: {config.seeds} is one seed; a study needs at least two, say seeds=[0,1,2,3,4,5,6,7,8,9]"
        )
    if config.eval.sets:
        raise ConfigError(
            f"eval.sets names {len(config.eval.sets)} sets, and a study resamples the problems of one; set eval.sets=[]"
        )
    run.run(config)
    return analyse(Path(config.output_dir) / config.name)


def analyse(run_dir: str | Path, replicates: int = REPLICATES) -> dict[str, Any]:
    """Means, intervals and paired differences of a run folder; written to study.{json,md,svg} there and returned.

    Reads seed-K/eval-ARM.json. Raises ValueError if fewer than two seeds are evaluated in all their arms, or if
    seeds were evaluated on different numbers of problems.
    """
    records = read(run_dir, rollouts=False)
    solved = {arm: np.array(_equal_lengths(arm, tables)) for arm, tables in records.solved_at.items()}
    if not solved or len(records.seeds) < 2:
        raise ValueError(f"{run_dir}: {len(records.seeds)} seeds are evaluated in all arms; a study needs at least two")
    multi = f"multi_at_{records.turns}"
    correct = {
        multi: {arm: (table > 0) & (table <= records.turns) for arm, table in solved.items()},
        "single": {arm: table == 1 for arm, table in solved.items()},
    }
    result: dict[str, Any] = {
        "name": records.path.resolve().name,
        "seeds": records.seeds,
        "problems": next(iter(solved.values())).shape[1],
        "replicates": replicates,
        "settings": _settings(records),
        "arms": {arm: {} for arm in solved},
        "differences": {f"drift - {arm}": {} for arm in solved if arm != "drift"} if "drift" in solved else {},
    }
    for measure, tables in correct.items():
        drawn = bootstrap(tables, replicates)
        for arm, table in tables.items():
            low, high = interval(drawn[arm])
            result["arms"][arm][measure] = {"mean": float(table.mean()), "low": low, "high": high}
        for key in result["differences"]:
            arm = key.removeprefix("drift - ")
            difference = paired_difference(tables["drift"].mean(1).tolist(), tables[arm].mean(1).tolist())
            low, high = interval(drawn["drift"] - drawn[arm])
            result["differences"][key][measure] = {
                "mean": difference.mean,
                "stderr": difference.stderr,
                "beyond_twice_stderr": difference.beyond_twice,
                "low": low,
                "high": high,
            }
    folder = records.path
    files.write(folder / "study.json", json.dumps(result, indent=2) + "\n")
    files.write(folder / "study.md", markdown(result))
    drawn_as = io.StringIO()
    _draw(result, multi).savefig(drawn_as, format="svg", metadata={"Date": None})
    files.write(folder / "study.svg", drawn_as.getvalue())
    return result


def _equal_lengths(arm: str, tables: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
    lengths = sorted({len(table) for table in tables})
    if len(lengths) > 1:
        raise ValueError(f"eval-{arm}.json: seeds have {lengths} problems; evaluate all of them on the same ones")
    return tables


def _settings(records: Records) -> dict[str, Any]:
    """What the weights were made with, and the effective sample size that came of it (mean over seeds, a share)."""
    weights = records.weights_config
    ess = records.summary.get("ess")
    return {
        "beta": weights.beta,
        "gamma": weights.gamma,
        "repetition": weights.repetition,
        "ess": float(np.mean(ess)) if ess else None,
    }


def markdown(result: dict[str, Any]) -> str:
    """The two tables, and the line that says what they are made from."""
    multi = next(iter(next(iter(result["arms"].values()))))
    name = multi.replace("multi_at_", "multi@")
    lines = [f"| arm | {name} | 95 % interval | single turn | 95 % interval |", "|---|---:|---:|---:|---:|"]
    for arm, measures in result["arms"].items():
        cells = [
            cell for m in (multi, "single") for cell in (f"{100 * measures[m]['mean']:.1f} %", _range(measures[m]))
        ]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    lines += [
        "",
        f"| difference in {name}, points | mean ± s.e. | ahead by > 2 s.e. | 95 % interval |",
        "|---|---:|:---:|---:|",
    ]
    for key, measures in result["differences"].items():
        at = measures[multi]
        verdict = "yes" if at["beyond_twice_stderr"] else "no"
        value = f"{100 * at['mean']:+.1f} ± {100 * at['stderr']:.1f}"
        lines.append(f"| {key.replace(' - ', ' − ')} | {value} | {verdict} | {_range(at, signed=True)} |")
    settings = result["settings"]
    ess = "not recorded" if settings["ess"] is None else f"{100 * settings['ess']:.1f} %"
    lines += [
        "",
        f"{len(result['seeds'])} seeds, {result['problems']} held-out problems; intervals bootstrapped over seeds and "
        f"problems ({result['replicates']} replicates), standard errors over seeds, paired. β = {settings['beta']:g}, "
        f"γ = {settings['gamma']:g}, λ = {settings['repetition']:g}, effective sample size {ess}.",
        "",
    ]
    return "\n".join(lines)


def _range(values: dict[str, float], signed: bool = False) -> str:
    sign = "+" if signed else ""
    return f"{100 * values['low']:{sign}.1f} … {100 * values['high']:{sign}.1f}"


def table(result: dict[str, Any]) -> Table:
    """The same for a terminal: arms, their intervals, and how far drift is ahead of each."""
    multi = next(iter(next(iter(result["arms"].values()))))
    name = multi.replace("multi_at_", "multi@")
    shown = Table(title=f"{result['name']}: {len(result['seeds'])} seeds, {result['problems']} problems", box=None)
    shown.add_column("arm")
    for heading in (name, "95 %", "single", "95 %", "drift ahead", "> 2 s.e."):
        shown.add_column(heading, justify="right", no_wrap=True)
    for arm, measures in result["arms"].items():
        ahead = result["differences"].get(f"drift - {arm}", {}).get(multi)
        last = ("", "")
        if ahead:
            last = (
                f"{100 * ahead['mean']:+.1f} ± {100 * ahead['stderr']:.1f}",
                "yes" if ahead["beyond_twice_stderr"] else "no",
            )
        cells = [cell for m in (multi, "single") for cell in (f"{100 * measures[m]['mean']:.1f}", _range(measures[m]))]
        shown.add_row(arm, *cells, *last, style="bold" if arm == "drift" else None)
    return shown


def _draw(result: dict[str, Any], multi: str) -> Any:
    rows = [(arm, arm, m[multi]["mean"], m[multi]["low"], m[multi]["high"]) for arm, m in result["arms"].items()]
    name = multi.replace("multi_at_", "multi@")
    title = f"{name} with 95 % intervals, {len(result['seeds'])} seeds, {result['problems']} problems"
    return plots.intervals(rows, title, "held-out problems solved")
