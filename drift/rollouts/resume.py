"""Takes trajectories off a rollout file when the answers that they were checked against have changed since."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from drift import store
from drift.types import Problem


def forget_corrected(path: str | Path, problems: Sequence[Problem]) -> int:
    """Removes the rows about problems whose text is still asked and whose answer is another now; returns how many.

    What they hold (verdicts, feedback, where they stopped) follows from the old answer, so they have to be sampled and verified
    again. Rows about other texts are left alone. The file is replaced at once. Raises StoreError for a bad row.
    """
    path, stale = Path(path), _stale(problems)
    if not count_corrected(path, problems):
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if line.strip() and not stale(_name(line))]
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    return sum(bool(line.strip()) for line in lines) - len(kept)


def count_corrected(path: str | Path, problems: Sequence[Problem]) -> int:
    """How many rows `forget_corrected` would remove."""
    if not Path(path).exists():
        return 0
    stale = _stale(problems)
    return sum(stale(row["prompt_id"]) for row in store.read(path, rejected=[]))


def _stale(problems: Sequence[Problem]) -> Callable[[str], bool]:
    """Whether a row's problem is one of these texts with another answer."""
    known = {problem.id for problem in problems}
    texts = {name.partition("-")[0] for name in known if "-" in name}
    return lambda name: name not in known and "-" in name and name.partition("-")[0] in texts


def _name(line: bytes) -> str:
    """The row's problem; "" for a line that is not a row, which `store` complains about."""
    try:
        return str(json.loads(line)["prompt_id"])
    except (ValueError, KeyError, TypeError):
        return ""
