"""Rows of problems from a JSONL file, a Parquet file, or a data set by hub name or folder.

Each row comes as a dict of the names that problems are read by (prompt or messages, answer, system, split), after the
column map and the template, together with its place; the row's other columns are kept.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from drift.tasks.base import TaskError

Row = dict[str, Any]
Placed = tuple[str, int, Row]  # its place as text; the number of the row or line, from 1; the row
_FIELD = re.compile(r"\{(\w+)\}")


class Source(Protocol):
    """The settings of a source of rows: `drift.config.SourceConfig` and classes derived from it."""

    @property
    def kind(self) -> str: ...
    @property
    def path(self) -> str | None: ...
    @property
    def subset(self) -> str | None: ...
    @property
    def columns(self) -> dict[str, str]: ...
    @property
    def template(self) -> str | None: ...


def read(source: Source, splits: Mapping[str, str] | None = None) -> Iterator[Placed]:
    """The rows of a source, mapped. splits: of a data set, ours ("train", "eval") to its own; each row says ours then.

    Raises TaskError for a source that is not there, a line that is no object, a column that no row has, and a data set
    that cannot be loaded.
    """
    for where, number, row in _raw(source, splits or {}):
        yield where, number, mapped(row, source.columns, source.template, where)


def mapped(row: Row, columns: Mapping[str, str], template: str | None, where: str) -> Row:
    """The row under our names. Raises TaskError for a column that is not there, naming those that are."""
    made = dict(row)
    for ours, theirs in columns.items():
        made[ours] = _column(row, theirs, where, f"columns.{ours}")
    for theirs in columns.values():
        if theirs not in columns:
            made.pop(theirs, None)
    if template is not None:
        made["prompt"] = _FIELD.sub(lambda found: _text(_column(row, found[1], where, "template")), template)
        made.pop("messages", None)
    return made


def _column(row: Row, name: str, where: str, setting: str) -> Any:
    if name not in row:
        raise TaskError(f"{where}: {setting} names the column {name!r}, and the row has {', '.join(map(repr, row))}")
    return row[name]


def _text(value: Any) -> str:
    """A value as a prompt shows it; a list has one item a line."""
    return "\n".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _raw(source: Source, splits: Mapping[str, str]) -> Iterator[Placed]:
    path = str(source.path)
    if source.kind == "dataset":
        yield from _dataset(path, source.subset, splits or {"": "train"})
    elif not Path(path).is_file():
        raise TaskError(f"path={path!r} is not a file; for a folder or a data set on the hub set kind=dataset")
    elif source.kind == "parquet":
        yield from _parquet(path)
    else:
        yield from _json_lines(Path(path))


def _json_lines(path: Path) -> Iterator[Placed]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:
                raise TaskError(f"{where}: not JSON in UTF-8: {error}; each line must be an object") from error
            if not isinstance(row, dict):
                raise TaskError(f"{where}: a {type(row).__name__}; each line must be an object")
            yield where, number, row


def _parquet(path: str) -> Iterator[Placed]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise TaskError(f"path={path!r}: reading Parquet needs pyarrow; pip install pyarrow") from None
    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", number, row
    except pyarrow.ArrowException as error:
        raise TaskError(f"path={path!r} cannot be read as Parquet: {error}") from None


def _dataset(path: str, subset: str | None, splits: Mapping[str, str]) -> Iterator[Placed]:
    """Streamed: a row is read when it is asked for."""
    try:
        import datasets
    except ImportError:
        raise TaskError(f"path={path!r}: a data set needs the package datasets; pip install datasets") from None
    for ours, theirs in splits.items():
        place = f"{path}{f', {subset}' if subset else ''}, split {theirs}"
        try:
            rows = datasets.load_dataset(path, subset, split=theirs, streaming=True)
            for number, row in enumerate(rows, 1):
                yield f"{place}, row {number}", number, {**row, "split": ours} if ours else dict(row)
        except TaskError:
            raise
        except Exception as error:  # the network, the hub, a file's format
            raise TaskError(
                f"{place} cannot be loaded: {' '.join(str(error).split())[:300]}; check the name or the folder, subset, and the "
                "names of the splits"
            ) from error
