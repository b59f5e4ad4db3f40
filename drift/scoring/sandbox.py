"""A pool of worker processes without rights that score model text; one that hangs or dies is replaced.

    >>> from drift.scoring.sandbox import Question, Sandbox
    >>> with Sandbox("math", workers=1, seconds=20) as sandbox:
    ...     sandbox.ask([Question("0.5x", "x/2"), Question("x", "x/2")])
    [1.0, 0.0]

A worker is a fresh Python that gets neither this process's environment variables nor its open files, and gives up what
rights it has before it reads any answer (`drift.scoring.confine`). Time is limited from here, since code that hangs does
not look at a clock.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from drift.scoring.worker import frame

MEMORY = 4 << 30  # bytes of address space that a worker may have
START = 120.0  # seconds to start in, on a busy machine
_LINE = 1 << 16  # bytes of a verdict, at most
_ROOT = str(Path(__file__).parent.parent.parent)


class SandboxError(RuntimeError):
    """A scorer that does not start."""


@dataclass(frozen=True, slots=True)
class Question:
    """An answer to score."""

    answer: str
    gold: str | None  # None when the problem has no single right answer
    problem: dict[str, Any] | None = None  # what the scorer needs besides


@dataclass(frozen=True, slots=True)
class Failed:
    """No verdict: the scorer failed, and it does so on the right answer too. It counts as wrong, and is counted."""

    reason: str  # a traceback, or a sentence

    def __bool__(self) -> bool:
        return False

    def __float__(self) -> float:
        return 0.0


Verdict = float | Failed  # a reward: 1 or more is right


class _Worker:
    """One process; `ask` returns None when it did not answer."""

    def __init__(self, setup: dict[str, Any]) -> None:
        self.buffer = b""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "drift.scoring.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_environment(),
            start_new_session=True,  # a Ctrl-C at the terminal is for the parent
        )
        self.kill = weakref.finalize(
            self, _end, self.process
        )  # by hand, or with the object, or at the end of the program
        started = self._said(setup, START)
        if started is None or not started["ready"]:
            self.kill()
            why = started["failed"] if started else f"it did not answer within {START:.0f} s"
            raise SandboxError(f"the scorer {setup['judge']} {setup['options'] or ''} does not start: {why}")
        self.confined = started["confined"] is True

    def ask(self, question: Question, seconds: float) -> dict[str, Any] | None:
        values = {"answer": question.answer, "gold": question.gold, "problem": question.problem}
        return self._said(values, seconds)

    def _said(self, message: Any, seconds: float) -> dict[str, Any] | None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(frame(message))
            self.process.stdin.flush()
        except (BrokenPipeError, ValueError):
            return None
        descriptor, deadline = self.process.stdout.fileno(), time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while b"\n" not in self.buffer:
                if len(self.buffer) > _LINE or not selector.select(max(0.0, deadline - time.monotonic())):
                    return None
                chunk = os.read(descriptor, 4096)
                if not chunk:  # the worker died
                    return None
                self.buffer += chunk
        line, _, self.buffer = self.buffer.partition(b"\n")
        try:
            said = json.loads(line)
        except ValueError:
            return None
        return said if isinstance(said, dict) and not self.buffer else None


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except BrokenPipeError:  # the worker died with a question in the pipe
                continue


class Sandbox:
    """At most `workers` processes for one judge of `drift.scoring.judges`, started when first needed.

    seconds: for one answer; what takes longer is wrong, and its worker is replaced. memory: bytes of a worker.
    killed, raised: answers that took too long or ended their worker, and that the scorer raised on; all are wrong.
    Raises ValueError for no time, SandboxError when a worker does not start.
    """

    def __init__(
        self, judge: str, workers: int | None = None, seconds: float = 5.0, memory: int = MEMORY, **options: Any
    ) -> None:
        if seconds <= 0:
            raise ValueError(f"seconds={seconds!r} must be above 0")
        self.seconds, self.killed, self.raised = seconds, 0, 0
        self._setup = {"judge": judge, "options": options, "memory": memory, "seconds": seconds}
        self._workers = workers or min(4, os.cpu_count() or 1)
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        self._threads: ThreadPoolExecutor | None = None

    def ask(self, questions: Sequence[Question]) -> list[Verdict]:
        """A verdict for each question, as many at a time as there are workers."""
        if not questions:
            return []
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self._workers)
        return list(self._threads.map(self._verdict, questions))

    def confined(self) -> bool:
        """Whether a worker has no network, cannot write files and cannot start processes: it tried."""
        worker = self._worker()
        self._idle.put(worker)
        return worker.confined

    def _worker(self) -> _Worker:
        try:
            return self._idle.get_nowait()
        except Empty:
            return _Worker(self._setup)

    def _verdict(self, question: Question) -> Verdict:
        said = self._asked(question)
        if said is None:
            self.killed += 1
            if question.gold is None or self._asked(Question(question.gold, question.gold, question.problem)):
                return 0.0
            return Failed(f"the scorer did not answer within {self.seconds:g} s, for the right answer neither")
        self.raised += "raised" in said
        reward = said.get("reward")
        return float(reward) if isinstance(reward, int | float) else Failed(str(said.get("failed")))

    def _asked(self, question: Question) -> dict[str, Any] | None:
        worker = self._worker()
        said = worker.ask(question, self.seconds)
        if said is None:
            worker.kill()
        else:
            self._idle.put(worker)
        return said

    def close(self) -> None:
        """Ends all workers; a later call starts new ones."""
        if self._threads is not None:
            self._threads.shutdown()
            self._threads = None
        while True:
            try:
                self._idle.get_nowait().kill()
            except Empty:
                return

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _environment() -> dict[str, str]:
    """No secrets: what an interpreter needs to find its packages, and one thread."""
    kept = {key: os.environ[key] for key in ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH") if key in os.environ}
    paths = os.pathsep.join([_ROOT, *(os.path.abspath(path) for path in sys.path if path != _ROOT)])
    return {
        **kept,
        "PYTHONPATH": paths,
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
