"""What small commands print: settings with their origin, a converted data set, how a trained model is loaded."""

from __future__ import annotations

import difflib
import json
import shlex
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from drift.config import Config, ConfigError, Setting
from drift.config.load import MISSING
from drift.data import SETS, convert


def settings_table(settings: list[Setting]) -> Table:
    """Every setting of a config: value, default, and where the value is from; those that are not defaults in bold."""
    table = Table(box=None)
    table.add_column("setting", no_wrap=True, min_width=max(len(one.path) for one in settings))
    for heading in ("value", "default", "origin"):
        table.add_column(heading, overflow="fold")
    for one in settings:
        cells = (one.path, _json(one.value), _json(one.default), one.origin)
        table.add_row(*map(Text, cells), style=None if one.origin == "default" else "bold")
    return table


def _json(value: object) -> str:
    return MISSING if value == MISSING else json.dumps(value, ensure_ascii=False, default=str)


def data(
    name: str | None, source: str | None, out: Path | None, *, limit: int | None, shuffle: int | None
) -> tuple[str, list[str]]:
    """Converts a published set, or lists them without a name; what to print, and the warnings.

    Raises ConfigError for a name that is no set, naming the nearest.
    """
    if name is None:
        return "\n".join(f"{one:15} {SETS[one].hub or 'from a local copy (--from)'}" for one in SETS), []
    if name not in SETS:
        near = difflib.get_close_matches(name, SETS, 1, 0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"NAME {name!r} is no published set; {hint}there are {', '.join(SETS)}")
    out = out or Path("data") / f"{name}.jsonl"
    done = convert(name, out, source, limit=limit, seed=shuffle)
    counts = ", ".join(f"{count:,} {split}" for split, count in done.rows.items())
    left = ", ".join(f"{count:,} for {reason}" for reason, count in done.skipped.most_common(5))
    warnings = [f"warning: {leak}" for leak in done.leaks[:10]]
    if len(done.leaks) > 10:
        warnings.append(f"warning: and {len(done.leaks) - 10} more rows of eval that train has too")
    left_out = f"; left out: {left}" if left else ""
    return f"{out}: {counts}{left_out}\nread it with {overrides(name, out)}", warnings


def overrides(name: str, path: Path) -> str:
    """The settings that make a converted set a run's task, as a command line takes them."""
    published = SETS[name]
    said = {"kind": "jsonl", "path": str(path), "scorer": published.scorer}
    said |= {"parser": published.parser} if published.parser else {}
    said |= {"instruction": published.instruction} if published.instruction else {}
    said |= {"duplicates": published.duplicates} if published.duplicates != "merge" else {}
    return " ".join(shlex.quote(f"task.{key}={value}") for key, value in said.items())


def first_line(command: str, config: Config, folder: Path) -> str:
    """What is about to run, before the libraries load."""
    adapters = f" with LoRA of rank {config.model.lora.rank}" if config.model.lora else ""
    model = config.model.path or "embedded tiny model"
    return f"{command} {config.name}: model {model}{adapters} in {config.model.dtype}, run folder {folder}"


def how_to_load(folder: Path, config: Config) -> str:
    """The trained model's folder, and the three lines that load it."""
    name, imports = "AutoModelForCausalLM", "from transformers import AutoModelForCausalLM, AutoTokenizer"
    if config.model.lora:
        name = "AutoPeftModelForCausalLM"
        imports = f"from peft import {name}; from transformers import AutoTokenizer"
    lines = [imports]
    lines += [f"model = {name}.from_pretrained({str(folder)!r})"]
    lines += [f"tokenizer = AutoTokenizer.from_pretrained({str(folder)!r})"]
    shown = "\n".join(f"  {line}" for line in lines)
    return f"the trained model is in {folder}; to load it:\n{shown}"


def show(table: Table) -> None:
    """Prints a table."""
    Console().print(table)
