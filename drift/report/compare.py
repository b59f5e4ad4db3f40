"""Several runs side by side, for `drift report A B`: their results, and the settings in which they differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from drift.report.intervals import mean_stderr
from drift.report.records import Records

ABSENT = "–"
PLACES = ("name", "output_dir")  # settings that differ by their nature


def results(runs: Sequence[Records]) -> Table:
    """A row for each arm of each run, with means over its seeds in percent and their standard errors."""
    table = Table(title="held-out problems solved", box=None)
    table.add_column("run", overflow="fold")
    table.add_column("arm", no_wrap=True)
    for heading in ("seeds", "multi@k %", "single %"):
        table.add_column(heading, justify="right", no_wrap=True)
    for run in runs:
        for number, (arm, result) in enumerate(run.results.items()):
            shown = (_percent(result.multi), _percent(result.single))
            table.add_row(str(run.path) if number == 0 else "", arm, str(len(result.multi)), *shown)
        if not run.results:
            table.add_row(str(run.path), "no result yet", "", "", "")
    return table


def settings(runs: Sequence[Records]) -> Table | None:
    """A row for each setting that is not the same in all runs; None if all are."""
    flat = [_flat(run.config.model_dump(mode="json")) if run.config else {} for run in runs]
    keys = dict.fromkeys(key for values in flat for key in values if key not in PLACES)
    differing = [key for key in keys if len({str(values.get(key, ABSENT)) for values in flat}) > 1]
    if not differing:
        return None
    table = Table(title="settings that differ", box=None)
    table.add_column("")
    for run in runs:
        table.add_column(str(run.path), overflow="fold")
    for key in differing:
        table.add_row(key, *(str(values.get(key, ABSENT)) for values in flat))
    return table


def _percent(values: Sequence[float]) -> str:
    mean, stderr = mean_stderr(list(values))[:2]
    return f"{100 * mean:.1f}" if stderr != stderr else f"{100 * mean:.1f} ± {100 * stderr:.1f}"


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"lr": 1}} as {"train.lr": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, dict) and bool(value)
        flat.update(_flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value})
    return flat
