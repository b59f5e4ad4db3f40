"""The public ops with a teacher: divergences over the vocabulary or a top k, and a policy loss in the same pass.

Shapes and logits as in `ops`; one target a hidden row (if several targets share one, pass hidden[rows]). Both logits of a chunk
exist at once: 4 units of matrix products for rows that read the teacher, 4 more for those with a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from drift_kernels import exploration as exploring
from drift_kernels import ops, reference
from drift_kernels.autograd import DistillWork, fused_loss
from drift_kernels.calls import DistillCall, KernelConfig
from drift_kernels.distill_spec import DistillSpec, ExplorationSpec
from drift_kernels.divergences import DistillTokens
from drift_kernels.folding import folded_tokens, or_one, own_normalizer
from drift_kernels.formulas import Tokens
from drift_kernels.head import Head, as_head
from drift_kernels.inputs import Flat, caller_tokens, check_data, check_tensor, flatten
from drift_kernels.needs import call_of
from drift_kernels.outputs import (
    DISTILL_OUTPUTS,
    EXPLORATION_OUTPUTS,
    POLICY_OUTPUTS,
    TEACHER_OUTPUTS,
    LossOutput,
    check_outputs,
    policy_metrics,
)
from drift_kernels.spec import PolicySpec
from drift_kernels.teachers import AnyTeacher, Teacher, TeacherLogprobs, TeacherTopK, flatten_teacher


@dataclass(frozen=True, eq=False)
class Exploration:
    """The exploration of `self_distill_loss`: token weights from entropies and log-probs (`ExplorationSpec`), and their data."""

    spec: ExplorationSpec
    turn_ids: Tensor  # int of the targets' shape: the assistant turn of each target, negative outside
    weights: Tensor | None = (
        None  # of the targets' shape: w of `ExplorationSpec`, the rebellious sample weight; None = 0
    )
    mean_difference: float | Tensor | None = (
        None  # last step's mean of the metric of that name, over all ranks; None = no step yet
    )
    mean_entropy: float | Tensor | None = None  # last step's mean of the metric `taught_entropy`; None = no step yet

    def __post_init__(self) -> None:
        _check_kind("spec", self.spec, ExplorationSpec)


def distill_loss(
    hidden: Tensor,
    head: Head | Tensor,
    teacher: AnyTeacher,
    token_weights: Tensor | None = None,
    *,
    targets: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    spec: DistillSpec = DistillSpec(),
    active: Tensor | None = None,
    outputs: Sequence[str] = (),
    normalizer: float | Tensor | None = None,
    config: KernelConfig = KernelConfig(),
) -> LossOutput:
    """Σᵢ token_weightsᵢ·divergenceᵢ(student, teacher) / normalizer, in one pass; see `DistillSpec`.

    teacher        `Teacher`, whose rows are aligned with hidden's; `TeacherTopK`; or `TeacherLogprobs` of the targets
    token_weights  of hidden's leading shape (default 1); rows of weight 0 are never computed
    targets        int64 of that shape: which rows count (−100 takes no part), and what log-probs are of. Needed for
                   importance_clip and `TeacherLogprobs`; without it every row (in `active`) counts
    old_logprobs   of the targets, for spec.importance_clip
    normalizer     the global denominator; default, the number of rows in this call that may count, whatever their weight
    outputs        per row: logprobs, entropy, lse, is_top1, mean_logits, log_sum_sq_probs of the student; divergence;
                   teacher_logprobs, teacher_entropy with a `Teacher`
    Metrics, as (sum, count): divergence, over rows of weight other than 0.
    Raises TypeError or ValueError naming the argument, RuntimeError if the backend cannot run.
    """
    with_targets = targets is not None
    if targets is None:
        targets = torch.zeros(hidden.shape[:-1], dtype=torch.int64, device=hidden.device)
    flat = flatten(hidden, head, targets, None, active)
    names = _check_outputs(outputs, DISTILL_OUTPUTS, teacher, with_targets)
    _check_kind("spec", spec, DistillSpec)
    weights = flat.per_entry("token_weights", token_weights)
    old = flat.per_entry("old_logprobs", old_logprobs)
    if (spec.importance_clip is not None or isinstance(teacher, TeacherLogprobs)) and not with_targets:
        raise ValueError("targets must be given: importance_clip and TeacherLogprobs read log-probs of tokens")
    _check_importance(spec, old)
    wanted = tuple(dict.fromkeys((*names, "divergence")))
    call = call_of(flat, PolicySpec(), config, wanted)
    mask, lessons = flat.mask(), DistillTokens(weights)
    if normalizer is None:
        normalizer = or_one(mask.sum(), flat.dtype)
    work = _work(flat, teacher, Tokens(old=old), lessons, DistillCall(call, spec, call.head), names)
    loss, values = fused_loss(flat, work, normalizer)
    metrics = {"divergence": _divergence(values, mask, lessons)}
    return LossOutput(loss, flat.unflatten({name: values[name] for name in names}), metrics)


def self_distill_loss(
    hidden: Tensor,
    head: Head | Tensor,
    targets: Tensor,
    teacher: AnyTeacher | None,
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
    exploration: Exploration | None = None,
    cu_seqlens: Tensor | None = None,
    segment_ids: Tensor | None = None,
    active: Tensor | None = None,
    outputs: Sequence[str] = (),
    normalizer: float | Tensor | None = None,
    config: KernelConfig = KernelConfig(),
) -> LossOutput:
    """(Σ policy_weightsᵢ·policyᵢ + distill_coef·Σ distill_weightsᵢ·divergenceᵢ) / normalizer in one pass (arXiv 2606.30345).

    Each is what `policy_loss` and `distill_loss` would give, of the same two logits. Arguments of those ops mean the same here.

    distill_weights, policy_weights  of the targets' shape, None = 1: where a router sends each token. A row that neither
                      reads is never computed, and the teacher's logits only for rows that the divergence or exploration reads
    has_teacher       bool of that shape; False: no divergence there, and exploration weights are 1. None = everywhere
    policy            losses of single tokens; those that read whole sequences or the call raise, as do aggregations over
                      sequences: both terms have one denominator
    exploration       token weights made from both entropies and log-probs (`Exploration`); needs a `Teacher`, and reads every
                      row that has a teacher
    teacher           None: exactly `policy_loss` with policy_weights as token_weights
    normalizer        the global denominator; default, the unmasked tokens of this call (1 for aggregation="token_sum")
    outputs           as of both ops, and with exploration: difference, rhythm, gate, rebellious
    Metrics, as (sum, count): divergence, over rows of distill weight other than 0; those of `policy_loss`; with exploration
    difference, rhythm, gate, rebellious and taught_entropy (the student's) over rows with a teacher.
    Raises TypeError or ValueError naming the argument, RuntimeError if the backend cannot run.
    """
    for name, value, kind in (("policy", policy, PolicySpec), ("distill", distill, DistillSpec)):
        _check_kind(name, value, kind)
    if exploration is not None:
        _check_kind("exploration", exploration, Exploration)
    if teacher is None:
        if exploration is not None or has_teacher is not None or distill_weights is not None:
            raise ValueError("distill_weights, has_teacher and exploration must be None if teacher is None")
        data = {"old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs, "rollout_logprobs": rollout_logprobs}
        layout = {"cu_seqlens": cu_seqlens, "segment_ids": segment_ids, "active": active, "normalizer": normalizer}
        extra = {"token_weights": policy_weights, "spec": policy, "outputs": outputs, "config": config}
        return ops.policy_loss(hidden, head, targets, advantages, **data, **layout, **extra)
    flat = flatten(hidden, head, targets, None, active)
    allowed = (*POLICY_OUTPUTS, *TEACHER_OUTPUTS, *(EXPLORATION_OUTPUTS if exploration is not None else ()))
    names, mask = _check_outputs(outputs, allowed, teacher, True), flat.mask()
    _check_token_scope(policy)
    data = caller_tokens(
        flat,
        mask,
        policy,
        advantages,
        old=old_logprobs,
        ref=ref_logprobs,
        rollout=rollout_logprobs,
        weights=policy_weights,
        weights_name="policy_weights",
        cu_seqlens=cu_seqlens,
        segment_ids=segment_ids,
    )
    tokens, factor = folded_tokens(data, mask, policy)
    _check_importance(distill, tokens.old)
    lessons = _lessons(flat, mask, distill_weights, distill_coef, has_teacher)
    taught = mask if lessons.taught is None else mask & lessons.taught
    if exploration is not None:
        if not isinstance(teacher, Teacher):
            raise ValueError(f"exploration reads the teacher's entropy: pass a Teacher, not {type(teacher).__name__}")
        lessons = _explored(flat, lessons, exploration, taught, data.segments)
    dense = ("ratio",) if "clipped" in names else ()  # as in `policy_loss`
    further = () if exploration is None else exploring.NAMES
    wanted = tuple(dict.fromkeys((*names, "clipped", *dense, "divergence", *further)))
    student = call_of(flat, policy, config, wanted)
    if normalizer is None:
        normalizer = own_normalizer(data, mask, policy, flat.dtype)
    spec = None if exploration is None else exploration.spec
    call = DistillCall(student, distill, student.head, exploration=spec, policy=True)
    loss, values = fused_loss(flat, _work(flat, teacher, tokens, lessons, call, names), normalizer)
    metrics = policy_metrics(values, mask, names, factor, data.weights)
    metrics["divergence"] = _divergence(values, mask, lessons)
    for name in further:
        metrics[name] = (torch.where(taught, values[name], 0.0).sum(), taught.sum())
    return LossOutput(loss, flat.unflatten({name: values[name] for name in names}), metrics)


def topk_logprobs(
    hidden: Tensor,
    head: Head | Tensor,
    k: int,
    *,
    active: Tensor | None = None,
    config: KernelConfig = KernelConfig(),
) -> TeacherTopK:
    """The k likeliest tokens of each row of hidden [..., D], likeliest first, with log-probs, and that of the rest. No gradient.

    It makes a teacher to keep or to send: k·12 bytes a row. Of equally likely tokens the lower id comes first. Rows outside
    `active` (int64 positions) are not computed and hold zeros.
    Raises TypeError or ValueError naming the argument, RuntimeError if the backend cannot run.
    """
    targets = torch.zeros(hidden.shape[:-1], dtype=torch.int64, device=hidden.device)
    flat = flatten(hidden.detach(), as_head(head).detach(), targets, None, active)
    V = flat.head.vocabulary
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= V:
        raise ValueError(f"k={k!r} must be a whole number from 1 to the vocabulary's size, {V}")
    call = call_of(flat, PolicySpec(), replace(config, accumulate_into_grad=None), ())
    if call.config.backend == "reference":
        ids, logprobs, rest = reference.topk_logprobs(flat, k, call)
    else:
        ids, logprobs, rest = torch.ops.drift_kernels.top_k(*flat.operands(), *flat.layout.flat(), k, call.encode())
    return TeacherTopK(ids.reshape(*flat.shape, k), logprobs.reshape(*flat.shape, k), rest.reshape(flat.shape))


def _check_outputs(
    outputs: Sequence[str], allowed: tuple[str, ...], teacher: AnyTeacher, with_targets: bool
) -> tuple[str, ...]:
    names = check_outputs(outputs, allowed)
    for name in names:
        if name in ("logprobs", "is_top1", "teacher_logprobs") and not with_targets:
            raise ValueError(f"outputs has {name!r}, which is of the targets: pass targets")
        if name in ("teacher_logprobs", "teacher_entropy") and not isinstance(teacher, Teacher):
            raise ValueError(f"outputs has {name!r}, which a {type(teacher).__name__} does not tell: pass a Teacher")
    return names


def _check_kind(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name}={value!r} must be a {kind.__name__}")


def _check_token_scope(policy: PolicySpec) -> None:
    if policy.scope != "token" or policy.aggregation.startswith("sequence"):
        raise ValueError(
            f"policy: objective={policy.objective!r} with ratio={policy.ratio!r}, off_policy_threshold="
            f"{policy.off_policy_threshold} and aggregation={policy.aggregation!r} reads more than a token at a time; use "
            "policy_loss for it and distill_loss for the divergence, or a token form"
        )


def _check_importance(spec: DistillSpec, old: Tensor | None) -> None:
    if spec.importance_clip is not None and old is None:
        raise ValueError(f"importance_clip={spec.importance_clip} needs old_logprobs")


def _lessons(
    flat: Flat, mask: Tensor, distill_weights: Tensor | None, coef: float, has_teacher: Tensor | None
) -> DistillTokens:
    weights = flat.per_entry("distill_weights", distill_weights)
    if not isinstance(coef, (int, float)) or not math.isfinite(coef):
        raise ValueError(
            f"distill_coef={coef!r} must be a finite number; what differs by token goes into distill_weights"
        )
    if coef != 1:
        weights = (torch.ones(mask.shape, dtype=flat.dtype, device=mask.device) if weights is None else weights) * coef
    if has_teacher is not None:
        check_tensor("has_teacher", has_teacher)
        if has_teacher.dtype != torch.bool or has_teacher.shape != flat.shape:
            raise ValueError(
                f"has_teacher must be bool of the targets' shape {tuple(flat.shape)}; got {tuple(has_teacher.shape)} "
                f"{has_teacher.dtype}"
            )
        has_teacher = has_teacher.reshape(-1)
    return DistillTokens(weights, has_teacher)


def _explored(
    flat: Flat, lessons: DistillTokens, exploration: Exploration, taught: Tensor, segments: Tensor | None
) -> DistillTokens:
    """`lessons` with the data that exploration reads per row."""
    turn_ids = exploration.turn_ids
    check_tensor("exploration.turn_ids", turn_ids)
    if turn_ids.shape != flat.shape or turn_ids.is_floating_point():
        raise ValueError(
            f"exploration.turn_ids must be integers of the targets' shape {tuple(flat.shape)}; got {tuple(turn_ids.shape)} "
            f"{turn_ids.dtype}"
        )
    turns = turn_ids.reshape(-1)
    same_turn = (turns[1:] == turns[:-1]) & (turns[1:] >= 0) & taught[1:] & taught[:-1]
    if segments is not None:
        same_turn = same_turn & (segments[1:] == segments[:-1])
    return replace(
        lessons,
        continues=torch.cat((torch.zeros_like(taught[:1]), same_turn)),
        rebellious=flat.per_entry("exploration.weights", exploration.weights),
        mean_difference=_mean("exploration.mean_difference", exploration.mean_difference, flat),
        mean_entropy=_mean("exploration.mean_entropy", exploration.mean_entropy, flat),
    )


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


def _work(
    flat: Flat,
    teacher: AnyTeacher,
    tokens: Tokens,
    lessons: DistillTokens,
    call: DistillCall,
    names: tuple[str, ...],
) -> DistillWork:
    tensors, options, scale = flatten_teacher(teacher, flat, call.distill)
    teach_all = any(name in TEACHER_OUTPUTS for name in names)
    call = replace(call, teacher=options, teacher_lora_scale=scale, teach_all=teach_all)
    return DistillWork(tokens, tensors, lessons, call)
