"""Training that was interrupted goes on where its last checkpoint stood, to the same bits.

`checkpoint-N/` after N optimizer steps holds `model.safetensors` (trained parameters, by name, float32 where the model
is in half precision), `optimizer.safetensors` (AdamW's moments), `state.json` (the counts, and what the training was of)
and `manifest.json` (length and checksum of each file, `drift.files`). Of a model that is spread over ranks, `shards/` holds the
same tensors in place of the safetensors files, as torch's distributed checkpoint: each rank writes its own part and its
checksum. Either kind is read by any number of ranks, spread or not. No generator state is kept, since each step seeds its
own. A folder gets its name once it is complete and on the disk; the last KEPT stay. One that is damaged is passed
over for the one before. These folders are for going on; `Policy.save` writes a model that others can load.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from drift import files
from drift.training import distributed
from drift.training.optimizer import MasterAdamW
from drift.training.sharding import like
from drift.types import Trajectory

Groups = dict[str, dict[str, torch.Tensor]]  # name → what belongs together, by name

SHARDS = "shards"
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
    optimizer: MasterAdamW,
    stats: dict[str, Any],
    job: dict[str, Any],
    tensors: Groups | None = None,
    rows: dict[str, list[dict[str, Any]]] | None = None,
) -> Path:
    """Writes `folder/checkpoint-STEP` and removes all but the last KEPT. stats: the counts so far; job: what is trained.

    tensors: name → what goes into NAME.safetensors, or shards; rows: name → what goes into NAME.jsonl. `load` and
    `load_rows` give them back. Every rank calls this; it returns once the checkpoint is there. Raises WriteError; what was
    there before then stays.
    """
    path = Path(folder) / f"checkpoint-{step}"
    groups = {"model": {n: m.detach() for n, m in optimizer.masters.items()}, "optimizer": optimizer.state_dict()}
    groups |= tensors or {}
    spread, first = any(isinstance(m, DTensor) for m in optimizer.parameters), distributed.rank() == 0
    if first:
        digests: dict[str, str] = {}
        with files.folder(path, digests) as partial:
            if spread:
                digests |= _write_shards(partial, groups)
            else:
                for name, group in groups.items():
                    save_file({k: v.contiguous() for k, v in group.items()}, partial / f"{name}.safetensors")
            for name, lines in (rows or {}).items():
                text = "".join(json.dumps(line) + "\n" for line in lines)
                (partial / f"{name}.jsonl").write_text(text, encoding="utf-8")
            state = {"step": step, "stats": stats, "job": job}
            (partial / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        _clear(path)
    elif spread:
        with files.writing(path):
            _write_shards(files.partial(path), groups)
    distributed.meet("the checkpoint")
    return path


def _write_shards(partial: Path, groups: Groups) -> dict[str, str]:
    """Every rank's part into partial/shards, on the disk; returns the checksums of all files. Every rank calls this."""
    distributed.meet("the checkpoint's folder")
    inside = partial / SHARDS
    try:
        dcp.save(_flat(groups), storage_writer=dcp.FileSystemWriter(inside, sync_files=True))
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error
    own = inside.glob(f"__{distributed.rank()}_*")
    return dict(distributed.gather([(file.relative_to(partial).as_posix(), files.digest(file)) for file in own]))


def _flat(groups: Groups) -> dict[str, Any]:
    return {f"{name}/{key}": tensor for name, group in groups.items() for key, tensor in group.items()}


def _clear(path: Path) -> None:
    """Removes what a new checkpoint makes superfluous."""
    everything = found(path.parent)
    place = everything.index(path)
    for other in (*everything[:place], *everything[place + KEPT :]):  # those of more steps were damaged
        shutil.rmtree(other)
    for torn in path.parent.glob("checkpoint-*.partial"):
        shutil.rmtree(torn)


def load(
    path: Path, optimizer: MasterAdamW, job: dict[str, Any], tensors: Groups | None = None
) -> tuple[int, dict[str, Any]]:
    """Takes model and optimizer back to `path`; returns the steps done and the counts.

    tensors: as in `save`; they take their values in place. Every rank calls this. Raises CheckpointError if the checkpoint is
    of another job, naming the difference, or of another model.
    """
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    there, here = state["job"], json.loads(json.dumps(job))
    if differ := sorted(key for key in there.keys() | here.keys() if there.get(key) != here.get(key)):
        changes = ", ".join(f"{key} was {there.get(key)!r} and is {here.get(key)!r}" for key in differ)
        raise CheckpointError(f"{path} is of another training: {changes}; set them back, or remove {path}")
    held = _Shards(path) if (path / SHARDS).is_dir() else _Whole(path)
    groups = {"model": {n: m.detach() for n, m in optimizer.masters.items()}, **(tensors or {})}
    for name, group in groups.items():
        _check_shapes(path, held.shapes(name), group)
    moments = {key: optimizer.empty_state(key) for key in held.shapes("optimizer")}
    held.read(groups | {"optimizer": moments})
    optimizer.write_back()
    optimizer.load_state_dict(moments)
    return state["step"], state["stats"]


def _check_shapes(path: Path, there: dict[str, list[int]], here: dict[str, torch.Tensor]) -> None:
    if there.keys() != here.keys():
        odd = sorted(there.keys() ^ here.keys())
        raise CheckpointError(f"{path} is of another model: {len(odd)} names differ, such as {odd[0]!r}")
    for name, tensor in here.items():
        if there[name] != list(tensor.shape):
            raise CheckpointError(
                f"{path} is of another model: {name} is {there[name]} there and {list(tensor.shape)} here"
            )


class _Whole:
    """The tensors of a checkpoint in safetensors files, one for each group."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def shapes(self, name: str) -> dict[str, list[int]]:
        with safe_open(self.path / f"{name}.safetensors", "pt") as file:
            return {key: file.get_slice(key).get_shape() for key in sorted(file.keys())}

    @torch.no_grad()
    def read(self, groups: Groups) -> None:
        """Fills the tensors in place, one after another; every rank calls this."""
        for name, group in groups.items():
            with safe_open(self.path / f"{name}.safetensors", "pt") as file:
                for key, tensor in group.items():
                    tensor.copy_(like(file.get_tensor(key), tensor))


class _Shards:
    """The tensors of a checkpoint that several ranks wrote."""

    def __init__(self, path: Path) -> None:
        self.reader = dcp.FileSystemReader(path / SHARDS)
        entries: dict[str, Any] = self.reader.read_metadata().state_dict_metadata
        self.sizes = {key: list(entry.size) for key, entry in entries.items()}

    def shapes(self, name: str) -> dict[str, list[int]]:
        return {key.removeprefix(f"{name}/"): size for key, size in self.sizes.items() if key.startswith(f"{name}/")}

    def read(self, groups: Groups) -> None:
        """Fills the tensors in place, each rank its own part; every rank calls this."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process reads all
            dcp.load(_flat(groups), storage_reader=self.reader, no_dist=distributed.world_size() == 1)


def load_tensors(path: Path, name: str) -> dict[str, torch.Tensor]:
    """The tensors that were saved whole under `name`."""
    return load_file(path / f"{name}.safetensors")


def load_rows(path: Path, name: str) -> list[dict[str, Any]]:
    """The rows that were saved under `name`."""
    with (path / f"{name}.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
