"""Row kernels in Triton on torch tensors. C rows of V fp32 logits, M entries; gradients go to a buffer of the caller's.

Needs a CUDA device, or Triton's interpreter (TRITON_INTERPRET=1 before Python starts). Unlike on a CPU, products are left
as they are: statistics write nothing over them, and the gradient is made of the products.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from drift_kernels.backends.params import ENTRY_OUTPUTS, POLICY_OUTPUTS, ROW_OUTPUTS, Chunk, policy_numbers
from drift_kernels.backends.triton import rows as kernels
from drift_kernels.backends.triton.launch import Launch, row_launch, run
from drift_kernels.backends.triton.partials import SUMS, Partials, merge, stack, sweeps
from drift_kernels.backends.triton.scorer import score
from drift_kernels.spec import PolicySpec

__all__ = ["Partials", "fused_policy", "grad_logits", "merge", "partial_stats", "row_stats", "score", "stack"]

GRADIENT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ENTRIES = 16  # of a row at once, where a row may have several
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
    made = {}
    for name in (*STATISTICS, *POLICY_OUTPUTS):
        if name in want:
            made[name] = logits.new_empty(logits.shape[0] if name in ROW_OUTPUTS else chunk.targets.numel())
    return made, {argument: made.get(name) for name, argument in STATISTICS.items()}


def programs(logits: Tensor, launch: Launch) -> tuple[int]:
    """The grid over rows."""
    return (-(-logits.shape[0] // launch.rows),)


def row_stats(logits: Tensor, chunk: Chunk, want: tuple[str, ...]) -> dict[str, Tensor]:
    """The statistics in `want` of products [C, V], per row or per entry."""
    made, statistics = _outputs(logits, chunk, want)
    _measure(logits, chunk, {**statistics, **sweeps(want), "partials": None, "at_target": None})
    return made


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


def _gradient_arguments(logits: Tensor, out: Tensor) -> dict[str, Any]:
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


def grad_logits(
    logits: Tensor,
    chunk: Chunk,
    coefs: Tensor | None,
    lse: Tensor,
    entropy_coefs: Tensor | None = None,
    entropy: Tensor | None = None,
    lse_coefs: Tensor | None = None,
    *,
    raw: bool,
    out: Tensor,
) -> Tensor:
    """Products (raw) or logits [C, V] to d(loss)/d(product) in `out` [C, V] fp32, bf16 or fp16.

    `coefs` [M], `entropy_coefs` and `lse_coefs` [C] are d(loss)/d(log-prob), d(loss)/d(entropy) and d(loss)/d(lse); rows
    without any are zeros. Returns which rows are not [C] uint8.
    """
    if entropy_coefs is not None and entropy is None:
        raise ValueError("entropy_coefs needs the rows' entropy")
    given = {"coefs": coefs, "lse": lse, "lse_coefs": lse_coefs, "entropy_coefs": entropy_coefs, "entropy": entropy}
    for name, tensor in given.items():
        _readable(name, tensor, logits.device)
    launch = row_launch("grad_logits", logits)
    arguments = {**head_arguments(logits, chunk), **given, **_gradient_arguments(logits, out)}
    arguments |= {"RAW": raw, "ROWS": launch.rows, "BLOCK": launch.block}
    run(kernels.grad_logits_kernel, programs(logits, launch), logits, launch, arguments)
    return arguments["live"]


def fused_policy(
    logits: Tensor,
    chunk: Chunk,
    spec: PolicySpec,
    advantages: Tensor | None,
    old: Tensor | None,
    ref: Tensor | None,
    weights: Tensor | None,
    want: tuple[str, ...],
    *,
    gradient: bool,
    out: Tensor | None = None,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Statistics and policy loss of products [C, V] and, with `gradient`, d(loss)/d(product) in `out`.

    Returns the outputs in `want` and which rows are not zero [C] uint8. One launch; two where a row has several targets,
    since a row's coefficients must all be known before its gradient.
    """
    entries = {"advantages": advantages, "old": old, "ref": ref, "weights": weights}
    for name, tensor in entries.items():
        _readable(name, tensor, logits.device)
    launch, shared = row_launch("fused_policy", logits), chunk.row_ptr is not None
    made, statistics = _outputs(logits, chunk, want)
    entropy_term = spec.entropy_coef != 0
    later: dict[str, Tensor | None] = dict.fromkeys(("coefs", "lse_coefs", "entropy_coefs"))
    if gradient and shared:
        later["coefs"] = logits.new_empty(chunk.targets.numel())
        later["lse_coefs"] = logits.new_empty(logits.shape[0]) if spec.z_loss_coef else None
        later["entropy_coefs"] = logits.new_empty(logits.shape[0]) if entropy_term else None
        for argument in ("lse", "entropy")[: 1 + entropy_term]:
            if statistics[argument] is None:
                statistics[argument] = logits.new_empty(logits.shape[0])
    numbers = policy_numbers(spec)
    kinds = {name.upper(): numbers.pop(name) for name in ("objective", "kl_value", "kl_grad", "kl_unbiased")}
    written: dict[str, Any] = dict.fromkeys(("out", "out_stride", "live"))
    if gradient:
        if out is None:
            raise ValueError("gradient=True needs out, the [C, V] buffer to write to")
        written = _gradient_arguments(logits, out)
    needs = sweeps(want)
    arguments = {
        **head_arguments(logits, chunk),
        **statistics,
        **entries,
        **{name: made.get(name) for name in POLICY_OUTPUTS},
        **numbers,
        **later,
        **written,
        **kinds,
        "ENTROPY": needs["ENTROPY"] or entropy_term,
        "EXTRA": needs["EXTRA"],
        "GRADIENT": gradient and not shared,
        "WITH_ENTROPY_TERM": entropy_term,
        "ENTRIES": ENTRIES if shared else 1,
        "ROWS": launch.rows,
        "BLOCK": launch.block,
    }
    run(kernels.fused_policy_kernel, programs(logits, launch), logits, launch, arguments)
    if not gradient or not shared:
        return made, written["live"]
    lse, entropy = statistics["lse"], statistics["entropy"]
    assert lse is not None
    assert out is not None
    given = (later["coefs"], lse, later["entropy_coefs"], entropy, later["lse_coefs"])
    live = grad_logits(logits, chunk, *given, raw=True, out=out)
    return made, live
