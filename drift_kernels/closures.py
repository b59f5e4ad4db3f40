"""The check that a `pointwise_loss` function makes one loss a token, from that token alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def check_pointwise(fn: Callable[..., Tensor], tensors: tuple[Tensor, ...], count: int, dtype: torch.dtype) -> None:
    """Raises ValueError unless fn makes one loss a token, of that token alone.

    Tried on log-probs from −0.001 to −50 in random order, and in the opposite one. fn of the tokens in two random parts
    must be what it is of all of them; and each token's gradient must grow as its loss does, by powers of two, which
    round nothing.
    """
    device = tensors[0].device if tensors else None
    drawn = torch.Generator().manual_seed(0)
    order, picked = (torch.randperm(count, generator=drawn).to(device) for _ in range(2))
    spread = -torch.logspace(-3, math.log10(50), max(count, 1), dtype=dtype, device=device)[:count][order]
    alone = "a token's loss may read that token alone"
    for logprobs in (spread, spread.flip(0)):
        whole = fn(logprobs.requires_grad_(torch.is_grad_enabled()), *tensors)
        _check_closure(whole, logprobs)
        if whole.shape != logprobs.shape:
            raise ValueError(
                f"fn returned shape {tuple(whole.shape)} for {count} tokens; it must return one loss a token, not reduce"
            )
        if count < 2:
            return
        with torch.no_grad():
            try:
                halves = picked.tensor_split([count // 2 | 1])
                parts = torch.cat([fn(logprobs[half], *(t[half] for t in tensors)) for half in halves])
            except Exception as error:
                raise ValueError(f"fn fails on some of the tokens, though {alone}: {error}") from error
        if parts.shape != whole.shape or not torch.allclose(whole[picked], parts, rtol=1e-4, atol=1e-6, equal_nan=True):
            raise ValueError(f"fn of all tokens differs from fn of two parts of them: {alone}")
        if whole.requires_grad:
            factor = torch.exp2(picked % 5).to(dtype)
            (plain,) = torch.autograd.grad(whole.sum(), logprobs, retain_graph=True)
            (scaled,) = torch.autograd.grad((factor * whole).sum(), logprobs)
            if not torch.allclose(scaled, factor * plain, rtol=1e-6, atol=1e-30, equal_nan=True):
                raise ValueError(f"fn's gradient at a token depends on other tokens' losses: {alone}")


def _check_closure(output: object, logprobs: Tensor) -> None:
    """Raises unless `output`, fn(logprobs, …), is a tensor and a function of no leaf that requires grad but `logprobs`."""
    if not isinstance(output, Tensor):
        raise TypeError(f"fn returned a {type(output).__name__}; it must return a tensor, one loss a token")
    seen, todo = set(), [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", logprobs) if type(node).__name__ == "AccumulateGrad" else logprobs
        if leaf is not logprobs:
            raise ValueError(
                f"fn reads a {tuple(leaf.shape)} tensor that requires grad, and no gradient would reach it; detach it, or "
                "write the loss on linear_logprob's logprobs"
            )
        todo += [function for function, _ in node.next_functions]
