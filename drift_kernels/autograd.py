"""The only autograd.Functions, and the registration of what they call with `torch.library`.

A fused op makes its gradients in the forward pass; backward scales them by the incoming gradient out of place, so a second
backward over a retained graph gives the same. `linear_logprob` saves log-sum-exps and recomputes in backward, or,
where only `hidden` needs a gradient, keeps ∂logp/∂hidden. Double backward raises.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from drift_kernels import driver
from drift_kernels.spec import Call, PolicySpec

_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor? rows, Tensor? active, Tensor? temperature"
_TOKENS = "Tensor? advantages, Tensor? old, Tensor? ref, Tensor? weights"
torch.library.define(
    "drift_kernels::fused",
    f"({_HEAD}, {_TOKENS}, Tensor normalizer, str call) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define("drift_kernels::score", f"({_HEAD}, str call) -> Tensor")
torch.library.define(
    "drift_kernels::logprob_backward",
    f"({_HEAD}, Tensor grad_logprobs, Tensor? grad_entropy, Tensor lse, Tensor? entropy, str call) -> (Tensor, Tensor, Tensor)",
)


def _given(grads: driver.Grads, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    empty = [like.new_empty(0) if g is None else g for g in (grads.hidden, grads.weight, grads.bias)]
    return empty[0], empty[1], empty[2]


@torch.library.impl("drift_kernels::fused", "CPU")
def _fused_cpu(
    hidden, weight, bias, targets, rows, active, temperature, advantages, old, ref, weights, normalizer, call
):
    x = driver.Inputs(hidden, weight, bias, targets, rows, active, temperature, advantages, old, ref, weights)
    loss, grads, outputs = driver.fused(x, Call.decode(call), normalizer)
    return (loss, *_given(grads, loss), outputs)


@torch.library.impl("drift_kernels::score", "CPU")
def _score_cpu(hidden, weight, bias, targets, rows, active, temperature, call):
    return driver.score(driver.Inputs(hidden, weight, bias, targets, rows, active, temperature), Call.decode(call))


@torch.library.impl("drift_kernels::logprob_backward", "CPU")
def _logprob_backward_cpu(
    hidden, weight, bias, targets, rows, active, temperature, grad_logprobs, grad_entropy, lse, entropy, call
):
    x = driver.Inputs(hidden, weight, bias, targets, rows, active, temperature)
    return _given(driver.backward(x, Call.decode(call), grad_logprobs, grad_entropy, lse, entropy), lse)


def _fake_grads(hidden: Tensor, weight: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    dtype = driver.compute_dtype(hidden.dtype)
    shapes = [(call.need_hidden, hidden.shape), (call.need_weight, weight.shape), (call.need_bias, weight.shape[:1])]
    made = [hidden.new_empty(shape if need else (0,), dtype=dtype) for need, shape in shapes]
    return made[0], made[1], made[2]


@torch.library.register_fake("drift_kernels::fused")
def _fused_fake(
    hidden, weight, bias, targets, rows, active, temperature, advantages, old, ref, weights, normalizer, call
):
    options, dtype = Call.decode(call), driver.compute_dtype(hidden.dtype)
    outputs = hidden.new_empty((len(options.outputs), targets.shape[0]), dtype=dtype)
    return (hidden.new_empty((), dtype=dtype), *_fake_grads(hidden, weight, options), outputs)


@torch.library.register_fake("drift_kernels::score")
def _score_fake(hidden, weight, bias, targets, rows, active, temperature, call):
    return hidden.new_empty(
        (len(Call.decode(call).outputs), targets.shape[0]), dtype=driver.compute_dtype(hidden.dtype)
    )


@torch.library.register_fake("drift_kernels::logprob_backward")
def _logprob_backward_fake(
    hidden, weight, bias, targets, rows, active, temperature, grad_logprobs, grad_entropy, lse, entropy, call
):
    return _fake_grads(hidden, weight, Call.decode(call))


@dataclass(frozen=True)
class Tokens:
    """Per-entry data of a fused loss [N] in the compute dtype, None where not given."""

    advantages: Tensor | None = None
    old: Tensor | None = None
    ref: Tensor | None = None
    weights: Tensor | None = None


@dataclass(frozen=True)
class Rest:
    """What an op reads of its inputs that never needs a gradient."""

    targets: Tensor  # [N] int64
    rows: Tensor | None
    active: Tensor | None
    temperature: Tensor | None  # [T]

    def flat(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """In the order of the ops' schemas."""
        return self.targets, self.rows, self.active, self.temperature


def _no_double_backward() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "double backward through a fused loss is not supported: call backward without create_graph=True"
        )


def _scaled(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """grad·scale in `dtype`, without a copy in between; see `_may_hand_over` for when that is grad itself."""
    if dtype == grad.dtype:
        return grad if _may_hand_over(grad, scale) else grad * scale
    return torch.mul(grad, scale, out=torch.empty_like(grad, dtype=dtype))


def _may_hand_over(grad: Tensor, scale: Tensor) -> bool:
    """Whether the saved gradient itself may leave backward, which saves a pass over [V, D].

    Only where reading `scale` costs no synchronisation, it is 1, and the graph is freed after this backward: whoever gets
    the tensor may add to it in place, and a second backward would see that.
    """
    if grad.device.type != "cpu" or torch.compiler.is_compiling() or scale.numel() != 1:
        return False
    keeps = torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore[reportAttributeAccessIssue]
    return not keeps and float(scale) == 1.0


class FusedLoss(torch.autograd.Function):
    """(hidden, weight, bias, normalizer) → (loss, outputs [K, N]); the rest is data."""

    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, normalizer, rest: Rest, tokens: Tokens, call: Call):
        values = (tokens.advantages, tokens.old, tokens.ref, tokens.weights)
        out = torch.ops.drift_kernels.fused(hidden, weight, bias, *rest.flat(), *values, normalizer, call.encode())
        return _finish_forward(ctx, out, (hidden, weight, bias), call)

    @staticmethod
    def backward(ctx: Any, *grad_outputs):
        return (*_finish_backward(ctx, grad_outputs[0]), None, None, None, None)


class PointwiseLoss(torch.autograd.Function):
    """As `FusedLoss`, for a token loss that is a Python function."""

    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, normalizer, rest: Rest, fn: Callable, tensors: tuple, call: Call):
        loss, grads, outputs = driver.pointwise(
            driver.Inputs(hidden, weight, bias, *rest.flat()), call, fn, tensors, normalizer
        )
        return _finish_forward(ctx, (loss, *_given(grads, loss), outputs), (hidden, weight, bias), call)

    @staticmethod
    def backward(ctx: Any, *grad_outputs):
        return (*_finish_backward(ctx, grad_outputs[0]), None, None, None, None, None)


def _finish_forward(ctx: Any, out: tuple, heads: tuple, call: Call) -> tuple[Tensor, Tensor]:
    loss, dhidden, dweight, dbias, outputs = out
    ctx.save_for_backward(dhidden, dweight, dbias)
    ctx.needs = (call.need_hidden, call.need_weight, call.need_bias)
    ctx.dtypes = tuple(None if t is None else t.dtype for t in heads)
    ctx.mark_non_differentiable(outputs)
    ctx.set_materialize_grads(False)
    return loss, outputs


def _finish_backward(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    _no_double_backward()
    if grad_loss is None:
        return None, None, None
    made = [
        _scaled(g, grad_loss, dtype) if need else None
        for need, g, dtype in zip(ctx.needs, ctx.saved_tensors, ctx.dtypes)
    ]
    return made[0], made[1], made[2]


class LinearLogprobs(torch.autograd.Function):
    """(hidden, weight, bias) → (logprobs, entropy) [N] each; entropy has no elements where nobody asked."""

    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, rest: Rest, call: Call):
        with_entropy = "entropy" in call.outputs
        ctx.rest, ctx.call, ctx.jacobian = rest, call, False
        ctx.set_materialize_grads(False)
        if call.need_hidden and not (call.need_weight or call.need_bias or with_entropy) and rest.rows is None:
            # only hidden is differentiated: keep dlogp/dhidden, and backward is a product
            jacobian = Call(PolicySpec(objective="reinforce"), call.head, call.config, ("logprobs",), need_hidden=True)
            none, one = (None, None, None, None), hidden.new_ones((), dtype=driver.compute_dtype(hidden.dtype))
            _, dhidden, _, _, out = torch.ops.drift_kernels.fused(
                hidden, weight, bias, *rest.flat(), *none, one, jacobian.encode()
            )
            ctx.jacobian = True
            ctx.save_for_backward(dhidden)
            ctx.dtype = hidden.dtype
            return out[0], out.new_empty(0)
        wanted = Call(call.spec, call.head, call.config, ("logprobs", "lse", *(("entropy",) if with_entropy else ())))
        out = torch.ops.drift_kernels.score(hidden, weight, bias, *rest.flat(), wanted.encode())
        logprobs, lse = out[0].clone(), out[1].clone()
        entropy = out[2].clone() if with_entropy else out.new_empty(0)
        ctx.save_for_backward(hidden, weight, bias, lse, entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grad_outputs):
        grad_logprobs, grad_entropy = grad_outputs
        _no_double_backward()
        if grad_logprobs is None and grad_entropy is None:
            return None, None, None, None, None
        if ctx.jacobian:
            (dhidden,) = ctx.saved_tensors
            assert grad_logprobs is not None  # this path has no entropy
            return _scaled(dhidden, -grad_logprobs[:, None], ctx.dtype), None, None, None, None
        hidden, weight, bias, lse, entropy = ctx.saved_tensors
        call: Call = ctx.call
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(lse)
        if "entropy" not in call.outputs:
            grad_entropy = None  # a compiled graph hands in an empty tensor here
        grad_entropy = None if grad_entropy is None else grad_entropy.contiguous()
        saved_entropy = None if grad_entropy is None else entropy
        grads = torch.ops.drift_kernels.logprob_backward(
            hidden,
            weight,
            bias,
            *ctx.rest.flat(),
            grad_logprobs.contiguous(),
            grad_entropy,
            lse,
            saved_entropy,
            call.encode(),
        )
        dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        needs = (call.need_hidden, call.need_weight, call.need_bias)
        made = [g.to(dtype) if need else None for need, g, dtype in zip(needs, grads, dtypes)]
        return made[0], made[1], made[2], None, None
