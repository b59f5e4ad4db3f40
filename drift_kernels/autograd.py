"""The only autograd.Functions, on top of the ops in `registered`.

A fused loss makes its gradients in the forward pass. Backward scales them by the incoming gradient out of place, so that a
second backward over a retained graph gives the same. `linear_logprob` saves log-sum-exps and recomputes in backward; if only
`hidden` needs a gradient, it keeps ∂logp/∂hidden instead. Double backward raises.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from drift_kernels import collectives, distill_driver, driver, gathered, reference
from drift_kernels.calls import Call, DistillCall, Share
from drift_kernels.divergences import DistillTokens, TeacherTensors
from drift_kernels.formulas import NO_TOKENS, Tokens
from drift_kernels.inputs import Flat, Layout
from drift_kernels.plan import unmasked
from drift_kernels.registered import HEAD_SIZE, Operands, driver_inputs, present
from drift_kernels.spec import PolicySpec
from drift_kernels.tensors import Grads, compute_dtype

Result = tuple[Tensor, tuple[Tensor, ...], Tensor]  # loss; gradients of the operands; outputs [K, N]


class Work(Protocol):
    """One loss without its tensors that may need a gradient."""

    @property
    def student(self) -> Call:
        """Which gradients are wanted, and how."""
        ...

    def run(self, operands: Operands, layout: Layout, normalizer: Tensor) -> Result:
        """Loss, gradients and outputs, by kernels."""
        ...

    def reference(self, flat: Flat, normalizer: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss in plain torch, which autograd differentiates, and outputs [N] by name."""
        ...


@dataclass(frozen=True)
class PolicyWork:
    """A loss of single tokens, sequences or the whole call (`PolicySpec`)."""

    tokens: Tokens
    student: Call

    def run(self, operands: Operands, layout: Layout, normalizer: Tensor) -> Result:
        """By the registered op, or directly if dW goes into `weight.grad`."""
        call, tensors = self.student, (*operands, *layout.flat())
        if call.accumulate_scale is None:
            loss, *grads, outputs = torch.ops.drift_kernels.fused(
                *tensors, *self.tokens.flat(), normalizer, call.encode()
            )
            return loss, tuple(grads), outputs
        # writes into weight.grad: not an op that a graph may move or repeat
        x = driver_inputs(tensors, call, self.tokens, operands[1].grad)
        return _accumulated(*driver.fused(x, call, normalizer))

    def reference(self, flat: Flat, normalizer: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """As `Work.reference`."""
        return reference.policy_loss(flat, self.tokens, self.student, normalizer)


@dataclass(frozen=True)
class DistillWork:
    """A divergence from a teacher, alone or with a policy loss."""

    tokens: Tokens
    teacher: TeacherTensors
    lessons: DistillTokens
    call: DistillCall

    @property
    def student(self) -> Call:
        """The student's part of the call."""
        return self.call.student

    def run(self, operands: Operands, layout: Layout, normalizer: Tensor) -> Result:
        """As `PolicyWork.run`."""
        call, student, tensors = self.call, self.call.student, (*operands, *layout.flat())
        if student.accumulate_scale is None:
            data = (*self.tokens.flat(), *self.teacher.flat(), *self.lessons.flat())
            loss, *grads, outputs = torch.ops.drift_kernels.distill(*tensors, *data, normalizer, call.encode())
            return loss, tuple(grads), outputs
        x = driver_inputs(tensors, student, self.tokens, operands[1].grad)
        return _accumulated(*distill_driver.fused(x, self.teacher, self.lessons, call, normalizer))

    def reference(self, flat: Flat, normalizer: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """As `Work.reference`."""
        return reference.distill_loss(flat, self.teacher, self.tokens, self.lessons, self.call, normalizer)


@dataclass(frozen=True)
class PointwiseWork:
    """A token loss that is a Python function."""

    fn: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]
    student: Call

    def run(self, operands: Operands, layout: Layout, normalizer: Tensor) -> Result:
        """Directly: an op's schema takes no function."""
        grad_into = None if self.student.accumulate_scale is None else operands[1].grad
        x = driver_inputs((*operands, *layout.flat()), self.student, weight_grad=grad_into)
        run = gathered.pointwise if gathered.wanted(self.student) else driver.pointwise
        loss, grads, outputs = run(x, self.student, self.fn, self.tensors, normalizer)
        if grad_into is not None:
            return _accumulated(loss, grads, outputs)
        return loss, present(grads, loss), outputs

    def reference(self, flat: Flat, normalizer: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """As `Work.reference`."""
        return reference.pointwise_loss(flat, self.fn, self.tensors, self.student, normalizer)


def fused_loss(flat: Flat, work: Work, normalizer: float | Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, differentiable, and the call's outputs [N] by name."""
    denominator = as_normalizer(normalizer, flat.hidden.new_empty((), dtype=flat.dtype))
    if work.student.config.backend == "reference":
        return work.reference(flat, denominator)
    loss, outputs = FusedLoss.apply(*flat.operands(), flat.layout, work, denominator)
    return loss, dict(zip(work.student.outputs, outputs))


def as_normalizer(value: float | Tensor, like: Tensor) -> Tensor:
    """The denominator as a 0-d tensor of like's dtype and device, without gradient.

    A tensor's value is checked on CPU only; on a GPU, reading it would synchronise. NaN comes from NaN data, and may pass.
    """
    wrong = "normalizer={} must be positive; it is the global denominator of the loss"
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"normalizer has shape {tuple(value.shape)}; it must be a number or a 0-d tensor")
        if value.device.type == "cpu" and not torch.compiler.is_compiling() and float(value) <= 0:
            raise ValueError(wrong.format(float(value)))
        return value.detach().reshape(()).to(like)
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise TypeError(f"normalizer={value!r} must be a number or a 0-d tensor")
    if not value > 0:
        raise ValueError(wrong.format(value))
    return torch.full((), float(value), dtype=like.dtype, device=like.device)


def _accumulated(loss: Tensor, grads: Grads, outputs: Tensor) -> Result:
    """The result without dW, which is in `weight.grad` already."""
    return loss, present(replace(grads, weight=None), loss), outputs


class FusedLoss(torch.autograd.Function):
    """(hidden, weight, bias, A, B) → (loss, outputs [K, N]), differentiable in the loss."""

    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, a, b, layout: Layout, work: Work, normalizer: Tensor):
        operands, call = (hidden, weight, bias, a, b), work.student
        loss, grads, outputs = work.run(operands, layout, normalizer)
        ctx.save_for_backward(*grads)
        ctx.needs, ctx.accumulate_scale, ctx.spent = call.needs, call.accumulate_scale, False
        ctx.share = call.head.share
        ctx.dtypes = tuple(None if t is None else t.dtype for t in operands)
        ctx.mark_non_differentiable(outputs)
        ctx.set_materialize_grads(False)
        return loss, outputs

    @staticmethod
    def backward(ctx: Any, *grad_outputs):
        _no_double_backward()
        grad_loss = grad_outputs[0]
        if grad_loss is None:
            return (None,) * (HEAD_SIZE + 3)
        if ctx.share is not None and not torch.compiler.is_compiling():
            _check_same_scale(grad_loss, ctx.share)
        needs = list(ctx.needs)
        if ctx.accumulate_scale is not None:
            _check_accumulated(ctx, grad_loss)
            ctx.spent = True
            needs[1] = False  # it is in weight.grad already
        scaled = (
            _scaled(g, grad_loss, dtype) if need else None
            for need, g, dtype in zip(needs, ctx.saved_tensors, ctx.dtypes)
        )
        return (*scaled, None, None, None)


def _check_same_scale(grad_loss: Tensor, share: Share) -> None:
    """The weight's gradient is made of all ranks' losses in the forward, so that one factor has to serve for all of them."""
    scales = collectives.gather(grad_loss.detach().reshape(1).double(), share).flatten().tolist()
    if any(scale != scales[0] and not (math.isnan(scale) and math.isnan(scales[0])) for scale in scales):
        raise RuntimeError(
            f"backward scales the loss by {scales} on the ranks of a head with parallel; it must be the same number on all: "
            "put what differs into token weights or the normalizer"
        )


def _check_accumulated(ctx: Any, grad_loss: Tensor) -> None:
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


def _no_double_backward() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "double backward through a fused loss is not supported: call backward without create_graph=True"
        )


def _scaled(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """grad·scale in `dtype`, without a copy in between, and in grad's own memory if `_is_last_use`."""
    if dtype != grad.dtype:
        return torch.mul(grad, scale, out=torch.empty_like(grad, dtype=dtype))
    if not _is_last_use(grad, scale):
        return grad * scale
    return grad if float(scale) == 1.0 else grad.mul_(scale)


def _is_last_use(grad: Tensor, scale: Tensor) -> bool:
    """Whether the saved gradient itself may leave backward, which saves a second [V, D] and a pass over it.

    Only if reading `scale` costs no synchronisation, and the graph is freed after this backward: whoever gets the tensor
    may add to it in place, and a second backward would see that.
    """
    if grad.device.type != "cpu" or torch.compiler.is_compiling() or scale.numel() != 1:
        return False
    return not torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore[reportAttributeAccessIssue]


# --- log-probs, differentiable under any loss on top ---


def logprobs_of(
    flat: Flat, call: Call, further: tuple[str, ...] = ()
) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """Log-probs [N] and, if `call.outputs` has "entropy", entropies, both differentiable; `further` outputs without gradient."""
    with_entropy = "entropy" in call.outputs
    if call.config.backend == "reference":
        stats = reference.linear_logprob(flat, call, flat.mask())
        values = {name: stats[name].detach() for name in further}
        return stats["logprobs"], stats["entropy"] if with_entropy else None, values
    logprobs, entropy, values = LinearLogprobs.apply(*flat.operands(), flat.layout, call, further)
    return logprobs, entropy if with_entropy else None, dict(zip(further, values))


class LinearLogprobs(torch.autograd.Function):
    """(head's five tensors) → (logprobs, entropy) [N] each, and `further` outputs [K, N] without gradient.

    `entropy` has no elements unless a differentiable one is wanted.
    """

    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, a, b, layout: Layout, call: Call, further: tuple[str, ...]):
        head = (hidden, weight, bias, a, b)
        with_entropy = "entropy" in call.outputs
        ctx.layout, ctx.call, ctx.jacobian = layout, call, False
        ctx.set_materialize_grads(False)
        if call.need_hidden and not any(call.needs[1:]) and not with_entropy and layout.rows is None:
            # only hidden is differentiated: keep dlogp/dhidden, and backward is a product
            names = tuple(dict.fromkeys(("logprobs", *further)))
            jacobian = replace(call, spec=PolicySpec(objective="reinforce"), outputs=names)
            one = hidden.new_ones((), dtype=compute_dtype(hidden.dtype))
            results = torch.ops.drift_kernels.fused(*head, *layout.flat(), *NO_TOKENS.flat(), one, jacobian.encode())
            ctx.jacobian = True
            ctx.save_for_backward(results[1])
            ctx.dtype = hidden.dtype
            out = results[-1]
            logprobs, entropy = out[0].clone(), out.new_empty(0)
        else:
            names = tuple(
                dict.fromkeys(("logprobs", "lse", "lse_low", *(("entropy",) if with_entropy else ()), *further))
            )
            out = torch.ops.drift_kernels.score(*head, *layout.flat(), call.scoring(names).encode())
            logprobs, lse, lse_low = (row.clone() for row in out[:3])
            entropy = out[3].clone() if with_entropy else out.new_empty(0)
            ctx.save_for_backward(*head, lse, lse_low, entropy)
        # a list as the index would be copied to the GPU, which blocks
        extra = torch.stack([out[names.index(name)] for name in further]) if further else out[:0]
        ctx.mark_non_differentiable(extra)
        return logprobs, entropy, extra

    @staticmethod
    def backward(ctx: Any, *grad_outputs):
        grad_logprobs, grad_entropy, _ = grad_outputs
        _no_double_backward()
        none = (None,) * HEAD_SIZE
        if grad_logprobs is None and grad_entropy is None:
            return (*none, None, None, None)
        call: Call = ctx.call
        if ctx.jacobian:
            (dhidden,) = ctx.saved_tensors
            assert grad_logprobs is not None  # this path has no entropy
            mask = unmasked(ctx.layout.targets, ctx.layout.active, call.head.ignore_index)
            grad_logprobs = torch.where(mask, grad_logprobs, 0.0)  # a NaN there must not reach hidden.grad
            return (_scaled(dhidden, -grad_logprobs[:, None], ctx.dtype), *none[1:], None, None, None)
        *head, lse, lse_low, entropy = ctx.saved_tensors
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(lse)
        if "entropy" not in call.outputs:
            grad_entropy = None  # a compiled graph hands in an empty tensor here
        grad_entropy = None if grad_entropy is None else grad_entropy.contiguous()
        saved_entropy = None if grad_entropy is None else entropy
        grads = torch.ops.drift_kernels.logprob_backward(
            *head,
            *ctx.layout.flat(),
            grad_logprobs.contiguous(),
            grad_entropy,
            lse,
            lse_low,
            saved_entropy,
            call.encode(),
        )
        cast = (g.to(t.dtype) if need else None for need, g, t in zip(call.needs, grads, head))
        return (*cast, None, None, None)
