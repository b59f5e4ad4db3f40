"""Times contenders and the bare GEMMs of a case, interleaved in one process; nobody is timed who failed the gate.

A round runs everyone once, so a ratio pairs times taken within seconds of each other, and its median over rounds bears a
machine whose speed drifts. Round 0 is the run that the gate checked. It is the first of its size, so memory is taken that
later ones find there: it counts only for those who are run once.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from bench import verify
from bench.cases import Case, Problem, Shares, make
from bench.peers import Contender, Loss

CHUNKS = (128, 256, 512, 1024)  # rows; the limit is the fastest of these
SLOW = 2.0  # times the fastest: after two rounds, those slower than this are not run again
SECONDS = 30.0  # of rounds in a case; after the second one, no further round begins beyond it
OURS = "drift"

Report = Callable[[str], None]


@dataclass
class Entry:
    """A contender's row."""

    name: str
    title: str
    units: float | None = None
    status: str = "ok"  # or "unavailable", "refused" (not for this case), "failed" (an error, or outside the budget)
    reason: str = ""
    once: bool = False
    times: dict[int, float] = field(default_factory=dict)  # by round, seconds
    peak_bytes: int | None = None

    @property
    def best(self) -> float | None:
        """Fastest round that counts."""
        return min(counted(self.times).values(), default=None)

    def fail(self, reason: str, status: str = "failed") -> None:
        """No time for this one."""
        self.status, self.reason, self.times = status, reason, {}


def counted(times: dict[int, float]) -> dict[int, float]:
    """Without round 0 if there are others."""
    return {number: seconds for number, seconds in times.items() if number} or times


def wall(work: Callable[[], None]) -> float:
    """Seconds that `work` takes by the wall clock."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


class GemmLimit:
    """The case's GEMMs alone: logits of the a·T rows read (a teacher's too, where it has a head), dhidden and dweight of the
    a′·T live ones, into ready buffers."""

    def __init__(
        self,
        problem: Problem,
        shares: Shares,
        dtype: torch.dtype,
        chunks: Sequence[int] = CHUNKS,
        timed: Callable[[Callable[[], None]], float] = wall,
    ) -> None:
        case, self.timed = problem.case, timed
        self.title = f"GEMMs, {'fp32' if dtype == torch.float32 else 'bf16'}"
        self.read, self.live = round(shares.read * case.T), round(shares.live * case.T)
        self.hidden = problem.hidden.detach()[: self.read].to(dtype)
        self.weight = problem.weight.detach().to(dtype)
        heads = problem.teacher if case.loss == "jsd" else None
        self.teacher = heads and (heads[0].to(dtype), heads[1].to(dtype))
        self.dweight = torch.zeros_like(self.weight)
        largest = min(max(chunks), self.read)
        self.logits = self.weight.new_zeros(largest, case.V)
        self.dhidden = self.weight.new_zeros(largest, case.D)
        self.times: dict[int, float] = {}
        sizes = sorted({min(chunk, self.read) for chunk in chunks})
        self.chunk = min(sizes, key=self.run) if sizes else 0

    def run(self, chunk: int | None = None) -> float:
        """Seconds of one sweep in chunks of about `chunk` rows, all equally long."""
        return self.timed(lambda: self.sweep(chunk or self.chunk))

    def sweep(self, chunk: int) -> None:
        """The products themselves."""
        pieces = -(-self.read // max(chunk, 1))
        for i in range(pieces):
            first, last = (self.read * k // pieces for k in (i, i + 1))
            alive = self.live * (i + 1) // pieces - self.live * i // pieces
            logits = self.logits[: last - first]
            if self.teacher is not None:
                torch.mm(self.teacher[0][first:last], self.teacher[1].t(), out=logits)
            torch.mm(self.hidden[first:last], self.weight.t(), out=logits)
            if not self.live:
                continue
            torch.mm(logits[:alive], self.weight, out=self.dhidden[:alive])
            rows = self.hidden[first : first + alive]
            torch.addmm(self.dweight, logits[:alive].t(), rows, beta=int(i > 0), out=self.dweight)


def _timed(problem: Problem, loss: Loss) -> tuple[float, torch.Tensor]:
    problem.hidden.grad = problem.weight.grad = None
    began = time.perf_counter()
    out = verify.step(problem, loss)
    return time.perf_counter() - began, out


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _enter(contender: Contender, case: Case, tiny: Problem) -> tuple[Entry, Loss | None]:
    """Its row, and its loss if it is there and runs on a tiny problem (which also compiles what wants compiling)."""
    entry = Entry(contender.name, contender.title, once=contender.once)
    if reason := contender.refuses(case):
        entry.fail(reason, "refused")
        return entry, None
    try:
        loss = contender.load()
    except Exception as error:  # whatever a foreign package throws at import
        entry.fail(f"not installed: {error}" if isinstance(error, ModuleNotFoundError) else _line(error), "unavailable")
        return entry, None
    try:
        verify.step(tiny, loss)
    except Exception as error:
        entry.fail(_line(error))
        return entry, None
    return entry, loss


def _gate(entry: Entry, problem: Problem, loss: Loss, plain: verify.Result, truth: verify.Result) -> None:
    """Round 0: timed, and kept only if loss and gradients are right."""
    half = problem.case.dtype != torch.float32 and entry.name != OURS
    try:
        seconds, out = _timed(problem, loss)
        passed, why = verify.check(
            verify.result(problem, out), plain, truth, problem.case.dtype, verify.HALF_SLACK if half else 1.0
        )
    except Exception as error:
        entry.fail(_line(error))
        return
    if passed:
        entry.times[0] = seconds
    else:
        entry.fail(f"wrong: {why}")


def run_case(
    case: Case,
    contenders: Sequence[Contender],
    rounds: int,
    report: Report = lambda text: None,
    *,
    half_limit: bool = True,
) -> dict:
    """Gate and timings of one case, as plain data (see docs/benchmarks.md); at most `rounds` rounds after the gate's.

    `half_limit`: a bf16 case has a limit of torch's bf16 products too. They take seconds each where they are emulated.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other projects' deprecations are no result
        return _run_case(case, contenders, rounds, report, half_limit)


def _run_case(case: Case, contenders: Sequence[Contender], rounds: int, report: Report, half_limit: bool) -> dict:
    report("reference in float64")
    problem, tiny = make(case), make(case.shrunk())
    shares = problem.shares()
    truth, plain = verify.exact(problem), verify.own(problem)
    if not verify.sane(plain, truth):
        raise RuntimeError(f"{case.name}: plain torch is itself far from float64, so nothing can be judged")
    report("bare GEMMs")
    dtypes = dict.fromkeys((torch.float32, case.dtype if half_limit else torch.float32))
    limits = [GemmLimit(problem, shares, dtype) for dtype in dtypes]
    runners: list[tuple[Entry, Loss]] = []
    entries = []
    for contender in contenders:
        report(f"round 0: {contender.title}")
        entry, loss = _enter(contender, case, tiny)
        entries.append(entry)
        if loss is None:
            continue
        entry.units = contender.units(case, shares)
        _gate(entry, problem, loss, plain, truth)
        if entry.status == "ok":
            runners.append((entry, loss))
    for limit in limits:
        limit.times[0] = limit.run()
    _rounds(problem, limits, runners, rounds, report)
    return _summary(case, shares, limits, entries)


def _rounds(
    problem: Problem, limits: list[GemmLimit], runners: list[tuple[Entry, Loss]], rounds: int, report: Report
) -> None:
    began = time.perf_counter()
    for number in range(1, rounds + 1):
        if number > 2 and time.perf_counter() - began > SECONDS:
            break
        for limit in limits:
            limit.times[number] = limit.run()
        bound = SLOW * min((entry.best or 0.0 for entry, _ in runners), default=0.0)
        fast = [
            (entry, loss)
            for entry, loss in runners
            if entry.name == OURS or (not entry.once if number <= 2 else (entry.best or 0.0) <= bound)
        ]
        turn = number % max(len(fast), 1)
        for entry, loss in fast[turn:] + fast[:turn]:
            report(f"round {number}: {entry.title}")
            entry.times[number], _ = _timed(problem, loss)
    problem.hidden.grad = problem.weight.grad = None


def paired(upper: dict[int, float], lower: dict[int, float]) -> float | None:
    """Median over the rounds that both ran of upper/lower."""
    ratios = [upper[number] / lower[number] for number in upper if number in lower]
    return statistics.median(ratios) if ratios else None


def _summary(case: Case, shares: Shares, limits: list[GemmLimit], entries: list[Entry]) -> dict[str, Any]:
    ok = [entry for entry in entries if entry.status == "ok"]
    peers = [entry for entry in ok if entry.name != OURS]
    ours = next((entry for entry in ok if entry.name == OURS), None)
    fastest = min(peers, key=lambda entry: entry.best or 0.0, default=None)
    our_times = {} if ours is None else ours.times
    item = case.dtype.itemsize
    return {
        "name": case.name,
        "loss": case.loss,
        "dtype": str(case.dtype).removeprefix("torch."),
        "shape": {"T": case.T, "D": case.D, "V": case.V},
        "shares": asdict(shares),
        "limit_units": 2 * shares.read + 4 * shares.live,
        "gradient_bytes": (case.T + case.V) * case.D * item,
        "limits": [
            {
                "title": limit.title,
                "chunk": limit.chunk,
                "times": limit.times,
                "seconds": min(counted(limit.times).values()),
            }
            for limit in limits
        ],
        "contenders": [
            {
                **asdict(entry),
                "seconds": entry.best,
                "over_limits": [paired(counted(entry.times), limit.times) for limit in limits],
                "over_drift": paired(counted(entry.times), our_times),
            }
            for entry in entries
        ],
        "fastest_peer": None if fastest is None else fastest.name,
        "speedup": None if fastest is None else paired(counted(fastest.times), our_times),
    }
