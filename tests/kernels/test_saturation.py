"""Policy losses where they saturate: every token clipped, ratios and estimates that overflow, certainty and impossibility."""

import math
from dataclasses import replace

import loose
import pytest
import torch
import torch.nn.functional as F
from preset_specs import PRESET_SPECS, REQUIRED

import drift_kernels as dk
from drift_kernels.checks import HUGE
from drift_kernels.testing import gradients, make_case

BACKENDS = ["cpu", "reference"]
CASE = make_case(30, 9, 61, seed=1)
MASK, COUNT = CASE.targets >= 0, int((CASE.targets >= 0).sum())
LENGTHS = torch.tensor([10, 20])
CU, OWNER = torch.tensor([0, 10, 30]), torch.repeat_interleave(torch.arange(2), LENGTHS)
LOGP = F.linear(CASE.hidden, CASE.weight, CASE.bias).log_softmax(-1).gather(1, CASE.targets.clamp(min=0)[:, None])[:, 0]
SIZES = torch.tensor([0.7, 1.9], dtype=torch.float64)  # of the two sequences' advantages


def on(backend):
    return dk.KernelConfig(backend=backend)


def own(h, w, b):
    """Log-probs of the targets as torch has them, differentiable."""
    return F.linear(h, w, b).log_softmax(-1).gather(1, CASE.targets.clamp(min=0)[:, None])[:, 0]


def aggregated(losses, spec):
    """As `spec.aggregation` has it."""
    losses = torch.where(MASK, losses, 0.0)
    if spec.aggregation == "token_mean":
        return losses.sum() / COUNT
    lengths = torch.zeros(2, dtype=torch.int64).index_add(0, OWNER, MASK.long())
    return (losses / lengths[OWNER]).sum() / 2


# preset → its changes, and the loss of a token of advantage A beyond the bound on its side (+1 for A > 0)
CLIPPED = {
    "ppo": ({}, lambda A, logp, side: -(1 + 0.2 * side) * A),
    "dapo": ({}, lambda A, logp, side: -(1.28 if side > 0 else 0.8) * A),
    "gspo": ({"clip_low": 0.3, "clip_high": 0.4}, lambda A, logp, side: -(1.4 if side > 0 else 0.7) * A),
    "gspo_token": ({"clip_low": 0.3, "clip_high": 0.4}, lambda A, logp, side: -(1.4 if side > 0 else 0.7) * A),
    "gmpo": ({"clip_low": 0.3, "clip_high": 0.4}, lambda A, logp, side: -math.exp(0.4 if side > 0 else -0.3) * A),
    "cispo": ({}, lambda A, logp, side: -(1 + 0.2 * side) * A * logp),  # keeps its gradient by design
    "dppo_tv": ({"clip_low": 1e-4, "clip_high": 1e-4}, lambda A, logp, side: 0 * A),
    "dppo_kl": ({"clip_low": 1e-5, "clip_high": 1e-5}, lambda A, logp, side: 0 * A),
}


@pytest.mark.parametrize("side", [1, -1])
@pytest.mark.parametrize("name", CLIPPED)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_token_clipped(backend, name, side):
    """Ratios of e^±1, far from where a log-ratio is held: the loss is the bound's, and no gradient is left."""
    options, exact = CLIPPED[name]
    spec = dk.PolicySpec.preset(name, **options)
    advantages = side * SIZES
    data = {"old_logprobs": LOGP - side, "cu_seqlens": CU, "spec": spec, "config": on(backend)}

    def fused(h, w, b):
        return loose.policy_loss(h, dk.Head(w, bias=b), CASE.targets, advantages, **data).loss

    def written_out(h, w, b):
        logp = own(h, w, b)
        return aggregated(exact(advantages[OWNER], logp, side) + 0 * logp, spec)

    found, want = (gradients(f, CASE.leaves(torch.float64)) for f in (fused, written_out))
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-12)
    assert any(grad.any() for grad in found[1:]) == (name == "cispo")
    with torch.no_grad():
        metrics = loose.policy_loss(
            CASE.hidden, dk.Head(CASE.weight, bias=CASE.bias), CASE.targets, advantages, **data
        ).metrics
    counts = {end: tuple(map(int, metrics[f"clip_ratio/{end}_mean"])) for end in ("high", "low")}
    assert counts == {"high": (COUNT * (side > 0), COUNT), "low": (COUNT * (side < 0), COUNT)}


@pytest.mark.parametrize("side", [1, -1])
@pytest.mark.parametrize("name", ["ppo", "dapo", "gspo", "gspo_token", "gmpo"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_beyond_the_other_bound_no_token_is_clipped(backend, name, side):
    """A > 0 with a ratio of 1/e and A < 0 with one of e keep loss and gradient: −r·A."""
    spec, advantages = dk.PolicySpec.preset(name), side * SIZES
    data = {"old_logprobs": LOGP + side, "cu_seqlens": CU, "spec": spec, "config": on(backend)}

    def fused(h, w, b):
        return loose.policy_loss(h, dk.Head(w, bias=b), CASE.targets, advantages, **data).loss

    def written_out(h, w, b):
        return aggregated(-advantages[OWNER] * (own(h, w, b) - LOGP - side).exp(), spec)

    found, want = (gradients(f, CASE.leaves(torch.float64)) for f in (fused, written_out))
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-12)


EXTREME = PRESET_SPECS | {
    "dppo_unbounded": dk.PolicySpec.preset("dppo_tv", delta=None, clip_low=HUGE, clip_high=HUGE),
    "off_policy": dk.PolicySpec(off_policy_threshold=0.1),
    "vespo_corrected": dk.PolicySpec.preset("vespo", correction="sequence_truncate"),
    "vespo_corrected_tokens": dk.PolicySpec.preset("vespo", correction="token_mask"),
    "unbiased_k1": dk.PolicySpec(kl_coef=0.1, kl_estimator="k1", kl_unbiased=True),
    "unbiased_k3": dk.PolicySpec(kl_coef=0.1, kl_estimator="k3", kl_unbiased=True),
}
EXTREME |= {
    f"corrected_{form}": dk.PolicySpec(correction=form, correction_bounds=(0.0, HUGE))
    for form in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
}
EXTREME |= {f"kl_{name}": dk.PolicySpec(kl_coef=0.1, kl_estimator=name) for name in ("k1", "k2", "k3", "abs", "k3+")}
OVERFLOWS = ("unbiased_k3", "kl_k3", "kl_k3+")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", EXTREME)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_overflows_without_a_sign(backend, name, dtype):
    """Log-probs that differ by 200 from the old, the reference's or the sampler's: finite losses and gradients, or +∞ from k3."""
    spec = EXTREME[name]
    leaves = CASE.leaves(dtype)
    for of in ("old_logprobs", "ref_logprobs", "rollout_logprobs"):
        for shift in (200.0, -200.0, 90.0, -90.0):
            data = {n: LOGP.to(dtype) for n in ("old_logprobs", "ref_logprobs", "rollout_logprobs")}
            data[of] = data[of] + shift
            infinite = dtype == torch.float32 and name in OVERFLOWS and of == "ref_logprobs" and shift > 0
            for sign in (1.0, -1.0):
                noise = torch.Generator().manual_seed(0)
                advantages = sign * SIZES.to(dtype)
                loss = loose.policy_loss(
                    *leaves[:2],
                    CASE.targets,
                    advantages,
                    bias=leaves[2],
                    spec=spec,
                    cu_seqlens=CU,
                    config=on(backend),
                    generator=noise,
                    **data,
                ).loss
                grads = torch.autograd.grad(loss, leaves)
                assert loss == math.inf if infinite else loss.isfinite()
                assert (name != "kl_k3+" and infinite) or all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("shift", [200.0, -200.0])
@pytest.mark.parametrize("name", ["ppo", "gspo", "gmpo", "sapo", "vespo", "dppo_unbounded", "corrected_token_truncate"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_ratio_that_overflows_is_held_at(backend, name, shift):
    """e^±20; by formulas of such ratios written out."""
    spec, advantages = EXTREME[name], -SIZES
    A, r = advantages[OWNER], math.exp(math.copysign(20, shift))
    data = {"old_logprobs": LOGP - shift, "rollout_logprobs": LOGP - shift}
    if name == "corrected_token_truncate":
        data = {"old_logprobs": LOGP, "rollout_logprobs": LOGP - shift}
    exact = {
        "ppo": -A * max(r, 0.8),
        "gspo": -A * max(r, 1 - 3e-4),
        "gmpo": -A * max(r, math.exp(-0.4)),
        "sapo": -4 / 1.05 * A / (1 + math.exp(min(-1.05 * (r - 1), 700))),
        # e^λ·w^k·e^(−λw), where w, a product of many ratios, is held between 1e-8 and e^20, at which nothing is left
        "vespo": -A * LOGP * (0 if shift > 0 else math.exp(2 + 3 * math.log(1e-8) - 2e-8)),
        "dppo_unbounded": -A * r * LOGP * (shift > 0),  # the old one would be e^196, and lies beyond any bound
        "corrected_token_truncate": -A * r,
    }[name]
    loss = loose.policy_loss(
        CASE.hidden,
        dk.Head(CASE.weight, bias=CASE.bias),
        CASE.targets,
        advantages,
        spec=spec,
        cu_seqlens=CU,
        config=on(backend),
        **data,
    ).loss
    torch.testing.assert_close(loss, aggregated(exact, spec), rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [300.0, 90.0, 30.0, -30.0, -90.0, -300.0])
@pytest.mark.parametrize("name", ["ppo", "gspo", "sapo", "gmpo", "kl_k3", "dro"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_targets_that_dominate_and_that_vanish(backend, name, scale, dtype):
    """p → 1 and p → 0, in the policy term and in the gradient of an entropy, against torch in double."""
    spec = replace(EXTREME[name], entropy_coef=0.3)
    weight = torch.zeros(7, 4, dtype=torch.float64)
    weight[3] = scale / 4
    targets = torch.tensor([3, 3, -100, 3])
    old = {"old_logprobs": None if name != "dro" else torch.full((4,), -1.0, dtype=dtype)}
    if spec.kl_coef:
        old["ref_logprobs"] = torch.full((4,), -2.0 if scale > 0 else scale, dtype=dtype)
    options = {"spec": spec, "cu_seqlens": torch.tensor([0, 2, 4]), "config": on(backend)}

    def exact(h, w):
        log_p = F.linear(h, w).log_softmax(-1)
        logp, entropy = log_p[:, 3], -(log_p.exp() * log_p).sum(-1)
        ratio = (logp - logp.detach()).exp()
        loss = {"sapo": -4 * torch.sigmoid(ratio - 1), "dro": -logp + REQUIRED / 2 * (logp + 1) ** 2}.get(name, -ratio)
        if spec.kl_coef:
            d = logp - old["ref_logprobs"].double()
            loss = loss + 0.1 * ((-d).exp() + d - 1)
        loss = (loss - 0.3 * entropy)[targets == 3]
        return loss.mean() if spec.aggregation == "token_mean" else (loss[:2].mean() + loss[2]) / 2

    def fused(h, w):
        return loose.policy_loss(h, w, targets, torch.ones(4, dtype=dtype), **old, **options).loss

    def leaves(dtype):
        return tuple(t.to(dtype).requires_grad_() for t in (torch.ones(4, 4), weight.clone()))

    found, want = gradients(fused, leaves(dtype)), gradients(exact, leaves(torch.float64))
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close([t.double() for t in found], list(want), **tolerance)
    if scale == 300 and dtype == torch.float32:
        assert not any(t.any() for t in found[1:])


@pytest.mark.parametrize("scale", [300.0, 30.0, -30.0, -300.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_entropies_of_near_certainty(backend, scale):
    """Differentiable ones."""
    weight = torch.zeros(7, 4, dtype=torch.float64)
    weight[3] = scale / 4
    targets = torch.tensor([3, 0])

    def exact(h, w):
        log_p = F.linear(h, w).log_softmax(-1)
        return (-(log_p.exp() * log_p).sum(-1) * torch.tensor([1.0, 2.0])).sum()

    def fused(h, w):
        out = dk.linear_logprob(h, w, targets, entropy_gradient=True, config=on(backend))
        return (out.entropy * torch.tensor([1.0, 2.0])).sum()

    def leaves():
        return torch.ones(2, 4, dtype=torch.float64).requires_grad_(), weight.clone().requires_grad_()

    found, want = (gradients(f, leaves()) for f in (fused, exact))
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["full", "student's top 1", "stored", "sampled", "explored"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_hybrid_over_a_vocabulary_of_one(backend, kind):
    """Nothing to learn from a teacher, and the policy term of a ratio of 1, without gradient."""
    g = torch.Generator().manual_seed(0)
    hidden, weight, seen, theirs = (torch.randn(n, 3, generator=g) for n in (6, 1, 6, 1))
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    teacher = dk.Teacher(seen, theirs)
    if kind == "stored":
        teacher = dk.topk_logprobs(seen, theirs, 1)
    elif kind == "sampled":
        teacher = dk.TeacherLogprobs(torch.zeros(6))
    explored = {"exploration": dk.ExplorationSpec(entropy_warmup=True), "turn_ids": torch.zeros(6, dtype=torch.int64)}
    explored |= {"rebellious_weights": torch.ones(6), "mean_difference": 0.1, "mean_entropy": 1.0}
    advantages = torch.tensor([1.0, -2.0, 9.0, 0.5, 3.0, 0.0])
    spec = {"student's top 1": {"top_k": 1}, "sampled": {"alpha": 1.0}}.get(kind, {})
    out = loose.self_distill_loss(
        *leaves,
        torch.tensor([0, 0, -100, 0, 0, 0]),
        teacher,
        advantages,
        distill_weights=None,
        policy_weights=None,
        old_logprobs=torch.zeros(6),
        policy=dk.PolicySpec(entropy_coef=0.1),
        distill=dk.DistillSpec(**spec),
        outputs=("logprobs", "entropy", "divergence"),
        config=on(backend),
        **(explored if kind == "explored" else {}),
    )
    torch.testing.assert_close(out.loss, torch.tensor(-2.5 / 5))
    assert all(value.abs().max() < 1e-6 for value in out.outputs.values())
    assert all(grad.abs().max() < 1e-6 for grad in torch.autograd.grad(out.loss, leaves))
