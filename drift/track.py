"""Metrics and progress: one JSON line a call, mirrored to TensorBoard, W&B or trackio where asked; bars or sober lines.

`metrics.jsonl` is the record and is only ever appended to: a resumed run logs some steps a second time, and a reader
keeps the last line of a step. Messages and bars go to standard error, so that standard output is left for results.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from drift import files

SINKS = ("tensorboard", "wandb", "trackio")
LINE_EVERY = 10.0  # seconds between two progress lines if there is no terminal


class MissingSink(ImportError):
    """A sink was asked for whose package is not installed."""


class Sink(Protocol):
    """Where metrics go besides metrics.jsonl."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, run_dir: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(log_dir=str(run_dir / "tensorboard"))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, run_dir: Path) -> None:
        import wandb

        run_id = _remembered(run_dir / ".wandb-id")  # the same run when a folder is resumed
        self._run: Any = wandb.init(project="drift", name=run_dir.name, dir=str(run_dir), id=run_id, resume="allow")
        self._run.define_metric("*", step_metric="step")  # every arm counts from 1, and W&B drops a step that goes back

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({**metrics, "step": step})

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    def __init__(self, run_dir: Path) -> None:
        import trackio

        self._run: Any = trackio.init(project="drift", name=run_dir.name, resume="allow")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(metrics, step=step)

    def close(self) -> None:
        self._run.finish()


def _remembered(path: Path) -> str:
    """The identifier in the file, made up and written down the first time."""
    if not path.exists():
        files.write(path, secrets.token_hex(4))
    return path.read_text().strip()


def _open_sink(name: str, run_dir: Path) -> Sink:
    kinds: dict[str, type] = {"tensorboard": _TensorBoard, "wandb": _WandB, "trackio": _Trackio}
    if name not in kinds:
        raise ValueError(f"track.sinks: {name!r} is not a sink; the sinks are {', '.join(SINKS)}")
    try:
        return kinds[name](run_dir)
    except ImportError as error:
        raise MissingSink(
            f"track.sinks: {name!r} needs a package that is not installed ({error}): pip install {name}"
        ) from error


def plain(value: Any) -> Any:
    """`value` as strict JSON holds it: scalars unwrapped, non-finite floats as None, containers element by element."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if hasattr(value, "tolist"):  # a tensor or an array of any shape, or a numpy scalar
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class Bar:
    """What `Track.progress` yields."""

    def __init__(self, track: Track, description: str, total: int | None) -> None:
        self.description, self.total, self.done = description, total, 0.0
        self._track, self._fields, self._start = track, {}, time.monotonic()
        self._last_line = self._start
        self._task = track._add_task(description, total)

    def advance(self, n: float = 1, **fields: Any) -> None:
        """`n` more units are done; `fields` (name=value) are shown beside the bar until they are replaced."""
        self.done += n
        self._fields.update(fields)
        if self._task is not None:
            self._track._bars.update(self._task, advance=n, fields=_show(self._fields))
        elif self._track._lines and time.monotonic() - self._last_line >= LINE_EVERY:
            self._last_line = time.monotonic()
            self._track.say(self._line())

    def _line(self, ended: str | None = None) -> str:
        seconds = max(time.monotonic() - self._start, 1e-9)
        parts = [f"{self.description} {self.done:g}" + (f"/{self.total}" if self.total else "")]
        if ended:
            parts.append(f"{ended} {_clock(seconds)}")
        else:
            parts.append(f"{self.done / seconds:.3g}/s")
            if self.total and self.done:
                parts.append(f"{_clock((self.total - self.done) * seconds / self.done)} left")
        return " · ".join(parts + ([_show(self._fields)] if self._fields else []))

    def _close(self, ended: str) -> None:
        if self._task is not None:
            self._track._remove_task(self._task)
        if self._track._lines or self._task is not None:
            self._track.say(self._line(ended))


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _show(fields: dict[str, Any]) -> str:
    return " ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in fields.items())


class Track:
    """Where a run writes its numbers and shows how far it is. A context manager; every method is safe after `close`.

    run_dir: the run's folder, made if absent; None records nothing (ranks other than 0, library use).
    sinks: any of `SINKS`, opened now. progress: False shows no bars or progress lines; `say` speaks all the same.
    Raises ValueError for an unknown sink, `MissingSink` for one whose package is absent.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str] | None,
        sinks: Sequence[str] = (),
        progress: bool = True,
        *,
        console: Console | None = None,
    ) -> None:
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._lines = progress and not self.console.is_terminal
        self._drawn = progress and self.console.is_terminal
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[fields]}", style="dim", markup=False),
            console=self.console,
            transient=True,
        )
        self._file, self._sinks = None, []
        self.folder: Path | None = None  # where metrics.jsonl is
        if run_dir is None:
            return
        self.folder = folder = Path(run_dir).resolve()
        with files.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        if cut := files.repair(path):
            self.say(f"{path}: the last line was torn ({cut} bytes); it is left out")
        self._sinks = [_open_sink(name, folder) for name in sinks]
        self._file = files.Lines(path)

    def log(self, step: int, **metrics: Any) -> None:
        """Append {"step", "time", **metrics}. Scalars of any kind, lists, strings; NaN and infinities become null.

        `time` is seconds since the epoch. Sinks get the finite numbers only.
        """
        if self._file is None:
            return
        row = plain(metrics)
        line = json.dumps({"step": int(step), "time": round(time.time(), 3), **row}, allow_nan=False)
        self._file.append(line.encode("utf-8") + b"\n")
        numbers = {k: v for k, v in row.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
        for sink in self._sinks:
            sink.log(int(step), numbers)

    @contextmanager
    def progress(self, description: str, total: int | None = None) -> Iterator[Bar]:
        """A bar on a terminal, elsewhere a line every ten seconds; may be nested. `total` None: unknown."""
        bar = Bar(self, description, total)
        try:
            yield bar
        except BaseException:
            bar._close("stopped after")
            raise
        bar._close("took")

    def say(self, text: str) -> None:
        """One line for the reader, above the bars; square brackets are text, not markup."""
        self.console.print(text, markup=False, emoji=False, highlight=False)

    def close(self) -> None:
        """Flush and close the file and the sinks."""
        self._bars.stop()
        if self._file is not None:
            self._file.close()
        for sink in self._sinks:
            sink.close()
        self._file, self._sinks = None, []

    def _add_task(self, description: str, total: int | None) -> Any:
        if not self._drawn:
            return None
        if not self._bars.tasks:
            self._bars.start()
        return self._bars.add_task(description, total=total, fields="")

    def _remove_task(self, task: Any) -> None:
        self._bars.remove_task(task)
        if not self._bars.tasks:
            self._bars.stop()

    def __enter__(self) -> Track:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
