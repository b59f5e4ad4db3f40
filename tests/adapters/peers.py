"""Tests that peers ship in their source distributions, fetched when they are run and never kept here."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest


def test_module(requirement: str, path: str, folder: Path) -> ModuleType:
    """The module at `path` of a package's sdist; skips with the reason where it cannot be had."""
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
    spec = importlib.util.spec_from_file_location(Path(path).stem + "_of_peer", folder / names[0])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


test_module.__test__ = False
