"""Distillation at its edges: nothing to learn, no probability, NaN, half precision, memory, and what raises."""

import math
import os
import subprocess
import sys

import loose
import pytest
import torch
from distill_cases import (
    ALPHAS,
    BACKENDS,
    CASE,
    MODES,
    OLD,
    RANDOM,
    TEACHER,
    TEACHER_BIAS,
    TEACHER_HIDDEN,
    TEACHER_WEIGHT,
    WEIGHTS,
    jsd,
    kl,
    logits_of,
    rows_of,
    stored,
)

import drift_kernels as dk
from drift_kernels.testing import gradients, make_case


def test_equal_distributions_have_no_divergence_and_the_shannon_one_stays_below_log_2():
    leaves = CASE.leaves(torch.float32)
    for alpha in ALPHAS:
        for k in (None, 4):
            teacher = dk.Teacher(leaves[0].detach(), leaves[1])
            out = dk.distill_loss(leaves[0], leaves[1], teacher, spec=dk.DistillSpec(alpha, k), outputs=("divergence",))
            assert out.outputs["divergence"].abs().max() < 1e-6
            assert max(t.abs().max() for t in torch.autograd.grad(out.loss, leaves[:2])) < 1e-6
    far = dk.Teacher(-50 * leaves[0].detach(), leaves[1])
    out = dk.distill_loss(50 * leaves[0], leaves[1], far, outputs=("divergence",)).outputs["divergence"]
    assert 0.6 < out.max() < math.log(2) + 1e-4


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
        dk.Head(leaves[1], bias=leaves[2]),
        rows_of(teacher, index),
        weights,
        targets=targets,
        spec=spec,
        config=dk.KernelConfig(backend=backend),
    )
    assert out.loss.item() == 0
    assert all(g.abs().sum() == 0 for g in torch.autograd.grad(out.loss, leaves))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_vocabulary_of_one_token(backend):
    config = dk.KernelConfig(backend=backend)
    h, w = torch.randn(4, 3, requires_grad=True), torch.randn(1, 3, requires_grad=True)
    for alpha in ALPHAS:
        for teacher in (dk.Teacher(torch.randn(4, 2), torch.randn(1, 2)), dk.topk_logprobs(h, w, 1)):
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
        out = dk.distill_loss(
            h, dk.Head(w, bias=b), dk.Teacher(th, dk.Head(tw, bias=tb)), spec=dk.DistillSpec(alpha), config=config
        )
        exact = jsd(s[:, both], t[:, both], alpha)
        exact = exact - (1 - alpha) * math.log(1 - alpha) * s[:, s_only].exp().sum(-1)
        exact = (exact - alpha * math.log(alpha) * t[:, t_only].exp().sum(-1)).mean()
        torch.testing.assert_close(out.loss.double(), exact, rtol=1e-5, atol=1e-6)
        got, want = (torch.autograd.grad(loss, (h, w), retain_graph=True) for loss in (out.loss, exact))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for alpha, finite in ((0.0, tb), (1.0, b)):  # infinite where the other side rules a token out
        assert (
            dk.distill_loss(
                h, dk.Head(w, bias=b), dk.Teacher(th, dk.Head(tw, bias=tb)), spec=dk.DistillSpec(alpha), config=config
            ).loss
            == math.inf
        )
        exact = (kl(t[:, 5:], t[:, 5:]) if finite is tb else kl(s[:, 5:], s[:, 5:])).mean()
        same_side = dk.Teacher(h.detach(), dk.Head(w, bias=b)) if finite is b else dk.Teacher(th, dk.Head(tw, bias=tb))
        student = (h, w, b) if finite is b else (th, tw, tb)
        out = dk.distill_loss(
            student[0], dk.Head(student[1], bias=student[2]), same_side, spec=dk.DistillSpec(alpha), config=config
        )
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
            kept = dk.topk_logprobs(h.detach(), dk.Head(tw.to(dtype), bias=deep.to(dtype)), 3, config=config)
            assert torch.equal(kept.ids.sort().values, torch.arange(3).repeat(6, 1))
            torch.testing.assert_close(kept.rest.double(), log_rest, rtol=1e-5, atol=1e-5)
            return dk.distill_loss(h, dk.Head(w, bias=b.to(dtype)), kept, spec=dk.DistillSpec(1.0), config=config).loss

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
        broken = leaves[0] if of == "student" else known.hidden if isinstance(known, dk.Teacher) else known.logprobs
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
        teacher = dk.Teacher(2 * leaves[0].detach().float(), leaves[1].detach().float())
        out = dk.distill_loss(leaves[0], leaves[1], teacher, spec=dk.DistillSpec(0.5, 100))
        assert out.loss.dtype == torch.float32
        runs.append((out.loss, *torch.autograd.grad(out.loss, leaves[:2])))
    for a, b in zip(*runs):
        assert torch.equal(a, b)
    with pytest.raises(TypeError, match="fp64 goes with fp64 alone"):
        dk.distill_loss(case.hidden, case.weight, dk.Teacher(leaves[0].detach(), leaves[1]))


def test_what_makes_no_sense_raises():
    h, w, y = CASE.hidden, CASE.weight, CASE.targets
    kept = stored()

    def refused(match, teacher=TEACHER, error=ValueError, spec=dk.DistillSpec(), **options):
        with pytest.raises(error, match=match):
            loose.distill_loss(h, w, teacher, spec=spec, **options)

    refused("tail=False goes with a top_k", spec=dk.DistillSpec(tail=False))
    refused("top_k=62 exceeds the vocabulary of 61", spec=dk.DistillSpec(top_k=62))
    refused("top_k=3, but the teacher holds 7", kept, spec=dk.DistillSpec(top_k=3))
    refused("at least 2 with tail=False", stored(1), spec=dk.DistillSpec(tail=False))
    refused("pass alpha=1.0", dk.TeacherLogprobs(OLD), targets=y)
    refused("targets must be given", dk.TeacherLogprobs(OLD), spec=dk.DistillSpec(1.0))
    refused("targets must be given", spec=dk.DistillSpec(importance_clip=2.0), old_logprobs=OLD)
    refused("needs old_logprobs", spec=dk.DistillSpec(importance_clip=2.0), targets=y)
    refused("pass targets", outputs=("logprobs",))
    refused("pass a Teacher", kept, outputs=("teacher_entropy",))
    refused("outputs has 'ratio'", outputs=("ratio",))
    refused("has 60 tokens, the student's 61", dk.Teacher(TEACHER_HIDDEN, TEACHER_WEIGHT[:60]))
    refused("teacher: targets", dk.Teacher(TEACHER_HIDDEN[:3], TEACHER_WEIGHT))
    refused("must be a Teacher", TEACHER_HIDDEN, TypeError)
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


MEMORY = """
import re, sys, torch
import drift_kernels as dk
dtype, k = getattr(torch, sys.argv[1]), int(sys.argv[2]) or None
T, D, V, workspace = 300, 64, 151_936, 64 << 20
hidden = torch.randn(T, D).to(dtype).requires_grad_()
weight = (torch.randn(V, D) * 0.05).to(dtype).requires_grad_()
seen, spec = torch.randn(T, D).to(dtype), dk.DistillSpec(top_k=k)
tiny = dk.distill_loss(hidden[:8], weight[:999], dk.Teacher(seen[:8], weight[:999]), spec=spec)
tiny.loss.backward()
hidden.grad = weight.grad = None
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
open("/proc/self/clear_refs", "w").write("5")
before = peak()
config = dk.KernelConfig(workspace_bytes=workspace)
dk.distill_loss(hidden, weight, dk.Teacher(seen, weight), spec=spec, config=config).loss.backward()
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
