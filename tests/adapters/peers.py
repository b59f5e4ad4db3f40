"""Tests that peers ship in their source distributions, fetched when they are run and never kept here."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest


def test_module(requirement: str, path: str, folder: Path) -> ModuleType:
    """The module at `path` of a package's sdist; skips with the reason where it cannot be had."""
    file = test_file(requirement, path, folder)
    spec = importlib.util.spec_from_file_location(file.stem + "_of_peer", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def passed(file: Path, conftest: str) -> int:
    """How many tests of `file` pass, in a pytest of their own with this conftest; AssertionError where one does not."""
    (file.parent / "conftest.py").write_text(conftest)
    root = Path(__file__).parent.parent.parent  # this checkout, installed or not
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore",
        f"--rootdir={file.parent}",
    ]
    done = subprocess.run(
        [*command, str(file)],
        capture_output=True,
        text=True,
        cwd=file.parent,
        env=os.environ | {"PYTHONPATH": os.pathsep.join((str(root), str(Path(__file__).parent)))},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    found = re.search(r"(\d+) passed", done.stdout)
    return int(found[1]) if found else 0


def test_file(requirement: str, path: str, folder: Path) -> Path:
    """`path` of a package's sdist, on its own in `folder`; skips with the reason where it cannot be had."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--no-binary",
        ":all:",
    ]
    done = subprocess.run([*command, "-d", str(folder), requirement], capture_output=True, text=True)
    archives = list(folder.glob("*.tar.gz"))
    if not archives:
        pytest.skip(f"cannot run: the sdist of {requirement} could not be fetched ({done.stderr.strip()[-200:]})")
    with tarfile.open(archives[0]) as archive:
        names = [name for name in archive.getnames() if name.split("/", 1)[-1] == path]
        if not names:
            pytest.skip(f"cannot run: the sdist of {requirement} carries no {path}")
        archive.extract(names[0], folder, filter="data")
    return folder / names[0]


test_file.__test__ = test_module.__test__ = False
