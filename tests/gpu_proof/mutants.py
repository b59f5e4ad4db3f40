"""Kernels with known mistakes in their text: built, and put through a check in a process of their own; and the value tests
under the sanitizers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from emulate import SANITIZED, build

AS_THEY_ARE = "as they are"
Change = tuple[str, str, str]  # file below csrc, text, its replacement


def libraries(folder: Path, changes: dict[str, Change], within: str) -> dict[str, Path]:
    """The kernels as they are, and each change made for the .cu file `within`; two at a time, without optimisation."""

    def make(item: tuple[str, tuple[Change, ...]]) -> tuple[str, Path]:
        name, made = item
        return name, build(folder / re.sub(r"\W", "_", name), changes=made, within=within, level="-O0")

    first = make((AS_THEY_ARE, ()))  # the others take from it what they do not change
    with ThreadPoolExecutor(2) as pool:
        return dict([first, *pool.map(make, [(name, (change,)) for name, change in changes.items()])])


def outcome(verify: Callable[[Path, pytest.MonkeyPatch], None], library: Path) -> str:
    """ "" where `verify` passes in a process of its own, else what it says or the signal that ended it."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads: the child starts none
        child = os.fork()
    if child == 0:
        said = ""
        try:
            with pytest.MonkeyPatch.context() as patch:
                verify(library, patch)
        except BaseException:
            said = traceback.format_exc()
        os.write(write, said[-8000:].encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read().decode(errors="replace")
    status = os.waitpid(child, 0)[1]
    return f"ended by signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else said


def sanitized(file: str, chosen: str, *changes: Change) -> subprocess.CompletedProcess:
    """The `chosen` tests of `file` with the kernels under the address and alignment sanitizers."""
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout
    options = {"LD_PRELOAD": runtime.strip(), "ASAN_OPTIONS": "detect_leaks=0", SANITIZED: json.dumps(changes)}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-s", "-p", "no:cacheprovider", file, "-k", chosen]
    return subprocess.run(command, env=os.environ | options, capture_output=True, text=True)
