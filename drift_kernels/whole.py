"""The public ops on the `reference` backend: whole [T, V] logits, and autograd does the rest."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from drift_kernels import distill_driver, divergences
from drift_kernels.backends import reference
from drift_kernels.calls import Call, DistillCall
from drift_kernels.divergences import DistillTokens
from drift_kernels.formulas import Tokens
from drift_kernels.inputs import Flat
from drift_kernels.plan import check_finite, check_targets, check_temperature, counting, distillation_rows
from drift_kernels.tensors import Inputs


def logits(flat: Flat, call: Call, mask: Tensor) -> Tensor:
    """Logits [T, V] of the hidden rows that the entries in `mask` [N] read; of zeros elsewhere."""
    check_targets(flat.targets[mask], flat.head.vocabulary, call.head.ignore_index)
    read = mask
    if flat.rows is not None:
        read = torch.zeros_like(flat.hidden[:, 0], dtype=torch.bool).index_fill(0, flat.rows[mask], True)
    check_temperature(None if flat.temperature is None else flat.temperature[read])
    hidden = torch.where(read[:, None], flat.hidden, 0.0)  # so that a masked NaN reaches nothing
    _, weight, bias, a, b = flat.operands()
    weight = reference.merged(weight, a, b, call.lora_scale, flat.dtype)
    return reference.logits(hidden, weight, bias, flat.temperature, call.head)


def statistics(flat: Flat, call: Call, mask: Tensor) -> dict[str, Tensor]:
    """Per-entry statistics [N] by name, differentiable."""
    return reference.statistics(logits(flat, call, mask), flat.targets, flat.rows, mask)


def policy(flat: Flat, tokens: Tokens, call: Call, normalizer: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """As `autograd.PolicyWork`: the loss, and the call's outputs [N] by name."""
    mask = flat.mask()
    if call.config.check_finite:
        check_finite(tokens.pick(counting(flat.targets, flat.active, tokens, call)))
    read = counting(flat.targets, flat.active, replace(tokens, advantages=None), replace(call, outputs=()))
    stats = statistics(flat, call, read)
    terms = reference.policy(stats, read, tokens, call.spec)
    loss = terms["loss"].sum() / normalizer
    if bool(
        (read != mask).any()
    ):  # outputs are of every unmasked entry, but a NaN of one without a weight reaches no gradient
        with torch.no_grad():
            stats = statistics(flat, call, mask)
            terms = reference.policy(stats, mask, tokens, call.spec)
    return loss, {name: (stats | terms)[name].detach() for name in call.outputs}


def distill(
    flat: Flat,
    teacher: divergences.TeacherTensors,
    tokens: Tokens,
    lessons: DistillTokens,
    call: DistillCall,
    denominator: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """As `autograd.DistillWork`: the loss, and the call's outputs [N] by name."""
    options = call.student
    x = Inputs(flat.hidden, flat.head.weight, flat.head.bias, flat.targets, None, flat.active, flat.temperature, tokens)
    student_reads, taught = distillation_rows(x, lessons, call)
    if options.config.check_finite:
        check_finite(tokens.pick(student_reads))
        check_finite(Tokens(weights=None if lessons.weights is None else lessons.weights[student_reads]))
    z = logits(flat, options, student_reads)
    stats = reference.statistics(z, flat.targets, None, student_reads)
    teacher_z, teacher_stats = None, {}
    if teacher.hidden is not None:
        teacher_z = _teacher_logits(teacher, taught, flat, call)
        teacher_stats = reference.statistics(teacher_z, flat.targets, None, taught)
    seen, nothing = {name: value.detach() for name, value in stats.items()}, flat.hidden.new_zeros(1, dtype=flat.dtype)
    lessons = replace(lessons, taught=taught)
    weights, factor, values = distill_driver.weigh(seen, teacher_stats, (nothing, nothing), tokens, lessons, call)
    divergence = reference.distillation(z, stats, teacher_z, teacher, taught.nonzero().squeeze(1), call.distill)
    loss = torch.where(weights != 0, weights * divergence, 0.0)
    if call.policy:
        if factor is not None:
            tokens = replace(tokens, weights=factor if tokens.weights is None else tokens.weights * factor)
        terms = reference.policy(stats, student_reads, tokens, options.spec)
        loss, values = loss + terms.pop("loss"), values | terms
    values = stats | values | {f"teacher_{name}": value for name, value in teacher_stats.items()}
    values["divergence"] = divergence
    return loss.sum() / denominator, {name: values[name].detach() for name in options.outputs}


def _teacher_logits(teacher: divergences.TeacherTensors, taught: Tensor, flat: Flat, call: DistillCall) -> Tensor:
    assert teacher.hidden is not None
    assert teacher.weight is not None
    check_temperature(None if teacher.temperature is None else teacher.temperature[taught])
    hidden = torch.where(taught[:, None], teacher.hidden, 0.0)
    weight = reference.merged(teacher.weight, teacher.lora_a, teacher.lora_b, call.teacher_lora_scale, flat.dtype)
    return reference.logits(hidden, weight, teacher.bias, teacher.temperature, call.teacher)
