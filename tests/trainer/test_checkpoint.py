"""A checkpoint that is damaged is named and passed over for the one before; if both are, the error names the remedy."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_policy import Policy, config, some

from drift import files
from drift.track import Track
from drift.training import checkpoint, trainer

SETTINGS = config(save_every=1, epochs=2.0)


def half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def zeros(path):
    path.write_bytes(bytes(path.stat().st_size))


def one_bit(path):
    content = bytearray(path.read_bytes())
    content[-100] ^= 0x40
    path.write_bytes(bytes(content))


def other(text):
    def other_content(path):
        path.write_text(text)

    return other_content


def nothing_inside(path):
    shutil.rmtree(path)
    path.mkdir()


WEIGHTS, MOMENTS = "model.safetensors", "optimizer.safetensors"
DAMAGES = [
    *((WEIGHTS, how) for how in (half, empty, zeros, one_bit, Path.unlink)),
    *((MOMENTS, how) for how in (half, one_bit, Path.unlink)),
    *(("state.json", how) for how in (half, empty, zeros, Path.unlink, other("[]"), other("{}"))),
    *(("manifest.json", how) for how in (half, empty, zeros, Path.unlink, other("[]"), other('{"files": {"x": 1}}'))),
    ("", nothing_inside),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(weights and counts of a training, a folder with its checkpoints of steps 3 and 4 of 6)."""
    folder = tmp_path_factory.mktemp("whole")
    policy, stopped = Policy(), folder / "stopped"
    stats = trainer.train(policy, some(10), SETTINGS, seed=3)

    class Stops(Track):
        def log(self, step, **metrics):
            if step == 5:
                raise InterruptedError

    with pytest.raises(InterruptedError):
        trainer.train(Policy(), some(10), SETTINGS, seed=3, track=Stops(None, progress=False), checkpoint_dir=stopped)
    assert sorted(path.name for path in stopped.iterdir()) == ["checkpoint-3", "checkpoint-4"]
    return policy.weights(), stats.losses, stopped


@pytest.mark.parametrize(("name", "damage"), DAMAGES, ids=[f"{n or 'folder'}-{d.__name__}" for n, d in DAMAGES])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(name, damage, whole, tmp_path, capsys):
    weights, losses, stopped = whole
    shutil.copytree(stopped, folder := tmp_path / "checkpoints")
    damage(folder / "checkpoint-4" / name)
    policy = Policy()
    with Track(None, progress=False) as track:
        stats = trainer.train(policy, some(10), SETTINGS, seed=3, track=track, checkpoint_dir=folder)
    said = " ".join(capsys.readouterr().err.split())
    assert "checkpoint-4 is damaged: " in said
    assert "going on from checkpoint-3, the one before" in said
    assert stats.losses == losses
    assert all(torch.equal(now, weights[key]) for key, now in policy.weights().items())


@pytest.mark.parametrize(("name", "damage"), DAMAGES, ids=[f"{n or 'folder'}-{d.__name__}" for n, d in DAMAGES])
def test_when_both_are_damaged_the_error_names_the_remedy(name, damage, whole, tmp_path):
    shutil.copytree(whole[2], folder := tmp_path / "checkpoints")
    for number in (3, 4):
        damage(folder / f"checkpoint-{number}" / name)
    with pytest.raises(checkpoint.CheckpointError) as raised:
        checkpoint.latest(folder)
    for part in ("checkpoint-4 is damaged: ", "checkpoint-3 is damaged: ", f"remove {folder / 'checkpoint-*'}"):
        assert part in str(raised.value)


def test_a_manifest_lists_every_file_with_length_and_checksum(whole):
    path = whole[2] / "checkpoint-4"
    listed = json.loads((path / "manifest.json").read_text())["files"]
    assert sorted(listed) == [WEIGHTS, MOMENTS, "state.json"]
    for name, entry in listed.items():
        assert entry == {"bytes": (path / name).stat().st_size, "sha256": files.digest(path / name)}


def test_what_a_killed_process_wrote_aside_is_removed(tmp_path):
    for name in ("config.yaml.77.partial", "seed-0/eval.json.8.partial", "seed-0/kept.partial", "config.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    files.sweep(tmp_path)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == ["config.yaml", "seed-0/kept.partial"]
