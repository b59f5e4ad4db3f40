"""math-verify behind a wall: worker processes with a time and a memory limit, killed and replaced when they hang.

math-verify has no safe time limit of its own off the main thread, and sympy can run for hours on an answer such as
9**9**9. A worker is this module run by the same Python, speaking one JSON line a question over its pipes, so nothing
of the parent (threads, CUDA, open files) is forked into it.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import selectors
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

_MEMORY = 4 << 30  # bytes of address space a worker may have
_START_SECONDS = 60.0  # importing sympy on a busy machine


class _Worker:
    """One subprocess; `ask` returns None when it had to be killed."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", "from drift.tasks.mathverify import _serve; _serve()"]
        package_root = str(Path(__file__).parent.parent.parent)
        path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}
        )
        if self._read_line(_START_SECONDS) != b"ready\n":
            self.kill()
            raise RuntimeError(f"a math-verify worker did not start within {_START_SECONDS:.0f} s: {' '.join(command)}")

    def _read_line(self, seconds: float) -> bytes | None:
        assert self.process.stdout is not None
        descriptor, line, deadline = self.process.stdout.fileno(), b"", time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return None
                chunk = os.read(descriptor, 4096)
                if not chunk:  # the worker died
                    return None
                line += chunk
        return line

    def ask(self, gold: str, answer: str, seconds: float) -> bool | None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return None
        line = self._read_line(seconds)
        return None if line is None else line == b"1\n"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:  # the worker died with a question in the pipe
                    continue


class MathVerifier:
    """A pool of at most `workers` math-verify processes, started when first needed.

    seconds: time limit of one verification; past it the answer counts as wrong and the worker is replaced.
    `killed` counts the workers that were killed for it (or died).
    """

    def __init__(self, workers: int | None = None, seconds: float = 5.0) -> None:
        if seconds <= 0:
            raise ValueError(f"seconds={seconds!r} has to be above 0")
        self.workers = workers or min(4, os.cpu_count() or 1)
        self.seconds = seconds
        self.killed = 0
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        self._threads = ThreadPoolExecutor(self.workers)
        atexit.register(self.close)

    def verify(self, gold: str, answer: str) -> bool:
        """Whether math-verify finds the two equal. Texts that are the same after stripping are, without asking it."""
        return self.verify_many([(gold, answer)])[0]

    def verify_many(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """`verify` for each (gold, answer), as many at a time as there are workers."""
        return list(self._threads.map(lambda pair: self._verify(*pair), pairs))

    def _verify(self, gold: str, answer: str) -> bool:
        if gold.strip() == answer.strip():
            return True
        worker = self._idle.get_nowait() if not self._idle.empty() else _Worker()
        verdict = worker.ask(gold, answer, self.seconds)
        if verdict is None:
            worker.kill()
            self.killed += 1
            return False
        self._idle.put(worker)
        return verdict

    def close(self) -> None:
        """End all workers; a later call starts new ones."""
        while not self._idle.empty():
            self._idle.get_nowait().kill()
        atexit.unregister(self.close)


_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")


def _wrap(text: str) -> str:
    """math-verify looks for symbols only inside a maths environment; there words would be products of letters."""
    return text if "$" in text or "\\boxed" in text or _WORD.search(text) else f"${text}$"


def _serve() -> None:
    """The worker's loop: a JSON [gold, answer] a line in, 1 or 0 a line out."""
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    import logging

    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)  # math-verify logs what it cannot parse; here that is simply a wrong answer
    out, sys.stdout = sys.stdout, sys.stderr  # whatever sympy prints must not look like a verdict
    out.write("ready\n")
    out.flush()
    for line in sys.stdin:
        gold, answer = (_wrap(text) for text in json.loads(line))
        try:
            right = verify(parse(gold), parse(answer))
        except (
            Exception
        ):  # third-party parsing of arbitrary text: whatever it raises, the answer was not shown to be right
            right = False
        out.write("1\n" if right else "0\n")
        out.flush()
