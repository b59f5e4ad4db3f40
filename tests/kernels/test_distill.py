"""Distillation against plain autograd over full logits, written out here."""

import math

import loose
import pytest
import torch
from distill_cases import (
    ALPHAS,
    BACKENDS,
    CASE,
    HEAD,
    MANY,
    MODES,
    OLD,
    RANDOM,
    TEACHER,
    TEACHER_HIDDEN,
    TEACHER_WEIGHT,
    WEIGHTS,
    jsd,
    logits_of,
    loss_of,
    over_top_k,
    rows_of,
    same,
    stored,
    teacher_log_probs,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import drift_kernels as dk
from drift_kernels import cpu_sweep
from drift_kernels.testing import gradients, make_case, within_budget


def exact_of(divergence):
    """Σ weight·divergence / tokens of divergence(log_s, log_t) [T]."""

    def run(h, w, b):
        log_s = logits_of(h, w, b, **HEAD).log_softmax(-1)
        mask = CASE.targets >= 0
        return torch.where(mask, WEIGHTS * divergence(log_s, teacher_log_probs()), 0.0).sum() / mask.sum()

    return run


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_over_the_vocabulary_in_double(alpha, backend):
    config = dk.KernelConfig(backend=backend, workspace_bytes=MANY.workspace_bytes)
    same(loss_of(TEACHER, dk.DistillSpec(alpha), config), exact_of(lambda s, t: jsd(s, t, alpha)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_over_a_top_k_in_double(alpha, tail, backend):
    config = dk.KernelConfig(backend=backend, workspace_bytes=MANY.workspace_bytes)
    kept = stored()
    of_student = exact_of(lambda s, t: over_top_k(s, t, s.topk(6).indices, tail, alpha))
    same(loss_of(TEACHER, dk.DistillSpec(alpha, 6, tail), config), of_student, rtol=1e-7)  # 1 − Σp cancels here
    of_teacher = exact_of(lambda s, t: over_top_k(s, t.topk(7).values, t.topk(7).indices, tail, alpha))
    for teacher in (kept, dk.TeacherTopK(kept.ids, kept.logprobs)):
        same(loss_of(teacher, dk.DistillSpec(alpha, tail=tail), config), of_teacher, rtol=1e-7)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_all_tokens_as_top_k_are_the_vocabulary(alpha):
    for teacher in (TEACHER, stored(61)):
        for tail in (True, False):
            spec = dk.DistillSpec(alpha, 61, tail)
            same(loss_of(teacher, spec), loss_of(TEACHER, dk.DistillSpec(alpha)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_sampled_token_alone(backend):
    """sg(logp − teacher's)·logp, as the method has it without full distributions."""
    config = dk.KernelConfig(backend=backend, workspace_bytes=MANY.workspace_bytes)
    safe = CASE.targets.clamp(min=0)[:, None]

    def exact(s, t):
        logp = s.gather(-1, safe)[:, 0]
        return (logp.detach() - t.gather(-1, safe)[:, 0]) * logp

    teacher = dk.TeacherLogprobs(teacher_log_probs().gather(-1, safe)[:, 0])
    same(loss_of(teacher, dk.DistillSpec(1.0), config), exact_of(exact))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("teacher", [TEACHER, stored(), "sampled"])
def test_importance_is_clipped_and_takes_no_gradient(teacher, backend):
    config, safe = (
        dk.KernelConfig(backend=backend, workspace_bytes=MANY.workspace_bytes),
        CASE.targets.clamp(min=0)[:, None],
    )
    alpha = 1.0 if teacher == "sampled" else 0.3
    known = dk.TeacherLogprobs(OLD) if teacher == "sampled" else teacher

    def exact(s, t):
        logp = s.gather(-1, safe)[:, 0]
        ratio = (logp.detach() - OLD).exp()
        assert (ratio > 1.5).any()
        assert (ratio < 1.5).any()
        if teacher == "sampled":
            plain = (logp.detach() - OLD) * logp
        elif teacher is TEACHER:
            plain = jsd(s, t, alpha)
        else:
            plain = over_top_k(s, t.topk(7).values, t.topk(7).indices, True, alpha)
        return plain * ratio.clamp(max=1.5)

    spec = dk.DistillSpec(alpha, importance_clip=1.5)
    same(loss_of(known, spec, config, old_logprobs=OLD), exact_of(exact), rtol=1e-7)


SHAPES = [(1, 33, 7), (40, 33, 1001), (5, 16, 50_257)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", ["vocabulary", "top_k", "renormalised"])
def test_error_is_within_twice_that_of_torch(shape, alpha, dtype, mode):
    T, D, V = shape
    case, teacher = make_case(*shape, dtype=dtype, masked=0.0), make_case(T, D + 3, V, dtype=dtype, seed=9)
    k = min(5, V)
    small = dk.KernelConfig(workspace_bytes=4 << 20)
    spec = dk.DistillSpec(alpha, None if mode == "vocabulary" else k, mode != "renormalised")
    ids = logits_of(case.hidden, case.weight, case.bias, 0.7).topk(k).indices  # decided once, for all precisions
    log_t = logits_of(teacher.hidden, teacher.weight, teacher.bias).log_softmax(-1)

    def fused(h, w, b):
        th, tw, tb = (t.detach() for t in teacher.leaves(dtype))
        known = dk.Teacher(th, dk.Head(tw, bias=tb))
        if mode != "vocabulary":
            rest = log_t.scatter(-1, ids, -math.inf).logsumexp(-1)
            known = dk.TeacherTopK(ids, log_t.gather(-1, ids), rest)
        return dk.distill_loss(
            h, dk.Head(w, bias=b, temperature=0.7), known, case.token_weights, spec=spec, config=small
        ).loss

    def eager(h, w, b):
        log_s = logits_of(h, w, b, 0.7).log_softmax(-1)
        if mode == "vocabulary":
            tensors = (t.detach().to(h.dtype) for t in (teacher.hidden, teacher.weight, teacher.bias))
            per_token = jsd(log_s, logits_of(*tensors).log_softmax(-1), alpha)
        else:
            per_token = over_top_k(log_s, log_t.to(log_s.dtype), ids, spec.tail, alpha)
        return (per_token * case.token_weights.to(per_token.dtype)).mean()

    actual, own, exact = (
        gradients(f, case.leaves(d)) for f, d in ((fused, dtype), (eager, dtype), (eager, torch.float64))
    )
    for name, a, o, e in zip(("loss", "hidden", "weight", "bias"), actual, own, exact):
        if V == 7 and name != "loss":
            scale = 1.0  # one row: gradients are differences of probabilities
        else:
            scale = max(1.0, math.log(V)) if name == "loss" else None
        ok, line = within_budget(a, o, e, torch.float32 if name == "loss" else dtype, scale)
        assert ok, f"{name}: {line}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lora", [False, True])
def test_a_temperature_a_row_padded_inputs_and_low_rank_heads(lora, backend):
    config = dk.KernelConfig(backend=backend, workspace_bytes=MANY.workspace_bytes)
    rank = [torch.randn(n, r, generator=RANDOM, dtype=torch.float64) for n, r in ((2, 9), (61, 2), (2, 5), (61, 2))]
    warm, cold = torch.linspace(0.5, 2.0, 30), torch.linspace(1.5, 0.6, 30)
    own, its = (dk.LoRAHead(rank[0], rank[1], 0.5), dk.LoRAHead(rank[2], rank[3], 2.0)) if lora else (None, None)

    def fused(h, w, b):
        teacher = dk.Teacher(
            TEACHER_HIDDEN.reshape(5, 6, 5), dk.Head(TEACHER_WEIGHT, lora=its, temperature=cold.reshape(5, 6))
        )
        shaped = {"targets": CASE.targets.reshape(5, 6), "temperature": warm.reshape(5, 6)}
        out = loose.distill_loss(
            h.reshape(5, 6, 9),
            dk.Head(w, bias=b, lora=own),
            teacher,
            WEIGHTS.reshape(5, 6),
            config=config,
            outputs=("divergence",),
            **shaped,
        )
        assert out.outputs["divergence"].shape == (5, 6)
        return out.loss

    def exact(h, w, b):
        tw = TEACHER_WEIGHT
        if lora:
            w, tw = w + 0.5 * rank[1] @ rank[0], tw + 2.0 * rank[3] @ rank[2]
        s = logits_of(h, w, b, warm[:, None].double()).log_softmax(-1)
        t = logits_of(TEACHER_HIDDEN, tw, None, cold[:, None].double()).log_softmax(-1)
        mask = CASE.targets >= 0
        return torch.where(mask, WEIGHTS * jsd(s, t, 0.5), 0.0).sum() / mask.sum()

    same(fused, exact)


def test_outputs_and_metrics():
    names = ("logprobs", "entropy", "lse", "teacher_logprobs", "teacher_entropy", "divergence", "is_top1")
    s = logits_of(CASE.hidden, CASE.weight, CASE.bias, **HEAD)
    log_s, log_t, mask = s.log_softmax(-1), teacher_log_probs(), CASE.targets >= 0
    safe = CASE.targets.clamp(min=0)[:, None]
    exact = {
        "logprobs": log_s.gather(-1, safe)[:, 0],
        "teacher_logprobs": log_t.gather(-1, safe)[:, 0],
        "entropy": -(log_s.exp() * log_s).sum(-1),
        "teacher_entropy": -(log_t.exp() * log_t).sum(-1),
        "lse": s.logsumexp(-1),
        "divergence": jsd(log_s, log_t, 0.5),
        "is_top1": (log_s.argmax(-1) == safe[:, 0]).double(),
    }
    for backend in BACKENDS:
        config = dk.KernelConfig(backend=backend, workspace_bytes=MANY.workspace_bytes)
        args = (CASE.hidden, CASE.weight, TEACHER, WEIGHTS)
        options = {"targets": CASE.targets, "bias": CASE.bias, "config": config, **HEAD}
        out = loose.distill_loss(*args, outputs=names, **options)
        for name in names:
            torch.testing.assert_close(out.outputs[name], torch.where(mask, exact[name], 0.0), rtol=1e-9, atol=1e-12)
        counts = mask & (WEIGHTS != 0)
        want = (exact["divergence"][counts].sum(), counts.sum())
        torch.testing.assert_close(out.metrics["divergence"], want)
        torch.testing.assert_close(loose.distill_loss(*args, **options).metrics["divergence"], want)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(sorted(MODES)), st.integers(1, 20_000), st.integers(0, 30), st.permutations(range(30)))
def test_chunks_splits_and_order_do_not_matter(mode, workspace, cut, order):
    teacher, spec = MODES[mode]
    order, total = torch.tensor(order), 17.0

    def part(h, w, b, index, config=MANY):
        return dk.distill_loss(
            h[index],
            dk.Head(w, bias=b),
            rows_of(teacher, index),
            WEIGHTS[index],
            targets=CASE.targets[index],
            spec=spec,
            normalizer=total,
            config=config,
        ).loss

    def whole(h, w, b):
        return part(h, w, b, torch.arange(30))

    def split(h, w, b):
        config = dk.KernelConfig(workspace_bytes=workspace)
        return part(h, w, b, order[:cut], config) + part(h, w, b, order[cut:], config)

    same(split, whole)


@pytest.mark.parametrize("mode", MODES)
def test_rows_of_weight_zero_are_not_computed(mode, monkeypatch):
    computed = []
    original = cpu_sweep.CpuSweep.__init__

    def spy(self, x, call, plan, *rest):
        original(self, x, call, plan, *rest)
        computed.append(plan.count)

    monkeypatch.setattr(cpu_sweep.CpuSweep, "__init__", spy)
    teacher, spec = MODES[mode]
    unmasked = CASE.targets >= 0
    args = (CASE.hidden, CASE.weight, teacher, WEIGHTS)
    dk.distill_loss(*args, targets=CASE.targets, spec=spec)
    dk.distill_loss(*args, targets=CASE.targets, spec=spec, outputs=("divergence",))
    active = (unmasked & (WEIGHTS != 0)).nonzero()[:3, 0]
    dk.distill_loss(*args, targets=CASE.targets, spec=spec, active=active)
    assert computed == [int((unmasked & (WEIGHTS != 0)).sum()), int(unmasked.sum()), 3]
