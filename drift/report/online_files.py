"""What an online run left for its report, seed by seed: its curves by name, stored responses, and who solved what when.

Files are read tolerantly, as `drift.report.records` does: what is absent or broken is noted in `Records.missing`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drift import store
from drift.online.examples import VALUES
from drift.report.records import Records

Points = list[tuple[int, float]]
BANDS = ("easy", "medium", "hard")


@dataclass(frozen=True, slots=True)
class Asked:
    """One stored trajectory, as far as curves need it."""

    step: int
    problem: str
    solved: bool


@dataclass(slots=True)
class Seed:
    """One training."""

    name: str  # such as seed-0/drift, which is also its folder
    curves: dict[str, Points]  # name below that in the log, such as router/teacher, to (step, value)
    examples: list[dict[str, Any]] = field(default_factory=list)  # rows of `drift.online.examples`, by step and place
    asked: list[Asked] = field(default_factory=list)
    last: list[dict[str, Any]] = field(default_factory=list)  # rollout rows of the last stored step


def read(records: Records) -> list[Seed]:
    """Every seed of the config that has logged a step; none for an offline run."""
    if records.config is None or records.config.online is None:
        return []
    found = []
    for seed in records.config.seeds:
        name = f"seed-{seed}/{records.config.online.algorithm}"
        if curves := _curves(records, name):
            one = Seed(name, curves)
            folder = records.path / name
            one.examples = _examples(records, folder / "examples.jsonl")
            one.asked, one.last = _rollouts(records, folder / "rollouts.jsonl")
            found.append(one)
    return found


def _curves(records: Records, name: str) -> dict[str, Points]:
    found = {}
    for metric, series in records.curves.items():
        for place, points in series.items():
            if place == name or place.startswith(f"{name}/"):
                found[f"{place}/{metric}".removeprefix(f"{name}/")] = points
    return found


def _lines(records: Records, file: Path) -> Iterator[dict[str, Any]]:
    """Objects of a JSONL file; a line that is none is counted in `missing`."""
    if not file.exists():
        return
    broken = 0
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict) and type(row.get("step")) is int:
                yield row
            else:
                broken += 1
    if broken:
        records.missing.append(f"{file.relative_to(records.path)}: {broken} lines cannot be read")


def _examples(records: Records, file: Path) -> list[dict[str, Any]]:
    kept: dict[tuple[int, int], dict[str, Any]] = {}
    for row in _lines(records, file):
        tokens, trained, index = row.get("tokens"), row.get("trained"), row.get("index")
        if not isinstance(tokens, list) or not isinstance(trained, list) or type(index) is not int:
            continue
        if len(tokens) != len(trained):
            continue
        for name in VALUES:
            values = row.get(name)
            if not isinstance(values, list) or len(values) != len(tokens):
                row.pop(name, None)
        kept[row["step"], index] = row
    return [kept[place] for place in sorted(kept)]


def _rollouts(records: Records, file: Path) -> tuple[list[Asked], list[dict[str, Any]]]:
    """Stored trajectories, and the last step's in full. A step that was stored twice counts as the second time."""
    steps: dict[int, dict[tuple[str, Any], Asked]] = defaultdict(dict)
    last: dict[tuple[str, Any], dict[str, Any]] = {}
    rejected = 0
    for row in _lines(records, file):
        try:
            row = store.validate(row)
        except store.StoreError:
            rejected += 1
            continue
        step, key = row["step"], (row["prompt_id"], row.get("traj_idx"))
        newest = max(steps, default=step)
        steps[step][key] = Asked(step, row["prompt_id"], row["t_star"] is not None)
        if step > newest:
            last = {}
        if step >= newest:
            last[key] = row
    if rejected:
        records.missing.append(f"{file.relative_to(records.path)}: {rejected} rows are left out")
    return [asked for step in sorted(steps) for asked in steps[step].values()], list(last.values())


def by_difficulty(asked: list[Asked], hard_below: float, easy_above: float) -> dict[str, Points]:
    """Band → (step, solved share) of problems that were asked before, by how often they were solved the first time.

    The first time itself is left out: it made the bands. A band without a second time is missing.
    """
    first: dict[str, int] = {}
    for one in asked:
        first[one.problem] = min(one.step, first.get(one.problem, one.step))
    met: dict[str, list[bool]] = defaultdict(list)
    for one in asked:
        if one.step == first[one.problem]:
            met[one.problem].append(one.solved)
    band = {}
    for problem, solved in met.items():
        share = sum(solved) / len(solved)
        band[problem] = "hard" if share < hard_below else "easy" if share > easy_above else "medium"
    later: dict[str, dict[int, list[bool]]] = {name: defaultdict(list) for name in BANDS}
    for one in asked:
        if one.step > first[one.problem]:
            later[band[one.problem]][one.step].append(one.solved)
    return {
        name: [(step, sum(solved) / len(solved)) for step, solved in sorted(steps.items())]
        for name, steps in later.items()
        if steps
    }
