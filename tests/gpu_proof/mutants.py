"""Kernels with known mistakes in their text: built, and put through a check in a process of their own; and the value tests
under the sanitizers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from emulate import LIBRARY, build

AS_THEY_ARE = "as they are"
Change = tuple[str, str, str]  # file below csrc, text, its replacement
Run = tuple[str, str, "Change | None"]  # file of value tests, which of them, a change


@contextmanager
def libraries(folder: Path, changes: dict[str, Change], within: str) -> Iterator[dict[str, Future[Path]]]:
    """The kernels as they are, and each change made for the .cu file `within`; two at a time, without optimisation."""

    def make(name: str, *made: Change) -> Path:
        return build(folder / re.sub(r"\W", "_", name), changes=made, within=within, level="-O0")

    with _two_at_a_time() as pool:
        first = pool.submit(make, AS_THEY_ARE)
        first.result()  # the others take from it what they do not change
        yield {AS_THEY_ARE: first, **{name: pool.submit(make, name, change) for name, change in changes.items()}}


@contextmanager
def _two_at_a_time() -> Iterator[ThreadPoolExecutor]:
    """A pool that drops what has not begun when nobody wants it any more."""
    pool = ThreadPoolExecutor(2)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def outcome(verify: Callable[[Path, pytest.MonkeyPatch], None], given: Path) -> str:
    """ "" if verify(given, …) passes in a process of its own, else what it says or the signal that ended it."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads: the child starts none
        child = os.fork()
    if child == 0:
        said = ""
        torch.set_num_threads(1)  # the parent's threads are not here
        try:
            with pytest.MonkeyPatch.context() as patch:
                verify(given, patch)
        except BaseException:
            said = traceback.format_exc()
        os.write(write, said[-8000:].encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read().decode(errors="replace")
    status = os.waitpid(child, 0)[1]
    return f"ended by signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else said


@contextmanager
def sanitized(folder: Path, runs: dict[str, Run]) -> Iterator[dict[str, Future[subprocess.CompletedProcess]]]:
    """Value tests with the kernels under the address and alignment sanitizers. What is not changed is compiled once."""
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout

    def make(name: str, change: Change | None) -> Path:
        where = {"changes": (change,), "within": change[0]} if change else {}
        return build(folder / re.sub(r"\W", "_", name), sanitize=True, level="-O0", **where)

    def run(name: str, file: str, chosen: str, change: Change | None) -> subprocess.CompletedProcess:
        options = {"LD_PRELOAD": runtime.strip(), "ASAN_OPTIONS": "detect_leaks=0", LIBRARY: str(make(name, change))}
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-s", "-p", "no:cacheprovider", file, "-k", chosen]
        return subprocess.run(command, env=os.environ | options, capture_output=True, text=True)

    with _two_at_a_time() as pool:
        pool.submit(make, AS_THEY_ARE, None).result()
        yield {name: pool.submit(run, name, *given) for name, given in runs.items()}
