"""Sampling servers that a run lost: told of, and counted in a file, so that those of an interrupted run count."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from drift.jobs.folder import read_json, write_json
from drift.track import Track

FILE = "servers.json"


def teller(track: Track) -> Callable[[str, str | None], None]:
    """An engine's `tell`: says each line, and counts the servers that were set aside, where `track` has a folder."""

    def tell(line: str, lost: str | None) -> None:
        track.say(line)
        if lost is not None and track.folder is not None:
            counts = losses(track.folder)
            write_json(track.folder / FILE, counts | {lost: counts.get(lost, 0) + 1})

    return tell


def losses(folder: Path) -> dict[str, int]:
    """How often each server was set aside, by its address."""
    return read_json(folder / FILE) if (folder / FILE).exists() else {}
