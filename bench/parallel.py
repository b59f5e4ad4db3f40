"""`python -m bench.parallel`: a head sharded over ranks, gathered as FSDP does it, against `GatherHidden`; over gloo on a CPU.

Each rank has rows of its own, R of all ranks together count, from 1 % to 100 % of the vocabulary V. One step is loss and
gradients of weighted cross-entropy. FSDP's way gathers the weight before and reduce-scatters its gradient after; the other
gathers the counted rows. Printed: seconds and bytes that a rank receives, counted at the collectives, with the formula's.

    python -m bench.parallel --ranks 2 --vocabulary 32768 --width 256 --rounds 3
    python -m bench.parallel --smoke               # seconds, tiny sizes: does it run here
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import drift_kernels as dk

SHARES = (0.01, 0.03, 0.1, 0.3, 0.6, 1.0)  # of counted rows in V
BYTES = 4  # of an element: all is fp32
STATISTICS, PER_ROW = (
    24,
    8 + BYTES,
)  # bytes a row: of a rank's statistics; of what travels with a hidden row (target, weight)


@dataclass(frozen=True)
class Sizes:
    """Of one run."""

    ranks: int
    vocabulary: int
    width: int
    rounds: int


def fsdp_bytes(s: Sizes) -> float:
    """That a rank receives: the weight's other shares, and the others' gradients of the own share."""
    return 2 * (s.ranks - 1) / s.ranks * s.vocabulary * s.width * BYTES


def gather_bytes(s: Sizes, rows: float) -> float:
    """That a rank receives for `rows` counted rows of all ranks, evenly spread."""
    moved = (s.ranks - 1) / s.ranks * (2 * s.width * BYTES + PER_ROW)
    return rows * (moved + (s.ranks - 1) * STATISTICS)


def crossover(s: Sizes) -> float:
    """The number of counted rows at which both receive the same."""
    return fsdp_bytes(s) / gather_bytes(s, 1.0)


class Received:
    """Counts the bytes that a rank receives from others in the collectives that are used here."""

    def __init__(self) -> None:
        self.bytes, self.plain = 0, {name: getattr(dist, name) for name in ("all_gather", "all_to_all_single")}

    def __enter__(self) -> Received:
        def all_gather(parts: list[Tensor], own: Tensor, **options: Any) -> object:
            self.bytes += sum(part.nbytes for part in parts) - own.nbytes
            return self.plain["all_gather"](parts, own, **options)

        def all_to_all_single(received: Tensor, *args: Any, **options: Any) -> object:
            n = dist.get_world_size()
            self.bytes += received.nbytes * (n - 1) // n
            return self.plain["all_to_all_single"](received, *args, **options)

        dist.all_gather, dist.all_to_all_single = all_gather, all_to_all_single  # pyright: ignore[reportAttributeAccessIssue]
        return self

    def __exit__(self, *_: object) -> None:
        for name, function in self.plain.items():
            setattr(dist, name, function)


def fsdp_step(hidden: Tensor, targets: Tensor, shard: Tensor, counted: float) -> None:
    """The whole weight, gathered; its gradient, reduced to the own share."""
    parts = [torch.empty_like(shard) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, shard)
    weight = torch.cat(parts).requires_grad_()
    dk.weighted_cross_entropy(hidden.requires_grad_(), weight, targets, normalizer=counted).loss.backward()
    assert weight.grad is not None
    received = torch.empty_like(weight)
    dist.all_to_all_single(received, weight.grad)
    received.reshape(len(parts), *shard.shape).sum(0)


def gather_step(hidden: Tensor, targets: Tensor, shard: Tensor, counted: float) -> None:
    """The rows that count, gathered; dhidden, reduced to the own rows."""
    rank, n = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD
    parallel = dk.GatherHidden(group, rank * shard.shape[0], n * shard.shape[0])
    head = dk.Head(shard.requires_grad_(), parallel=parallel)
    dk.weighted_cross_entropy(hidden.requires_grad_(), head, targets, normalizer=counted).loss.backward()


def timed(step: Callable[..., None], rounds: int, *args: Any) -> tuple[float, int]:
    """Median seconds of the slowest rank, and bytes received in one step."""
    with Received() as received:
        step(*(a.clone() if isinstance(a, Tensor) else a for a in args))
    seconds = []
    for _ in range(rounds):
        own = [a.clone() if isinstance(a, Tensor) else a for a in args]
        dist.barrier()
        began = time.perf_counter()
        step(*own)
        dist.barrier()
        seconds.append(time.perf_counter() - began)
    return median(seconds), received.bytes


def rank_main(rank: int, s: Sizes, store: str, out: Any) -> None:
    """One rank's part; rank 0 puts the rows of the table into `out`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=s.ranks)
    drawn = torch.Generator().manual_seed(rank)
    shard = torch.randn(s.vocabulary // s.ranks, s.width, generator=drawn) / s.width**0.5
    for share in SHARES:
        rows = max(1, round(share * s.vocabulary / s.ranks))
        hidden = torch.randn(rows, s.width, generator=drawn)
        targets = torch.randint(0, s.vocabulary, (rows,), generator=drawn)
        args = (hidden, targets, shard, float(rows * s.ranks))
        found = [timed(step, s.rounds, *args) for step in (fsdp_step, gather_step)]
        if rank == 0:
            out.put((rows * s.ranks, *found[0], *found[1]))
    dist.barrier()
    dist.destroy_process_group()


def meets(points: list[tuple[float, float]]) -> float | None:
    """Where the ratio of (rows, ratio) points passes 1, by interpolation; None if it does not."""
    for (a, x), (b, y) in pairwise(points):
        if (x - 1) * (y - 1) <= 0 and x != y:
            return a + (b - a) * (1 - x) / (y - x)
    return None


def measure(s: Sizes) -> list[tuple]:
    """(counted rows, FSDP's seconds and bytes, the other's) for each of SHARES."""
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        args = (s, str(Path(folder) / "store"), out)
        ranks = [context.Process(target=rank_main, args=(rank, *args)) for rank in range(s.ranks)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            raise RuntimeError("a rank failed; what it said is above")
        return [out.get() for _ in SHARES]


def table(s: Sizes, found: list[tuple]) -> str:
    """As text, with the crossover under it."""
    lines = [
        f"{s.ranks} ranks, V = {s.vocabulary}, D = {s.width}, fp32, gloo; bytes that a rank receives in one step",
        "| counted rows | of V | FSDP s | GatherHidden s | FSDP MB | formula | GatherHidden MB | formula |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for rows, seconds, moved, own_seconds, own_moved in found:
        numbers = (moved, fsdp_bytes(s), own_moved, gather_bytes(s, rows))
        megabytes = " | ".join(f"{number / 1e6:.3f}" for number in numbers)
        lines.append(f"| {rows} | {rows / s.vocabulary:.0%} | {seconds:.4f} | {own_seconds:.4f} | {megabytes} |")
    by_bytes = meets([(rows, own / moved) for rows, _, moved, _, own in found])
    by_time = meets([(rows, own / seconds) for rows, seconds, _, own, _ in found])
    places = (by_bytes, crossover(s), by_time)
    said = ["no number of" if at is None else f"{at / s.vocabulary:.2f} V" for at in places]
    lines.append(
        f"\nSame bytes at {said[0]} counted rows (formula: {crossover(s) / s.vocabulary:.2f} V); same time at {said[1]}."
    )
    return "\n".join(lines)


def main() -> None:
    """Parses the command line, measures, prints."""
    parser = argparse.ArgumentParser(prog="python -m bench.parallel", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=32_768, help="V, cut into equal shares")
    parser.add_argument("--width", type=int, default=256, help="D")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes")
    options = parser.parse_args()
    sizes = Sizes(options.ranks, options.vocabulary, options.width, options.rounds)
    if options.smoke:
        sizes = Sizes(options.ranks, 512, 16, 1)
    if sizes.vocabulary % sizes.ranks:
        parser.error(f"--vocabulary {sizes.vocabulary} must be a multiple of --ranks {sizes.ranks}")
    print(table(sizes, measure(sizes)))


if __name__ == "__main__":
    main()
