"""Training that was interrupted goes on where its last checkpoint stood, to the same bits.

`checkpoint-N/` after N optimizer steps holds `model.safetensors` (trained parameters, by name, float32 where the model
is in half precision), `optimizer.safetensors` (AdamW's moments), `state.json` (the counts, and what the training was of)
and `manifest.json` (length and checksum of each file, `drift.files`). No generator state is kept, since each step seeds
its own. A folder gets its name once it is complete and on the disk; the last KEPT stay. One that is damaged is passed
over for the one before. These folders are for going on; `Policy.save` writes a model that others can load.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from drift import files
from drift.training.optimizer import MasterAdamW, Whole
from drift.training.sharding import like
from drift.types import Trajectory

KEPT = 2  # the last checkpoint, and the one before for when the last is damaged


class CheckpointError(RuntimeError):
    """A checkpoint that is damaged, belongs to another training, or does not fit the model."""


def fingerprint(trajectories: Sequence[Trajectory]) -> str:
    """A hash of what is trained: ids, turns and weights, in order."""
    digest = hashlib.sha256()
    for trajectory in trajectories:
        spans = [bound for turn in trajectory.turns for bound in (turn.start, turn.stop)]
        for integers in (trajectory.token_ids, spans):
            digest.update(len(integers).to_bytes(8, "little") + np.asarray(integers, dtype=np.int64).tobytes())
        digest.update(np.float64(trajectory.weight).tobytes())
    return digest.hexdigest()


def found(folder: str | Path) -> list[Path]:
    """The checkpoints that got their name in `folder`, the one with the most steps first."""
    numbered = {
        int(match[1]): path for path in Path(folder).glob("checkpoint-*") if (match := re.search(r"-(\d+)$", path.name))
    }
    return [numbered[step] for step in sorted(numbered, reverse=True)]


def latest(folder: str | Path, say: Callable[[str], None] = lambda _: None) -> Path | None:
    """The undamaged checkpoint with the most steps in `folder`, or None if there is none at all.

    say: gets a line about each damaged one that is passed over. Raises CheckpointError if all are damaged.
    """
    broken: list[str] = []
    for path in found(folder):
        damage = files.damage(path)
        if damage is None:
            for line in broken:
                say(f"{line}; going on from {path.name}, the one before")
            return path
        broken.append(f"{path} is damaged: {damage}")
    if broken:
        raise CheckpointError(
            f"{'; '.join(broken)}. No checkpoint is left to go on from: remove {Path(folder) / 'checkpoint-*'}, and the "
            "same command does this training again from its start"
        )
    return None


def describe(folder: str | Path | None) -> str:
    """The checkpoint that a training goes on from, for a sentence."""
    there = [] if folder is None else found(folder)
    return f"checkpoint {there[0].name.rpartition('-')[2]} ({there[0]})" if there else "the start of this training"


def save(
    folder: str | Path,
    step: int,
    optimizer: MasterAdamW | Whole,
    stats: dict[str, Any],
    job: dict[str, Any],
    tensors: dict[str, dict[str, torch.Tensor]] | None = None,
    rows: dict[str, list[dict[str, Any]]] | None = None,
) -> Path:
    """Writes `folder/checkpoint-STEP` and removes all but the last KEPT. stats: the counts so far; job: what is trained.

    tensors: name → what goes into NAME.safetensors; rows: name → what goes into NAME.jsonl. `load_tensors` and
    `load_rows` give them back. Raises WriteError; what was there before then stays.
    """
    path = Path(folder) / f"checkpoint-{step}"
    with files.folder(path) as partial:
        masters = {name: m.detach().contiguous() for name, m in optimizer.masters.items()}
        save_file(masters, partial / "model.safetensors")
        save_file({k: v.contiguous() for k, v in optimizer.state_dict().items()}, partial / "optimizer.safetensors")
        for name, content in (tensors or {}).items():
            save_file({k: v.contiguous() for k, v in content.items()}, partial / f"{name}.safetensors")
        for name, lines in (rows or {}).items():
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (partial / f"{name}.jsonl").write_text(text, encoding="utf-8")
        state = {"step": step, "stats": stats, "job": job}
        (partial / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
    everything = found(folder)
    place = everything.index(path)
    for other in (*everything[:place], *everything[place + KEPT :]):  # those of more steps were damaged
        shutil.rmtree(other)
    for torn in Path(folder).glob("checkpoint-*.partial"):
        shutil.rmtree(torn)
    return path


def load(path: Path, optimizer: MasterAdamW, job: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Takes model and optimizer back to `path`; returns the steps done and the counts.

    Raises CheckpointError if the checkpoint is of another job, naming the difference, or of another model.
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
