"""One case on one machine: right first, then memory, then interleaved rounds. Runs in a process that may die (`supervise`).

Round by round everyone runs once, in an order that rotates, after a warm-up on a tiny problem and the run that the gate
checked. Times are medians over rounds; ratios, medians over pairs of one round.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch

from bench import roofline, verify
from bench.cases import TOP_K, Case, Problem, Shares, make
from bench.gpu.machine import Machine
from bench.gpu.peers import contenders
from bench.measure import Entry, GemmLimit, paired
from bench.peers import Contender, Loss
from drift_kernels.calls import Call
from drift_kernels.gpu_sweep import workspace_of

CHUNKS = (1024, 2048, 4096, 8192)  # rows of the bare GEMMs; the limit is the fastest of these
SECONDS = 20.0  # of rounds in a case; after the third one, no further round begins beyond it

_DENSE = Case("dense-8192x4096x151936", "mean", 8, 1024, 151_936, torch.bfloat16, D=4096)
CASES = {
    case.name: case
    for case in (
        _DENSE,
        replace(_DENSE, name="dense-4096x4096x128256", segments=4, V=128_256),
        replace(_DENSE, name="dense-8192x2304x256000", V=256_000, D=2304),
        replace(_DENSE, name="ppo-32768x2048x151936", loss="clip", segments=32, D=2048, mask="share", share=0.3, noise=0.3),
        replace(_DENSE, name="score-8192x4096x151936", loss="score"),
        replace(_DENSE, name="jsd-4096x4096x128256", loss="jsd", segments=4, V=128_256),
        replace(_DENSE, name="jsd-top-4096x4096x128256", loss="jsd-top", segments=4, V=128_256),
    )
}  # fmt: skip

Say = Callable[[str, str], None]  # (what is about to run, or has failed; why it has)


class BrokenError(RuntimeError):
    """The device does not answer any more: only a new process helps."""


def line(error: BaseException) -> str:
    """An error in one line of a table."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def run_case(case: Case, machine: Machine, skip: dict[str, str], rounds: int, say: Say, only: tuple[str, ...]) -> dict:
    """Everyone's line, as plain data. `skip` has reasons of those not to run, `only` the names of those asked for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other projects' deprecations are no result
        return _run_case(case, machine, skip, rounds, say, only)


def _run_case(case: Case, machine: Machine, skip: dict[str, str], rounds: int, say: Say, only: tuple[str, ...]) -> dict:
    say("float64", "")
    problem, tiny = (make(c, device=machine.device) for c in (case, small(case, machine)))
    shares, truth = problem.shares(), verify.exact(problem)
    say("torch", "")
    plain = verify.own(problem)
    if not verify.sane(plain, truth):
        raise RuntimeError("plain torch is itself far from float64, so nothing can be judged")
    say("bare GEMMs", "")
    limit = GemmLimit(problem, shares, case.dtype, CHUNKS, lambda work: machine.seconds(work, best_of=2))
    entries, runners = [], []
    for contender in contenders(machine.backends, case):
        if only and contender.name not in only:
            continue
        say(contender.name, "")
        entry = Entry(contender.name, contender.title)
        entries.append(entry)
        loss = _admitted(entry, contender, problem, tiny, plain, truth, skip, machine, say)
        if loss is not None:
            # without a backward pass nobody makes anything twice
            entry.units = case.units if case.loss == "score" else contender.units(case, shares)
            runners.append((entry, loss))
    _rounds(problem, limit, runners, rounds, machine, say)
    return _summary(case, shares, limit, entries, machine)


def small(case: Case, machine: Machine) -> Case:
    """A problem of the same kind that compiles what wants compiling."""
    return case.shrunk() if machine.dry else case.shrunk(length=128, V=1024, D=256)


def _admitted(
    entry: Entry,
    contender: Contender,
    problem: Problem,
    tiny: Problem,
    plain: verify.Result,
    truth: verify.Result,
    skip: dict[str, str],
    machine: Machine,
    say: Say,
) -> Loss | None:
    """The loss of a contender who is there and right, its peak memory noted; else None, with the reason in its entry."""
    case, ours = problem.case, entry.name.startswith("drift-")
    why = skip.get(entry.name) or (machine.reason(entry.name.removeprefix("drift-")) if ours else None)
    if reason := contender.refuses(case) or why:
        entry.fail(reason, "failed" if entry.name in skip else "refused" if why is None else "unavailable")
        return None
    machine.meter.reset()  # gives back what others have left
    try:
        loss = contender.load()
        verify.step(tiny, loss)
        out = verify.step(problem, loss)
        passed, errors = verify.check(
            verify.result(problem, out), plain, truth, case.dtype, 1.0 if ours else verify.HALF_SLACK
        )
        if not passed:
            entry.fail(f"wrong: {errors}")
            return None
        problem.hidden.grad = problem.weight.grad = out = None
        machine.meter.reset()
        verify.step(problem, loss)
        entry.peak_bytes = machine.meter.peak()
    except ModuleNotFoundError as error:
        entry.fail(f"not installed: {error}", "unavailable")
        return None
    except Exception as error:  # whatever a foreign package throws
        _failed(entry, error, machine, say)
        return None
    finally:
        problem.hidden.grad = problem.weight.grad = None
    return loss


def _failed(entry: Entry, error: Exception, machine: Machine, say: Say) -> None:
    """No time for this one; BrokenError if nobody after it would get any."""
    entry.fail(line(error))
    if not machine.healthy():
        say(entry.name, entry.reason)
        raise BrokenError(entry.reason) from error


def _rounds(
    problem: Problem, limit: GemmLimit, runners: list[tuple[Entry, Loss]], rounds: int, machine: Machine, say: Say
) -> None:
    began = time.monotonic()
    for number in range(rounds):
        if number > 2 and time.monotonic() - began > SECONDS:
            break
        limit.times[number] = limit.run()
        turn = number % max(len(runners), 1)
        for entry, loss in runners[turn:] + runners[:turn]:
            say(entry.name, "")
            problem.hidden.grad = problem.weight.grad = None
            try:
                entry.times[number] = machine.seconds(lambda loss=loss: verify.step(problem, loss))
            except Exception as error:
                _failed(entry, error, machine, say)
        runners = [runner for runner in runners if runner[0].status == "ok"]
    problem.hidden.grad = problem.weight.grad = None


def predicted(case: Case, shares: Shares, machine: Machine, role: str) -> float | None:
    """Seconds by the roofline; None for a GPU whose peaks are not known."""
    if machine.peaks is None:
        return None
    workspace = workspace_of(Call(), torch.device(machine.device))
    cuda, shape = role == "cuda", (round(shares.read * case.T), case.D, case.V, workspace)
    twice = not (cuda and float(machine.facts.get("capability", 0)) >= 9)
    if case.loss == "score":
        stages = roofline.scoring(*shape)["staged" if cuda else "score kernel"]
    elif case.loss == "jsd":
        stages = roofline.distillation(*shape, twice=twice)
    elif case.loss == "jsd-top":
        stages = roofline.stored(*shape, TOP_K)
    else:
        stages = roofline.training(*shape, twice)
    return sum(stage.seconds(machine.peaks) for stage in stages)


def _summary(case: Case, shares: Shares, limit: GemmLimit, entries: list[Entry], machine: Machine) -> dict[str, Any]:
    flops = case.units * round(shares.trained * case.T) * case.V * case.D
    ours = {entry.name.removeprefix("drift-") for entry in entries if entry.name.startswith("drift-")}

    def row(entry: Entry) -> dict[str, Any]:
        seconds = statistics.median(entry.times.values()) if entry.times else None
        return {
            **asdict(entry),
            "seconds": seconds,
            "tflops": None if seconds is None else flops / seconds / 1e12,
            "over_gemms": paired(entry.times, limit.times),
        }

    return {
        "name": case.name,
        "loss": case.loss,
        "dtype": str(case.dtype).removeprefix("torch."),
        "shape": {"T": case.T, "D": case.D, "V": case.V},
        "shares": asdict(shares),
        "flops": flops,
        "gradient_bytes": 0 if case.loss == "score" else (case.T + case.V) * case.D * case.dtype.itemsize,
        "gemms": {"chunk": limit.chunk, "times": limit.times, "seconds": statistics.median(limit.times.values())},
        "predicted": {role: predicted(case, shares, machine, role) for role in sorted(ours)},
        "contenders": [row(entry) for entry in entries],
    }
