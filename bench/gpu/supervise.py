"""Tasks in a process that may die: of a peer's crash the GPU's context does not recover.

The worker says what it is about to do, one JSON line each. When it dies, falls silent or finds the GPU broken, what it was
doing is noted, and a new one goes on without that. A task is a case of `measure.CASES`, or "tuning".
"""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.gpu import measure, tune
from bench.gpu.machine import Machine

ROOT = Path(__file__).parent.parent.parent
TUNING = "tuning"
SILENCE = 120.0  # seconds without a line: compiling takes a minute, hanging takes forever
STEPS = ("float64", "torch", "bare GEMMs")  # that a case cannot do without


def work(machine: Machine, order: dict[str, Any], out: Callable[[dict], None]) -> int:
    """The worker: does the tasks of `order` and tells `out` about each step and each result. Returns its exit status."""
    for task in order["tasks"]:
        skip = order["skip"].get(task, {})

        def say(step: str, reason: str, task: str = task) -> None:
            out({"task": task, "step": step, "reason": reason})

        try:
            if task == TUNING:
                found = tune.try_all(machine, skip, say, order["until"])
            else:
                case = measure.CASES[task]
                case = case.shrunk() if machine.dry else case
                found = measure.run_case(case, machine, skip, order["rounds"], say, tuple(order["only"]))
        except measure.BrokenError:
            return 3
        except Exception as error:
            if not machine.healthy():
                return 3
            found = {"name": task, "reason": measure.line(error)}
        out({"task": task, "result": found})
    return 0


def supervise(
    order: dict[str, Any], worker: Sequence[str], seconds: float, report: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """Each task's result; of those that could not be had, {"name": …, "reason": …}. `worker` is its command, which the order
    follows.
    """
    results: dict[str, dict[str, Any]] = {}
    until = time.monotonic() + seconds
    order |= {"until": time.time() + seconds}
    while left := [task for task in order["tasks"] if task not in results]:
        if time.monotonic() >= until:
            results |= {task: {"name": task, "reason": "left out: the time was over"} for task in left}
            break
        task, step, reason, status = _watch(order | {"tasks": left}, worker, until, results, report)
        if all(task in results for task in left):
            break
        task = task if task in left and task not in results else next(name for name in left if name not in results)
        reason = reason or f"the process ended with status {status}, or was ended"
        report(f"{task}: {step or 'start'}: {reason}; going on without it")
        known = order["skip"].setdefault(task, {})
        if step in ("", *STEPS) or step in known:
            results[task] = {"name": task, "reason": f"{step or 'start'}: {reason}"}
        known[step] = reason
    return results


def _watch(
    order: dict[str, Any], worker: Sequence[str], until: float, results: dict[str, Any], report: Callable[[str], None]
) -> tuple[str, str, str, int]:
    """Runs a worker to its end; the last task, step and reason that it named, and its exit status."""
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"} | os.environ
    last: tuple[str, str, str] = ("", "", "")
    with subprocess.Popen(
        [*worker, json.dumps(order)], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    ) as process:
        assert process.stdout is not None
        watch = _timer(process, until)
        for text in process.stdout:
            if not text.startswith('{"task": '):
                continue  # what peers print
            watch.cancel()
            watch = _timer(process, until)
            said = json.loads(text)
            if "result" in said:
                results[said["task"]] = said["result"]
                last = ("", "", "")
            else:
                last = (said["task"], said["step"], said["reason"])
                report(f"{said['task']}: {said['step']} {said['reason']}".rstrip())
        watch.cancel()
        status = process.wait()
    return last[0], last[1], last[2], status


def _timer(process: subprocess.Popen, until: float) -> threading.Timer:
    timer = threading.Timer(max(0.0, min(SILENCE, until - time.monotonic())), process.kill)
    timer.daemon = True
    timer.start()
    return timer
