"""What a teacher can be, and its checks. A teacher gets no gradient; its rows are aligned with the student's.

Left out: teachers with a vocabulary of their own. Their tokens would have to be matched before any divergence is defined.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from drift_kernels import divergences
from drift_kernels.calls import HeadOptions
from drift_kernels.distill_spec import DistillSpec
from drift_kernels.inputs import Flat, check_data, flatten
from drift_kernels.tensors import LoRAHead


@dataclass(frozen=True)
class TeacherHead:
    """A teacher by its hidden states and head; nothing of the student's (temperature, softcap, …) is taken over."""

    hidden: (
        Tensor  # of the student's leading shape, [..., D'], without gradient; row i is what the teacher sees of token i
    )
    weight: Tensor  # [V, D']; may be the student's own, and require grad: none reaches it through the teacher
    bias: Tensor | None = None  # [V]
    lora: LoRAHead | None = None
    temperature: float | Tensor = 1.0  # a number, or one a row
    softcap: float | None = None
    logit_scale: float = 1.0


@dataclass(frozen=True)
class TeacherTopK:
    """A teacher by its likeliest tokens, as `topk_logprobs` makes it or another server did."""

    ids: Tensor  # [..., k] int64, distinct within a row
    logprobs: Tensor  # [..., k]
    rest: Tensor | None = None  # [...] log-prob of all other tokens together; None = 1 − Σp, at least 2⁻²⁴


@dataclass(frozen=True)
class TeacherLogprobs:
    """A teacher by the log-probs of the targets alone: sg(logp − teacher's logp)·logp in place of a divergence.

    That has, over tokens sampled from the student, the gradient of KL(student‖teacher): it goes with alpha = 1.
    """

    logprobs: Tensor  # of the targets' shape


AnyTeacher = TeacherHead | TeacherTopK | TeacherLogprobs


def flatten_teacher(
    teacher: AnyTeacher, student: Flat, spec: DistillSpec
) -> tuple[divergences.Teacher, HeadOptions, float]:
    """The teacher's tensors [T, …], how its logits come from products, and its LoRA scale.

    Raises TypeError or ValueError naming what is wrong, also with `spec`.
    """
    V = student.weight.shape[0]
    if isinstance(teacher, TeacherHead):
        if spec.top_k is None and not spec.tail:
            raise ValueError("tail=False goes with a top_k: over the whole vocabulary there is no tail")
        if spec.top_k is not None and spec.top_k > V:
            raise ValueError(f"top_k={spec.top_k} exceeds the vocabulary of {V}")
        return _flatten_head(teacher, student)
    if isinstance(teacher, TeacherTopK):
        return _flatten_top_k(teacher, student, spec), HeadOptions(), 1.0
    if not isinstance(teacher, TeacherLogprobs):
        raise TypeError(
            f"teacher is a {type(teacher).__name__}; it must be a TeacherHead, a TeacherTopK or TeacherLogprobs"
        )
    if spec.alpha != 1 or spec.top_k is not None:
        raise ValueError(
            f"alpha={spec.alpha}, top_k={spec.top_k}: TeacherLogprobs gives KL(student‖teacher) by samples; "
            "pass alpha=1.0 and top_k=None"
        )
    logprobs = student.per_entry("teacher.logprobs", teacher.logprobs)
    return divergences.Teacher(sampled=logprobs), HeadOptions(), 1.0


def _flatten_head(teacher: TeacherHead, student: Flat) -> tuple[divergences.Teacher, HeadOptions, float]:
    check_data("teacher.hidden", teacher.hidden, student.hidden.device)
    targets = student.targets.reshape(student.shape)
    try:
        flat = flatten(
            teacher.hidden, teacher.weight, targets, teacher.bias, teacher.temperature, None, None, teacher.lora
        )
    except (TypeError, ValueError) as error:
        raise type(error)(f"teacher: {error}") from None
    if flat.dtype != student.dtype:
        raise TypeError(
            f"teacher.hidden is {flat.hidden.dtype}, hidden {student.hidden.dtype}; fp64 goes with fp64 alone"
        )
    if flat.weight.shape[0] != student.weight.shape[0]:
        raise ValueError(
            f"the teacher's vocabulary has {flat.weight.shape[0]} tokens, the student's {student.weight.shape[0]}; "
            "they must agree"
        )
    number = 1.0 if isinstance(teacher.temperature, Tensor) else teacher.temperature
    head = HeadOptions(number, teacher.softcap, teacher.logit_scale)
    bias = None if flat.bias is None else flat.bias.detach()
    made = divergences.Teacher(flat.hidden.detach(), flat.weight.detach(), bias, temperature=flat.temperature)
    if flat.lora is None:
        return made, head, 1.0
    made = replace(made, lora_a=flat.lora.A.detach(), lora_b=flat.lora.B.detach())
    return made, head, float(flat.lora.scale)


def _flatten_top_k(teacher: TeacherTopK, student: Flat, spec: DistillSpec) -> divergences.Teacher:
    for name, value in (("ids", teacher.ids), ("logprobs", teacher.logprobs), ("rest", teacher.rest)):
        if value is not None:
            check_data(f"teacher.{name}", value, student.hidden.device)
    ids, logprobs, shape = teacher.ids, teacher.logprobs, tuple(student.shape)
    if ids.dtype != torch.int64 or ids.shape[:-1] != student.shape or ids.dim() != len(shape) + 1:
        raise ValueError(f"teacher.ids must be int64 {(*shape, 'k')}; got {tuple(ids.shape)} {ids.dtype}")
    if logprobs.shape != ids.shape or not logprobs.is_floating_point():
        raise ValueError(
            f"teacher.logprobs must be floats of the ids' shape {tuple(ids.shape)}; got {tuple(logprobs.shape)} {logprobs.dtype}"
        )
    k, V = ids.shape[-1], student.weight.shape[0]
    if not (1 if spec.tail else 2) <= k <= V:
        raise ValueError(f"teacher.ids has {k} tokens a row; it must be 1 … {V}, and at least 2 with tail=False")
    if spec.top_k not in (None, k):
        raise ValueError(f"top_k={spec.top_k}, but the teacher holds {k} tokens a row; pass top_k=None or {k}")
    dtype = student.dtype
    rest = student.per_entry("teacher.rest", teacher.rest)
    return divergences.Teacher(ids=ids.reshape(-1, k), logprobs=logprobs.reshape(-1, k).to(dtype), rest=rest)
