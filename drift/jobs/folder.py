"""A run's folder: who may write into it, what it holds already, and its files of settings and seconds."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from drift import files
from drift.config import Config, ConfigError, dump, load
from drift.training import distributed

MAY_CHANGE = (
    "seeds",
    "arms",
    "track",
    "name",
    "output_dir",
    "engine",
    "train.timeout",
    "train.shard",
    "train.shard_head",
    "train.save_every",
    "train.max_skipped",
    "train.grad_spike",
    "train.low_ess",
    "train.sampler_gap",
)  # between two runs in one folder


class RunError(RuntimeError):
    """A run that cannot go on; the message names the setting or the file, and the remedy."""


def rollout_path(folder: Path, config: Config, seed: int) -> Path:
    """Where a seed's trajectories are: the first seed's lie on top, to be looked at."""
    inside = folder if seed == config.seeds[0] else folder / f"seed-{seed}"
    return inside / "rollouts.jsonl"


class Clock:
    """Seconds by stage, kept in a file, so that those of an interrupted run count."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = read_json(path) if path.exists() else {}
        numbers = isinstance(self.seconds, dict) and all(type(v) in (int, float) for v in self.seconds.values())
        if not numbers:
            raise RunError(f"{path} should hold seconds by stage; remove it, and the same command goes on without them")

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start
            if distributed.rank() == 0:
                write_json(self.path, self.seconds)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Inside, no other run gets into the folder. Under torchrun the first rank holds it for all."""
    if not _first():
        yield
        return
    with files.lock(folder):
        files.sweep(folder)
        yield


def _first() -> bool:
    """Whether this process is torchrun's first rank, or was started without torchrun; known before the ranks meet."""
    return os.environ.get("RANK", "0") == "0"


def finished(folder: Path, config: Config) -> dict[str, Any] | None:
    """The summary, if it is that of these settings, seeds and arms."""
    if not all((folder / name).exists() for name in ("config.yaml", "report.html", "summary.json")):
        return None
    before = _settings(folder / "config.yaml")
    kept = {key: getattr(config, key) for key in ("track", "output_dir", "engine")}
    same = before.model_copy(update=kept) == config
    return read_json(folder / "summary.json") if same else None


def _settings(file: Path) -> Config:
    """What a run wrote there. Raises ConfigError naming the file, which is not the one that the command names."""
    try:
        return load(file, [])
    except ConfigError as error:
        raise ConfigError(
            f"{file}, which an earlier run wrote, cannot be read: {error}; give this run another name (name=…), or remove "
            "the folder"
        ) from None


def claim(folder: Path, config: Config) -> None:
    """Writes config.yaml, on the first rank; in a folder where a run has got anywhere, only MAY_CHANGE may differ."""
    file = folder / "config.yaml"
    if file.exists() and any((folder / name).exists() for name in ("base", "rollouts.jsonl")):
        before, now = _settings(file).model_dump(), config.model_dump()
        differ = [line for key in now for line in _differences(key, before[key], now[key])]
        if before["seeds"][0] != config.seeds[0]:
            differ.append(f"seeds began with {before['seeds'][0]} and now with {config.seeds[0]}")
        if differ:
            raise ConfigError(
                f"{folder} holds a run with other settings: {'; '.join(differ)}. Set them back, give this run another "
                f"name (name=…), or remove the folder"
            )
    if _first():
        (folder / "summary.json").unlink(missing_ok=True)
        files.write(file, dump(config))


def _differences(path: str, before: Any, now: Any) -> list[str]:
    if path in MAY_CHANGE:
        return []
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(before.keys() | now.keys())
        return [line for key in keys for line in _differences(f"{path}.{key}", before.get(key), now.get(key))]
    return [] if before == now else [f"{path} was {before!r} and is {now!r}"]


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is not JSON ({error}); remove it, and the same command makes it again") from None


def write_json(path: Path, content: Any) -> None:
    files.write(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
