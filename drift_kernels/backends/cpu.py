"""C++ kernels (`csrc/cpu`) on torch tensors. C rows of V logits, M entries; R is float32 or float64.

The bf16 products take bf16 and fp32 matrices whose last stride is 1, and a scratch tensor of `gemm_scratch_bytes`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from drift_kernels import _cpu  # pyright: ignore[reportAttributeAccessIssue]
from drift_kernels.formulas import ratio_bounds
from drift_kernels.spec import HeadOptions, PolicySpec

ROW_OUTPUTS = {"lse": "lse", "entropy": "entropy", "mean_logits": "mean_logits", "log_sum_sq_probs": "log_sum_sq"}
ENTRY_OUTPUTS = {"logprobs": "logprobs", "is_top1": "top1"}
POLICY_OUTPUTS = ("loss", "ratio", "kl", "clipped")
OBJECTIVES = {"clip": 0, "cispo": 1, "sapo": 2, "reinforce": 3, "dppo_tv": 4, "dppo_kl": 5, "dro": 6}
GEMM_ALIGNMENT = 64  # bytes, of the scratch
ESTIMATORS = {"k1": 0, "k2": 1, "k3": 2, "abs": 3}


@dataclass(frozen=True)
class Chunk:
    """What row kernels read of some rows besides their logits. Every tensor is contiguous and of the logits' dtype."""

    targets: Tensor  # [M] int64
    row_ptr: Tensor | None  # [C + 1] int64, None = one entry a row
    inv_temperature: Tensor | None  # [C], None = the head's own
    bias: Tensor | None  # [V]
    head: HeadOptions


def _address(tensor: Tensor | None) -> int:
    """Where a tensor's elements lie one after another, for C++ to read."""
    if tensor is None:
        return 0
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.is_neg():
        raise ValueError(
            f"a {tuple(tensor.shape)} tensor on {tensor.device} with strides {tensor.stride()} cannot be read as it is"
        )
    return tensor.data_ptr()


def _rows(logits: Tensor, chunk: Chunk):
    rows = _cpu.Rows()
    rows.logits, rows.rows, rows.vocab, rows.stride = logits.data_ptr(), *logits.shape, logits.stride(0)
    rows.targets, rows.row_ptr = _address(chunk.targets), _address(chunk.row_ptr)
    rows.bias, rows.inv_temperature = _address(chunk.bias), _address(chunk.inv_temperature)
    rows.scalar_inv_temperature = 1 / chunk.head.temperature
    rows.logit_scale, rows.softcap = chunk.head.logit_scale, chunk.head.softcap or 0.0
    return rows


def _stats(logits: Tensor, chunk: Chunk, want: tuple[str, ...]):
    stats, outputs = _cpu.Stats(), {}
    for name in want:
        if name in ROW_OUTPUTS or name in ENTRY_OUTPUTS:
            size = logits.shape[0] if name in ROW_OUTPUTS else chunk.targets.numel()
            outputs[name] = logits.new_empty(size)
            setattr(stats, ROW_OUTPUTS.get(name) or ENTRY_OUTPUTS[name], outputs[name].data_ptr())
    return stats, outputs


def row_stats(logits: Tensor, chunk: Chunk, want: tuple[str, ...]) -> dict[str, Tensor]:
    """Products [C, V] become logits in place; returns the statistics in `want`, per row or per entry."""
    stats, outputs = _stats(logits, chunk, want)
    _cpu.row_stats(_rows(logits, chunk), stats, logits.dtype == torch.float64)
    return outputs


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
) -> Tensor:
    """Products (raw) or logits [C, V] become d(loss)/d(product) in place; returns which rows are not all zero [C] uint8.

    `coefs` [M], `entropy_coefs` and `lse_coefs` [C] are d(loss)/d(log-prob), d(loss)/d(entropy) and d(loss)/d(lse).
    """
    c = _coefs(coefs, lse, entropy_coefs, entropy, lse_coefs)
    live = torch.empty(logits.shape[0], dtype=torch.uint8)
    _cpu.grad_logits(_rows(logits, chunk), c, raw, live.data_ptr(), logits.dtype == torch.float64)
    return live


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
) -> tuple[dict[str, Tensor], Tensor]:
    """Statistics, policy loss and, with `gradient`, d(loss)/d(product) in place; returns outputs and live rows [C]."""
    stats, outputs = _stats(logits, chunk, want)
    policy = _cpu.Policy()
    policy.params, policy.gradient = policy_params(spec), gradient
    policy.advantages, policy.old, policy.ref = _address(advantages), _address(old), _address(ref)
    policy.weights = _address(weights)
    for name in POLICY_OUTPUTS:
        if name in want:
            outputs[name] = logits.new_empty(chunk.targets.numel())
            setattr(policy, name, outputs[name].data_ptr())
    live = torch.empty(logits.shape[0], dtype=torch.uint8)
    _cpu.fused_policy(_rows(logits, chunk), stats, policy, live.data_ptr(), logits.dtype == torch.float64)
    return outputs, live


def policy_params(spec: PolicySpec):
    """The spec as `csrc/policy.h` wants it."""
    p = _cpu.PolicyParams()
    p.objective = OBJECTIVES[spec.objective]
    p.kl_value = ESTIMATORS[spec.kl_estimator.rstrip("+")]
    p.kl_grad = ESTIMATORS["k2"] if spec.kl_estimator.endswith("+") else p.kl_value
    p.low, p.high = ratio_bounds(spec)
    p.dual_clip, p.delta = spec.dual_clip or 0.0, math.inf if spec.delta is None else spec.delta
    p.tau_pos, p.tau_neg = spec.sapo_temperatures
    p.kl_coef, p.entropy_coef, p.z_loss_coef = spec.kl_coef, spec.entropy_coef, spec.z_loss_coef
    p.kl_unbiased, p.dro_beta = spec.kl_unbiased, spec.dro_beta or 0.0
    return p


def _coefs(
    coefs: Tensor | None, lse: Tensor, entropy_coefs: Tensor | None, entropy: Tensor | None, lse_coefs: Tensor | None
):
    c = _cpu.Coefs()
    c.logprobs, c.lse = _address(coefs), _address(lse)
    c.entropy, c.row_entropy, c.row_lse = _address(entropy_coefs), _address(entropy), _address(lse_coefs)
    return c


def top_k(logits: Tensor, chunk: Chunk, taught: Tensor | None, n: int, k: int) -> Tensor:
    """The k largest of logits [C, V], largest first [n, k] int64; row i of `taught` [C] says which of n it is, −1 none."""
    b = _cpu.Buckets()
    ids = torch.empty((n, k), dtype=torch.int64)
    b.ids, b.k = _address(ids), k
    _cpu.top_k(_rows(logits, chunk), _address(taught), b, logits.dtype == torch.float64)
    return ids


def bucket_logprobs(
    logits: Tensor, chunk: Chunk, taught: Tensor | None, lse: Tensor, ids: Tensor, rest: bool
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of `ids` [n, k], and with `rest` of all other tokens together [n], by logits [C, V]."""
    b = _cpu.Buckets()
    logprobs = logits.new_empty(ids.shape)
    others = logits.new_empty(ids.shape[0]) if rest else None
    b.ids, b.k, b.logprobs, b.rest = _address(ids), ids.shape[1], _address(logprobs), _address(others)
    _cpu.bucket_logprobs(_rows(logits, chunk), _address(taught), _address(lse), b, logits.dtype == torch.float64)
    return logprobs, others


def fused_distill(
    logits: Tensor,
    chunk: Chunk,
    taught: Tensor | None,
    teacher: Tensor,
    teacher_lse: Tensor,
    weights: Tensor,
    alpha: float,
    lse: Tensor,
    coefs: Tensor | None = None,
    entropy_coefs: Tensor | None = None,
    entropy: Tensor | None = None,
    lse_coefs: Tensor | None = None,
    *,
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Divergences [n] of logits [C, V] from the teacher's [n, V], and with `gradient` d(loss)/d(product) in place.

    `weights` [C] are the divergences', the coefficients what other terms add (see `grad_logits`). Returns live rows [C] too.
    """
    t = _cpu.Teacher()
    t.logits, t.stride, t.lse, t.alpha = teacher.data_ptr(), teacher.stride(0), _address(teacher_lse), alpha
    divergence, live = logits.new_empty(teacher.shape[0]), torch.empty(logits.shape[0], dtype=torch.uint8)
    t.weights, t.divergence, t.gradient = _address(weights), _address(divergence), gradient
    c = _coefs(coefs, lse, entropy_coefs, entropy, lse_coefs)
    double = logits.dtype == torch.float64
    _cpu.fused_distill(_rows(logits, chunk), c, _address(taught), t, live.data_ptr(), double)
    return divergence, live


def grad_buckets(
    logits: Tensor,
    chunk: Chunk,
    taught: Tensor | None,
    ids: Tensor,
    rest: Tensor | None,
    dlogprobs: Tensor,
    drest: Tensor | None,
    lse: Tensor,
    coefs: Tensor | None = None,
    entropy_coefs: Tensor | None = None,
    entropy: Tensor | None = None,
    lse_coefs: Tensor | None = None,
) -> Tensor:
    """Logits [C, V] become d(loss)/d(product), by the derivatives of what `bucket_logprobs` gave; returns live rows [C]."""
    b = _cpu.Buckets()
    b.ids, b.k, b.rest = _address(ids), ids.shape[1], _address(rest)
    b.dlogprobs, b.drest = _address(dlogprobs), _address(drest)
    live = torch.empty(logits.shape[0], dtype=torch.uint8)
    c = _coefs(coefs, lse, entropy_coefs, entropy, lse_coefs)
    double = logits.dtype == torch.float64
    _cpu.grad_buckets(_rows(logits, chunk), c, _address(taught), b, live.data_ptr(), double)
    return live


def compact(logits: Tensor, live: Tensor) -> tuple[int, Tensor | None]:
    """Moves live rows of [C, V] to the front; returns how many, and where each came from (None: all are live)."""
    order = torch.empty(logits.shape[0], dtype=torch.int64)
    size = logits.element_size()
    row, stride = logits.shape[1] * size, logits.stride(0) * size
    count = _cpu.compact(logits.data_ptr(), logits.shape[0], row, stride, live.data_ptr(), order.data_ptr())
    return (count, None) if count == logits.shape[0] else (count, order[:count])


has_bf16_gemm = _cpu.has_bf16_gemm  # () -> bool


def gemm_scratch_bytes(rows: int, width: int, threads: int) -> int:
    """What the products of up to `rows` hidden rows of `width` need as scratch, whatever the vocabulary."""
    return _cpu.gemm_scratch_bytes(rows, width, threads) + GEMM_ALIGNMENT


def _gemm(a: Tensor, b: Tensor, out: Tensor, sizes: tuple[int, int, int], scratch: Tensor, threads: int):
    g = _cpu.Gemm()
    g.a, g.b, g.c = a.data_ptr(), b.data_ptr(), out.data_ptr()
    g.a_stride, g.b_stride, g.c_stride = a.stride(0), b.stride(0), out.stride(0)
    g.m, g.n, g.k = sizes
    g.scratch, g.threads = -(-scratch.data_ptr() // GEMM_ALIGNMENT) * GEMM_ALIGNMENT, threads
    return g


def gemm_nt(a: Tensor, b: Tensor, out: Tensor, scratch: Tensor, threads: int) -> None:
    """out [C, V] fp32 = a [C, D] bf16 · bᵀ, b [V, D] bf16."""
    _cpu.gemm_nt(_gemm(a, b, out, (a.shape[0], b.shape[0], a.shape[1]), scratch, threads))


def gemm_nn(a: Tensor, b: Tensor, out: Tensor, scratch: Tensor, threads: int) -> None:
    """out [C, D] fp32 = a [C, V] fp32, rounded to bf16, · b [V, D] bf16."""
    _cpu.gemm_nn(_gemm(a, b, out, (a.shape[0], b.shape[1], a.shape[1]), scratch, threads))


def gemm_tn(
    a: Tensor,
    b: Tensor,
    out: Tensor | None,
    scratch: Tensor,
    threads: int,
    *,
    accumulate: bool,
    rounded: Tensor | None = None,
) -> None:
    """out [V, D] fp32 (+)= aᵀ · b [C, D] bf16, a [C, V] fp32 rounded to bf16; to `rounded` [V, D] bf16 instead where given."""
    target = out if rounded is None else rounded
    assert target is not None
    g = _gemm(a, b, target, (a.shape[1], b.shape[1], a.shape[0]), scratch, threads)
    if rounded is not None:
        g.c, g.c_stride = (0, 0) if out is None else (out.data_ptr(), out.stride(0))
        g.rounded = _address(rounded)
    g.accumulate = accumulate
    _cpu.gemm_tn(g)
