"""Row kernels in Triton on torch tensors. C rows of V fp32 logits, M entries; gradients go to a buffer of the caller's.

Needs a CUDA device, or Triton's interpreter (TRITON_INTERPRET=1 before Python starts). Unlike on a CPU, products are left
as they are: statistics write nothing over them, and the gradient is made of the products.
"""

from __future__ import annotations

from collections import namedtuple
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from drift_kernels.backends.contract import BucketSlopes, Chunk, Coefs, TeacherChunk
from drift_kernels.backends.params import ENTRY_OUTPUTS, POLICY_OUTPUTS, ROW_OUTPUTS, policy_numbers
from drift_kernels.backends.partials import SUMS, Partials, merge, stack, sweeps
from drift_kernels.backends.triton import buckets, distill
from drift_kernels.backends.triton import rows as kernels
from drift_kernels.backends.triton.launch import Launch, row_launch, run
from drift_kernels.backends.triton.scorer import score
from drift_kernels.formulas import Tokens
from drift_kernels.spec import PolicySpec

__all__ = [
    "Partials",
    "bucket_logprobs",
    "fused_distill",
    "fused_policy",
    "grad_buckets",
    "grad_logits",
    "merge",
    "partial_stats",
    "row_stats",
    "score",
    "stack",
    "top_k",
]

KINDS = ("objective", "kl_value", "kl_grad", "kl_unbiased")  # compiled into the kernel; other numbers are arguments
PolicyNumbers = namedtuple("PolicyNumbers", [name for name in policy_numbers(PolicySpec()) if name not in KINDS])
GRADIENT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ENTRIES = 16  # of a row at once, where a row may have several
IDS = 128  # of a row at once, among its top k
CANDIDATES = 1 << 23  # of all programs of `top_k` together: 64 MiB of keys
STATISTICS = {**ROW_OUTPUTS, **ENTRY_OUTPUTS, "mean_logits": "mean"}  # output → kernel argument


def _readable(name: str, tensor: Tensor | None, device: torch.device) -> None:
    if tensor is not None and (tensor.device != device or not tensor.is_contiguous()):
        raise ValueError(
            f"{name} {tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device} must be contiguous on {device}"
        )


def head_arguments(logits: Tensor, chunk: Chunk) -> dict[str, Any]:
    """What every row kernel reads: where the rows lie, their entries, and how a product becomes a logit."""
    if logits.dtype != torch.float32 or logits.dim() != 2 or logits.stride(1) != 1:
        raise TypeError(
            f"logits {tuple(logits.shape)} {logits.dtype} with strides {logits.stride()} must be [C, V] float32 rows; "
            "backend='cpu' and 'reference' take float64"
        )
    for name in ("targets", "row_ptr", "bias", "inv_temperature"):
        _readable(name, getattr(chunk, name), logits.device)
    return {
        "x": logits,
        "stride": logits.stride(0),
        "rows": logits.shape[0],
        "V": logits.shape[1],
        "targets": chunk.targets,
        "row_ptr": chunk.row_ptr,
        "bias": chunk.bias,
        "inverses": chunk.inv_temperature,
        "inverse": 1 / chunk.head.temperature,
        "scale": chunk.head.logit_scale,
        "cap": chunk.head.softcap,
    }


def _outputs(logits: Tensor, chunk: Chunk, want: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    """Room for what is wanted, and the same by kernel argument with None for the rest."""
    outputs = {}
    for name in (*STATISTICS, *POLICY_OUTPUTS):
        if name in want:
            outputs[name] = logits.new_empty(logits.shape[0] if name in ROW_OUTPUTS else chunk.targets.numel())
    return outputs, {argument: outputs.get(name) for name, argument in STATISTICS.items()}


def programs(logits: Tensor, launch: Launch) -> tuple[int]:
    """The grid over rows."""
    return (-(-logits.shape[0] // launch.rows),)


def row_stats(logits: Tensor, chunk: Chunk, want: tuple[str, ...]) -> dict[str, Tensor]:
    """The statistics in `want` of products [C, V], per row or per entry."""
    outputs, statistics = _outputs(logits, chunk, want)
    _measure(logits, chunk, {**statistics, **sweeps(want), "partials": None, "at_target": None})
    return outputs


def partial_stats(logits: Tensor, chunk: Chunk, want: tuple[str, ...], first: int = 0) -> Partials:
    """What `merge` needs for the statistics in `want`, of products [C, V] that are columns first … first + V of whole rows.

    `chunk.targets` are those of whole rows, `chunk.bias` is of these columns.
    """
    local = replace(chunk, targets=torch.where(chunk.targets < 0, -1, chunk.targets - first))
    part = Partials(logits.new_empty((SUMS, logits.shape[0])), logits.new_empty(chunk.targets.numel()))
    nothing = _outputs(logits, chunk, ())[1]
    _measure(logits, local, {**nothing, **sweeps(want), "partials": part.sums, "at_target": part.at_target})
    return part


def _measure(logits: Tensor, chunk: Chunk, arguments: dict[str, Any]) -> None:
    launch = row_launch("row_stats", logits)
    shape = {"ENTRIES": 1 if chunk.row_ptr is None else ENTRIES, "ROWS": launch.rows, "BLOCK": launch.block}
    arguments = {**head_arguments(logits, chunk), **arguments, **shape}
    run(kernels.row_stats_kernel, programs(logits, launch), logits, launch, arguments)


def _gradient_arguments(logits: Tensor, out: Tensor | None) -> dict[str, Any]:
    """Where the gradient goes and room for the flags of live rows, by kernel argument; None for each without `out`."""
    if out is None:
        return dict.fromkeys(("out", "out_stride", "live"))
    if (
        out.shape != logits.shape
        or out.dtype not in GRADIENT_DTYPES
        or out.stride(1) != 1
        or out.device != logits.device
    ):
        raise ValueError(
            f"out {tuple(out.shape)} {out.dtype} on {out.device} must be {tuple(logits.shape)} rows of float32, bfloat16 "
            f"or float16 on {logits.device}"
        )
    live = torch.empty(logits.shape[0], dtype=torch.uint8, device=logits.device)
    return {"out": out, "out_stride": out.stride(0), "live": live}


def _coef_arguments(coefs: Coefs, device: torch.device) -> dict[str, Tensor | None]:
    """The derivatives by statistics, and these, by kernel argument."""
    if coefs.dentropy is not None and coefs.entropy is None:
        raise ValueError("coefs.dentropy needs coefs.entropy, the rows' entropy")
    arguments = {
        "coefs": coefs.dlogprobs,
        "lse_coefs": coefs.dlse,
        "lse": coefs.lse,
        "lse_low": coefs.lse_low,
        "entropy_coefs": coefs.dentropy,
        "entropy": coefs.entropy,
    }
    for name, tensor in arguments.items():
        _readable(name, tensor, device)
    return arguments


def grad_logits(logits: Tensor, chunk: Chunk, coefs: Coefs, *, raw: bool, out: Tensor) -> Tensor:
    """Products (raw) or logits [C, V] to d(loss)/d(product) in `out` [C, V] fp32, bf16 or fp16.

    Rows without any coefficient are zeros. Returns which rows are not [C] uint8.
    """
    launch = row_launch("grad_logits", logits)
    arguments = {**head_arguments(logits, chunk), **_coef_arguments(coefs, logits.device)}
    arguments |= {**_gradient_arguments(logits, out), "RAW": raw, "ROWS": launch.rows, "BLOCK": launch.block}
    run(kernels.grad_logits_kernel, programs(logits, launch), logits, launch, arguments)
    return arguments["live"]


def fused_policy(
    logits: Tensor, chunk: Chunk, spec: PolicySpec, tokens: Tokens, want: tuple[str, ...], *, out: Tensor | None = None
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Statistics and policy loss of products [C, V] and, with `out`, d(loss)/d(product) there.

    Returns the outputs in `want` and which rows are not zero [C] uint8. One launch; two if a row has several targets,
    since a row's coefficients must all be known before its gradient.
    """
    entries = {name: getattr(tokens, name) for name in ("advantages", "old", "ref", "weights")}
    for name, tensor in entries.items():
        _readable(name, tensor, logits.device)
    launch, shared = row_launch("fused_policy", logits), chunk.row_ptr is not None
    outputs, statistics = _outputs(logits, chunk, want)
    written, entropy_term = _gradient_arguments(logits, out), spec.entropy_coef != 0
    later: dict[str, Tensor | None] = dict.fromkeys(("coefs", "lse_coefs", "entropy_coefs"))
    if out is not None and shared:
        later["coefs"] = logits.new_empty(chunk.targets.numel())
        later["lse_coefs"] = logits.new_empty(logits.shape[0]) if spec.z_loss_coef else None
        later["entropy_coefs"] = logits.new_empty(logits.shape[0]) if entropy_term else None
        for argument in ("lse", "lse_low", "entropy")[: 2 + entropy_term]:
            if statistics[argument] is None:
                statistics[argument] = logits.new_empty(logits.shape[0])
    numbers, sums = policy_numbers(spec), sweeps(want)
    kinds = {name.upper(): numbers.pop(name) for name in KINDS}
    arguments = {
        **head_arguments(logits, chunk),
        **statistics,
        **entries,
        **{name: outputs.get(name) for name in POLICY_OUTPUTS},
        "numbers": PolicyNumbers(**{name: float(value) for name, value in numbers.items()}),
        **later,
        **written,
        **kinds,
        "ENTROPY": sums["ENTROPY"] or entropy_term,
        "EXTRA": sums["EXTRA"],
        "GRADIENT": out is not None and not shared,
        "WITH_ENTROPY_TERM": entropy_term,
        "ENTRIES": ENTRIES if shared else 1,
        "ROWS": launch.rows,
        "BLOCK": launch.block,
    }
    run(kernels.fused_policy_kernel, programs(logits, launch), logits, launch, arguments)
    lse, low = statistics["lse"], statistics["lse_low"]
    if out is None or not shared or lse is None:
        return outputs, written["live"]
    coefs = Coefs(lse, later["coefs"], later["entropy_coefs"], statistics["entropy"], later["lse_coefs"], low)
    return outputs, grad_logits(logits, chunk, coefs, raw=True, out=out)


def _one_each(logits: Tensor, chunk: Chunk, *without: str) -> dict[str, Any]:
    """`head_arguments` of rows with one target each, but for those that a kernel has no use for."""
    if chunk.row_ptr is not None:
        raise ValueError("row_ptr: distillation takes one target a row")
    arguments = head_arguments(logits, chunk)
    return {name: value for name, value in arguments.items() if name not in ("row_ptr", "rows", *without)}


def fused_distill(
    logits: Tensor,
    chunk: Chunk,
    coefs: Coefs,
    teacher: TeacherChunk,
    weights: Tensor,
    alpha: float,
    *,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Divergences [n] of products [C, V] from the teacher's products [n, V], and with `out` d(loss)/d(product) there.

    Teacher rows that no row names stay unwritten. `weights` [C] are those of the divergences, `coefs` the derivatives of
    other terms. Returns live rows [C] too.
    """
    rows = {"taught": teacher.rows, "y_lse": teacher.lse, "y_lse_low": teacher.lse_low, "weights": weights}
    for name, tensor in rows.items():
        _readable(name, tensor, logits.device)
    teacher_arguments = _one_each(teacher.logits, teacher.chunk, "V", "targets")
    if teacher.logits.shape[1] != logits.shape[1]:
        raise ValueError(f"the teacher's {teacher.logits.shape[1]} columns must be the student's {logits.shape[1]}")
    kind = distill.FORWARD if alpha == 0 else distill.REVERSE if alpha == 1 else distill.MIXED
    launch, divergence = row_launch("fused_distill", logits), logits.new_empty(teacher.logits.shape[0])
    arguments = {
        **_one_each(logits, chunk),
        **_coef_arguments(coefs, logits.device),
        **{"y" if name == "x" else f"y_{name}": value for name, value in teacher_arguments.items()},
        **rows,
        "alpha": float(alpha),
        "divergence": divergence,
        **_gradient_arguments(logits, out),
        "KIND": kind.value,
        "GRADIENT": out is not None,
        "BLOCK": launch.block,
    }
    run(distill.fused_distill_kernel, (logits.shape[0],), logits, launch, arguments)
    return divergence, arguments["live"]


def top_k(logits: Tensor, chunk: Chunk, teacher_rows: Tensor | None, n: int, k: int) -> Tensor:
    """Ids [n, k] int64 of the k largest logits of products [C, V], largest first, of equal ones the lower id first.

    A kernel finds the k of each row; they are sorted by a key that no two share, so that the order hangs on no library's.
    `teacher_rows` as `TeacherChunk.rows`; teacher rows that no row names hold some ids of the vocabulary.
    """
    _readable("teacher_rows", teacher_rows, logits.device)
    launch = row_launch("top_k", logits)
    (C, V), device = logits.shape, logits.device
    blocks = -(-V // launch.block)
    room = min(V, k * (blocks + 1)) if k <= launch.block else V  # of a row's candidates
    grid = min(C, max(1, CANDIDATES // room))
    keys = torch.zeros((n, k), dtype=torch.int64, device=device)
    lists = torch.empty((grid, room), dtype=torch.int64, device=device)
    arguments = {**_one_each(logits, chunk, "targets"), "rows": C, "taught": teacher_rows, "keys": keys, "k": k}
    arguments |= {"lists": lists, "room": room, "BLOCK": launch.block}
    run(buckets.top_k_kernel, (grid,), logits, launch, arguments)
    return logits.shape[1] - 1 - (keys.sort(-1, descending=True).values & 0x7FFFFFFF)


def _by_block(ids: Tensor, V: int, block: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Ids [n, k] sorted, where each came from, and where those of each block of columns begin, by kernel argument."""
    ordered, order = ids.sort(-1)
    first = torch.arange(0, V + block, block, device=ids.device).expand(ids.shape[0], -1).contiguous()
    edges = torch.searchsorted(ordered, first)
    return ordered, order, {"ordered_ids": ordered, "edges": edges, "blocks": first.shape[1] - 1}


def bucket_logprobs(
    logits: Tensor,
    chunk: Chunk,
    teacher_rows: Tensor | None,
    lse: Tensor,
    ids: Tensor,
    rest: bool,
    lse_low: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of `ids` [n, k], and with `rest` of all other tokens together [n], by products [C, V].

    `teacher_rows` as `TeacherChunk.rows`. An id outside the vocabulary has a log-prob of NaN; ids of a row are distinct.
    """
    for name, tensor in (("teacher_rows", teacher_rows), ("lse", lse), ("lse_low", lse_low), ("ids", ids)):
        _readable(name, tensor, logits.device)
    launch, (n, k) = row_launch("bucket_logprobs", logits), ids.shape
    logprobs, others = logits.new_empty((n, k)), logits.new_empty(n) if rest else None
    search: dict[str, Any] = dict.fromkeys(("ordered_ids", "edges", "blocks"))
    if rest:
        search = _by_block(ids, logits.shape[1], launch.block)[2]
    arguments = {
        **_one_each(logits, chunk, "targets"),
        "taught": teacher_rows,
        "lse": lse,
        "lse_low": lse_low,
        "ids": ids,
        "k": k,
        **search,
        "logprobs": logprobs,
        "rest": others,
        "ENTRIES": IDS,
        "BLOCK": launch.block,
    }
    run(buckets.bucket_logprobs_kernel, (logits.shape[0],), logits, launch, arguments)
    return logprobs, others


def grad_buckets(
    logits: Tensor, chunk: Chunk, coefs: Coefs, teacher_rows: Tensor | None, slopes: BucketSlopes, *, out: Tensor
) -> Tensor:
    """Products [C, V] to d(loss)/d(product) in `out`, by derivatives of the results of `bucket_logprobs`; live rows [C]."""
    if slopes.drest is not None and slopes.rest is None:
        raise ValueError("drest needs rest, the log-probs that it is the derivative by")
    for name in ("ids", "rest", "dlogprobs", "drest"):
        _readable(name, getattr(slopes, name), logits.device)
    _readable("teacher_rows", teacher_rows, logits.device)
    launch = row_launch("grad_buckets", logits)
    _, order, search = _by_block(slopes.ids, logits.shape[1], launch.block)
    arguments = {
        **_one_each(logits, chunk),
        **_coef_arguments(coefs, logits.device),
        "taught": teacher_rows,
        "k": slopes.ids.shape[1],
        **search,
        "dlogprobs": slopes.dlogprobs.gather(1, order),
        "rest": slopes.rest,
        "drest": slopes.drest,
        **_gradient_arguments(logits, out),
        "ENTRIES": IDS,
        "BLOCK": launch.block,
    }
    run(buckets.grad_buckets_kernel, (logits.shape[0],), logits, launch, arguments)
    return arguments["live"]
