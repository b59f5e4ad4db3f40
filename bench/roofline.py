"""Bytes, FLOPs and the time that a GPU could do them in, counted on paper: `python -m bench.roofline`.

Predictions, not measurements: no GPU has run these kernels. A stage takes as long as its products at the share of the peak
that such products reach, or as its bytes at a share of the memory's bandwidth, whichever is longer; stages follow one
another, since they share both. Within a stage there are two bounds: products and bytes overlap wholly, or not at all.
"""

from __future__ import annotations

from dataclasses import dataclass

from drift_kernels.gpu_sweep import WORKSPACE_BYTES, capacity, flushes, padded, workspace_share

GEMM_SHARE = 0.73  # of the peak: 42 ms for the three products of 8192 × 4096 × 151,936, as TRL's maintainers publish
COPY_SHARE = 0.85  # of the peak: assumed


@dataclass(frozen=True)
class Peaks:
    """Of a GPU, by its data sheet: dense bf16 FLOP/s and bytes/s of its memory."""

    flops: float
    bytes: float


H100 = Peaks(989e12, 3.35e12)  # SXM
H200 = Peaks(989e12, 4.8e12)
B200 = Peaks(2250e12, 8.0e12)
KNOWN = {  # by what torch calls the device; the first whose words are all in the name
    "H100 PCIe": Peaks(756e12, 2.0e12),
    "H100": H100,
    "GH200": Peaks(989e12, 4.0e12),
    "H200": H200,
    "B200": B200,
    "A100 80GB PCIe": Peaks(312e12, 1.935e12),
    "A100 80GB": Peaks(312e12, 2.039e12),
    "A100": Peaks(312e12, 1.555e12),
}


def peaks_of(device: str) -> Peaks | None:
    """Of the device that torch calls `device`; None for one that is not known here."""
    named = device.replace("-", " ").split()
    return next((peaks for words, peaks in KNOWN.items() if set(words.split()) <= set(named)), None)


@dataclass(frozen=True)
class Stage:
    """One kind of kernel over all rows."""

    name: str
    flops: float
    bytes: float

    def limits(self, peaks: Peaks = H100) -> tuple[float, float]:
        """Seconds that its products and its bytes take at these shares of the peaks."""
        return self.flops / (peaks.flops * GEMM_SHARE), self.bytes / (peaks.bytes * COPY_SHARE)

    def seconds(self, peaks: Peaks = H100) -> float:
        """The longer of the two."""
        return max(self.limits(peaks))


def bounds(stages: list[Stage], peaks: Peaks) -> tuple[float, float]:
    """Seconds of the stages one after another, if products and bytes of each overlap wholly, and if not at all."""
    limits = [stage.limits(peaks) for stage in stages]
    return sum(map(max, limits)), sum(map(sum, limits))


def training(T: int, D: int, V: int, workspace: int, twice: bool = True) -> list[Stage]:
    """A loss with all its gradients over T rows that count, bf16, through `drift_kernels.gpu_sweep`; a kernel that keeps a
    row on chip does not read it `twice`."""
    staged, room = capacity(workspace, V, D, 2, True)
    width, blocks = padded(V), -(-T // staged)
    return [
        Stage("logits = h·Wᵀ, fp32 out", 2.0 * T * V * D, 4 * T * width + blocks * 2 * V * D),
        Stage(f"fused_policy: read {'twice' if twice else 'once'}, write bf16", 0, (4 + 4 * twice + 2) * T * width),
        *_gradients(T, D, V, staged, room),
    ]


def _gradients(T: int, D: int, V: int, staged: int, room: int) -> list[Stage]:
    """What follows the row kernels, by the rows of the block and of the buffer of gradients."""
    product, width, buffers = 2.0 * T * V * D, padded(V), flushes(T, staged, room)
    return [
        Stage("dh = dlogits·W", product, 2 * T * width + buffers * 2 * V * D + 4 * T * D),
        Stage("dW += dlogitsᵀ·h, fp32 sums", product, 2 * T * width + buffers * 8 * V * D - 4 * V * D),
        Stage("dW times the incoming gradient, to bf16", 0, 6 * V * D),
    ]


def distillation(T: int, D: int, V: int, workspace: int, k: int | None = None, twice: bool = True) -> list[Stage]:
    """A divergence from a teacher of the student's size with all gradients, over the vocabulary or, by Triton, the student's
    top `k`; a kernel that keeps a pair of rows on chip does not read it `twice`."""
    width, weight, product = padded(V), 2 * V * D, 2.0 * T * V * D
    staged, room = capacity(workspace, V, D, 2, True, 4 * width + 2 * D)
    blocks = -(-T // staged)
    logits = Stage("logits = h·Wᵀ, fp32 out, student and teacher", 2 * product, 2 * (4 * T * width + blocks * weight))
    stats = Stage("row_stats of both: read once", 0, 8 * T * width)
    if k is None:
        often = "twice" if twice else "once"
        middle = [Stage(f"fused_distill: read both {often}, write bf16", 0, (8 + 8 * twice + 2) * T * width)]
    else:
        middle = [
            Stage(f"top_k, k = {k}: read twice", 0, 8 * T * width),
            Stage("bucket_logprobs of both: read once where the k hold most", 0, 8 * T * width),
            Stage("grad_buckets: read once, write bf16", 0, (4 + 2) * T * width),
        ]
    return [logits, stats, *middle, *_gradients(T, D, V, staged, room)]


def stored(T: int, D: int, V: int, workspace: int, k: int) -> list[Stage]:
    """The same from a teacher's `k` log-probs a row and the rest as one."""
    width = padded(V)
    staged, room = capacity(workspace, V, D, 2, True, (k + 1) * 112)  # bytes of an id as `distill_driver` counts them
    return [
        Stage("logits = h·Wᵀ, fp32 out", 2.0 * T * V * D, 4 * T * width + -(-T // staged) * 2 * V * D),
        Stage("row_stats: read once", 0, 4 * T * width),
        Stage("bucket_logprobs: read once where the k hold most", 0, 4 * T * width),
        Stage("grad_buckets: read once, write bf16", 0, (4 + 2) * T * width),
        *_gradients(T, D, V, staged, room),
    ]


def scoring(T: int, D: int, V: int, workspace: int) -> dict[str, list[Stage]]:
    """Log-probs alone, by the scorer and through logits in memory."""
    product, weight = 2.0 * T * V * D, 2 * V * D
    blocks = -(-T // capacity(workspace, V, D, 2, False)[0])
    return {
        "score kernel": [Stage("h·Wᵀ, sums in registers", product, weight + 2 * T * D)],
        "staged": [
            Stage("logits = h·Wᵀ, fp32 out", product, 4 * T * padded(V) + blocks * weight),
            Stage("row_stats: read once", 0, 4 * T * padded(V)),
        ],
    }


def table(title: str, stages: list[Stage]) -> str:
    """Markdown."""
    lines = [f"**{title}**\n", "| stage | TFLOP | GB | predicted ms | limit |", "|---|---|---|---|---|"]
    for s in stages:
        products, memory = s.limits()
        limit = "products" if products >= memory else "memory"
        lines.append(f"| {s.name} | {s.flops / 1e12:.1f} | {s.bytes / 1e9:.1f} | {1e3 * s.seconds():.1f} | {limit} |")
    total, bare = sum(s.seconds() for s in stages), sum(s.limits()[0] for s in stages)
    lines.append(f"| all | | | {1e3 * total:.1f} | {total / bare:.2f} × bare products ({1e3 * bare:.1f} ms) |")
    return "\n".join(lines)


SHAPES = ((8192, 4096, 151_936), (4096, 4096, 151_936), (8192, 4096, 128_256))
GPUS = {"H100": H100, "H200": H200, "B200": B200}
FREE = 40 * 10**9  # bytes, of which the default workspace is a share


def bounds_table() -> str:
    """Markdown: both bounds of training, by shape, workspace, backend and GPU."""
    lines = [f"| rows × D × V | workspace | backend | {' | '.join(GPUS)} |", "|---|---|---|" + "---|" * len(GPUS)]
    for T, D, V in SHAPES:
        for workspace in (WORKSPACE_BYTES, workspace_share(FREE)):
            for backend in ("Triton", "CUDA"):
                stages, cells = training(T, D, V, workspace, twice=backend == "Triton"), []
                for peaks in GPUS.values():
                    bare = sum(stage.limits(peaks)[0] for stage in stages)
                    low, high = bounds(stages, peaks)
                    cells.append(f"{1e3 * low:.1f}–{1e3 * high:.1f} ms, {low / bare:.2f}–{high / bare:.2f} ×")
                shape = f"{T:,} × {D:,} × {V:,}"
                lines.append(f"| {shape} | {workspace >> 30} GiB | {backend} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Prints the tables that docs/gpu.md quotes."""
    print(bounds_table(), end="\n\n")
    (T, D, V), workspace = SHAPES[0], WORKSPACE_BYTES
    shape = f"{T} × {D} × {V:,}, bf16"
    tables = {
        f"Training, {shape}, workspace 1 GiB: Triton": training(T, D, V, workspace),
        "The same: CUDA on sm_90, rows kept on chip": training(T, D, V, workspace, twice=False),
        "Triton, workspace 256 MiB": training(T, D, V, workspace >> 2),
        "Distillation over the vocabulary, workspace 1 GiB: Triton": distillation(T, D, V, workspace),
        "The same: CUDA on sm_90, pairs of rows kept on chip": distillation(T, D, V, workspace, twice=False),
        "Distillation over the student's top 100, the same: Triton": distillation(T, D, V, workspace, 100),
    }
    for title, stages in tables.items():
        print(table(title, stages), end="\n\n")
    for name, stages in scoring(T, D, V, workspace).items():
        print(table(f"Scoring, {name}", stages), end="\n\n")


if __name__ == "__main__":
    main()
