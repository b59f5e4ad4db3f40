"""Distillation against plain autograd over full logits, written out here; the autograd contract; what raises."""

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import drift_kernels as dk
from drift_kernels import distill_driver, driver
from drift_kernels.formulas import Tokens
from drift_kernels.spec import Call, DistillCall
from drift_kernels.testing import gradients, make_case, within_budget

ALPHAS = [0.0, 0.1, 0.5, 0.9, 1.0]
BACKENDS = ["cpu", "reference"]
CASE = make_case(30, 9, 61, seed=1)
WEIGHTS = CASE.token_weights
OLD = torch.full((30,), -4.1, dtype=torch.float64)
MANY = dk.KernelConfig(workspace_bytes=8 * (2 * 61 + 9 + 9 + 5) * 7)  # at least three chunks in double
RANDOM = torch.Generator().manual_seed(5)
TEACHER_HIDDEN = torch.randn(30, 5, generator=RANDOM, dtype=torch.float64)
TEACHER_WEIGHT = torch.randn(61, 5, generator=RANDOM, dtype=torch.float64)
TEACHER_BIAS = torch.randn(61, generator=RANDOM, dtype=torch.float64)
TEACHER = dk.TeacherHead(TEACHER_HIDDEN, TEACHER_WEIGHT, TEACHER_BIAS, temperature=1.3, softcap=6.0, logit_scale=0.8)
HEAD = {"temperature": 0.7, "softcap": 4.0, "logit_scale": 1.2}


def logits_of(hidden, weight, bias, temperature=1.0, softcap=None, logit_scale=1.0):
    z = F.linear(hidden, weight, bias)
    z = (z if z.dtype == torch.float64 else z.float()) * logit_scale
    return (softcap * torch.tanh(z / softcap) if softcap else z) / temperature


def kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def jsd(log_s, log_t, alpha):
    """As the method writes it."""
    if alpha == 0:
        return kl(log_t, log_s)
    if alpha == 1:
        return kl(log_s, log_t)
    log_m = ((1 - alpha) * log_s.exp() + alpha * log_t.exp()).log()
    return (1 - alpha) * kl(log_s, log_m) + alpha * kl(log_t, log_m)


def over_top_k(log_s, log_t, ids, tail, alpha):
    """Over tokens `ids` [T, k] and, with `tail`, the rest as one; `log_t` over the vocabulary, or [T, k] of the ids."""
    s, t = log_s.exp().gather(-1, ids), (log_t if log_t.shape == ids.shape else log_t.gather(-1, ids)).exp()
    if tail:
        s, t = (torch.cat((p, 1 - p.sum(-1, keepdim=True)), -1) for p in (s, t))
    else:
        s, t = (p / p.sum(-1, keepdim=True) for p in (s, t))
    return jsd(s.log(), t.log(), alpha)


def teacher_log_probs():
    return logits_of(TEACHER_HIDDEN, TEACHER_WEIGHT, TEACHER_BIAS, 1.3, 6.0, 0.8).log_softmax(-1)


def stored(k=7):
    return dk.topk_logprobs(
        TEACHER_HIDDEN, TEACHER_WEIGHT, k, bias=TEACHER_BIAS, temperature=1.3, softcap=6.0, logit_scale=0.8
    )


def loss_of(teacher, spec, config=MANY, **options):
    def run(h, w, b):
        return dk.distill_loss(
            h, w, teacher, WEIGHTS, targets=CASE.targets, spec=spec, bias=b, config=config, **HEAD, **options
        ).loss

    return run


def exact_of(divergence):
    """Σ weight·divergence / tokens of divergence(log_s, log_t) [T]."""

    def run(h, w, b):
        log_s = logits_of(h, w, b, **HEAD).log_softmax(-1)
        mask = CASE.targets >= 0
        return torch.where(mask, WEIGHTS * divergence(log_s, teacher_log_probs()), 0.0).sum() / mask.sum()

    return run


def same(actual, exact, rtol=1e-9, atol=1e-12):
    actual, exact = (gradients(f, CASE.leaves(torch.float64)) for f in (actual, exact))
    torch.testing.assert_close(actual, exact, rtol=rtol, atol=atol)


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
        known = dk.TeacherHead(th, tw, tb)
        if mode != "vocabulary":
            rest = log_t.scatter(-1, ids, -math.inf).logsumexp(-1)
            known = dk.TeacherTopK(ids, log_t.gather(-1, ids), rest)
        return dk.distill_loss(h, w, known, case.token_weights, spec=spec, bias=b, temperature=0.7, config=small).loss

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
        teacher = dk.TeacherHead(
            TEACHER_HIDDEN.reshape(5, 6, 5), TEACHER_WEIGHT, lora=its, temperature=cold.reshape(5, 6)
        )
        shaped = {"targets": CASE.targets.reshape(5, 6), "temperature": warm.reshape(5, 6)}
        out = dk.distill_loss(
            h.reshape(5, 6, 9),
            w,
            teacher,
            WEIGHTS.reshape(5, 6),
            bias=b,
            lora=own,
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
        out = dk.distill_loss(*args, outputs=names, **options)
        for name in names:
            torch.testing.assert_close(out.outputs[name], torch.where(mask, exact[name], 0.0), rtol=1e-9, atol=1e-12)
        counts = mask & (WEIGHTS != 0)
        want = (exact["divergence"][counts].sum(), counts.sum())
        torch.testing.assert_close(out.metrics["divergence"], want)
        torch.testing.assert_close(dk.distill_loss(*args, **options).metrics["divergence"], want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_topk_logprobs(backend):
    config = dk.KernelConfig(backend=backend, workspace_bytes=8 * 80 * 11)
    log_p = logits_of(CASE.hidden, CASE.weight, CASE.bias, **HEAD).log_softmax(-1)
    active = torch.tensor([2, 3, 11, 29])
    for k in (1, 7, 60, 61):
        found = dk.topk_logprobs(CASE.hidden, CASE.weight, k, bias=CASE.bias, config=config, **HEAD)
        values, ids = log_p.topk(k)
        assert torch.equal(found.ids, ids)
        torch.testing.assert_close(found.logprobs, values)
        rest = log_p.scatter(-1, ids, -math.inf).logsumexp(-1) if k < 61 else torch.full((30,), -math.inf).double()
        torch.testing.assert_close(found.rest, rest)
        some = dk.topk_logprobs(CASE.hidden, CASE.weight, k, bias=CASE.bias, config=config, active=active, **HEAD)
        assert torch.equal(some.ids[active], ids[active])
        torch.testing.assert_close(some.rest[active], rest[active])
        assert some.logprobs.abs().sum() == some.logprobs[active].abs().sum()
    ties = dk.topk_logprobs(torch.ones(1, 2), torch.ones(500, 2), 300, config=config)
    assert torch.equal(ties.ids[0], torch.arange(300))  # the lower of equal ids first
    padded = dk.topk_logprobs(CASE.hidden.reshape(2, 15, 9), CASE.weight, 3, config=config)
    assert padded.ids.shape == padded.logprobs.shape == (2, 15, 3)
    assert padded.rest.shape == (2, 15)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 40), st.integers(0, 10_000))
def test_top_k_of_any_row(V, k, seed):
    k = min(k, V)
    weight = torch.randn(V, 1, generator=torch.Generator().manual_seed(seed)).round(decimals=2)  # with ties
    found = dk.topk_logprobs(torch.ones(1, 1), weight, k)
    assert torch.equal(found.ids[0], weight[:, 0].sort(descending=True, stable=True).indices[:k])


MODES = {
    "full": (TEACHER, dk.DistillSpec(0.3)),
    "forward": (TEACHER, dk.DistillSpec(0.0)),
    "reverse": (TEACHER, dk.DistillSpec(1.0)),
    "top_k": (TEACHER, dk.DistillSpec(0.3, 5)),
    "stored": (stored(), dk.DistillSpec(0.3, tail=False)),
    "sampled": (dk.TeacherLogprobs(OLD), dk.DistillSpec(1.0)),
}


def rows_of(teacher, index):
    if isinstance(teacher, dk.TeacherHead):
        return dk.TeacherHead(teacher.hidden[index], teacher.weight, teacher.bias, None, 1.3, 6.0, 0.8)
    if isinstance(teacher, dk.TeacherTopK):
        return dk.TeacherTopK(teacher.ids[index], teacher.logprobs[index], teacher.rest[index])
    return dk.TeacherLogprobs(teacher.logprobs[index])


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(sorted(MODES)), st.integers(1, 20_000), st.integers(0, 30), st.permutations(range(30)))
def test_chunks_splits_and_order_do_not_matter(mode, workspace, cut, order):
    teacher, spec = MODES[mode]
    order, total = torch.tensor(order), 17.0

    def part(h, w, b, index, config=MANY):
        return dk.distill_loss(
            h[index],
            w,
            rows_of(teacher, index),
            WEIGHTS[index],
            targets=CASE.targets[index],
            spec=spec,
            bias=b,
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
    original = driver.Sweep.__init__

    def spy(self, x, call, plan, *rest):
        original(self, x, call, plan, *rest)
        computed.append(plan.count)

    monkeypatch.setattr(driver.Sweep, "__init__", spy)
    teacher, spec = MODES[mode]
    unmasked = CASE.targets >= 0
    args = (CASE.hidden, CASE.weight, teacher, WEIGHTS)
    dk.distill_loss(*args, targets=CASE.targets, spec=spec)
    dk.distill_loss(*args, targets=CASE.targets, spec=spec, outputs=("divergence",))
    active = (unmasked & (WEIGHTS != 0)).nonzero()[:3, 0]
    dk.distill_loss(*args, targets=CASE.targets, spec=spec, active=active)
    assert computed == [int((unmasked & (WEIGHTS != 0)).sum()), int(unmasked.sum()), 3]


def test_equal_distributions_have_no_divergence_and_the_shannon_one_stays_below_log_2():
    leaves = CASE.leaves(torch.float32)
    for alpha in ALPHAS:
        for k in (None, 4):
            teacher = dk.TeacherHead(leaves[0].detach(), leaves[1])
            out = dk.distill_loss(leaves[0], leaves[1], teacher, spec=dk.DistillSpec(alpha, k), outputs=("divergence",))
            assert out.outputs["divergence"].abs().max() < 1e-6
            assert max(t.abs().max() for t in torch.autograd.grad(out.loss, leaves[:2])) < 1e-6
    far = dk.TeacherHead(-50 * leaves[0].detach(), leaves[1])
    out = dk.distill_loss(50 * leaves[0], leaves[1], far, outputs=("divergence",)).outputs["divergence"]
    assert 0.6 < out.max() < math.log(2) + 1e-4


@pytest.mark.parametrize("mode", [name for name in MODES if name != "sampled"])  # which holds its factor fixed
def test_gradcheck_through_the_real_driver(mode):
    case, seen, spec = make_case(12, 4, 11, seed=3), TEACHER_HIDDEN[:12], MODES[mode][1]
    head = TEACHER_WEIGHT[:11]
    teacher = dk.topk_logprobs(seen, head, 4) if mode == "stored" else dk.TeacherHead(seen, head)
    options = {"spec": spec, "softcap": 4.0, "config": dk.KernelConfig(workspace_bytes=8 * 60 * 3)}

    def op(h, w, b):
        return dk.distill_loss(h, w, teacher, case.token_weights, targets=case.targets, bias=b, **options).loss

    assert torch.autograd.gradcheck(op, case.leaves(torch.float64), atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_only_what_requires_grad_is_computed_and_backward_scales(mode):
    op = loss_of(*MODES[mode])
    leaves = CASE.leaves(torch.float64)
    full = torch.autograd.grad(op(*leaves), leaves)
    for subset in ((1, 0, 0), (0, 1, 0), (0, 1, 1)):
        some = [t.detach().requires_grad_(bool(on)) for t, on in zip(leaves, subset)]
        loss = op(*some)
        (2 * loss).backward(retain_graph=True)
        loss.backward()
        for leaf, grad, on in zip(some, full, subset):
            if on:
                torch.testing.assert_close(leaf.grad, 3 * grad)
            else:
                assert leaf.grad is None
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(op(*leaves), leaves, create_graph=True)


@pytest.mark.parametrize("mode", MODES)
def test_no_grad_costs_no_gradient(mode, monkeypatch):
    def refuse(*_):
        raise AssertionError("a gradient was made")

    monkeypatch.setattr(driver.Sweep, "add_gradients", refuse)
    op, leaves = loss_of(*MODES[mode]), CASE.leaves(torch.float64)
    with torch.no_grad():
        loss = op(*leaves)
    assert not loss.requires_grad
    torch.testing.assert_close(op(*(t.detach() for t in leaves)), loss)
    with pytest.raises(AssertionError, match="a gradient was made"):
        op(*leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_head_that_student_and_teacher_share_is_differentiated_through_the_student_alone(backend):
    hidden, weight = (t.detach().clone().requires_grad_() for t in (CASE.hidden, CASE.weight))
    teacher_hidden = TEACHER_HIDDEN.repeat(1, 2)[:, :9]
    config = dk.KernelConfig(backend=backend)
    out = dk.distill_loss(hidden, weight, dk.TeacherHead(teacher_hidden, weight), config=config)
    s, t = (F.linear(h, w).log_softmax(-1) for h, w in ((hidden, weight), (teacher_hidden, weight.detach())))
    exact = jsd(s, t, 0.5).mean()
    torch.testing.assert_close(out.loss, exact)
    grads = (torch.autograd.grad(loss, (hidden, weight)) for loss in (out.loss, exact))
    torch.testing.assert_close(next(grads), next(grads))
    with pytest.raises(ValueError, match=r"teacher.hidden requires grad"):
        dk.distill_loss(hidden, weight, dk.TeacherHead(hidden, weight), config=config)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["empty", "masked", "weightless"])
def test_nothing_to_learn_gives_zero(kind, mode, backend):
    teacher, spec = MODES[mode]
    leaves, index = CASE.leaves(torch.float64), torch.arange(0 if kind == "empty" else 30)
    targets = CASE.targets[index] if kind == "weightless" else torch.full_like(index, -100)
    weights = WEIGHTS[index] * (kind != "weightless")
    out = dk.distill_loss(
        leaves[0][index],
        leaves[1],
        rows_of(teacher, index),
        weights,
        targets=targets,
        spec=spec,
        bias=leaves[2],
        config=dk.KernelConfig(backend=backend),
    )
    assert out.loss.item() == 0
    assert all(g.abs().sum() == 0 for g in torch.autograd.grad(out.loss, leaves))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_vocabulary_of_one_token(backend):
    config = dk.KernelConfig(backend=backend)
    h, w = torch.randn(4, 3, requires_grad=True), torch.randn(1, 3, requires_grad=True)
    for alpha in ALPHAS:
        for teacher in (dk.TeacherHead(torch.randn(4, 2), torch.randn(1, 2)), dk.topk_logprobs(h, w, 1)):
            loss = dk.distill_loss(h, w, teacher, spec=dk.DistillSpec(alpha), config=config).loss
            assert abs(loss.item()) < 1e-7
            assert all(g.abs().max() < 1e-7 for g in torch.autograd.grad(loss, (h, w)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_without_probability(backend, dtype):
    """−inf logits (a masked vocabulary) of either side or both, and logits whose probabilities underflow."""
    h, w, b = CASE.leaves(dtype)
    th, tw, tb = (t.to(dtype) for t in (TEACHER_HIDDEN, TEACHER_WEIGHT, TEACHER_BIAS.clone()))
    with torch.no_grad():
        b[:3], tb[2:5] = -math.inf, -math.inf
        b[7:9] -= 150
        tb[8:10] -= 150
    b = b.detach()
    config = dk.KernelConfig(backend=backend)
    keep_s, keep_t = torch.arange(61) >= 3, (torch.arange(61) < 2) | (torch.arange(61) >= 5)
    s = logits_of(h.double(), w.double(), b.double()).log_softmax(-1)
    t = logits_of(th.double(), tw.double(), tb.double()).log_softmax(-1)
    s_only, t_only, both = keep_s & ~keep_t, keep_t & ~keep_s, keep_s & keep_t
    for alpha in (0.1, 0.5, 0.9):
        out = dk.distill_loss(h, w, dk.TeacherHead(th, tw, tb), bias=b, spec=dk.DistillSpec(alpha), config=config)
        exact = jsd(s[:, both], t[:, both], alpha)
        exact = exact - (1 - alpha) * math.log(1 - alpha) * s[:, s_only].exp().sum(-1)
        exact = (exact - alpha * math.log(alpha) * t[:, t_only].exp().sum(-1)).mean()
        torch.testing.assert_close(out.loss.double(), exact, rtol=1e-5, atol=1e-6)
        got, want = (torch.autograd.grad(loss, (h, w), retain_graph=True) for loss in (out.loss, exact))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for alpha, finite in ((0.0, tb), (1.0, b)):  # infinite where the other side rules a token out
        assert (
            dk.distill_loss(h, w, dk.TeacherHead(th, tw, tb), bias=b, spec=dk.DistillSpec(alpha), config=config).loss
            == math.inf
        )
        exact = (kl(t[:, 5:], t[:, 5:]) if finite is tb else kl(s[:, 5:], s[:, 5:])).mean()
        same_side = dk.TeacherHead(h.detach(), w, b) if finite is b else dk.TeacherHead(th, tw, tb)
        student = (h, w, b) if finite is b else (th, tw, tb)
        out = dk.distill_loss(*student[:2], same_side, bias=student[2], spec=dk.DistillSpec(alpha), config=config)
        torch.testing.assert_close(out.loss.double(), exact, atol=1e-6, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("depth", [-1.0, -40.0])
def test_a_rest_too_small_for_a_difference(depth, backend):
    """Where nearly all mass lies in the top k, 1 − Σp would be rounding noise; the rest is summed itself, and kept."""
    h, w, tw = (torch.randn(n, 4, generator=RANDOM).double() for n in (6, 30, 30))
    b = torch.cat((torch.zeros(3), torch.full((27,), depth))).double()
    deep = torch.cat((torch.zeros(3), torch.full((27,), -45.0))).double()
    log_t = logits_of(h, tw, deep).log_softmax(-1)
    log_rest, config = log_t[:, 3:].logsumexp(-1), dk.KernelConfig(backend=backend)

    def exact(h, w):
        log_s = logits_of(h, w, b).log_softmax(-1)
        both = (torch.cat((p[:, :3], p[:, 3:].logsumexp(-1, keepdim=True)), -1) for p in (log_s, log_t))
        return kl(*both).mean()

    def fused(dtype):
        def run(h, w):
            kept = dk.topk_logprobs(h.detach(), tw.to(dtype), 3, bias=deep.to(dtype), config=config)
            assert torch.equal(kept.ids.sort().values, torch.arange(3).repeat(6, 1))
            torch.testing.assert_close(kept.rest.double(), log_rest, rtol=1e-5, atol=1e-5)
            return dk.distill_loss(h, w, kept, bias=b.to(dtype), spec=dk.DistillSpec(1.0), config=config).loss

        return run

    want = gradients(exact, (h.requires_grad_(), w.requires_grad_()))
    for dtype, close in ((torch.float32, {"rtol": 1e-4, "atol": 1e-5}), (torch.float64, {"rtol": 1e-9, "atol": 1e-12})):
        got = gradients(fused(dtype), tuple(t.detach().to(dtype).requires_grad_() for t in (h, w)))
        torch.testing.assert_close([t.double() for t in got], list(want), **close)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("of", ["student", "teacher"])
def test_nan_in_a_row_that_counts_shows_and_elsewhere_does_not(of, mode, backend):
    teacher, spec = MODES[mode]
    counts = (CASE.targets >= 0) & (WEIGHTS != 0)
    for row, shows in ((counts.nonzero()[0, 0], True), ((~counts).nonzero()[0, 0], False)):
        leaves, known = CASE.leaves(torch.float64), rows_of(teacher, torch.arange(30))
        broken = leaves[0] if of == "student" else known.hidden if isinstance(known, dk.TeacherHead) else known.logprobs
        with torch.no_grad():
            broken[row] = math.nan
        loss = dk.distill_loss(
            leaves[0],
            leaves[1],
            known,
            WEIGHTS,
            targets=CASE.targets,
            spec=spec,
            config=dk.KernelConfig(backend=backend),
        ).loss
        assert loss.isnan() == shows
        grads = torch.autograd.grad(loss, leaves[:2])
        assert grads[1].isnan().any() == shows


def test_half_inputs_repeat_bitwise_and_a_teacher_may_have_another_dtype():
    case = make_case(50, 16, 3001, dtype=torch.bfloat16)
    runs = []
    for _ in range(2):
        leaves = case.leaves(torch.bfloat16)
        teacher = dk.TeacherHead(2 * leaves[0].detach().float(), leaves[1].detach().float())
        out = dk.distill_loss(leaves[0], leaves[1], teacher, spec=dk.DistillSpec(0.5, 100))
        assert out.loss.dtype == torch.float32
        runs.append((out.loss, *torch.autograd.grad(out.loss, leaves[:2])))
    for a, b in zip(*runs):
        assert torch.equal(a, b)
    with pytest.raises(TypeError, match="fp64 goes with fp64 alone"):
        dk.distill_loss(case.hidden, case.weight, dk.TeacherHead(leaves[0].detach(), leaves[1]))


def test_weight_gradients_added_in_place():
    leaves = CASE.leaves(torch.float32)
    (grad,) = torch.autograd.grad(dk.distill_loss(leaves[0], leaves[1], stored()).loss, leaves[1])
    leaves[1].grad = torch.ones_like(leaves[1])
    dk.distill_loss(*leaves[:2], stored(), config=dk.KernelConfig(accumulate_into_grad=1.0)).loss.backward()
    torch.testing.assert_close(leaves[1].grad, grad + 1)


def test_what_makes_no_sense_raises():
    h, w, y = CASE.hidden, CASE.weight, CASE.targets
    kept = stored()

    def refused(match, teacher=TEACHER, error=ValueError, spec=dk.DistillSpec(), **options):
        with pytest.raises(error, match=match):
            dk.distill_loss(h, w, teacher, spec=spec, **options)

    refused("tail=False goes with a top_k", spec=dk.DistillSpec(tail=False))
    refused("top_k=62 exceeds the vocabulary of 61", spec=dk.DistillSpec(top_k=62))
    refused("top_k=3, but the teacher holds 7", kept, spec=dk.DistillSpec(top_k=3))
    refused("at least 2 with tail=False", stored(1), spec=dk.DistillSpec(tail=False))
    refused("pass alpha=1.0", dk.TeacherLogprobs(OLD), targets=y)
    refused("targets must be given", dk.TeacherLogprobs(OLD), spec=dk.DistillSpec(1.0))
    refused("targets must be given", spec=dk.DistillSpec(importance_clip=2.0), old_logprobs=OLD)
    refused("needs old_logprobs", spec=dk.DistillSpec(importance_clip=2.0), targets=y)
    refused("pass targets", outputs=("logprobs",))
    refused("pass a TeacherHead", kept, outputs=("teacher_entropy",))
    refused("outputs has 'ratio'", outputs=("ratio",))
    refused("has 60 tokens, the student's 61", dk.TeacherHead(TEACHER_HIDDEN, TEACHER_WEIGHT[:60]))
    refused("teacher: targets", dk.TeacherHead(TEACHER_HIDDEN[:3], TEACHER_WEIGHT))
    refused("must be a TeacherHead", TEACHER_HIDDEN, TypeError)
    refused(r"teacher.ids must be int64 \(30, 'k'\)", dk.TeacherTopK(kept.ids[:3], kept.logprobs[:3]))
    refused("floats of the ids' shape", dk.TeacherTopK(kept.ids, kept.logprobs[:, :3]))
    refused("teacher's ids hold", dk.TeacherTopK(kept.ids + 55, kept.logprobs), IndexError)
    refused(
        "token_weights has 1 non-finite",
        token_weights=torch.tensor([math.inf] + [1.0] * 29),
        config=dk.KernelConfig(check_finite=True),
    )
    for match, error, options in (
        (r"alpha=1.5 must lie in", ValueError, {"alpha": 1.5}),
        ("top_k=0 must be at least 1", ValueError, {"top_k": 0}),
        ("one token alone is certain", ValueError, {"top_k": 1, "tail": False}),
        ("whole number", TypeError, {"top_k": 2.5}),
        ("importance_clip=0.0 must be positive", ValueError, {"importance_clip": 0}),
    ):
        with pytest.raises(error, match=match):
            dk.DistillSpec(**options)
    for k in (0, 62, 2.0):
        with pytest.raises(ValueError, match="must be a whole number from 1"):
            dk.topk_logprobs(h, w, k)


def op_arguments(mode):
    """Of the registered op, in single precision."""
    caught, original = [], distill_driver.fused
    teacher, spec = MODES[mode]
    h, w, b = CASE.leaves(torch.float32)

    def spy(x, teacher, lessons, call, normalizer):
        caught.append((x, teacher, lessons, call, normalizer))
        return original(x, teacher, lessons, call, normalizer)

    distill_driver.fused = spy
    try:
        if isinstance(teacher, dk.TeacherHead):
            teacher = dk.TeacherHead(TEACHER_HIDDEN.float(), TEACHER_WEIGHT.float(), TEACHER_BIAS.float())
        spec = dk.DistillSpec(spec.alpha, spec.top_k, spec.tail, 2.0)
        dk.distill_loss(h, w, teacher, WEIGHTS, targets=CASE.targets, old_logprobs=OLD, spec=spec, bias=b)
    finally:
        distill_driver.fused = original
    ((x, known, lessons, call, normalizer),) = caught
    head = (h.detach(), w.detach(), b.detach(), None, None, x.targets, None, None, None)
    return (*head, *x.tokens.flat(), *known.flat(), *lessons.flat(), normalizer, call.encode()), call


@pytest.mark.parametrize("mode", MODES)
def test_opcheck(mode):
    arguments, call = op_arguments(mode)
    assert call.call.needs[:3] == (True, True, True)
    torch.library.opcheck(torch.ops.drift_kernels.distill, arguments)
    assert DistillCall.decode(call.encode()) == call
    head = (CASE.hidden.float(), CASE.weight.float(), None, None, None, CASE.targets * 0, None, None, None)
    torch.library.opcheck(torch.ops.drift_kernels.top_k, (*head, 5, Call().encode()))
    assert Tokens(*arguments[9:17]).old is not None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own tracer
def test_a_step_compiles_as_one_graph():
    backbone = torch.nn.Sequential(torch.nn.Embedding(61, 16), torch.nn.Linear(16, 9), torch.nn.Tanh()).double()
    head, ids = torch.nn.Parameter(CASE.weight.clone()), torch.arange(30) % 61

    def step(ids, targets, weights):
        hidden = backbone(ids)
        spec = dk.DistillSpec(importance_clip=2.0)
        full = dk.distill_loss(
            hidden,
            head,
            dk.TeacherHead(hidden.detach() * 2, head),
            weights,
            targets=targets,
            old_logprobs=OLD,
            spec=spec,
        )
        kept = dk.topk_logprobs(TEACHER_HIDDEN, TEACHER_WEIGHT, 5)
        return full.loss + dk.distill_loss(hidden, head, kept, weights).loss, full.metrics["divergence"][0]

    results = []
    for fn in (step, torch.compile(step, fullgraph=True)):
        loss, divergence = fn(ids, CASE.targets, WEIGHTS)
        results.append((loss, divergence, *torch.autograd.grad(loss, [head, *backbone.parameters()])))
    torch.testing.assert_close(results[0], results[1])


MEMORY = """
import re, sys, torch
import drift_kernels as dk
dtype, k = getattr(torch, sys.argv[1]), int(sys.argv[2]) or None
T, D, V, workspace = 300, 64, 151_936, 64 << 20
hidden = torch.randn(T, D).to(dtype).requires_grad_()
weight = (torch.randn(V, D) * 0.05).to(dtype).requires_grad_()
seen, spec = torch.randn(T, D).to(dtype), dk.DistillSpec(top_k=k)
tiny = dk.distill_loss(hidden[:8], weight[:999], dk.TeacherHead(seen[:8], weight[:999]), spec=spec)
tiny.loss.backward()
hidden.grad = weight.grad = None
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
open("/proc/self/clear_refs", "w").write("5")
before = peak()
config = dk.KernelConfig(workspace_bytes=workspace)
dk.distill_loss(hidden, weight, dk.TeacherHead(seen, weight), spec=spec, config=config).loss.backward()
by_right = 2 * T * D * 4 + V * D * 4 + (V * D * 2 if dtype != torch.float32 else 0)
print((peak() - before - by_right) / workspace)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "k"), [("float32", 0), ("float32", 100), ("bfloat16", 0)])
def test_peak_memory_stays_within_the_workspace(dtype, k):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEMORY, dtype, str(k)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert 0.3 < float(done.stdout) <= 1.10, f"peak over what is there by right: {done.stdout.strip()} of the workspace"
