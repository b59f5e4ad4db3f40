"""The only autograd.Functions, and the registration of what they call with `torch.library`.

A fused op makes its gradients in the forward pass; backward scales them by the incoming gradient out of place, so a second
backward over a retained graph gives the same. `linear_logprob` saves log-sum-exps and recomputes in backward, or,
where only `hidden` needs a gradient, keeps ∂logp/∂hidden. Double backward raises.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from drift_kernels import driver
from drift_kernels.calls import Call
from drift_kernels.formulas import NO_TOKENS, Tokens
from drift_kernels.products import gradient_dtype
from drift_kernels.spec import PolicySpec
from drift_kernels.tensors import Grads, Inputs, LoRAHead, compute_dtype

HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor? lora_a, Tensor? lora_b"
REST = "Tensor targets, Tensor? rows, Tensor? active, Tensor? temperature"
TOKENS = ", ".join(f"Tensor? {field.name}" for field in fields(Tokens))
GRADS = "Tensor, Tensor, Tensor, Tensor, Tensor"
torch.library.define(
    "drift_kernels::fused", f"({HEAD}, {REST}, {TOKENS}, Tensor normalizer, str call) -> (Tensor, {GRADS}, Tensor)"
)
torch.library.define("drift_kernels::score", f"({HEAD}, {REST}, str call) -> Tensor")
torch.library.define(
    "drift_kernels::logprob_backward",
    f"({HEAD}, {REST}, Tensor grad_logprobs, Tensor? grad_entropy, Tensor lse, Tensor? entropy, str call) -> ({GRADS})",
)
HEAD_SIZE, REST_SIZE = len(HEAD.split(",")), len(REST.split(","))


@dataclass(frozen=True)
class Head:
    """The tensors of a head and what it is applied to: all that may need a gradient."""

    hidden: Tensor  # [T, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None = None  # [V]
    lora_a: Tensor | None = None  # [r, D]
    lora_b: Tensor | None = None  # [V, r]

    def flat(self) -> tuple[Tensor | None, ...]:
        """In the order of the ops' schemas."""
        return self.hidden, self.weight, self.bias, self.lora_a, self.lora_b


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


def inputs(head_and_rest: tuple, call: Call, tokens: Tokens = NO_TOKENS, weight_grad: Tensor | None = None):
    hidden, weight, bias, a, b, targets, rows, active, temperature = head_and_rest
    lora = None if a is None else LoRAHead(a, b, call.lora_scale)
    return Inputs(hidden, weight, bias, targets, rows, active, temperature, tokens, lora, weight_grad)


def given(grads: Grads, like: Tensor) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) if g is None else g for g in grads.flat())


@torch.library.impl("drift_kernels::fused", ("CPU", "CUDA"))
def _fused(*args):
    head, (*tokens, normalizer, text) = args[: HEAD_SIZE + REST_SIZE], args[HEAD_SIZE + REST_SIZE :]
    call = Call.decode(text)
    loss, grads, outputs = driver.fused(inputs(head, call, Tokens(*tokens)), call, normalizer)
    return (loss, *given(grads, loss), outputs)


@torch.library.impl("drift_kernels::score", ("CPU", "CUDA"))
def _score(*args):
    *head, text = args
    call = Call.decode(text)
    return driver.score(inputs(tuple(head), call), call)


@torch.library.impl("drift_kernels::logprob_backward", ("CPU", "CUDA"))
def _logprob_backward(*args):
    *head, grad_logprobs, grad_entropy, lse, entropy, text = args
    call = Call.decode(text)
    return given(driver.backward(inputs(tuple(head), call), call, grad_logprobs, grad_entropy, lse, entropy), lse)


def fake_grads(head: tuple, call: Call) -> tuple[Tensor, ...]:
    hidden, dtype = head[0], compute_dtype(head[0].dtype)
    of_weight = gradient_dtype(head[1].dtype, dtype, head[1].device) if call.need_weight else dtype
    dtypes = (dtype, of_weight, dtype, dtype, dtype)
    shapes = ((0,) if t is None or not need else t.shape for need, t in zip(call.needs, head))
    return tuple(hidden.new_empty(shape, dtype=kind) for shape, kind in zip(shapes, dtypes))


def fake_outputs(args: tuple, call: Call) -> Tensor:
    hidden, targets = args[0], args[HEAD_SIZE]
    return hidden.new_empty((len(call.outputs), targets.shape[0]), dtype=compute_dtype(hidden.dtype))


@torch.library.register_fake("drift_kernels::fused")
def _fused_fake(*args):
    call, dtype = Call.decode(args[-1]), compute_dtype(args[0].dtype)
    loss = args[0].new_empty((), dtype=dtype)
    return (loss, *fake_grads(args[:HEAD_SIZE], call), fake_outputs(args, call))


@torch.library.register_fake("drift_kernels::score")
def _score_fake(*args):
    return fake_outputs(args, Call.decode(args[-1]))


@torch.library.register_fake("drift_kernels::logprob_backward")
def _logprob_backward_fake(*args):
    return fake_grads(args[:HEAD_SIZE], Call.decode(args[-1]))


def _no_double_backward() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "double backward through a fused loss is not supported: call backward without create_graph=True"
        )


def _scaled(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """grad·scale in `dtype`, without a copy in between, and in grad's own memory where `_is_last_use`."""
    if dtype != grad.dtype:
        return torch.mul(grad, scale, out=torch.empty_like(grad, dtype=dtype))
    if not _is_last_use(grad, scale):
        return grad * scale
    return grad if float(scale) == 1.0 else grad.mul_(scale)


def _is_last_use(grad: Tensor, scale: Tensor) -> bool:
    """Whether the saved gradient itself may leave backward, which saves a second [V, D] and a pass over it.

    Only where reading `scale` costs no synchronisation, and the graph is freed after this backward: whoever gets the tensor
    may add to it in place, and a second backward would see that.
    """
    if grad.device.type != "cpu" or torch.compiler.is_compiling() or scale.numel() != 1:
        return False
    return not torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore[reportAttributeAccessIssue]


class FusedLoss(torch.autograd.Function):
    """(head's five tensors) → (loss, outputs [K, N]); the rest is data."""

    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, a, b, normalizer, rest: Rest, tokens: Tokens, call: Call):
        head = (hidden, weight, bias, a, b)
        if call.accumulate_scale is not None:  # writes into weight.grad: not an op that a graph may move or repeat
            x = inputs((*head, *rest.flat()), call, tokens, weight.grad)
            loss, grads, outputs = driver.fused(x, call, normalizer)
            made = given(replace(grads, weight=None), loss)
        else:
            out = torch.ops.drift_kernels.fused(*head, *rest.flat(), *tokens.flat(), normalizer, call.encode())
            loss, *made, outputs = out
        return finish_forward(ctx, loss, made, outputs, head, call)

    @staticmethod
    def backward(ctx: Any, *grad_outputs):
        return (*finish_backward(ctx, grad_outputs[0]), None, None, None, None)


class PointwiseLoss(torch.autograd.Function):
    """As `FusedLoss`, for a token loss that is a Python function."""

    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, a, b, normalizer, rest: Rest, fn: Callable, tensors: tuple, call: Call):
        head = (hidden, weight, bias, a, b)
        grad_into = None if call.accumulate_scale is None else weight.grad
        x = inputs((*head, *rest.flat()), call, weight_grad=grad_into)
        loss, grads, outputs = driver.pointwise(x, call, fn, tensors, normalizer)
        if grad_into is not None:
            grads = replace(grads, weight=None)
        return finish_forward(ctx, loss, given(grads, loss), outputs, head, call)

    @staticmethod
    def backward(ctx: Any, *grad_outputs):
        return (*finish_backward(ctx, grad_outputs[0]), None, None, None, None, None)


def finish_forward(ctx: Any, loss: Tensor, grads: Any, outputs: Tensor, head: tuple, call: Call):
    ctx.save_for_backward(*grads)
    ctx.needs, ctx.accumulate_scale, ctx.spent = call.needs, call.accumulate_scale, False
    ctx.dtypes = tuple(None if t is None else t.dtype for t in head)
    ctx.mark_non_differentiable(outputs)
    ctx.set_materialize_grads(False)
    return loss, outputs


def finish_backward(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, ...]:
    _no_double_backward()
    if grad_loss is None:
        return (None,) * len(ctx.needs)
    needs = list(ctx.needs)
    if ctx.accumulate_scale is not None:
        few_ulps = 8 * torch.finfo(grad_loss.dtype).eps * abs(ctx.accumulate_scale)  # 1 / 3 is another number in fp32
        if not abs(float(grad_loss) - ctx.accumulate_scale) <= few_ulps:
            raise RuntimeError(
                f"accumulate_into_grad={ctx.accumulate_scale} was added to weight.grad in the forward, but backward scales "
                f"the loss by {float(grad_loss)}: pass that number as accumulate_into_grad, and zero weight.grad"
            )
        if ctx.spent:
            raise RuntimeError(
                "accumulate_into_grad added to weight.grad once, in the forward: a second backward over the retained graph "
                "would leave it out; use KernelConfig(accumulate_into_grad=None)"
            )
        ctx.spent = True
        needs[1] = False  # it is in weight.grad already
    return tuple(
        _scaled(g, grad_loss, dtype) if need else None for need, g, dtype in zip(needs, ctx.saved_tensors, ctx.dtypes)
    )


class LinearLogprobs(torch.autograd.Function):
    """(head's five tensors) → (logprobs, entropy) [N] each, and `further` outputs [K, N] without gradient.

    `entropy` has no elements where nobody asked for a differentiable one.
    """

    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, a, b, rest: Rest, call: Call, further: tuple[str, ...]):
        head = (hidden, weight, bias, a, b)
        with_entropy = "entropy" in call.outputs
        ctx.rest, ctx.call, ctx.jacobian = rest, call, False
        ctx.set_materialize_grads(False)
        if call.need_hidden and not any(call.needs[1:]) and not with_entropy and rest.rows is None:
            # only hidden is differentiated: keep dlogp/dhidden, and backward is a product
            names = tuple(dict.fromkeys(("logprobs", *further)))
            jacobian = replace(call, spec=PolicySpec(objective="reinforce"), outputs=names)
            one = hidden.new_ones((), dtype=compute_dtype(hidden.dtype))
            made = torch.ops.drift_kernels.fused(*head, *rest.flat(), *NO_TOKENS.flat(), one, jacobian.encode())
            ctx.jacobian = True
            ctx.save_for_backward(made[1])
            ctx.dtype = hidden.dtype
            out = made[-1]
            logprobs, entropy = out[0].clone(), out.new_empty(0)
        else:
            names = tuple(dict.fromkeys(("logprobs", "lse", *(("entropy",) if with_entropy else ()), *further)))
            no_needs = dict.fromkeys(("need_hidden", "need_weight", "need_bias", "need_lora_a", "need_lora_b"), False)
            wanted = replace(call, outputs=names, **no_needs)
            out = torch.ops.drift_kernels.score(*head, *rest.flat(), wanted.encode())
            logprobs, lse = out[0].clone(), out[1].clone()
            entropy = out[2].clone() if with_entropy else out.new_empty(0)
            ctx.save_for_backward(*head, lse, entropy)
        extra = out[[names.index(name) for name in further]]
        ctx.mark_non_differentiable(extra)
        return logprobs, entropy, extra

    @staticmethod
    def backward(ctx: Any, *grad_outputs):
        grad_logprobs, grad_entropy, _ = grad_outputs
        _no_double_backward()
        none = (None,) * HEAD_SIZE
        if grad_logprobs is None and grad_entropy is None:
            return (*none, None, None, None)
        if ctx.jacobian:
            (dhidden,) = ctx.saved_tensors
            assert grad_logprobs is not None  # this path has no entropy
            return (_scaled(dhidden, -grad_logprobs[:, None], ctx.dtype), *none[1:], None, None, None)
        *head, lse, entropy = ctx.saved_tensors
        call: Call = ctx.call
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(lse)
        if "entropy" not in call.outputs:
            grad_entropy = None  # a compiled graph hands in an empty tensor here
        grad_entropy = None if grad_entropy is None else grad_entropy.contiguous()
        saved_entropy = None if grad_entropy is None else entropy
        grads = torch.ops.drift_kernels.logprob_backward(
            *head, *ctx.rest.flat(), grad_logprobs.contiguous(), grad_entropy, lse, saved_entropy, call.encode()
        )
        made = (g.to(t.dtype) if need else None for need, g, t in zip(call.needs, grads, head))
        return (*made, None, None, None)
