"""Shared by tests and benchmarks: an input factory and the error budget.

An op passes when its error against float64 is at most twice the error that torch's own eager code makes in the same dtype,
plus a few ulp of the quantity's scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

ULPS = 8


@dataclass
class Case:
    """Inputs of one op; T hidden rows of width D, vocabulary V."""

    hidden: Tensor  # [T, D]
    weight: Tensor  # [V, D]
    bias: Tensor  # [V]
    targets: Tensor  # [T] int64, -100 at masked positions
    advantages: Tensor  # [T] float64, some of them 0
    token_weights: Tensor  # [T] float64, some of them 0
    noise: Tensor  # [T] float64, old log-probs minus log-probs

    def leaves(self, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """Fresh hidden, weight and bias in `dtype` that require grad."""
        copies = [
            t.to(device=device, dtype=dtype, copy=True).requires_grad_() for t in (self.hidden, self.weight, self.bias)
        ]
        return copies[0], copies[1], copies[2]


def make_case(
    T: int, D: int, V: int, *, masked: float = 0.3, dtype: torch.dtype = torch.float64, seed: int = 0
) -> Case:
    """Random inputs whose values are exact in `dtype`, so that every dtype sees the same numbers."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(T, D, generator=g, dtype=torch.float64)
    weight = torch.randn(V, D, generator=g, dtype=torch.float64) / D**0.5
    bias = torch.randn(V, generator=g, dtype=torch.float64) * 0.1
    targets = torch.randint(0, V, (T,), generator=g)
    targets[torch.rand(T, generator=g) < masked] = -100
    advantages = torch.randn(T, generator=g, dtype=torch.float64)
    weights = torch.rand(T, generator=g, dtype=torch.float64) + 0.1
    for zeroed in (advantages, weights):
        zeroed[torch.rand(T, generator=g) < 0.2] = 0
    noise = torch.randn(T, generator=g, dtype=torch.float64) * 0.3
    hidden, weight, bias = (t.to(dtype).double() for t in (hidden, weight, bias))
    return Case(hidden, weight, bias, targets, advantages.float().double(), weights.float().double(), noise)


def off_the_edges(old: Tensor, logprobs: Tensor, edges: tuple[float, ...], margin: float = 1e-3) -> Tensor:
    """`old` moved so that no ratio exp(logprobs − old) lies within `margin` of an edge, where fp32 cannot decide."""
    for edge in edges:
        near = ((logprobs - old).exp() - edge).abs() < margin
        old = torch.where(near, old - 4 * margin, old)
    return old


def within_budget(
    actual: Tensor, own: Tensor, exact: Tensor, dtype: torch.dtype, scale: float | None = None
) -> tuple[bool, str]:
    """Whether `actual`'s error is at most 2x that of torch's `own` plus a few ulp; and a line that says by how much.

    `scale` is the size of the summands, if their sum cancels; default: the largest exact value.
    """
    exact = exact.double()
    scale = (float(exact.abs().max()) if exact.numel() else 0.0) if scale is None else scale
    if exact.numel() == 0:
        return actual.shape == exact.shape, "empty"
    error, reference = (float((t.double() - exact).abs().max()) for t in (actual, own))
    bound = 2 * reference + ULPS * torch.finfo(dtype).eps * scale
    ok = error <= bound  # False for NaN
    return ok, f"error {error:.3e}, torch's own {reference:.3e}, bound {bound:.3e}, scale {scale:.3e}"


def gradients(fn: Callable[..., Tensor], leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """(loss, gradient of each leaf), detached; zeros where a leaf takes no part."""
    loss = fn(*leaves)
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return (loss.detach(), *(torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, grads)))
