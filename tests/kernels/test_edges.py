"""Extreme numbers and unusual inputs: overflow, saturation, ±inf, one-word vocabularies. Of every op: `test_every_op`."""

import math

import loose
import pytest
import torch
import torch.nn.functional as F

import drift_kernels as dk
from drift_kernels.testing import gradients, make_case

BACKENDS = ["cpu", "reference"]
CASE = make_case(30, 9, 61, seed=1)


def leaves(dtype=torch.float64):
    return CASE.leaves(dtype)


def on(backend):
    return dk.KernelConfig(backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_ratios_that_would_overflow(backend, dtype):
    """A log-ratio of ±200 is held at ±20: finite loss and gradients, and no gradient from what was held."""
    h, w, _ = leaves(dtype)
    for shift in (200.0, -200.0):
        old = torch.full((30,), -4.0, dtype=dtype) + shift
        for advantage in (1.0, -1.0):
            advantages = torch.full((30,), advantage, dtype=dtype)
            out = dk.policy_loss(
                h, w, CASE.targets, advantages, old_logprobs=old, config=on(backend), outputs=("ratio",)
            )
            grads = torch.autograd.grad(out.loss, (h, w))
            assert math.isfinite(float(out.loss.detach()))
            assert not any(g.any() for g in grads)
            held = out.outputs["ratio"][CASE.targets >= 0]
            torch.testing.assert_close(held.log(), torch.full_like(held, -math.copysign(20, shift)))


@pytest.mark.parametrize("scale", [300.0, -300.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_target_that_dominates_and_one_that_vanishes(backend, scale):
    """p → 1: log-prob and gradient exactly 0. p → 0: log-prob about −|scale|·…, the gradient of a full miss."""
    hidden = torch.ones(2, 4).requires_grad_()
    weight = torch.zeros(7, 4)
    weight[3] = scale / 4
    weight.requires_grad_()
    targets = torch.tensor([3, 3])
    out = dk.weighted_cross_entropy(hidden, weight, targets, outputs=("logprobs", "entropy"), config=on(backend))
    dh, dw = torch.autograd.grad(out.loss, (hidden, weight))
    assert (out.logprobs <= 0).all()
    if scale > 0:
        assert float(out.loss.detach()) == 0
        assert not dh.any()
        assert not dw.any()
    else:
        torch.testing.assert_close(out.logprobs, torch.full((2,), scale - math.log(6)))
        torch.testing.assert_close(dw[3], torch.full((4,), -1.0))
        torch.testing.assert_close(dw[0], torch.full((4,), 1 / 6))


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_logits_through_a_softcap(backend, dtype, sign):
    """tanh(±inf) = ±1: the logit is ±softcap, with no slope."""
    h, w, b = leaves(dtype)
    with torch.no_grad():
        b[5] = sign * math.inf
    capped = b.detach().clone()
    capped[5] = sign * 1e6
    args = (CASE.targets, CASE.token_weights.to(dtype))

    def run(bias):
        bias = bias.clone().requires_grad_()
        out = dk.weighted_cross_entropy(
            h, dk.Head(w, bias=bias, softcap=3.0), *args, config=on(backend), outputs=("entropy",)
        )
        return out.loss.detach(), out.entropy, *torch.autograd.grad(out.loss, (h, w, bias))

    infinite, huge = run(b.detach()), run(capped)
    torch.testing.assert_close(infinite, huge)
    assert all(torch.isfinite(t).all() for t in infinite)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_words(backend):
    """A bias of −inf takes a word out of the vocabulary, as users mask tokens: log-probs of the others stay finite."""
    h, w, b = leaves()
    with torch.no_grad():
        b[7] = -math.inf
    targets = CASE.targets.masked_fill(CASE.targets == 7, 8)
    out = dk.weighted_cross_entropy(h, dk.Head(w, bias=b), targets, outputs=("logprobs", "entropy"), config=on(backend))
    kept = [i for i in range(61) if i != 7]
    shifted = torch.where(targets > 7, targets - 1, targets)
    want = F.cross_entropy(F.linear(h, w[kept], b[kept]), shifted)
    torch.testing.assert_close(out.loss, want)
    for ours, theirs in zip(torch.autograd.grad(out.loss, (h, w)), torch.autograd.grad(want, (h, w))):
        torch.testing.assert_close(ours, theirs)
    assert torch.isfinite(out.entropy).all()


@pytest.mark.parametrize("preset", ["ppo", "gspo", "kl_cov"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_vocabulary_of_one(backend, preset):
    """p = 1 whatever the logit: log-prob and entropy 0, no gradient."""
    hidden, weight = torch.randn(6, 3).requires_grad_(), torch.randn(1, 3).requires_grad_()
    targets = torch.tensor([0, 0, -100, 0, 0, 0])
    spec = dk.PolicySpec.preset(preset, entropy_coef=0.1)
    out = dk.policy_loss(
        hidden,
        weight,
        targets,
        torch.ones(6),
        old_logprobs=torch.zeros(6),
        cu_seqlens=torch.tensor([0, 2, 6]),
        spec=spec,
        outputs=("logprobs", "entropy", "is_top1"),
        config=on(backend),
    )
    dh, dw = torch.autograd.grad(out.loss, (hidden, weight))
    assert not out.logprobs.any()
    assert out.entropy.abs().max() < 1e-6
    assert out.outputs["is_top1"].sum() == 5
    assert dh.abs().max() < 1e-6
    assert dw.abs().max() < 1e-6


def test_the_same_target_everywhere_adds_up():
    case = make_case(50, 9, 61, masked=0.0)
    targets = torch.full((50,), 17)

    def fused(h, w, b):
        return dk.weighted_cross_entropy(
            h, dk.Head(w, bias=b), targets, config=dk.KernelConfig(workspace_bytes=8 * 80 * 7)
        ).loss

    def eager(h, w, b):
        return F.cross_entropy(F.linear(h, w, b), targets)

    torch.testing.assert_close(
        gradients(fused, case.leaves(torch.float64)), gradients(eager, case.leaves(torch.float64))
    )


def test_the_same_target_several_times_in_a_row():
    """rows= with one word asked for three times by one hidden state."""
    h, w, _ = leaves()
    rows, targets = torch.tensor([0, 0, 0, 4]), torch.tensor([5, 5, 5, 1])
    fused = dk.weighted_cross_entropy(h, w, targets, rows=rows).loss
    eager = F.cross_entropy(F.linear(h[rows], w), targets)
    torch.testing.assert_close(torch.autograd.grad(fused, (h, w)), torch.autograd.grad(eager, (h, w)))


@pytest.mark.parametrize("shape", [(0, 9), (1, 0, 9), (0, 4, 9)])
def test_no_rows_at_all(shape):
    _, w, _ = leaves()
    hidden = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    targets = torch.zeros(shape[:-1], dtype=torch.int64)
    tokens = torch.zeros(shape[:-1], dtype=torch.float64)
    for preset in ("ppo", "gspo", "kl_cov", "vespo"):
        options = {"cu_seqlens": torch.tensor([0])} if len(shape) == 2 else {}
        spec = dk.PolicySpec.preset(preset)
        out = loose.policy_loss(hidden, w, targets, tokens, old_logprobs=tokens, spec=spec, **options)
        dh, dw = torch.autograd.grad(out.loss, (hidden, w))
        assert float(out.loss.detach()) == 0
        assert dh.shape == shape
        assert not dw.any()
