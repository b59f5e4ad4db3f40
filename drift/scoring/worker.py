"""The process on the other side of the wall: gives up its rights, then answers one question after another.

`python -m drift.scoring.worker`: a pickled setup and then pickled questions, each behind its length, come in by stdin from the
trusted side; one JSON line each goes out by stdout, and nothing that this process writes is ever unpickled.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import struct
import sys
import traceback
from typing import Any, BinaryIO

from drift.scoring.confine import confine
from drift.scoring.judges import JUDGES, Judge

TRACEBACK = 4000  # characters of one that are sent, from its end


def read(stream: BinaryIO) -> Any:
    """The next message; None at the end of the stream."""
    head = stream.read(8)
    if len(head) < 8:
        return None
    return pickle.loads(stream.read(struct.unpack("<Q", head)[0]))


def frame(message: Any) -> bytes:
    """A message as `read` takes it."""
    body = pickle.dumps(message)
    return struct.pack("<Q", len(body)) + body


def readable(judge: Judge) -> list[str]:
    """Folders that the interpreter, its packages and the scorer lie in; not the working directory."""
    roots = {os.path.realpath(path) for path in (sys.prefix, sys.base_prefix, sys.exec_prefix)}
    roots |= {os.path.realpath(path) for path in sys.path if path.endswith(("site-packages", "dist-packages"))}
    return sorted(root for root in roots | set(judge.folders) if root != "/")


def main() -> None:
    """Serves until the questions end."""
    questions, verdicts = sys.stdin.buffer, os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a scorer prints must not look like a verdict
    setup = read(questions)

    def say(**values: Any) -> None:
        verdicts.write(json.dumps(values) + "\n")
        verdicts.flush()

    try:
        judge = JUDGES[setup["judge"]](**setup["options"])
        say(ready=True, confined=confine(readable(judge), setup["memory"]))
    except BaseException:
        say(ready=False, failed=traceback.format_exc()[-TRACEBACK:])
        return
    while (question := read(questions)) is not None:
        signal.setitimer(signal.ITIMER_REAL, setup["seconds"] + 10)  # ends this process when nobody is left to do so
        say(**_answer(judge, question))
        signal.setitimer(signal.ITIMER_REAL, 0)


def _answer(judge: Judge, question: dict[str, Any]) -> dict[str, Any]:
    """{"reward"}; a scorer that raises on the answer is tried on the gold answer, and failed if it raises there too."""
    try:
        return {"reward": float(judge.score(question["answer"], question["gold"], question["problem"]))}
    except Exception:
        said = traceback.format_exc()[-TRACEBACK:]
    if judge.may_raise and question["gold"] is not None:
        try:
            judge.score(question["gold"], question["gold"], question["problem"])
            return {"reward": 0.0, "raised": said}
        except Exception:
            said = traceback.format_exc()[-TRACEBACK:]
    elif judge.may_raise:
        return {"reward": 0.0, "raised": said}
    return {"failed": said}


if __name__ == "__main__":
    main()
