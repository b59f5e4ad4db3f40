"""The structs of `csrc/rows.h` filled from tensors, for the C++ and the CUDA kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from drift_kernels import _cpu  # pyright: ignore[reportAttributeAccessIssue]
from drift_kernels.backends.params import ENTRY_OUTPUTS, POLICY_OUTPUTS, ROW_OUTPUTS, Chunk, policy_numbers
from drift_kernels.spec import PolicySpec


def address(tensor: Tensor | None, device: torch.device) -> int:
    """Where a tensor's elements lie one after another on `device`; 0 for None."""
    if tensor is None:
        return 0
    if tensor.device != device or not tensor.is_contiguous() or tensor.is_neg():
        raise ValueError(
            f"a {tuple(tensor.shape)} tensor on {tensor.device} with strides {tensor.stride()} cannot be read as it is, "
            f"with logits on {device}"
        )
    return tensor.data_ptr()


def rows(logits: Tensor, chunk: Chunk):
    """Rows of logits [C, V] with their entries."""
    r, device = _cpu.Rows(), logits.device
    r.logits, r.rows, r.vocab, r.stride = logits.data_ptr(), *logits.shape, logits.stride(0)
    r.targets, r.row_ptr = address(chunk.targets, device), address(chunk.row_ptr, device)
    r.bias, r.inv_temperature = address(chunk.bias, device), address(chunk.inv_temperature, device)
    r.scalar_inv_temperature = 1 / chunk.head.temperature
    r.logit_scale, r.softcap = chunk.head.logit_scale, chunk.head.softcap or 0.0
    return r


def stats(logits: Tensor, chunk: Chunk, want: tuple[str, ...]):
    """Room for the statistics in `want`, and the tensors by name."""
    s, outputs = _cpu.Stats(), {}
    for name in want:
        if name in ROW_OUTPUTS or name in ENTRY_OUTPUTS:
            size = logits.shape[0] if name in ROW_OUTPUTS else chunk.targets.numel()
            outputs[name] = logits.new_empty(size)
            setattr(s, ROW_OUTPUTS.get(name) or ENTRY_OUTPUTS[name], outputs[name].data_ptr())
    return s, outputs


def coefs(
    device: torch.device,
    logprobs: Tensor | None,
    lse: Tensor,
    entropy_coefs: Tensor | None,
    entropy: Tensor | None,
    lse_coefs: Tensor | None,
):
    """Coefficients of log-probs [M], entropies and log-sum-exps [C], with the rows' own lse and entropy [C]."""
    c = _cpu.Coefs()
    c.logprobs, c.lse = address(logprobs, device), address(lse, device)
    c.entropy, c.row_entropy = address(entropy_coefs, device), address(entropy, device)
    c.row_lse = address(lse_coefs, device)
    return c


def policy(
    logits: Tensor,
    chunk: Chunk,
    spec: PolicySpec,
    advantages: Tensor | None,
    old: Tensor | None,
    ref: Tensor | None,
    weights: Tensor | None,
    want: tuple[str, ...],
    gradient: bool,
):
    """A policy loss with room for its outputs in `want`, and the tensors by name."""
    p, outputs, device = _cpu.Policy(), {}, logits.device
    p.params, p.gradient = policy_params(spec), gradient
    p.advantages, p.old, p.ref = address(advantages, device), address(old, device), address(ref, device)
    p.weights = address(weights, device)
    for name in POLICY_OUTPUTS:
        if name in want:
            outputs[name] = logits.new_empty(chunk.targets.numel())
            setattr(p, name, outputs[name].data_ptr())
    return p, outputs


def teacher(logits: Tensor, lse: Tensor, weights: Tensor, alpha: float, gradient: bool):
    """A teacher's logits [n, V] with their lse [n], the weights [C] of its divergences, and room for these [n]."""
    t, device = _cpu.Teacher(), logits.device
    divergence = logits.new_empty(logits.shape[0])
    t.logits, t.stride, t.lse, t.alpha = logits.data_ptr(), logits.stride(0), address(lse, device), alpha
    t.weights, t.divergence, t.gradient = address(weights, device), divergence.data_ptr(), gradient
    return t, divergence


def buckets(
    ids: Tensor,
    logprobs: Tensor | None = None,
    rest: Tensor | None = None,
    dlogprobs: Tensor | None = None,
    drest: Tensor | None = None,
):
    """Tokens `ids` [n, k] with their log-probs [n, k], that of all others [n], and the derivatives by both."""
    b, device = _cpu.Buckets(), ids.device
    b.ids, b.k = address(ids, device), ids.shape[1]
    b.logprobs, b.rest = address(logprobs, device), address(rest, device)
    b.dlogprobs, b.drest = address(dlogprobs, device), address(drest, device)
    return b


def policy_params(spec: PolicySpec):
    """The spec as `csrc/policy.h` wants it."""
    p = _cpu.PolicyParams()
    for name, value in policy_numbers(spec).items():
        setattr(p, name, value)
    return p
