"""What a run folder holds, finished or not: everything that the report, the study and the command line show.

Read from files alone, so a run that was interrupted, or copied from another machine, reads the same. What is absent or
unreadable is listed in `Records.missing` in words instead of being an error: half a run is still worth looking at.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drift import returns, store
from drift.config import Config, ConfigError, WeightsConfig, load

ARMS = {
    "base": "before training",
    "uniform": "all weights 1",
    "success_only": "successes alone",
    "drift": "importance-weighted",
}  # in the order they are shown


class RecordsError(ValueError):
    """A file of a run that holds something else than what a run writes there."""


@dataclass(slots=True)
class Results:
    """Accuracies of one arm, each list one entry a seed."""

    multi: list[float]  # multi@k: share of problems solved within k turns
    single: list[float]  # share solved in the first turn
    by_turn: list[list[float]]  # cumulative shares after turns 1..k
    sampled: dict[str, list[float]] = field(default_factory=dict)  # mean@n and pass@n, where `eval.samples` drew any
    corrected: list[list[float | None]] = field(
        default_factory=list
    )  # of turns 2..k, the share of unsolved that it solves
    sets: dict[str, Results] = field(default_factory=dict)  # of each evaluation set, if there are several


@dataclass(slots=True)
class Sampled:
    """One rollout file with what its rows are worth."""

    source: str  # path within the run folder
    rows: list[dict[str, Any]]
    returns: list[float]  # A2, aligned with rows
    weights: list[float]  # A3, aligned with rows
    groups: list[list[int]]  # row numbers of each prompt
    ess_by_group: list[float]  # effective sample size as a share of the group, of groups that are not skipped
    ess: float  # of all rows together, as a share
    unsolved: float  # share of groups without a success
    dropped: float  # share of all weight that min_weight leaves out


@dataclass(slots=True)
class Records:
    """A run folder, read."""

    path: Path
    config: Config | None = None
    config_text: str = ""
    summary: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, Any] = field(default_factory=dict)  # stage -> seconds, and "total" where the run is finished
    turns: int = 5  # the k of multi@k
    seeds: list[int] = field(default_factory=list)
    results: dict[str, Results] = field(default_factory=dict)  # arm -> accuracies over `seeds`
    solved_at: dict[str, list[list[int]]] = field(default_factory=dict)  # arm -> [seeds][problems], 0 = never
    curves: dict[str, dict[str, list[tuple[int, float]]]] = field(default_factory=dict)  # metric -> series -> points
    sampled: list[Sampled] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def about(self, arm: str) -> str:
        """What an arm is, in a few words."""
        if self.config and self.config.online and arm != "base":
            return "trained online"
        return ARMS.get(arm, "")

    @property
    def weights_config(self) -> WeightsConfig:
        """The settings that returns and weights are computed with."""
        return self.config.weights if self.config else WeightsConfig()


def read(run_dir: str | Path, *, rollouts: bool = True, summary: dict[str, Any] | None = None) -> Records:
    """Everything in the folder; `rollouts` False leaves the trajectories unread (they are most of its size).

    summary: in place of summary.json.

    What is missing or cannot be read is noted in `missing`. Raises NotADirectoryError if there is no such folder, and
    RecordsError if a file holds what no run writes.
    """
    path = Path(run_dir)
    if not path.is_dir():
        raise NotADirectoryError(f"run_dir: {str(path)!r} is not a folder; a run writes to output_dir/name")
    records = Records(path)
    _read_config(records)
    _read_results(records, summary)
    _read_curves(records)
    if rollouts:
        _read_rollouts(records)
    return records


def _read_config(records: Records) -> None:
    file = records.path / "config.yaml"
    if not file.exists():
        records.missing.append("config.yaml: returns and weights are computed with the default settings")
        return
    records.config_text = file.read_text(encoding="utf-8", errors="replace")
    try:
        records.config = load(file, [])
        records.turns = records.config.eval.turns
    except (ConfigError, OSError) as error:
        records.missing.append(f"config.yaml cannot be read, so default settings are shown: {error}")


def _json(records: Records, file: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        records.missing.append(f"{file.relative_to(records.path)} cannot be read: {error}")
        return None
    if not isinstance(content, dict):
        records.missing.append(f"{file.relative_to(records.path)} holds no JSON object")
        return None
    return content


def _read_results(records: Records, summary: dict[str, Any] | None) -> None:
    """From summary.json if it is there, else from the evaluations that are."""
    evaluations = _read_evaluations(records)
    arms = {arm for found in evaluations.values() for arm in found}
    complete = [seed for seed, found in evaluations.items() if found.keys() == arms]
    for arm in ordered(arms) if complete else ():
        records.solved_at[arm] = [evaluations[seed][arm] for seed in complete]
    file, seconds = records.path / "summary.json", records.path / "seconds.json"
    if summary is not None:
        records.summary = summary
    elif file.exists():
        records.summary = _json(records, file) or {}
    else:
        records.missing.append("summary.json: the run is not finished")
    records.seconds = records.summary.get("seconds") or (_json(records, seconds) if seconds.exists() else None) or {}
    numbers = isinstance(records.seconds, dict) and all(_is_duration(value) for value in records.seconds.values())
    _expect(file, numbers, "seconds should be an object of numbers by stage")
    if results := records.summary.get("results"):
        _expect(file, isinstance(results, dict), "results should be an object with a member for each arm")
        read = {arm: _results_of(file, f"results.{arm}", results[arm]) for arm in ordered(results)}
        records.turns = next(iter(read.values()))[0]
        records.results = {arm: result for arm, (_, result) in read.items()}
        number = len(next(iter(records.results.values())).multi)
        for arm, (turns, result) in read.items():
            alike = (turns, len(result.multi)) == (records.turns, number)
            _expect(file, alike, f"results.{arm} should have as many seeds and turns as the other arms")
        records.seeds = records.summary.get("seeds", list(range(number)))
        _expect(file, isinstance(records.seeds, list) and len(records.seeds) == number, f"seeds should list {number}")
        return
    records.seeds = complete
    if records.config and records.config.eval.sets:
        records.missing.append("evaluations: those of several sets are shown when the run is finished")
        return
    for arm, tables in records.solved_at.items():
        by_turn = [_cumulative(table, records.turns) for table in tables]
        records.results[arm] = Results([b[-1] for b in by_turn], [b[0] for b in by_turn], by_turn)
    if not records.results:
        records.missing.append("evaluations: no seed has been evaluated in all its arms yet")


def _results_of(file: Path, place: str, values: Any) -> tuple[int, Results]:
    """(k, accuracies) from one arm's part of summary.json."""
    turns = (
        [key.removeprefix("multi_at_") for key in values if key.startswith("multi_at_")]
        if isinstance(values, dict)
        else []
    )
    _expect(file, len(turns) == 1 and turns[0].isdecimal(), f"{place} should be an object with one list multi_at_K")
    for key in (f"multi_at_{turns[0]}", "single"):
        _expect(file, _are_shares(values.get(key)), f"{place}.{key} should be a list of shares from 0 to 1, one a seed")
    result = Results(values[f"multi_at_{turns[0]}"], values["single"], values.get("by_turn", []))
    number, by_turn = len(result.multi), result.by_turn
    _expect(
        file, len(result.single) == number, f"{place}.single should have {number} entries, as its multi_at_{turns[0]}"
    )
    fits = isinstance(by_turn, list) and all(_are_shares(row) and len(row) == len(by_turn[0]) for row in by_turn)
    _expect(
        file, fits and len(by_turn) in (0, number), f"{place}.by_turn should be {number} lists of shares, one a seed"
    )
    for key in values:
        if key.startswith(("mean_at_", "pass_at_")):
            fits = _are_shares(values[key]) and len(values[key]) == number
            _expect(file, fits, f"{place}.{key} should be {number} shares from 0 to 1, one a seed")
            result.sampled[key.replace("_at_", "@")] = values[key]
    result.corrected = values.get("corrected", [])
    fits = isinstance(result.corrected, list) and all(_are_rates(rates) for rates in result.corrected)
    _expect(file, fits, f"{place}.corrected should be lists of shares from 0 to 1 or null, one a seed")
    sets = values.get("sets", {})
    _expect(file, isinstance(sets, dict), f"{place}.sets should be an object with a member for each evaluation set")
    result.sets = {name: _results_of(file, f"{place}.sets.{name}", one)[1] for name, one in sets.items()}
    return int(turns[0]), result


def _are_rates(values: Any) -> bool:
    return (
        isinstance(values, list)
        and (known := [v for v in values if v is not None]) is not None
        and (not known or _are_shares(known))
    )


def _are_shares(values: Any) -> bool:
    numbers = isinstance(values, list) and all(type(value) in (int, float) for value in values)
    return numbers and len(values) > 0 and all(0 <= value <= 1 for value in values)


def _is_duration(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


def _expect(file: Path, holds: bool, complaint: str) -> None:
    if not holds:
        raise RecordsError(f"{file}: {complaint}; mend the file, or remove it and let `drift run` write it again")


def _read_evaluations(records: Records) -> dict[int, dict[str, list[int]]]:
    """seed -> arm -> solved_at, of the config's seeds and arms; every seed starts from the base, evaluated once."""
    seeds, arms = (records.config.seeds, records.config.trained) if records.config else (None, None)
    found: dict[int, dict[str, list[int]]] = {}
    for file in sorted(records.path.glob("seed-*/eval-*.json")):
        name, arm = re.fullmatch(r"seed-(\d+)", file.parent.name), file.stem.removeprefix("eval-")
        if name is None or (seeds and int(name[1]) not in seeds) or (arms and arm not in ("base", *arms)):
            continue
        if solved := _solved_at(records, file):
            found.setdefault(int(name[1]), {})[arm] = solved
    base = records.path / "base" / "eval.json"
    if base.exists() and (solved := _solved_at(records, base)):
        for arms_found in found.values() if found else [found.setdefault((seeds or [0])[0], {})]:
            arms_found.setdefault("base", solved)
    return dict(sorted(found.items(), key=lambda item: seeds.index(item[0]) if seeds else item[0]))


def _solved_at(records: Records, file: Path) -> list[int]:
    solved = (_json(records, file) or {}).get("solved_at") or []
    turns = isinstance(solved, list) and all(type(turn) is int and turn >= 0 for turn in solved)
    _expect(file, turns, "solved_at should be a list of turns, 0 where a problem was not solved")
    return solved


def ordered(arms: Iterable[str]) -> list[str]:
    """Known arms in the order of `ARMS`, then the others by name."""
    return sorted(arms, key=lambda arm: (list(ARMS).index(arm) if arm in ARMS else len(ARMS), arm))


def _cumulative(solved_at: list[int], turns: int) -> list[float]:
    return [sum(0 < t <= turn for t in solved_at) / len(solved_at) for turn in range(1, turns + 1)]


def _read_curves(records: Records) -> None:
    """metric -> series -> points; "seed-0/drift/loss" is the metric loss of the series seed-0/drift.

    A step that was logged twice (a resumed run) keeps its last value.
    """
    files = [records.path / "metrics.jsonl", *sorted(records.path.glob("seed-*/metrics.jsonl"))]
    files = [file for file in files if file.exists()]
    if not files:
        records.missing.append("metrics.jsonl: nothing has been logged")
    found: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for file in files:
        inside = "" if file.parent == records.path else f"{file.parent.name}/"
        unreadable = 0
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
                step = int(row.pop("step"))
                numbers = {k: float(v) for k, v in row.items() if k != "time" and type(v) in (int, float)}
                numbers = {k: v for k, v in numbers.items() if math.isfinite(v)}
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
                unreadable += 1
                continue
            for name, value in numbers.items():
                series, _, metric = (inside + name).rpartition("/")
                found[metric][series][step] = value
        if unreadable:
            records.missing.append(f"{file.relative_to(records.path)}: {unreadable} lines cannot be read")
    records.curves = {
        metric: {name: sorted(points.items()) for name, points in series.items()} for metric, series in found.items()
    }


def _read_rollouts(records: Records) -> None:
    files = [*sorted(records.path.glob("rollouts*.jsonl")), *sorted(records.path.glob("seed-*/rollouts*.jsonl"))]
    for file in files:
        rejected: list[tuple[int, str]] = []
        rows = store.read(file, rejected=rejected)
        source = str(file.relative_to(records.path))
        if rejected:
            line, reason = rejected[0]
            records.missing.append(f"{source}: {len(rejected)} rows are left out, the first at line {line}: {reason}")
        if rows:
            records.sampled.append(weighed(source, rows, records.weights_config))
    if not records.sampled and not (records.config and records.config.online):
        records.missing.append("rollouts.jsonl: no trajectory has been sampled")


def weighed(source: str, rows: list[dict[str, Any]], settings: WeightsConfig) -> Sampled:
    """Rows with their returns, weights and groups."""
    weights, stats = returns.weigh(rows, settings)
    by_prompt: dict[str, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        by_prompt[row["prompt_id"]].append(number)
    groups = list(by_prompt.values())
    values = [returns.trajectory_return(row, settings.gamma, settings.repetition) for row in rows]
    shares = []
    for group in groups:
        if settings.skip_unsolved_groups and all(rows[i]["t_star"] is None for i in group):
            continue
        whole = returns.importance_weights([values[i] for i in group], settings.beta)  # before min_weight
        shares.append(returns.effective_sample_size(whole) / len(group))
    return Sampled(
        source=source,
        rows=rows,
        returns=values,
        weights=weights,
        groups=groups,
        ess_by_group=shares,
        ess=stats["ess_overall"],
        unsolved=stats["unsolved_share"],
        dropped=stats["dropped_weight_share"],
    )
