"""Arithmetic of a few numbers a token around the loops: weights, the policy's outputs, derivatives by autograd."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from drift_kernels import formulas
from drift_kernels.calls import Call
from drift_kernels.formulas import Tokens


def without_saved_hooks() -> torch.autograd.graph.saved_tensors_hooks:
    """Disables saved-tensor hooks for an op's own small graphs; checkpointing would recompute its region for each of them."""
    return torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved)


def differentiate(fn: Callable[..., Tensor], leaves: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """fn(**leaves) [M] and the derivatives of its sum by those leaves that it depends on.

    Autograd is switched on whatever surrounds: a compiled graph calls operators below it.
    """
    tls, nothing = torch._C._dispatch_tls_local_include_set(), torch._C.DispatchKeySet(torch._C.DispatchKey.Undefined)
    with torch._C._ForceDispatchKeyGuard(tls, nothing), torch.enable_grad(), without_saved_hooks():
        inputs = {name: values.detach().requires_grad_() for name, values in leaves.items()}
        result = fn(**inputs)
        if not result.requires_grad:
            return result, {}
        slopes = torch.autograd.grad(result.sum(), tuple(inputs.values()), allow_unused=True)
    return result.detach(), {name: slope for name, slope in zip(inputs, slopes) if slope is not None}


def weights_of(tokens: Tokens, targets: Tensor, normalizer: Tensor) -> Tensor:
    """The factor on each entry's loss [M]."""
    weights = normalizer.new_ones(targets.shape) if tokens.weights is None else tokens.weights
    return weights / normalizer


def policy_loss(
    logprobs: Tensor, lse: Tensor, entropy: Tensor | None, tokens: Tokens, weights: Tensor, call: Call
) -> Tensor:
    """Weighted policy losses [M], 0 for a weight of 0; differentiable in the statistics."""
    tokens = formulas.read_at(weights, tokens, call.spec)
    return torch.where(weights != 0, weights * formulas.token_loss(logprobs, tokens, entropy, lse, call.spec), 0.0)


def policy_outputs(logprobs: Tensor, tokens: Tokens, weights: Tensor, call: Call) -> dict[str, Tensor]:
    """The policy's own per-token outputs among `call.outputs`; `clipped` is 0 if the weight is."""
    out = {}
    if "ratio" in call.outputs:
        out["ratio"] = formulas.ratio_of(logprobs, tokens, call.spec)
    if "clipped" in call.outputs:
        out["clipped"] = torch.where(weights != 0, formulas.clipped(logprobs, tokens, call.spec), 0.0)
    if "kl" in call.outputs:
        out["kl"] = torch.zeros_like(logprobs) if tokens.ref is None else formulas.kl_term(logprobs, tokens, call.spec)
    return out
