"""A handful of launch choices for the kernels of each backend, and the best of them as a file for DRIFT_TUNING.

A choice must give what the rule's gives before it is timed, and be 2 % faster to be written down. Tried at one size: a
block of 512 rows and 151,936 columns, as the chunk loop makes them; the scorer over 2,048 hidden rows of 4,096 in bf16.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.gpu.machine import Machine
from bench.gpu.measure import BrokenError, Say, line
from drift_kernels import PolicySpec
from drift_kernels.backends import cuda, tuning
from drift_kernels.backends.contract import BucketSlopes, Chunk, Coefs, TeacherChunk
from drift_kernels.calls import HeadOptions
from drift_kernels.formulas import Tokens
from drift_kernels.gpu_sweep import SCORED_ROWS, STAGED_ROWS, aligned

VOCABULARY, WIDTH, TOP_K = 151_936, 4096, 100
GAIN = 0.98  # of the rule's time, at most
REPEATS = 9
GROUP_SECONDS = 20.0  # that compiling and timing a group may take
Numbers = dict[str, Any]


@dataclass(frozen=True)
class Group:
    """Kernels that share their numbers: of "triton" each has its own, of "cuda" all but `fused_distill` have the same."""

    role: str
    kernels: tuple[str, ...]
    candidates: tuple[Numbers, ...]

    def setting(self, numbers: Numbers) -> dict[str, Numbers]:
        """As DRIFT_TUNING's file has it."""
        if self.role == "cuda":
            return {"cuda": {cuda.PAIR: numbers} if self.kernels == (cuda.PAIR,) else numbers}
        return {"triton": {kernel: numbers for kernel in self.kernels}}


ROW_KERNELS = ("row_stats", "grad_logits", "fused_policy")
BUCKET_KERNELS = ("top_k", "bucket_logprobs", "grad_buckets")
_BLOCKS = tuple({"block": b, "warps": w} for b, w in ((2048, 4), (4096, 16), (8192, 8), (8192, 16), (16_384, 16)))
_CLUSTERS = tuple(
    {"threads": t, "cluster": c, "on_chip": True} for t, c in ((512, 4), (512, 8), (256, 8), (256, 4), (128, 8))
)
_TWICE = tuple({"threads": t, "cluster": 1, "on_chip": False} for t in (256, 512))
_FEWER = tuple({"block": b, "warps": w} for b, w in ((2048, 4), (4096, 16), (8192, 16)))
_PAIRS = tuple({"block": b, "warps": w} for b, w in ((512, 4), (1024, 4), (2048, 8), (2048, 16)))
_PAIRS_ON_CHIP = tuple({"threads": t, "cluster": 8, "on_chip": True} for t in (128, 256))
_TILES = tuple(
    {"rows": r, "block": b, "depth": d, "warps": w, "stages": s}
    for r, b, d, w, s in ((128, 128, 64, 8, 4), (128, 256, 64, 8, 3))
)
GROUPS = (
    *(Group("triton", (kernel,), _BLOCKS) for kernel in ROW_KERNELS),
    Group("triton", ("fused_distill",), _PAIRS),
    *(Group("triton", (kernel,), _FEWER) for kernel in BUCKET_KERNELS),
    Group("triton", ("score",), _TILES),
    Group("cuda", ("fused_distill",), (*_PAIRS_ON_CHIP, *_TWICE)),
    Group("cuda", (*ROW_KERNELS, *BUCKET_KERNELS), (*_CLUSTERS, *_TWICE)),
)


@contextmanager
def launched_with(setting: dict[str, Numbers]) -> Iterator[None]:
    """Kernels are launched as a tuning file with `setting` says."""
    before = os.environ.get(tuning.VARIABLE)
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(setting, file)
        file.flush()
        os.environ[tuning.VARIABLE] = file.name
        _forget()
        try:
            yield
        finally:
            del os.environ[tuning.VARIABLE]
            if before is not None:
                os.environ[tuning.VARIABLE] = before
            _forget()


def _forget() -> None:
    tuning._read.cache_clear()
    cuda.choose.cache_clear()


class Rows:
    """A block of products, a teacher's beside it, with what the kernels read of them; and operands of the scorer's."""

    def __init__(self, machine: Machine, role: str) -> None:
        count, V, scored, D = (8, 515, 8, 32) if machine.dry else (STAGED_ROWS, VOCABULARY, SCORED_ROWS, WIDTH)
        device = torch.device(machine.device)
        g = torch.Generator(device).manual_seed(0)
        self.kernels = machine.kernels(role)
        self.logits = aligned(count, V, torch.float32, device).normal_(generator=g)
        self.out = aligned(count, V, torch.bfloat16, device)
        self.chunk = Chunk(torch.arange(count, device=device) % V, None, None, None, HeadOptions())
        self.ones = torch.ones(count, device=device)
        self.old = -12.0 * self.ones
        self.lse = self.logits.logsumexp(1)
        self.teacher = aligned(count, V, torch.float32, device).normal_(generator=g)
        self.teacher_lse = self.teacher.logsumexp(1)
        self.ids = self.teacher.topk(TOP_K).indices
        self.dlogprobs, self.rest = torch.ones_like(self.ids, dtype=torch.float32), -self.ones
        self.scored = Chunk(torch.arange(scored, device=device) % V, None, None, None, HeadOptions())
        self.hidden, self.weight = (torch.empty(n, D, dtype=torch.bfloat16, device=device) for n in (scored, V))
        self.hidden.normal_(generator=g)
        self.weight.normal_(0, D**-0.5, generator=g)

    def run(self, kernel: str) -> Tensor:
        """Launches `kernel`; returns where its result lies."""
        if kernel in ("score", "fused_distill", *BUCKET_KERNELS):
            return getattr(self, f"_{kernel}")()
        if kernel == "row_stats":
            return self.kernels.row_stats(self.logits, self.chunk, ("logprobs", "lse"))["lse"]
        if kernel == "grad_logits":
            self.kernels.grad_logits(self.logits, self.chunk, Coefs(self.lse, self.ones), raw=True, out=self.out)
        else:
            tokens = Tokens(self.ones, self.old, None, self.ones)
            self.kernels.fused_policy(self.logits, self.chunk, PolicySpec(), tokens, ("loss",), out=self.out)
        return self.out

    def _fused_distill(self) -> Tensor:
        teacher = TeacherChunk(self.teacher, self.chunk, self.teacher_lse)
        self.kernels.fused_distill(self.logits, self.chunk, Coefs(self.lse), teacher, self.ones, 0.5, out=self.out)
        return self.out

    def _top_k(self) -> Tensor:
        return self.kernels.top_k(self.logits, self.chunk, None, len(self.ids), TOP_K)

    def _bucket_logprobs(self) -> Tensor:
        logprobs, rest = self.kernels.bucket_logprobs(self.logits, self.chunk, None, self.lse, self.ids, True)
        return torch.cat((logprobs, rest[:, None]), 1)

    def _grad_buckets(self) -> Tensor:
        slopes = BucketSlopes(self.ids, self.dlogprobs, self.rest, self.ones)
        self.kernels.grad_buckets(self.logits, self.chunk, Coefs(self.lse), None, slopes, out=self.out)
        return self.out

    def _score(self) -> Tensor:
        """Both of its forms: Σe alone, and what entropies need besides."""
        self.kernels.score(self.hidden, self.weight, self.scored, ("logprobs",))
        found = self.kernels.score(self.hidden, self.weight, self.scored, ("logprobs", "entropy"))
        return torch.stack((found["logprobs"], found["entropy"]))


def try_all(machine: Machine, skip: dict[str, str], say: Say, until: float) -> dict[str, Any]:
    """{"file": what DRIFT_TUNING may name, "tried": one line each, "reasons": of backends that cannot run, and of kernels left
    out because `until`, as `time.time` has it, is near}."""
    reasons = {role: machine.reason(role) for role in machine.backends}
    tried, best = [], {}
    for group in GROUPS:
        if reasons[group.role]:
            continue
        if time.time() > until - GROUP_SECONDS:
            reasons[" ".join((group.role, *group.kernels))] = "left out: the time was over"
            continue
        rows, lines = Rows(machine, group.role), []
        for numbers in ({}, *group.candidates):
            name = " ".join((group.role, *group.kernels, json.dumps(numbers)))
            say(name, "")
            lines.append({"role": group.role, "kernels": group.kernels, "numbers": numbers})
            lines[-1] |= (
                {"seconds": None, "reason": skip[name]} if name in skip else _try(rows, group, numbers, machine)
            )
            if lines[-1]["reason"] and not machine.healthy():
                say(name, lines[-1]["reason"])
                raise BrokenError(lines[-1]["reason"])
        tried += lines
        timed = [found for found in lines if found["seconds"] is not None]
        fastest = min(timed, key=lambda found: found["seconds"], default=None)
        rule = lines[0]["seconds"]
        if fastest and fastest["numbers"] and rule is not None and fastest["seconds"] <= GAIN * rule:
            best.setdefault(group.role, {}).update(group.setting(fastest["numbers"])[group.role])
    return {"file": best, "tried": tried, "reasons": {role: why for role, why in reasons.items() if why}}


def _try(rows: Rows, group: Group, numbers: Numbers, machine: Machine) -> dict[str, Any]:
    """Median seconds of the group's kernels together, or the reason why there are none."""
    try:
        with launched_with({}):
            wanted = [rows.run(kernel).clone() for kernel in group.kernels]
        with launched_with(group.setting(numbers) if numbers else {}):
            for kernel, want in zip(group.kernels, wanted):
                rows.out.fill_(float("nan"))
                error = float((rows.run(kernel).float() - want.float()).abs().max() / want.float().abs().max())
                if not error <= (1e-2 if want.is_floating_point() else 0.0):  # a rounding to bf16; ids are the same
                    return {"seconds": None, "reason": f"wrong: {kernel} differs by {error:.1e}"}
            times = [sum(machine.seconds(lambda k=k: rows.run(k)) for k in group.kernels) for _ in range(REPEATS)]
    except Exception as error:
        return {"seconds": None, "reason": line(error)}
    return {"seconds": statistics.median(times), "reason": ""}


def save(found: dict[str, Any], path: Path) -> None:
    """Writes the file that DRIFT_TUNING may name."""
    path.write_text(json.dumps(found["file"], indent=1) + "\n")
