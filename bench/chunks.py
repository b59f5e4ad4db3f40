"""`python -m bench.chunks`: the constant of the chunk-size model in `drift_kernels/plan.py`, measured on this machine.

A loss over n rows in k chunks does the same products for every k. What grows with k is what each chunk costs by itself: fetching
and storing dweight [V, D] once more, packing the weight, and the ramp of three products, together α·V·D seconds. What shrinks
with k is the logits buffer of n/k rows, whose pages the system has to clear and map when it is first made: f seconds a byte.
k·α·V·D + f·4·V·n/k is least for chunks of √(κ·n·D) rows, κ = α / 4f: V drops out.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

from drift_kernels import products

D, V, ROWS = 512, 65_536, 1_024
PIECES = (1, 2, 4, 8)
ROUNDS = 5
BYTES = 256 << 20


def seconds(run: Callable[[], object]) -> float:
    """Of one call."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def chunk_cost() -> float:
    """α: seconds that each further chunk costs, over V·D; the least-squares slope of time against the number of chunks."""
    hidden, weight = torch.randn(ROWS, D), torch.randn(V, D)
    logits, dhidden, dweight = torch.randn(ROWS, V), torch.empty(ROWS, D), torch.zeros(V, D)
    by = products.choose(hidden, weight, torch.float32, BYTES)
    by.reserve(ROWS)

    def sweep(pieces: int) -> None:
        for i in range(pieces):
            part = slice(ROWS * i // pieces, ROWS * (i + 1) // pieces)
            by.logits(hidden[part], logits[part])
            by.dhidden(logits[part], dhidden[part])
            by.dweight(logits[part], hidden[part], dweight, None, accumulate=i > 0, scale=1.0)

    times = [median(seconds(lambda k=k: sweep(k)) for _ in range(ROUNDS)) for k in PIECES]
    mean_k, mean_t = sum(PIECES) / len(PIECES), sum(times) / len(times)
    slope = sum((k - mean_k) * (t - mean_t) for k, t in zip(PIECES, times)) / sum((k - mean_k) ** 2 for k in PIECES)
    return slope / (V * D)


def touch_cost() -> float:
    """f: seconds a byte of memory costs the first time it is written, over what it costs the second time."""
    found = []
    for _ in range(ROUNDS):
        block = torch.empty(BYTES, dtype=torch.uint8)
        first, second = seconds(block.zero_), seconds(block.zero_)
        found.append((first - second) / BYTES)
        del block
    return median(found)


def main() -> None:
    """Prints α, f and κ."""
    alpha, f = chunk_cost(), touch_cost()
    print(f"a chunk costs {alpha * 1e9:.3f} ns for each element of dweight, a byte first written {f * 1e9:.3f} ns")
    print(
        f"kappa = {alpha / (4 * f):.2f}; for 1,024 rows of 896: chunks of {(alpha / (4 * f) * 1024 * 896) ** 0.5:,.0f}"
    )


if __name__ == "__main__":
    main()
