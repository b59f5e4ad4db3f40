"""Training that was interrupted goes on where its last checkpoint stood, to the same bits.

`checkpoint-N/` after N optimizer steps holds `model.safetensors` (trained parameters, by name, float32 where the model
is in half precision), `optimizer.safetensors` (AdamW's moments) and `state.json` (the counts, and what the training was
of). No generator state is kept, since each step seeds its own. A folder gets its name once it is complete, and the one
before it goes after that. These folders are for going on; `Policy.save` writes a model that others can load.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from drift.training.optimizer import MasterAdamW, Whole
from drift.training.sharding import like
from drift.types import Trajectory


class CheckpointError(RuntimeError):
    """A checkpoint that belongs to another training, or does not fit the model."""


def fingerprint(trajectories: Sequence[Trajectory]) -> str:
    """A hash of what is trained: ids, turns and weights, in order."""
    digest = hashlib.sha256()
    for trajectory in trajectories:
        spans = [bound for turn in trajectory.turns for bound in (turn.start, turn.stop)]
        for integers in (trajectory.token_ids, spans):
            digest.update(len(integers).to_bytes(8, "little") + np.asarray(integers, dtype=np.int64).tobytes())
        digest.update(np.float64(trajectory.weight).tobytes())
    return digest.hexdigest()


def latest(folder: str | Path) -> Path | None:
    """The complete checkpoint with the most steps in `folder`, or None."""
    found = {
        int(match[1]): path for path in Path(folder).glob("checkpoint-*") if (match := re.search(r"-(\d+)$", path.name))
    }
    return found[max(found)] if found else None


def describe(folder: str | Path | None) -> str:
    """The checkpoint that a training goes on from, for a sentence."""
    path = None if folder is None else latest(folder)
    return "the start of this training" if path is None else f"checkpoint {path.name.rpartition('-')[2]} ({path})"


def save(
    folder: str | Path,
    step: int,
    optimizer: MasterAdamW | Whole,
    stats: dict[str, Any],
    job: dict[str, Any],
    tensors: dict[str, dict[str, torch.Tensor]] | None = None,
    rows: dict[str, list[dict[str, Any]]] | None = None,
) -> Path:
    """Writes `folder/checkpoint-STEP` and removes the one before. stats: the counts so far; job: what is trained.

    tensors: name → what goes into NAME.safetensors; rows: name → what goes into NAME.jsonl. `load_tensors` and
    `load_rows` give them back.
    """
    path = Path(folder) / f"checkpoint-{step}"
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file({name: m.detach().contiguous() for name, m in optimizer.masters.items()}, partial / "model.safetensors")
    save_file({k: v.contiguous() for k, v in optimizer.state_dict().items()}, partial / "optimizer.safetensors")
    for name, content in (tensors or {}).items():
        save_file({k: v.contiguous() for k, v in content.items()}, partial / f"{name}.safetensors")
    for name, lines in (rows or {}).items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (partial / f"{name}.jsonl").write_text(text, encoding="utf-8")
    state = {"step": step, "stats": stats, "job": job}
    (partial / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
    older = [other for other in Path(folder).glob("checkpoint-*") if other != partial]
    if path in older:
        shutil.rmtree(path)
        older.remove(path)
    partial.rename(path)
    for other in older:
        shutil.rmtree(other)
    return path


def load(path: Path, optimizer: MasterAdamW, job: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Takes model and optimizer back to `path`; returns the steps done and the counts.

    Raises CheckpointError where the checkpoint is of another job, naming what differs, or of another model.
    """
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    there, here = state["job"], json.loads(json.dumps(job))
    if differ := sorted(key for key in there.keys() | here.keys() if there.get(key) != here.get(key)):
        changes = ", ".join(f"{key} was {there.get(key)!r} and is {here.get(key)!r}" for key in differ)
        raise CheckpointError(f"{path} is of another training: {changes}; set them back, or remove {path}")
    weights = load_file(path / "model.safetensors")
    if weights.keys() != optimizer.masters.keys():
        odd = sorted(weights.keys() ^ optimizer.masters.keys())
        raise CheckpointError(f"{path} is of another model: {len(odd)} names differ, such as {odd[0]!r}")
    with torch.no_grad():
        for name, master in optimizer.masters.items():
            if weights[name].shape != master.shape:
                shapes = f"{list(weights[name].shape)} there and {list(master.shape)} here"
                raise CheckpointError(f"{path} is of another model: {name} is {shapes}")
            master.copy_(like(weights[name], master))
    optimizer.write_back()
    optimizer.load_state_dict(load_file(path / "optimizer.safetensors"))
    return state["step"], state["stats"]


def load_tensors(path: Path, name: str) -> dict[str, torch.Tensor]:
    """The tensors that were saved under `name`."""
    return load_file(path / f"{name}.safetensors")


def load_rows(path: Path, name: str) -> list[dict[str, Any]]:
    """The rows that were saved under `name`."""
    with (path / f"{name}.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
