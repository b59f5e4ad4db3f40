"""The table of objectives says of each loss what its formula does; gradient-preserving clipping is what its papers define."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from preset_specs import required

import drift_kernels as dk
from drift_kernels import formulas
from drift_kernels.spec import OBJECTIVES, PARAMETERS
from drift_kernels.testing import gradients, make_case

LENGTHS = torch.tensor([11, 1, 18, 10])
SELECTIVE = {"cov_share": 0.2, "cov_bounds": (0.1, 5.0)}  # of 40 tokens, so that some are selected
FORMS = [(name, ratio) for name, traits in OBJECTIVES.items() for ratio in traits.ratios]


def policy_spec(objective, ratio):
    options = {name: value for name, value in SELECTIVE.items() if objective in PARAMETERS[name][1]}
    return dk.PolicySpec(objective=objective, ratio=ratio, **required(objective), **options)


def random_tokens(seed=0):
    """(log-probs [40], tokens) of four sequences, off-policy, with advantages of both signs."""
    g = torch.Generator().manual_seed(seed)
    n = int(LENGTHS.sum())
    logprobs = -torch.rand(n, generator=g, dtype=torch.float64) - 0.3
    old = logprobs + 0.4 * torch.randn(n, generator=g, dtype=torch.float64)
    segments = torch.repeat_interleave(torch.arange(len(LENGTHS)), LENGTHS)
    advantages, noise = torch.randn(n, generator=g, dtype=torch.float64), torch.rand(n, generator=g)
    tokens = formulas.Tokens(
        advantages=advantages, old=old, rollout=old, segments=segments, lengths=LENGTHS, noise=noise
    )
    return logprobs, tokens


def loss_and_gradient(logprobs, tokens, spec):
    leaf = logprobs.clone().requires_grad_()
    loss = formulas.objective(leaf, tokens, spec)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


def positive_factors(tokens, traits):
    """Factors between 0.5 and 2, one a token; one a sequence if the loss reads the mean advantage of the sequence."""
    g = torch.Generator().manual_seed(1)
    if traits.mean_advantage:
        return (0.5 + 1.5 * torch.rand(len(LENGTHS), generator=g, dtype=torch.float64))[tokens.segments]
    return 0.5 + 1.5 * torch.rand(len(tokens.segments), generator=g, dtype=torch.float64)


@pytest.mark.parametrize(("objective", "ratio"), FORMS)
def test_linear_objectives_and_no_others_are_proportional_to_the_advantage(objective, ratio):
    """loss(c·A) = c·loss(A) with c > 0, which lets a correction multiply the advantage."""
    spec, (logprobs, tokens) = policy_spec(objective, ratio), random_tokens()
    factors = positive_factors(tokens, spec.traits)
    assert tokens.advantages is not None
    multiplied = replace(tokens, advantages=factors * tokens.advantages)
    loss, _ = loss_and_gradient(logprobs, tokens, spec)
    scaled, _ = loss_and_gradient(logprobs, multiplied, spec)
    assert loss.abs().sum() > 0
    assert torch.allclose(scaled, factors * loss, rtol=1e-12, atol=1e-14) == spec.traits.linear


@pytest.mark.parametrize(("objective", "ratio"), FORMS)
def test_vanishing_objectives_and_no_others_are_zero_at_advantage_zero(objective, ratio):
    """Neither loss nor gradient, so that such a token need not be computed."""
    spec, (logprobs, tokens) = policy_spec(objective, ratio), random_tokens()
    loss, gradient = loss_and_gradient(logprobs, replace(tokens, advantages=torch.zeros_like(logprobs)), spec)
    assert (not loss.any() and not gradient.any()) == spec.traits.vanishes


def gradient_preserving(logprobs, old, advantages, low, high, below, above):
    """arXiv 2508.07629 (weights 1) and 2509.20712, token by token: a bound times r/sg(r) in place of a ratio outside of it."""
    losses = []
    for logp, before, advantage in zip(logprobs, old, advantages):
        ratio = (logp - before).exp()
        one = ratio / ratio.detach()
        if advantage < 0 and ratio < 1 - low:
            ratio = below * (1 - low) * one
        elif advantage > 0 and ratio > 1 + high:
            ratio = above * (1 + high) * one
        losses.append(-ratio * advantage)
    return torch.stack(losses)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("preset", "weights"), [("gppo", (1.0, 1.0)), ("ce_gppo", (0.75, 1.0)), ("gppo", (0.3, 0.6))])
def test_gppo_keeps_a_bounded_gradient_of_clipped_tokens(preset, weights, backend):
    case = make_case(40, 9, 61, seed=8, masked=0.0)
    with torch.no_grad():
        old = dk.linear_logprob(case.hidden, case.weight, case.targets).logprobs + case.noise
    spec = dk.PolicySpec.preset(preset, clip_high=0.28, gppo_weights=weights)
    config = dk.KernelConfig(backend=backend, workspace_bytes=8 * 80 * 11)

    def fused(h, w, b):
        head = dk.Head(w, bias=b)
        return dk.policy_loss(
            h, head, case.targets, case.advantages, old_logprobs=old, spec=spec, outputs=("clipped",), config=config
        )

    def eager(h, w, b):
        logp = torch.log_softmax(F.linear(h, w, b), -1).gather(-1, case.targets[:, None])[:, 0]
        return gradient_preserving(logp, old, case.advantages, 0.2, 0.28, *weights).mean()

    with torch.no_grad():
        assert set(fused(case.hidden, case.weight, case.bias).outputs["clipped"].tolist()) == {-1.0, 0.0, 1.0}
    ours, exact = (gradients(f, case.leaves(torch.float64)) for f in (lambda *x: fused(*x).loss, eager))
    torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-13)
