"""A tiny run in a process of its own that can be killed, limited or starved, and a comparison of two run folders."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from drift import cli
from drift.jobs import run as _  # noqa: F401  what a fork needs is imported once, here

TINY = {
    "seeds": [0],
    "model": {"hidden_size": 32, "layers": 1, "heads": 2},
    "warm_start": {
        "target_low": 0.1,
        "target_high": 0.99,
        "max_steps": 200,
        "check_every": 10,
        "check_problems": 20,
        "batch_size": 16,
        "lr": 1e-2,
    },
    "rollout": {"n": 4, "turns": 2, "max_new_tokens": 6, "batch_size": 8},
    "train": {"lr": 5e-4, "schedule": "linear", "batch_size": 4, "save_every": 1},
    "eval": {"turns": 2, "max_new_tokens": 6},
    "track": {"progress": False},
}
ONLINE = {"algorithm": "drift", "steps": 6, "prompts": 2, "curriculum": {"warmup_steps": 1, "transition_steps": 2}}
CONFIGS = {
    "offline": {"arms": ["uniform", "drift"]},
    "online": {"online": ONLINE},
    "ahead": {"online": {**ONLINE, "ahead": True}},
}
FREE = {"config.yaml", "metrics.jsonl", "seconds.json", "summary.json", "report.html", ".lock"}  # hold times or names
TIMES = ("time", "seconds", "tokens_per", "memory", "tokens_per_second")


def config_file(folder: Path, kind: str, **sections) -> Path:
    """A config of this kind whose runs go to `folder`/NAME."""
    folder.mkdir(parents=True, exist_ok=True)
    # which quarter a last digit lies in: learnt, by halves, within 20 steps
    splits = ("warm", "train", "eval")
    rows = [{"prompt": f"Say {n}", "answer": str(n % 10 // 3), "split": splits[n // 100]} for n in range(300)]
    problems = folder / "digits.jsonl"
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = {"warm_problems": 60, "train_problems": 4, "eval_problems": 8}
    task = {"kind": "jsonl", "path": str(problems), **sizes}
    settings = {"name": kind, "output_dir": str(folder), "task": task, **TINY, **CONFIGS[kind], **sections}
    path = folder / f"{kind}.yaml"
    path.write_text(json.dumps(settings))
    return path


class Life:
    """`drift run FILE` in a fork; its output is in `log`."""

    def __init__(self, file: Path, *overrides: str, before: Callable[[], object] | None = None) -> None:
        self.log = file.with_suffix(".log")
        self.pid = os.fork()
        if self.pid:
            return
        code = 99
        try:
            descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.stdout, sys.stderr = (os.fdopen(fd, "w", closefd=False) for fd in (1, 2))
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if before:
                before()
            code = cli.main(["run", str(file), *overrides])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def wait(self, until: Callable[[], bool] | None = None, seconds: float = 600.0) -> int | None:
        """The exit status; None once `until` holds. An endless run is killed, and fails the test."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if until is not None and until():
                return None
            time.sleep(0.002)
        self.kill()
        raise AssertionError(f"the run did not end within {seconds:g} s: {self.said()[-500:]}")

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def said(self) -> str:
        return self.log.read_text(errors="replace")


def differences(folder: Path, reference: Path) -> dict[str, object]:
    """How a finished run's folder differs from another's, times and names apart; empty for none."""
    here, there = _hashes(folder), _hashes(reference)
    alike = here.keys() & there.keys() - FREE  # examples.jsonl holds repeated steps twice
    found: dict[str, object] = {
        "files": sorted(here.keys() ^ there.keys()),
        "bytes": sorted(name for name in alike if here[name] != there[name] and not name.endswith("examples.jsonl")),
    }
    ours, theirs = (json.loads((f / "summary.json").read_text())["results"] for f in (folder, reference))
    found["results"] = [] if ours == theirs else [ours, theirs]
    measured, expected = _metrics(folder), _metrics(reference)
    found["metrics"] = sorted(str(k) for k in measured.keys() | expected.keys() if measured.get(k) != expected.get(k))
    return {name: value for name, value in found.items() if value}


def _hashes(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _metrics(folder: Path) -> dict[tuple, dict]:
    """The last line of each step and kind counts."""
    last = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        kept = {key: value for key, value in row.items() if not any(word in key for word in TIMES)}
        last[(row["step"], *sorted(kept))] = kept
    return last
