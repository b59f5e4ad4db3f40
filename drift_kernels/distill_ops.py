"""The public ops with a teacher: divergences over the vocabulary or a top k, and a policy loss beside them in the same pass.

Shapes and logits as in `ops`; one target a hidden row (where several share one, pass hidden[rows]). Both logits of a chunk
are there at once: 4 units of matrix products for rows that read the teacher, 4 more for those with a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from drift_kernels import backends, distill_driver, divergences, ops
from drift_kernels import exploration as exploring
from drift_kernels.autograd import Rest
from drift_kernels.backends import reference
from drift_kernels.calls import Call, DistillCall, KernelConfig
from drift_kernels.distill_autograd import DistillLoss
from drift_kernels.distill_spec import DistillSpec, ExplorationSpec
from drift_kernels.divergences import DistillTokens
from drift_kernels.formulas import Tokens
from drift_kernels.inputs import (
    OUTPUTS,
    POLICY_OUTPUTS,
    Flat,
    as_normalizer,
    check_data,
    check_outputs,
    check_tensor,
    flatten,
    with_needs,
)
from drift_kernels.ops import LossOutput
from drift_kernels.plan import check_finite, check_temperature
from drift_kernels.spec import PolicySpec
from drift_kernels.teachers import AnyTeacher, TeacherHead, TeacherLogprobs, TeacherTopK, flatten_teacher
from drift_kernels.tensors import Inputs, LoRAHead

TEACHER_OUTPUTS = ("teacher_logprobs", "teacher_entropy", "divergence")
DISTILL_OUTPUTS = (*OUTPUTS, *TEACHER_OUTPUTS)
EXPLORATION_OUTPUTS = ("difference", "rhythm", "gate", "rebellious")


def distill_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: AnyTeacher,
    token_weights: Tensor | None = None,
    *,
    targets: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    spec: DistillSpec = DistillSpec(),
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    lora: LoRAHead | None = None,
    active: Tensor | None = None,
    outputs: Sequence[str] = (),
    normalizer: float | Tensor | None = None,
    config: KernelConfig = KernelConfig(),
) -> LossOutput:
    """Σᵢ token_weightsᵢ·divergenceᵢ(student, teacher) / normalizer, in one pass; see `DistillSpec`.

    teacher        `TeacherHead`, whose rows are aligned with student_hidden's; `TeacherTopK`; or `TeacherLogprobs` of the targets
    token_weights  of student_hidden's leading shape (default 1); rows of weight 0 are never computed
    targets        int64 of that shape: which rows count (`ignore_index` takes no part), and what log-probs are of. Needed for
                   importance_clip and `TeacherLogprobs`; without it every row (in `active`) counts
    old_logprobs   of the targets, for spec.importance_clip
    normalizer     the global denominator; default, the number of rows in this call that may count, whatever their weight
    outputs        per row: logprobs, entropy, lse, is_top1, mean_logits, log_sum_sq_probs of the student; divergence;
                   teacher_logprobs, teacher_entropy with a `TeacherHead`
    Metrics, as (sum, count): divergence, over rows of weight other than 0.
    Raises TypeError or ValueError naming the argument, RuntimeError where the backend cannot run.
    """
    with_targets = targets is not None
    if targets is None:
        targets = torch.zeros(student_hidden.shape[:-1], dtype=torch.int64, device=student_hidden.device)
    flat = flatten(student_hidden, student_weight, targets, bias, temperature, None, active, lora)
    names = _check_outputs(outputs, DISTILL_OUTPUTS, teacher, with_targets)
    _check_kind("spec", spec, DistillSpec)
    weights = flat.per_entry("token_weights", token_weights)
    old = flat.per_entry("old_logprobs", old_logprobs)
    if (spec.importance_clip is not None or isinstance(teacher, TeacherLogprobs)) and not with_targets:
        raise ValueError("targets must be given: importance_clip and TeacherLogprobs read log-probs of tokens")
    _check_importance(spec, old)
    head = ops.head_options(temperature, softcap, logit_scale, ignore_index)
    wanted = tuple(dict.fromkeys((*names, "divergence")))
    call = with_needs(Call(PolicySpec(), head, config, wanted), flat)
    mask = flat.mask(ignore_index)
    if normalizer is None:
        normalizer = ops.or_one(mask.sum(), flat)
    lessons = DistillTokens(weights)
    loss, values = _run(flat, teacher, Tokens(old=old), lessons, call, spec, None, names, normalizer)
    result = LossOutput(loss, ops.unflatten({name: values[name] for name in names}, flat))
    result.metrics = {"divergence": _divergence(values, mask, lessons)}
    return result


def self_distill_loss(
    student_hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    teacher: AnyTeacher,
    advantages: Tensor,
    *,
    distill_weights: Tensor | None,
    policy_weights: Tensor | None,
    distill_coef: float = 1.0,
    has_teacher: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    policy: PolicySpec = PolicySpec(),
    distill: DistillSpec = DistillSpec(),
    exploration: ExplorationSpec | None = None,
    turn_ids: Tensor | None = None,
    rebellious_weights: Tensor | None = None,
    mean_difference: float | Tensor | None = None,
    mean_entropy: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    segment_ids: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    lora: LoRAHead | None = None,
    active: Tensor | None = None,
    outputs: Sequence[str] = (),
    normalizer: float | Tensor | None = None,
    config: KernelConfig = KernelConfig(),
) -> LossOutput:
    """(Σ policy_weightsᵢ·policyᵢ + distill_coef·Σ distill_weightsᵢ·divergenceᵢ) / normalizer in one pass (arXiv 2606.30345).

    Each is what `policy_loss` and `distill_loss` would give, of the same two logits. Arguments of those ops mean the same here.

    distill_weights, policy_weights  of the targets' shape, None = 1: where a router sends each token. A row that neither
                      reads is never computed, and the teacher's logits only where the divergence or exploration reads them
    has_teacher       bool of that shape; False: no divergence there, and exploration weights are 1. None = everywhere
    policy            losses of single tokens; those that read whole sequences or the call raise, as do aggregations over
                      sequences: both terms have one denominator
    exploration       weights made on the way from both entropies and log-probs (`ExplorationSpec`); needs a `TeacherHead`, and
                      reads every row that has a teacher
    turn_ids          int of the targets' shape: which assistant turn a target belongs to, negative outside; with exploration
    rebellious_weights  of the targets' shape: w of `ExplorationSpec`; None = 0
    mean_difference, mean_entropy  the last step's means over all ranks, of the metrics below; None where there was no step
    normalizer        the global denominator; default, the unmasked tokens of this call (1 for aggregation="token_sum")
    outputs           as of both ops, and with exploration: difference, rhythm, gate, rebellious
    Metrics, as (sum, count): divergence, over rows of distill weight other than 0; those of `policy_loss`; with exploration
    difference, rhythm, gate, rebellious and taught_entropy (the student's) over rows with a teacher.
    Raises TypeError or ValueError naming the argument, RuntimeError where the backend cannot run.
    """
    flat = flatten(student_hidden, weight, targets, bias, temperature, None, active, lora)
    allowed = (*POLICY_OUTPUTS, *TEACHER_OUTPUTS, *(EXPLORATION_OUTPUTS if exploration is not None else ()))
    names, mask = _check_outputs(outputs, allowed, teacher, True), flat.mask(ignore_index)
    for name, value, kind in (("policy", policy, PolicySpec), ("distill", distill, DistillSpec)):
        _check_kind(name, value, kind)
    if exploration is not None:
        _check_kind("exploration", exploration, ExplorationSpec)
    if policy.scope != "token" or policy.aggregation.startswith("sequence"):
        raise ValueError(
            f"policy: objective={policy.objective!r} with ratio={policy.ratio!r}, off_policy_threshold="
            f"{policy.off_policy_threshold} and aggregation={policy.aggregation!r} reads more than a token at a time; use "
            "policy_loss for it and distill_loss beside, or a token form"
        )
    check_data("advantages", advantages, flat.targets.device)
    segments, count = ops.segments_of(flat, policy, advantages, cu_seqlens, segment_ids)
    given = ops.given_tokens(
        flat,
        segments,
        count,
        advantages,
        old_logprobs,
        ref_logprobs,
        rollout_logprobs,
        policy_weights,
        "policy_weights",
    )
    tokens, factor = ops.folded_tokens(flat, mask, segments, count, given, policy)
    _check_importance(distill, tokens.old)
    lessons = _lessons(flat, mask, distill_weights, distill_coef, has_teacher)
    if exploration is not None:
        if not isinstance(teacher, TeacherHead):
            raise ValueError(
                f"exploration reads the teacher's entropy: pass a TeacherHead, not {type(teacher).__name__}"
            )
        taught = mask if lessons.taught is None else mask & lessons.taught
        lessons = replace(
            lessons,
            continues=_continues(flat, taught, turn_ids, segments),
            rebellious=flat.per_entry("rebellious_weights", rebellious_weights),
            mean_difference=_mean("mean_difference", mean_difference, flat),
            mean_entropy=_mean("mean_entropy", mean_entropy, flat),
        )
    elif rebellious_weights is not None or turn_ids is not None:
        raise ValueError("rebellious_weights and turn_ids go with exploration=ExplorationSpec(…)")
    dense = ("ratio",) if "clipped" in names else ()  # as in `policy_loss`
    further = () if exploration is None else exploring.NAMES
    wanted = tuple(dict.fromkeys((*names, "clipped", *dense, "divergence", *further)))
    head = ops.head_options(temperature, softcap, logit_scale, ignore_index)
    call = with_needs(Call(policy, head, config, wanted), flat)
    if normalizer is None:
        normalizer = ops.own_normalizer(flat, mask, segments, count, policy)
    loss, values = _run(flat, teacher, tokens, lessons, call, distill, exploration, names, normalizer, policy=True)
    result = LossOutput(loss, ops.unflatten({name: values[name] for name in names}, flat))
    result.metrics = ops.policy_metrics(values, mask, names, factor)
    result.metrics["divergence"] = _divergence(values, mask, lessons)
    taught = mask if lessons.taught is None else mask & lessons.taught
    for name in further:
        result.metrics[name] = (torch.where(taught, values[name], 0.0).sum(), taught.sum())
    return result


def topk_logprobs(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    lora: LoRAHead | None = None,
    active: Tensor | None = None,
    config: KernelConfig = KernelConfig(),
) -> TeacherTopK:
    """The k likeliest tokens of each row of hidden [..., D], likeliest first, with log-probs, and that of the rest. No gradient.

    It makes a teacher to keep or to send: k·12 bytes a row. Of equally likely tokens the lower id comes first. Rows outside
    `active` (int64 positions) are not computed and hold zeros.
    Raises TypeError or ValueError naming the argument, RuntimeError where the backend cannot run.
    """
    targets = torch.zeros(hidden.shape[:-1], dtype=torch.int64, device=hidden.device)
    flat = flatten(hidden.detach(), weight.detach(), targets, bias, temperature, None, active, lora)
    V = flat.weight.shape[0]
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= V:
        raise ValueError(f"k={k!r} must be a whole number from 1 to the vocabulary's size, {V}")
    scale = 1.0 if flat.lora is None else float(flat.lora.scale)
    head = ops.head_options(temperature, softcap, logit_scale, -100)
    call = Call(PolicySpec(), head, replace(config, accumulate_into_grad=None), lora_scale=scale)
    if backends.resolve(config.backend, hidden.device) == "reference":
        with torch.no_grad():
            found = reference.top_k(ops.reference_logits(flat, call, flat.mask(-100)), k, flat.mask(-100))
    else:
        rest = Rest(flat.targets, None, flat.active, flat.temperature)
        tensors = (None if t is None else t.detach() for t in ops.head_of(flat).flat())
        found = torch.ops.drift_kernels.top_k(*tensors, *rest.flat(), k, call.encode())
    ids, logprobs, others = found
    return TeacherTopK(ids.reshape(*flat.shape, k), logprobs.reshape(*flat.shape, k), others.reshape(flat.shape))


def _check_outputs(
    outputs: Sequence[str], allowed: tuple[str, ...], teacher: AnyTeacher, with_targets: bool
) -> tuple[str, ...]:
    names = check_outputs(outputs, allowed)
    for name in names:
        if name in ("logprobs", "is_top1", "teacher_logprobs") and not with_targets:
            raise ValueError(f"outputs has {name!r}, which is of the targets: pass targets")
        if name in ("teacher_logprobs", "teacher_entropy") and not isinstance(teacher, TeacherHead):
            raise ValueError(
                f"outputs has {name!r}, which a {type(teacher).__name__} does not tell: pass a TeacherHead"
            )
    return names


def _check_kind(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name}={value!r} must be a {kind.__name__}")


def _check_importance(spec: DistillSpec, old: Tensor | None) -> None:
    if spec.importance_clip is not None and old is None:
        raise ValueError(f"importance_clip={spec.importance_clip} needs old_logprobs")


def _lessons(flat: Flat, mask: Tensor, weights: Tensor | None, coef: float, taught: Tensor | None) -> DistillTokens:
    given = flat.per_entry("distill_weights", weights)
    if not isinstance(coef, (int, float)) or not math.isfinite(coef):
        raise ValueError(
            f"distill_coef={coef!r} must be a finite number; what differs by token goes into distill_weights"
        )
    if coef != 1:
        given = (torch.ones(mask.shape, dtype=flat.dtype, device=mask.device) if given is None else given) * coef
    if taught is not None:
        check_tensor("has_teacher", taught)
        if taught.dtype != torch.bool or taught.shape != flat.shape:
            raise ValueError(
                f"has_teacher must be bool of the targets' shape {tuple(flat.shape)}; got {tuple(taught.shape)} {taught.dtype}"
            )
        taught = taught.reshape(-1)
    return DistillTokens(given, taught)


def _continues(flat: Flat, taught: Tensor, turn_ids: Tensor | None, segments: Tensor | None) -> Tensor:
    """Which rows have the row before them in the same turn [T] bool."""
    if turn_ids is None:
        raise ValueError("exploration needs turn_ids: entropies are compared within an assistant turn")
    check_tensor("turn_ids", turn_ids)
    if turn_ids.shape != flat.shape or turn_ids.is_floating_point():
        raise ValueError(
            f"turn_ids must be integers of the targets' shape {tuple(flat.shape)}; got {tuple(turn_ids.shape)} {turn_ids.dtype}"
        )
    turns = turn_ids.reshape(-1)
    same = (turns[1:] == turns[:-1]) & (turns[1:] >= 0) & taught[1:] & taught[:-1]
    if segments is not None:
        same = same & (segments[1:] == segments[:-1])
    return torch.cat((torch.zeros_like(taught[:1]), same))


def _mean(name: str, value: float | Tensor | None, flat: Flat) -> Tensor | None:
    if value is None:
        return None
    if isinstance(value, Tensor):
        check_data(name, value, flat.hidden.device)
        if value.numel() != 1:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be a number or a 0-d tensor")
        return value.detach().reshape(()).to(flat.dtype)
    return torch.full((), float(value), dtype=flat.dtype, device=flat.hidden.device)


def _divergence(values: dict[str, Tensor], mask: Tensor, lessons: DistillTokens) -> tuple[Tensor, Tensor]:
    counts = mask if lessons.taught is None else mask & lessons.taught
    if lessons.weights is not None:
        counts = counts & (lessons.weights != 0)
    return torch.where(counts, values["divergence"], 0.0).sum(), counts.sum()


def _run(
    flat: Flat,
    teacher: AnyTeacher,
    tokens: Tokens,
    lessons: DistillTokens,
    student: Call,
    spec: DistillSpec,
    explore: ExplorationSpec | None,
    names: tuple[str, ...],
    normalizer: float | Tensor,
    policy: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and per-token outputs flat by name."""
    known, head, scale = flatten_teacher(teacher, flat, spec)
    teach_all = any(name in TEACHER_OUTPUTS for name in names)
    call = DistillCall(student, spec, head, scale, explore, policy, teach_all)
    denominator = as_normalizer(normalizer, flat.hidden.new_empty((), dtype=flat.dtype))
    if backends.resolve(student.config.backend, flat.hidden.device) == "reference":
        return _reference(flat, known, tokens, lessons, call, denominator)
    rest = Rest(flat.targets, None, flat.active, flat.temperature)
    loss, stacked = DistillLoss.apply(*ops.head_of(flat).flat(), denominator, rest, tokens, known, lessons, call)
    return loss, dict(zip(student.outputs, stacked))


def _reference(
    flat: Flat,
    teacher: divergences.Teacher,
    tokens: Tokens,
    lessons: DistillTokens,
    call: DistillCall,
    denominator: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    options = call.student
    x = Inputs(flat.hidden, flat.weight, flat.bias, flat.targets, None, flat.active, flat.temperature, tokens)
    student_reads, taught = distill_driver.reads(x, lessons, call)
    if options.config.check_finite:
        check_finite(tokens.pick(student_reads))
        check_finite(Tokens(weights=None if lessons.weights is None else lessons.weights[student_reads]))
    z = ops.reference_logits(flat, options, student_reads)
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


def _teacher_logits(teacher: divergences.Teacher, taught: Tensor, flat: Flat, call: DistillCall) -> Tensor:
    assert teacher.hidden is not None
    assert teacher.weight is not None
    check_temperature(None if teacher.temperature is None else teacher.temperature[taught])
    hidden = torch.where(taught[:, None], teacher.hidden, 0.0)
    weight = reference.merged(teacher.weight, teacher.lora_a, teacher.lora_b, call.teacher_lora_scale, flat.dtype)
    return reference.logits(hidden, weight, teacher.bias, teacher.temperature, call.teacher)
