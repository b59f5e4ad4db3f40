"""The ops that autograd calls, registered with `torch.library`: schemas, implementations, and shapes for tracing."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from drift_kernels import distill_driver, driver, gathered
from drift_kernels.backends.contract import Coefs
from drift_kernels.calls import Call, DistillCall
from drift_kernels.divergences import DistillTokens, TeacherTensors
from drift_kernels.formulas import NO_TOKENS, Tokens
from drift_kernels.products import gradient_dtype
from drift_kernels.tensors import Grads, Inputs, LoRAHead, compute_dtype

Operands = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]  # hidden, weight, bias, LoRA's A and B

HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor? lora_a, Tensor? lora_b"
LAYOUT = "Tensor targets, Tensor? rows, Tensor? active, Tensor? temperature"
HEAD_SIZE, LAYOUT_SIZE = len(HEAD.split(",")), len(LAYOUT.split(","))
GRADS = "Tensor, Tensor, Tensor, Tensor, Tensor"


def _schema(bundle: type, prefix: str = "") -> str:
    return ", ".join(f"Tensor? {prefix}{field.name}" for field in fields(bundle))


TOKENS, TEACHER, LESSONS = _schema(Tokens), _schema(TeacherTensors, "teacher_"), _schema(DistillTokens, "lesson_")
torch.library.define(
    "drift_kernels::fused", f"({HEAD}, {LAYOUT}, {TOKENS}, Tensor normalizer, str call) -> (Tensor, {GRADS}, Tensor)"
)
torch.library.define(
    "drift_kernels::distill",
    f"({HEAD}, {LAYOUT}, {TOKENS}, {TEACHER}, {LESSONS}, Tensor normalizer, str call) -> (Tensor, {GRADS}, Tensor)",
)
torch.library.define("drift_kernels::score", f"({HEAD}, {LAYOUT}, str call) -> Tensor")
torch.library.define("drift_kernels::top_k", f"({HEAD}, {LAYOUT}, int k, str call) -> (Tensor, Tensor, Tensor)")
torch.library.define(
    "drift_kernels::logprob_backward",
    f"({HEAD}, {LAYOUT}, Tensor grad_logprobs, Tensor? grad_entropy, Tensor lse, Tensor lse_low, Tensor? entropy, str call)"
    f" -> ({GRADS})",
)


def driver_inputs(
    operands_and_layout: tuple, call: Call, tokens: Tokens = NO_TOKENS, weight_grad: Tensor | None = None
) -> Inputs:
    """An op's flat tensors as the chunk loop takes them."""
    hidden, weight, bias, a, b, targets, rows, active, temperature = operands_and_layout
    lora = None if a is None else LoRAHead(a, b, call.lora_scale)
    return Inputs(hidden, weight, bias, targets, rows, active, temperature, tokens, lora, weight_grad)


def present(grads: Grads, like: Tensor) -> tuple[Tensor, ...]:
    """Gradients as an op returns them: an empty tensor stands for none."""
    return tuple(like.new_empty(0) if g is None else g for g in grads.flat())


@torch.library.impl("drift_kernels::fused", ("CPU", "CUDA"))
def _fused(*args):
    start = HEAD_SIZE + LAYOUT_SIZE
    (*tokens, normalizer, text) = args[start:]
    call = Call.decode(text)
    x = driver_inputs(args[:start], call, Tokens(*tokens))
    loss, grads, outputs = (gathered if gathered.wanted(call) else driver).fused(x, call, normalizer)
    return (loss, *present(grads, loss), outputs)


def _split(args: tuple) -> tuple[tuple, Tokens, TeacherTensors, DistillTokens]:
    """The operands with their layout, and the three bundles, from the arguments of `distill`."""
    sizes = (HEAD_SIZE + LAYOUT_SIZE, len(fields(Tokens)), len(fields(TeacherTensors)), len(fields(DistillTokens)))
    parts, start = [], 0
    for size in sizes:
        parts.append(args[start : start + size])
        start += size
    return tuple(parts[0]), Tokens(*parts[1]), TeacherTensors(*parts[2]), DistillTokens(*parts[3])


@torch.library.impl("drift_kernels::distill", ("CPU", "CUDA"))
def _distill(*args):
    operands, tokens, teacher, lessons = _split(args)
    call = DistillCall.decode(args[-1])
    x = driver_inputs(operands, call.student, tokens)
    run = gathered.distill if gathered.wanted(call.student) else distill_driver.fused
    loss, grads, outputs = run(x, teacher, lessons, call, args[-2])
    return (loss, *present(grads, loss), outputs)


@torch.library.impl("drift_kernels::score", ("CPU", "CUDA"))
def _score(*args):
    *tensors, text = args
    call = Call.decode(text)
    return (gathered if gathered.wanted(call) else driver).score(driver_inputs(tuple(tensors), call), call)


@torch.library.impl("drift_kernels::top_k", ("CPU", "CUDA"))
def _top_k(*args):
    *tensors, k, text = args
    call = Call.decode(text)
    run = gathered.top_k if gathered.wanted(call) else distill_driver.top_k
    return run(driver_inputs(tuple(tensors), call), k, call)


@torch.library.impl("drift_kernels::logprob_backward", ("CPU", "CUDA"))
def _logprob_backward(*args):
    *tensors, grad_logprobs, grad_entropy, lse, lse_low, entropy, text = args
    call = Call.decode(text)
    x = driver_inputs(tuple(tensors), call)
    run = gathered.backward if gathered.wanted(call) else driver.backward
    coefs = Coefs(lse, grad_logprobs, grad_entropy, entropy, lse_low=lse_low)
    return present(run(x, call, coefs), lse)


def _fake_grads(operands: tuple, call: Call) -> tuple[Tensor, ...]:
    hidden, dtype = operands[0], compute_dtype(operands[0].dtype)
    of_weight = gradient_dtype(operands[1].dtype, dtype, operands[1].device) if call.need_weight else dtype
    dtypes = (dtype, of_weight, dtype, dtype, dtype)
    shapes = ((0,) if t is None or not need else t.shape for need, t in zip(call.needs, operands))
    return tuple(hidden.new_empty(shape, dtype=kind) for shape, kind in zip(shapes, dtypes))


def _fake_outputs(args: tuple, call: Call) -> Tensor:
    hidden, targets = args[0], args[HEAD_SIZE]
    return hidden.new_empty((len(call.outputs), targets.shape[0]), dtype=compute_dtype(hidden.dtype))


def _fake_loss(args: tuple, call: Call) -> tuple[Tensor, ...]:
    loss = args[0].new_empty((), dtype=compute_dtype(args[0].dtype))
    return (loss, *_fake_grads(args[:HEAD_SIZE], call), _fake_outputs(args, call))


@torch.library.register_fake("drift_kernels::fused")
def _fused_fake(*args):
    return _fake_loss(args, Call.decode(args[-1]))


@torch.library.register_fake("drift_kernels::distill")
def _distill_fake(*args):
    return _fake_loss(args, DistillCall.decode(args[-1]).student)


@torch.library.register_fake("drift_kernels::score")
def _score_fake(*args):
    return _fake_outputs(args, Call.decode(args[-1]))


@torch.library.register_fake("drift_kernels::top_k")
def _top_k_fake(*args):
    hidden, targets, k = args[0], args[HEAD_SIZE], args[-2]
    T, dtype = targets.shape[0], compute_dtype(hidden.dtype)
    floats = (hidden.new_empty((T, k), dtype=dtype), hidden.new_empty((T,), dtype=dtype))
    return hidden.new_empty((T, k), dtype=torch.int64), *floats


@torch.library.register_fake("drift_kernels::logprob_backward")
def _logprob_backward_fake(*args):
    return _fake_grads(args[:HEAD_SIZE], Call.decode(args[-1]))
