"""What a teacher can be, and its checks. A teacher gets no gradient; its rows are aligned with the student's.

Left out: teachers with a vocabulary of their own. Their tokens would have to be matched before any divergence is defined.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from drift_kernels import divergences
from drift_kernels.calls import HeadOptions
from drift_kernels.distill_spec import DistillSpec
from drift_kernels.head import Head, as_head
from drift_kernels.inputs import Flat, check_data, flatten


@dataclass(frozen=True, eq=False)
class Teacher:
    """A teacher by its hidden states and head; nothing of the student's head (temperature, softcap, …) is taken over."""

    hidden: (
        Tensor  # of the student's leading shape, [..., D'], without gradient; row i is aligned with the student's row i
    )
    head: Head | Tensor  # [V, D']; may be the student's own head: no gradient reaches it through the teacher


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


AnyTeacher = Teacher | TeacherTopK | TeacherLogprobs


def flatten_teacher(
    teacher: AnyTeacher, student: Flat, spec: DistillSpec
) -> tuple[divergences.TeacherTensors, HeadOptions, float]:
    """The teacher's tensors [T, …], how its logits come from products, and its LoRA scale.

    Raises TypeError or ValueError naming what is wrong, also with `spec`.
    """
    V = student.head.vocabulary
    if isinstance(teacher, Teacher):
        if spec.top_k is None and not spec.tail:
            raise ValueError("tail=False goes with a top_k: over the whole vocabulary there is no tail")
        if spec.top_k is not None and spec.top_k > V:
            raise ValueError(f"top_k={spec.top_k} exceeds the vocabulary of {V}")
        return _flatten_head(teacher, student)
    if isinstance(teacher, TeacherTopK):
        return _flatten_top_k(teacher, student, spec), HeadOptions(), 1.0
    if not isinstance(teacher, TeacherLogprobs):
        raise TypeError(
            f"teacher is a {type(teacher).__name__}; it must be a Teacher, a TeacherTopK or TeacherLogprobs"
        )
    if spec.alpha != 1 or spec.top_k is not None:
        raise ValueError(
            f"alpha={spec.alpha}, top_k={spec.top_k}: TeacherLogprobs gives KL(student‖teacher) by samples; "
            "pass alpha=1.0 and top_k=None"
        )
    logprobs = student.per_entry("teacher.logprobs", teacher.logprobs)
    return divergences.TeacherTensors(sampled=logprobs), HeadOptions(), 1.0


def _flatten_head(teacher: Teacher, student: Flat) -> tuple[divergences.TeacherTensors, HeadOptions, float]:
    check_data("teacher.hidden", teacher.hidden, student.hidden.device)
    targets = student.targets.reshape(student.shape)
    try:
        flat = flatten(teacher.hidden, as_head(teacher.head).detach(), targets, None, None)
    except (TypeError, ValueError) as error:
        raise type(error)(f"teacher: {error}") from None
    if flat.dtype != student.dtype:
        raise TypeError(
            f"teacher.hidden is {flat.hidden.dtype}, hidden {student.hidden.dtype}; fp64 goes with fp64 alone"
        )
    if flat.head.vocabulary != student.head.vocabulary:
        raise ValueError(
            f"the teacher's vocabulary has {flat.head.vocabulary} tokens, the student's {student.head.vocabulary}; "
            "they must agree"
        )
    if flat.head.options.share != student.head.options.share:
        raise NotImplementedError(
            f"teacher.head.parallel={flat.head.parallel} differs from the student's {student.head.parallel}; both heads must "
            "be spread over the ranks in the same way"
        )
    hidden, weight, bias, a, b = flat.operands()
    tensors = divergences.TeacherTensors(
        hidden.detach(), weight, bias, temperature=flat.temperature, lora_a=a, lora_b=b
    )
    return tensors, flat.head.options, 1.0 if flat.head.lora is None else float(flat.head.lora.scale)


def _flatten_top_k(teacher: TeacherTopK, student: Flat, spec: DistillSpec) -> divergences.TeacherTensors:
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
    k, V = ids.shape[-1], student.head.vocabulary
    if not (1 if spec.tail else 2) <= k <= V:
        raise ValueError(f"teacher.ids has {k} tokens a row; it must be 1 … {V}, and at least 2 with tail=False")
    if spec.top_k not in (None, k):
        raise ValueError(f"top_k={spec.top_k}, but the teacher holds {k} tokens a row; pass top_k=None or {k}")
    dtype = student.dtype
    rest = student.per_entry("teacher.rest", teacher.rest)
    return divergences.TeacherTensors(ids=ids.reshape(-1, k), logprobs=logprobs.reshape(-1, k).to(dtype), rest=rest)
