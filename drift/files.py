"""Files that survive a crash: whole or absent, on the disk before their name is, and checked when they are read again.

A single file is written aside, synchronised and renamed (`write`). A folder of files (a checkpoint, a model) is filled
aside (`folder`), gets a manifest with the length and SHA-256 of each file (`seal`), and then its name; `damage` compares.
The manifest lists files by their path in the folder, so that several processes may each have written some of them.
A file of lines is appended to by `Lines`: a line that could not be written whole is taken back.

What the system refuses (no room, no permission, a limit, a folder that is gone) becomes a `WriteError`, which names the
file and the remedy.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

MANIFEST = "manifest.json"
LOCK = ".lock"
_REMEDIES = {
    errno.ENOSPC: "make room on that disk, or choose another folder",
    errno.EDQUOT: "raise the disk quota, or make room",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f)",
    errno.EACCES: "make the folder writable, or choose another one",
    errno.EPERM: "make the folder writable, or choose another one",
    errno.EROFS: "its file system is read-only: make it writable, or choose another folder",
    errno.ENOENT: "its folder was removed during the run",
    errno.EIO: "the disk reports an error",
}
_TORN = re.compile(r"\.\d+\.partial$")
_CODE = re.compile(r"\(os error (\d+)\)")


class WriteError(OSError):
    """A file that could not be written; the message names it, the cause and the remedy."""


class LockedError(RuntimeError):
    """A folder or a file that another process is writing to."""


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Inside, an error of the system or of safetensors becomes a WriteError about `path`."""
    try:
        yield
    except WriteError:
        raise
    except (OSError, SafetensorError) as error:
        found = _CODE.search(str(error))
        code = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
        if code is None:
            raise
        remedy = _REMEDIES.get(code, "see that the folder can be written to")
        raise WriteError(
            f"{path} cannot be written: {os.strerror(code)}; {remedy}. Nothing that was finished is lost, and the same "
            "command goes on from it"
        ) from error


def write(path: str | Path, content: str | bytes) -> None:
    """Writes the whole file: a reader finds the old content or the new, also after a crash or a power loss."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with writing(path):
        try:
            with partial.open("wb") as file:
                file.write(content.encode("utf-8") if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        sync(path.parent)


def sweep(path: str | Path) -> None:
    """Removes what processes that were killed during `write` left anywhere in the folder; for the holder of its lock."""
    for torn in Path(path).rglob("*.partial"):
        if _TORN.search(torn.name):
            torn.unlink(missing_ok=True)


def partial(path: Path) -> Path:
    """The folder that is filled before it takes the name `path`."""
    return path.with_name(path.name + ".partial")


@contextmanager
def folder(path: str | Path, digests: Mapping[str, str] | None = None) -> Iterator[Path]:
    """Yields a folder to fill; at the end it is sealed, synchronised, and takes the place of `path`.

    digests: as in `seal`.
    """
    path = Path(path)
    inside = partial(path)
    with writing(path):
        shutil.rmtree(inside, ignore_errors=True)
        inside.mkdir(parents=True)
        try:
            yield inside
            seal(inside, digests)
            if path.exists():
                shutil.rmtree(path)
            inside.rename(path)
        except BaseException:
            shutil.rmtree(inside, ignore_errors=True)
            raise
        sync(path.parent)


@contextmanager
def into(path: str | Path) -> Iterator[Path]:
    """Yields a folder to fill; at the end its files move into `path`, next to what is there, with their manifest last."""
    path = Path(path)
    partial = path / ".partial"
    with writing(path):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            seal(partial)
            (path / MANIFEST).unlink(missing_ok=True)
            for file in sorted(partial.iterdir(), key=lambda file: file.name == MANIFEST):
                file.replace(path / file.name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        sync(path)


def seal(path: Path, digests: Mapping[str, str] | None = None) -> None:
    """Writes the manifest of all files in the folder, and has everything reach the disk.

    digests: path in the folder → checksum, of files for which another process has computed it.
    """
    known = digests or {}
    listed = {file.relative_to(path).as_posix(): file for file in sorted(path.rglob("*")) if file.is_file()}
    listed.pop(MANIFEST, None)
    entries = {
        name: {"bytes": file.stat().st_size, "sha256": known.get(name) or digest(file)} for name, file in listed.items()
    }
    for file in listed.values():
        sync(file)
    for inside in (p for p in path.rglob("*") if p.is_dir()):
        sync(inside)
    write(path / MANIFEST, json.dumps({"files": entries}, indent=1) + "\n")


def damage(path: str | Path, suffix: str = "") -> str | None:
    """How the folder differs from its manifest, in a few words; None for a folder that is as it was written.

    suffix: looks at files alone whose name ends so.
    """
    path = Path(path)
    try:
        entries = json.loads((path / MANIFEST).read_bytes())["files"]
        expected = {str(name): (entry["bytes"], entry["sha256"]) for name, entry in entries.items()}
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST} cannot be read"
    for name, (size, checksum) in expected.items():
        if not name.endswith(suffix):
            continue
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, and had {size}"
        if digest(file) != checksum:
            return f"the checksum of {name} differs"
    return None


def digest(path: Path) -> str:
    """SHA-256 of the file, in hexadecimal digits."""
    found = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def sync(path: Path) -> None:
    """Has a file, or the names in a folder, reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot synchronise a folder
            raise
    finally:
        os.close(descriptor)


def repair(path: Path) -> int:
    """Cuts a last line that has no line end, such as one that a crash tore or left as NUL bytes; returns the bytes cut."""
    if not path.exists():
        return 0
    with writing(path), path.open("rb+") as file:
        content = file.read()
        kept = content.rstrip(b"\0").rfind(b"\n") + 1
        file.truncate(kept)
    return len(content) - kept


class Lines:
    """Appends whole lines to a file, which is made if absent: `append` writes all that it is given, or nothing."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab", buffering=0)
        self._torn: int | None = None  # the file's length before an append that could not be taken back

    def append(self, lines: bytes) -> None:
        """Writes lines, each with its line end. Raises WriteError; the file is then as before, or refuses to go on."""
        with writing(self.path):
            if self._torn is not None:
                os.ftruncate(self._file.fileno(), self._torn)
                self._torn = None
            before, left = os.fstat(self._file.fileno()).st_size, memoryview(lines)
            try:
                while left:
                    left = left[os.write(self._file.fileno(), left) :]
            except BaseException:
                self._torn = before
                os.ftruncate(self._file.fileno(), before)
                self._torn = None
                raise

    def sync(self) -> None:
        """Has all lines reach the disk."""
        with writing(self.path):
            os.fsync(self._file.fileno())

    def hold(self) -> None:
        """Refuses every other process that calls this, until the file is closed. Raises LockedError."""
        _flock(self._file.fileno(), self.path)

    def close(self) -> None:
        self._file.close()


@contextmanager
def lock(path: str | Path) -> Iterator[None]:
    """Inside, no other process gets into the same folder, which is made if absent. The system frees it after a crash.

    Raises LockedError if another process is in there.
    """
    path = Path(path)
    with writing(path / LOCK):
        path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _flock(descriptor, path)
        yield
    finally:
        os.close(descriptor)


def _flock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise LockedError(
            f"another process is writing to {path}; wait until it has ended, or choose another name or folder"
        ) from None
