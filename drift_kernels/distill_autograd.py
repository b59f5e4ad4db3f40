"""The autograd.Function of losses with a teacher, and the registration of their ops; everything as in `autograd`."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from drift_kernels import autograd, distill_driver
from drift_kernels.autograd import HEAD, HEAD_SIZE, REST, REST_SIZE, TOKENS, Rest
from drift_kernels.calls import Call, DistillCall
from drift_kernels.divergences import DistillTokens, Teacher
from drift_kernels.formulas import Tokens
from drift_kernels.tensors import compute_dtype

_TEACHER = ", ".join(f"Tensor? teacher_{field.name}" for field in fields(Teacher))
_LESSONS = ", ".join(f"Tensor? lesson_{field.name}" for field in fields(DistillTokens))
torch.library.define(
    "drift_kernels::distill",
    f"({HEAD}, {REST}, {TOKENS}, {_TEACHER}, {_LESSONS}, Tensor normalizer, str call) -> (Tensor, {autograd.GRADS}, Tensor)",
)
torch.library.define("drift_kernels::top_k", f"({HEAD}, {REST}, int k, str call) -> (Tensor, Tensor, Tensor)")


def _split(args: tuple) -> tuple[tuple, Tokens, Teacher, DistillTokens]:
    """Head and rest, and the three bundles, of what an op was given."""
    sizes = (HEAD_SIZE + REST_SIZE, len(fields(Tokens)), len(fields(Teacher)), len(fields(DistillTokens)))
    parts, start = [], 0
    for size in sizes:
        parts.append(args[start : start + size])
        start += size
    return tuple(parts[0]), Tokens(*parts[1]), Teacher(*parts[2]), DistillTokens(*parts[3])


@torch.library.impl("drift_kernels::distill", ("CPU", "CUDA"))
def _distill(*args):
    head, tokens, teacher, lessons = _split(args)
    call = DistillCall.decode(args[-1])
    x = autograd.inputs(head, call.student, tokens)
    loss, grads, outputs = distill_driver.fused(x, teacher, lessons, call, args[-2])
    return (loss, *autograd.given(grads, loss), outputs)


@torch.library.register_fake("drift_kernels::distill")
def _distill_fake(*args):
    call = DistillCall.decode(args[-1]).student
    loss = args[0].new_empty((), dtype=compute_dtype(args[0].dtype))
    return (loss, *autograd.fake_grads(args[:HEAD_SIZE], call), autograd.fake_outputs(args, call))


@torch.library.impl("drift_kernels::top_k", ("CPU", "CUDA"))
def _top_k(*args):
    *head, k, text = args
    call = Call.decode(text)
    return distill_driver.top_k(autograd.inputs(tuple(head), call), k, call)


@torch.library.register_fake("drift_kernels::top_k")
def _top_k_fake(*args):
    hidden, targets, k = args[0], args[HEAD_SIZE], args[-2]
    T, dtype = targets.shape[0], compute_dtype(hidden.dtype)
    made = (hidden.new_empty((T, k), dtype=dtype), hidden.new_empty((T,), dtype=dtype))
    return hidden.new_empty((T, k), dtype=torch.int64), *made


class DistillLoss(torch.autograd.Function):
    """(the student head's five tensors) → (loss, outputs [K, T]); the rest is data, the teacher too."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        normalizer: Tensor,
        rest: Rest,
        tokens: Tokens,
        teacher: Teacher,
        lessons: DistillTokens,
        call: DistillCall,
    ):
        head = (hidden, weight, bias, a, b)
        # Writing into weight.grad is not an op that a graph may move or repeat.
        if call.student.accumulate_scale is not None:
            x = autograd.inputs((*head, *rest.flat()), call.student, tokens, weight.grad)
            loss, grads, outputs = distill_driver.fused(x, teacher, lessons, call, normalizer)
            made = autograd.given(replace(grads, weight=None), loss)
        else:
            data = (*rest.flat(), *tokens.flat(), *teacher.flat(), *lessons.flat())
            loss, *made, outputs = torch.ops.drift_kernels.distill(*head, *data, normalizer, call.encode())
        return autograd.finish_forward(ctx, loss, made, outputs, head, call.student)

    @staticmethod
    def backward(ctx: Any, *grad_outputs):
        return (*autograd.finish_backward(ctx, grad_outputs[0]), None, None, None, None, None, None)
