"""The structs of `csrc/rows.h` filled from tensors, for the C++ and the CUDA kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from drift_kernels.backends.contract import BucketSlopes, Chunk, Coefs, TeacherChunk
from drift_kernels.backends.params import ENTRY_OUTPUTS, POLICY_OUTPUTS, ROW_OUTPUTS, policy_numbers
from drift_kernels.formulas import Tokens
from drift_kernels.native import extension as _cpu
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


def logit_rows(logits: Tensor, chunk: Chunk):
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


def coefs(coefs: Coefs):
    """The derivatives by statistics, and these."""
    c, device = _cpu.Coefs(), coefs.lse.device
    c.logprobs, c.lse = address(coefs.dlogprobs, device), address(coefs.lse, device)
    c.entropy, c.row_entropy = address(coefs.dentropy, device), address(coefs.entropy, device)
    c.row_lse, c.lse_low = address(coefs.dlse, device), address(coefs.lse_low, device)
    return c


def policy(logits: Tensor, chunk: Chunk, spec: PolicySpec, tokens: Tokens, want: tuple[str, ...], gradient: bool):
    """A policy loss with room for its outputs in `want`, and the tensors by name."""
    p, outputs, device = _cpu.Policy(), {}, logits.device
    p.params, p.gradient = policy_params(spec), gradient
    p.advantages, p.old = address(tokens.advantages, device), address(tokens.old, device)
    p.ref, p.weights = address(tokens.ref, device), address(tokens.weights, device)
    for name in POLICY_OUTPUTS:
        if name in want:
            outputs[name] = logits.new_empty(chunk.targets.numel())
            setattr(p, name, outputs[name].data_ptr())
    return p, outputs


def teacher(rows: TeacherChunk, weights: Tensor, alpha: float, gradient: bool):
    """A teacher's rows with the weights [C] of its divergences, and room for these [n]."""
    t, logits = _cpu.Teacher(), rows.logits
    divergence, device = logits.new_empty(logits.shape[0]), logits.device
    t.logits, t.stride, t.lse, t.alpha = logits.data_ptr(), logits.stride(0), address(rows.lse, device), alpha
    t.lse_low = address(rows.lse_low, device)
    t.weights, t.divergence, t.gradient = address(weights, device), divergence.data_ptr(), gradient
    return t, divergence


def buckets(ids: Tensor, logprobs: Tensor | None = None, rest: Tensor | None = None):
    """Tokens `ids` [n, k] with room for their log-probs [n, k] and that of all others [n]."""
    b, device = _cpu.Buckets(), ids.device
    b.ids, b.k = address(ids, device), ids.shape[1]
    b.logprobs, b.rest = address(logprobs, device), address(rest, device)
    return b


def bucket_slopes(slopes: BucketSlopes):
    """Tokens with the derivatives by their log-probs, and by that of all others."""
    b, device = buckets(slopes.ids, None, slopes.rest), slopes.ids.device
    b.dlogprobs, b.drest = address(slopes.dlogprobs, device), address(slopes.drest, device)
    return b


def policy_params(spec: PolicySpec):
    """The spec as `csrc/policy.h` wants it."""
    p = _cpu.PolicyParams()
    for name, value in policy_numbers(spec).items():
        setattr(p, name, value)
    return p
