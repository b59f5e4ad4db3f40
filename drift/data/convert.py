"""From a copy of a published set to one JSONL file: rows of ours, each with its split, leaks between splits named."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from drift import files
from drift.data.sets import SETS, PublishedSet, Skip
from drift.tasks.base import TaskError, canonical
from drift.tasks.source import Placed, read

logger = logging.getLogger(__name__)
SUFFIXES = {".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}


@dataclass(frozen=True, slots=True)
class _Source:
    """The settings that `drift.tasks.source.read` reads."""

    kind: str
    path: str
    subset: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    template: str | None = None


@dataclass(slots=True)
class Converted:
    """The counts of a conversion."""

    rows: Counter[str] = field(default_factory=Counter)  # by split
    skipped: Counter[str] = field(default_factory=Counter)  # by reason
    leaks: list[str] = field(default_factory=list)  # rows of "eval" that "train" has too


def convert(
    name: str, out: str | Path, source: str | None = None, *, limit: int | None = None, seed: int | None = None
) -> Converted:
    """Writes the set `name` to `out`, whole or not at all.

    source: a file, or a folder that holds train and test files (JSONL or Parquet), or a hub name; default the set's own
    on the hub. seed: shuffles the rows of each split, as the public code does with 42. limit: the first so many rows of
    each split. Raises TaskError for an unknown set, a source that is not there, and rows that do not have the set's
    shape, all named.
    """
    if name not in SETS:
        raise TaskError(f"no published set {name!r}; there are {', '.join(SETS)}")
    published, done = SETS[name], Converted()
    rows: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    complaints = list[str]()
    for split, where, row in _rows(name, published, source):
        try:
            rows.setdefault(split, []).append((where, published.read(row)))
        except Skip as reason:
            done.skipped[str(reason)] += 1
        except (KeyError, ValueError, TypeError) as error:
            what = (
                f"the column {error} is missing; the row has {', '.join(map(repr, row))}"
                if type(error) is KeyError
                else error
            )
            complaints.append(f"{where}: {what}")
    if complaints:
        more = f"\nand {len(complaints) - 10} more rows" if len(complaints) > 10 else ""
        raise TaskError("\n".join(complaints[:10]) + more)
    if not rows:
        raise TaskError(
            f"{source or published.hub}: no row is left of {sum(done.skipped.values())}; is it the set {name!r}?"
        )
    for split, had in rows.items():
        order = range(len(had)) if seed is None else np.random.default_rng(seed).permutation(len(had)).tolist()
        rows[split] = [had[place] for place in order][:limit]
        done.rows[split] = len(rows[split])
    done.leaks = _leaks(rows)
    lines = (json.dumps({**row, "split": split}, ensure_ascii=False) for split in rows for _, row in rows[split])
    with files.writing(out):
        Path(out).parent.mkdir(parents=True, exist_ok=True)
    files.write(Path(out), "".join(f"{line}\n" for line in lines))
    return done


def _leaks(rows: dict[str, list[tuple[str, dict[str, Any]]]]) -> list[str]:
    """Rows of "eval" that ask what a row of "train" asks, each with both places."""
    trained = {canonical(row["prompt"]): where for where, row in rows.get("train", [])}
    return [
        f"{where} asks the same as {trained[key]}, which is in train"
        for where, row in rows.get("eval", [])
        if (key := canonical(row["prompt"])) in trained
    ]


def _rows(name: str, published: PublishedSet, source: str | None) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(our split, its place, the row) of the source."""
    path = Path(source) if source else None
    if path and path.is_file():
        split = "eval" if "train" not in published.splits or path.stem.startswith(("test", "eval")) else "train"
        yield from ((split, where, row) for where, _, row in _file(path))
    elif path and path.is_dir():
        inside = {"train": _inside(path, "train"), "eval": [*_inside(path, "test"), *_inside(path, "eval")]}
        if "train" not in published.splits:  # its one part may have any name
            inside = {"eval": inside["eval"] or inside["train"] or _inside(path, "")}
        if not any(inside.values()):
            raise TaskError(f"{path} holds no train or test file that ends in one of {', '.join(SUFFIXES)}")
        for split, found in inside.items():
            for file in found:
                yield from ((split, where, row) for where, _, row in _file(file))
    elif not (source or published.hub):
        raise TaskError(f"{name} is not on the hub: give --from FOLDER, one that holds its train and test files")
    else:
        hub = source or published.hub
        for subset in _subsets(hub, published.subsets):
            for split, theirs in published.splits.items():
                rows = read(_Source("dataset", hub, subset), {split: theirs})
                yield from ((split, where, {k: v for k, v in row.items() if k != "split"}) for where, _, row in rows)


def _inside(folder: Path, stem: str) -> list[Path]:
    return sorted(file for file in folder.rglob(f"{stem}*") if file.suffix in SUFFIXES)


def _file(path: Path) -> Iterator[Placed]:
    kind = SUFFIXES.get(path.suffix)
    if kind is None:
        raise TaskError(f"{path}: its name must end in one of {', '.join(SUFFIXES)}")
    yield from read(_Source(kind, str(path)))


def _subsets(hub: str, subsets: tuple[str, ...]) -> list[str | None]:
    if subsets != ("*",):
        return list(subsets) or [None]
    try:
        import datasets

        return list(datasets.get_dataset_config_names(hub))
    except Exception as error:  # the network, the hub, a missing package
        raise TaskError(f"{hub}: its subsets cannot be listed: {' '.join(str(error).split())[:300]}") from error
