"""What the system refuses (room, size, permission, a folder that is gone) ends a run with a sentence, and loses nothing."""

from __future__ import annotations

import resource
import shutil
import subprocess
from pathlib import Path

import pytest
from killed_runs import Life, config_file, differences

ENOUGH = 40_000  # bytes of a file: more than any but the weights has


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    life = Life(config_file(folder, "online"))
    assert life.wait() == 0, life.said()
    return folder / "online"


@pytest.fixture
def disk(tmp_path):
    """A file system of its own, and a way to mount it again with other options; needs the right to mount."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this process may not mount a file system")
    yield place, lambda options: subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)
    subprocess.run(["umount", "-l", str(place)], check=True)


def second_checkpoint(folder: Path) -> bool:
    """Whether the run has written its second; files come and go while it is looked for."""
    return (folder / "seed-0/drift/checkpoints/checkpoint-2").exists()


def ends_with(life: Life, words: str) -> None:
    assert life.wait(seconds=60) == 1, life.said()
    assert words in life.said()
    assert "Traceback" not in life.said()


def test_a_limit_on_the_size_of_files(expected, tmp_path):
    file = config_file(tmp_path, "online")
    limit = (ENOUGH, ENOUGH)
    life = Life(file, before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    ends_with(life, "cannot be written: File too large; raise the limit on the size of a file")
    again = Life(file)
    assert again.wait() == 0, again.said()
    assert differences(tmp_path / "online", expected) == {}


def test_a_full_disk(expected, disk):
    place, remount = disk
    file = shutil.copy(config_file(place, "online"), place.parent / "online.yaml")  # its log has room
    folder = place / "online"
    life = Life(file)
    assert life.wait(lambda: second_checkpoint(folder)) is None
    (place / "ballast").write_bytes(b"")
    life.kill()
    used = int(subprocess.check_output(["du", "-sk", str(place)], text=True).split()[0])
    remount(f"size={used + 8}k")
    ends_with(Life(file), "cannot be written: No space left on device; make room on that disk")
    remount("size=64m")
    again = Life(file)
    assert again.wait() == 0, again.said()
    assert differences(folder, expected) == {}


def test_a_read_only_folder(expected, disk):
    place, remount = disk
    file = config_file(place, "online")
    life = Life(file)
    assert life.wait(lambda: second_checkpoint(place / "online")) is None
    life.kill()
    remount("ro")
    life = Life(file_copy := shutil.copy(file, place.parent / "online.yaml"))
    assert file_copy
    ends_with(life, "its file system is read-only")
    remount("rw")
    again = Life(file)
    assert again.wait() == 0, again.said()
    assert differences(place / "online", expected) == {}


def test_a_folder_that_is_removed_during_the_run(tmp_path):
    file, folder = config_file(tmp_path, "online"), tmp_path / "online"
    life = Life(file)
    assert life.wait(lambda: second_checkpoint(folder)) is None
    shutil.rmtree(folder, ignore_errors=True)
    assert life.wait(seconds=60) == 1, life.said()
    assert "Traceback" not in life.said()


def test_a_second_process_in_the_same_folder_is_refused(tmp_path):
    file, folder = config_file(tmp_path, "offline"), tmp_path / "offline"
    first = Life(file)
    assert first.wait(lambda: (folder / "base").exists()) is None
    second = Life(shutil.copy(file, tmp_path / "second.yaml"))
    ends_with(second, f"another process is writing to {folder}; wait until it has ended")
    first.kill()
    again = Life(file)  # a lock that a killed process held is free
    assert again.wait(lambda: "another process" in again.said() or any(folder.rglob("rollouts.jsonl"))) is None
    assert "another process" not in again.said()
    again.kill()
