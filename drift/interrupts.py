"""SIGINT (Ctrl-C) and SIGTERM: the optimizer step in flight ends and its checkpoint is written; anything else stops at once.

`handled` installs the handlers, for the command line. A training wraps each step in `finishing`: a signal is noted there
(`asked`), and the training saves and calls `stop`. A second signal does not wait.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """The process was asked to end. `signal`: by which signal; `saved`: the checkpoint that was written for that, or None."""

    def __init__(self, number: int, saved: str | None = None) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal, self.saved = signal.Signals(number), saved


causes: list[Callable[[], BaseException | None]] = []  # asked at a SIGTERM for the error to raise in place of Stopped
_deep = 0  # how many `finishing` blocks the main thread is in
_noted: int | None = None  # the signal that waits for the end of a step


def asked() -> int:
    """The signal that waits for the end of the step, or 0."""
    return _noted or 0


def stop(number: int, saved: str | None = None) -> None:
    """Raises Stopped for the signal."""
    global _noted
    _noted = None
    raise Stopped(number, saved)


@contextmanager
def finishing() -> Iterator[None]:
    """Inside, the first signal waits; the body looks at `asked` when it is ready to stop."""
    global _deep
    _deep += 1
    try:
        yield
    finally:
        _deep -= 1


@contextmanager
def handled(say: Callable[[str], None]) -> Iterator[None]:
    """Inside, SIGINT and SIGTERM are handled as above; `say` gets one line when a step is waited for. Main thread only."""
    global _noted
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, _: Any) -> None:
        global _noted
        if number == signal.SIGTERM:
            for cause in causes:
                if error := cause():
                    raise error
        if _deep and _noted is None:
            _noted = number
            say(f"{signal.Signals(number).name}: the step in flight ends first; the same signal again stops at once")
        else:
            stop(number)

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    _noted = None
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
