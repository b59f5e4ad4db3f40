"""Trains online for so many minutes while everything around the trainer fails, then counts: `make soak`, MINUTES=30.

At tiny size, from a stand-in for a vLLM server. At random instants the server is started anew, does not answer, or answers
with errors; workers that score are killed; and now and then the trainer is killed, the ends of its files or its last
checkpoint are damaged, and the same command goes on. At the end the trainer is asked to stop. Then every step's
trajectories have to be there once, by their ids, and the trainer's resident memory has to be flat.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/support")]

from fake_vllm_server import StandIn  # noqa: E402
from killed_runs import config_file  # noqa: E402

from drift import store  # noqa: E402
from drift.config import load  # noqa: E402
from drift.model.policy import load_policy  # noqa: E402
from drift.training import checkpoint  # noqa: E402

PROMPTS, N, SAVE = 2, 4, 5
LIVES = 4  # of the trainer; all but the last end by SIGKILL
SETTLED = 15.0  # seconds of training after which memory should not grow any more
GROWTH = 0.05  # of resident memory, that the allocator may still take after that


class Trainer:
    """`drift run FILE` in a process, and its resident memory over time."""

    def __init__(self, file: Path, folder: Path) -> None:
        self.folder, self.log = folder, file.with_suffix(".log")
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests/support")])
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        self.output = self.log.open("ab")
        command = [sys.executable, "-m", "drift", "run", str(file)]
        self.process = subprocess.Popen(command, env=environment, stdout=self.output, stderr=subprocess.STDOUT)
        self.before = self.newest()
        self.began: float | None = None  # when the first checkpoint of its own was there
        self.memory: list[tuple[float, int]] = []  # seconds since then, bytes

    def look(self) -> None:
        """Notes the resident memory once it has done steps. Raises AssertionError when the trainer has ended."""
        assert self.process.poll() is None, self.log.read_text()[-3000:]
        if self.began is None and self.newest() not in (None, self.before):
            self.began = time.monotonic()
        if self.began is not None:
            pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
            self.memory.append((time.monotonic() - self.began, pages * os.sysconf("SC_PAGE_SIZE")))

    def newest(self) -> tuple[str, int] | None:
        """The checkpoint of the most steps, and when it was written."""
        try:
            path = checkpoint.found(self.folder / "checkpoints")[0]
            return path.name, path.stat().st_mtime_ns
        except (IndexError, OSError):
            return None

    def workers(self) -> list[int]:
        """The processes that score."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [pid for pid in map(int, children) if b"drift.scoring.worker" in _command(pid)]

    def end(self, number: int) -> int:
        """The exit status after this signal."""
        self.process.send_signal(number)
        status = self.process.wait(120)
        self.output.close()
        return status

    def growth(self) -> float | None:
        """Relative, from the first tenth after it has settled to the last; None if it did not live so long."""
        settled = [size for at, size in self.memory if at > SETTLED]
        tenth = len(settled) // 10
        if tenth < 3:
            return None
        return statistics.median(settled[-tenth:]) / statistics.median(settled[:tenth]) - 1


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def disturb(draw: random.Random, server: StandIn, trainer: Trainer, counts: Counter[str]) -> None:
    """One fault, by chance."""
    kind = draw.choice(["restart", "restart in a request", "drop", "error", "abort", "worker"])
    if kind == "restart":
        with server.computing:
            server.boot()
    elif kind == "worker":
        workers = trainer.workers()
        if not workers:
            return
        os.kill(draw.choice(workers), signal.SIGKILL)
    else:
        server.faults.append({"restart in a request": "restart", "error": 503}.get(kind, kind))
    counts[kind] += 1


def rot(draw: random.Random, run: Path, folder: Path, counts: Counter[str]) -> None:
    """What a power loss leaves: torn and NUL ends of files of rows, and now and then a damaged checkpoint."""
    for path in (folder / "rollouts.jsonl", folder / "examples.jsonl", run / "metrics.jsonl"):
        if path.exists():
            with path.open("ab") as file:
                file.write(draw.choice([b'{"prompt_id": "p', b"\0" * 300, b'{"step": 1, "x": [1, 2']))
            counts["torn file"] += 1
    kept = checkpoint.found(folder / "checkpoints")
    if len(kept) == checkpoint.KEPT and draw.random() < 0.7:
        path = kept[0] / draw.choice(
            ["model.safetensors", "optimizer.safetensors", "state.json", "teacher.safetensors"]
        )
        content = bytearray(path.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        counts["damaged checkpoint"] += 1


def settings(place: Path, url: str) -> Path:
    """The config: online training without an end, from the server, scored in workers."""
    sections = {
        "engine": {"kind": "vllm", "url": url, "wait": 60.0, "retries": 20},
        "online": {"algorithm": "drift", "steps": 1_000_000, "prompts": PROMPTS, "curriculum": {"warmup_steps": 5}},
        "train": {"lr": 1e-5, "batch_size": 4, "save_every": SAVE},
    }
    file = config_file(place, "online", **sections)
    made = json.loads(file.read_text())
    made["task"]["scorer"] = "soak_scorer:right"
    file.write_text(json.dumps(made))
    return file


def check_rows(path: Path, steps: int) -> int:
    """The number of trajectories; each step's are there once."""
    found = Counter((row["step"], row["prompt_id"], row["traj_idx"]) for row in store.read(path))
    doubled = [key for key, count in found.items() if count > 1]
    assert not doubled, f"doubled: {doubled[:5]}"
    each = Counter(step for step, _, _ in found)
    numbers = sorted(each)
    assert len(numbers) == steps, f"{len(numbers)} steps have rows, and the checkpoint has {steps}"
    assert numbers == list(range(numbers[0], numbers[0] + steps)), "steps without rows"
    assert set(each.values()) == {PROMPTS * N}, Counter(each.values())
    return sum(each.values())


def soak(minutes: float, seed: int, place: Path) -> dict[str, object]:
    """The figures. Raises AssertionError for what is not as promised."""
    draw, counts, lives = random.Random(seed), Counter[str](), []
    blank = load(settings(place, "http://127.0.0.1:1"), [])
    served = load_policy(blank.model, seed=1).model
    served.set_attn_implementation("sdpa")  # transformers' own, since nothing is packed
    with StandIn(served) as server:
        file, run = settings(place, server.url), place / "online"
        folder = run / "seed-0" / "drift"
        for life in range(LIVES):
            trainer, until = Trainer(file, folder), None
            while until is None or time.monotonic() < until:
                trainer.look()
                if until is None and trainer.began is not None:
                    until = time.monotonic() + 60 * minutes / LIVES
                if until is not None and draw.random() < 0.15:
                    disturb(draw, server, trainer, counts)
                time.sleep(0.25)
            last = life == LIVES - 1
            status = trainer.end(signal.SIGTERM if last else signal.SIGKILL)
            lives.append(trainer)
            if not last:
                server.faults.clear()  # a server that errs while it is connected to is refused
                counts["killed trainer"] += 1
                rot(draw, run, folder, counts)
        assert status == 128 + signal.SIGTERM, (status, trainer.log.read_text()[-3000:])
        kept = checkpoint.latest(folder / "checkpoints")
        assert kept is not None
        steps = int(kept.name.rpartition("-")[2])
        rows = check_rows(folder / "rollouts.jsonl", steps)
    assert "Traceback" not in trainer.log.read_text()
    growths = [round(grown, 4) for life in lives if (grown := life.growth()) is not None]
    assert all(grown < GROWTH for grown in growths), growths
    return {
        "minutes": minutes,
        "steps": steps,
        "trajectories": rows,
        "doubled": 0,
        "lost": 0,
        "faults": dict(counts),
        "resident MiB at the end": round(lives[-1].memory[-1][1] / 2**20),
        "growth of resident memory": growths,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Online training while servers, workers and the trainer itself fail.")
    parser.add_argument("minutes", nargs="?", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="drift-soak-") as temporary:
        print(json.dumps(soak(options.minutes, options.seed, Path(temporary)), indent=1))
