"""Every op on every backend against float64, within twice torch's own error in the same dtype."""

import math
from dataclasses import replace

import loose
import pytest
import torch
import torch.nn.functional as F

import drift_kernels as dk
from drift_kernels import _cpu
from drift_kernels.testing import gradients, make_case, off_the_edges, within_budget

SHAPES = [(1, 33, 7), (5, 8, 1), (64, 33, 1001), (37, 16, 50_257), (3, 7, 131_075)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ISAS = _cpu.isas()  # that this CPU has; it would take the last by itself
EACH_ISA = pytest.mark.parametrize("isa", ISAS, indirect=True)
SMALL = dk.KernelConfig(backend="cpu", workspace_bytes=4 << 20)  # several chunks at a large V


@pytest.fixture
def isa(request):
    """Row kernels take the sweeps that were compiled for this instruction set."""
    _cpu.limit_isa(request.param)
    yield request.param
    _cpu.limit_isa(None)


def check(actual, own, exact, dtype, V, names=("loss", "hidden", "weight", "bias")):
    for name, a, o, e in zip(names, actual, own, exact):
        # a loss is made of log-probs of about log V, which may cancel
        ok, line = (
            within_budget(a, o, e, torch.float32, max(1.0, math.log(V)))
            if name == "loss"
            else within_budget(a, o, e, dtype)
        )
        assert ok, f"{name}: {line}"


def eager_cross_entropy(hidden, weight, bias, targets, weights, temperature=1.0, softcap=None):
    """What a user would write, in the inputs' dtype."""
    z = F.linear(hidden, weight, bias).float() if hidden.dtype != torch.float64 else F.linear(hidden, weight, bias)
    z = softcap * torch.tanh(z / softcap) if softcap else z
    ce = F.cross_entropy(z / temperature, targets, reduction="none", ignore_index=-100)
    total = torch.where(targets != -100, weights, 0.0).sum().clamp(min=1e-30)
    return (ce * weights.to(ce.dtype)).sum() / total


@EACH_ISA
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_weighted_cross_entropy(shape, dtype, softcap, isa):
    case = make_case(*shape, dtype=dtype)
    if (case.targets < 0).all():
        case.targets[0] = 0
    weights = case.token_weights + 0.1

    def fused(h, w, b):
        options = {"bias": b, "temperature": 0.7, "softcap": softcap, "config": SMALL}
        return loose.weighted_cross_entropy(h, w, case.targets, weights, **options).loss

    def eager(h, w, b):
        return eager_cross_entropy(h, w, b, case.targets, weights, 0.7, softcap)

    actual, own, exact = (
        gradients(f, case.leaves(d)) for f, d in ((fused, dtype), (eager, dtype), (eager, torch.float64))
    )
    check(actual, own, exact, dtype, shape[2])


def test_each_instruction_set_has_sweeps_of_its_own():
    """Sums in another order differ in their last bits: what is limited is what runs."""
    case = make_case(64, 8, 20_011, masked=0.0)
    args = (case.hidden.float(), case.weight.float(), case.targets)
    found = {}
    try:
        for name in ISAS:
            _cpu.limit_isa(name)
            found[name] = dk.linear_logprob(*args, entropy_gradient=True)
        assert ISAS[0] == "baseline"
        assert len({tuple(out.entropy.tolist()) for out in found.values()}) == len(ISAS)
        with pytest.raises(ValueError, match="this CPU has no 'sse9'"):
            _cpu.limit_isa("sse9")
    finally:
        _cpu.limit_isa(None)
    again = dk.linear_logprob(*args, entropy_gradient=True).entropy
    assert torch.equal(again, found[ISAS[-1]].entropy)


def ppo(hidden, weight, bias, case, old, low=0.2, high=0.28):
    """The clipped loss as its paper writes it, token mean."""
    z = F.linear(hidden, weight, bias)
    logp = torch.log_softmax(z if z.dtype == torch.float64 else z.float(), -1)
    mask = case.targets >= 0
    logp = logp.gather(-1, case.targets.clamp(min=0)[:, None])[:, 0]
    r = (logp - old.to(logp.dtype)).exp()
    A = case.advantages.to(logp.dtype)
    loss = -torch.minimum(r * A, r.clamp(1 - low, 1 + high) * A)
    return (loss * mask).sum() / mask.sum().clamp(min=1)


@EACH_ISA
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_policy_loss_is_ppo(shape, dtype, isa):
    case = make_case(*shape, dtype=dtype)
    exact_logp = dk.linear_logprob(
        case.hidden, dk.Head(case.weight, bias=case.bias), case.targets, config=dk.KernelConfig(backend="reference")
    ).logprobs
    # ratios in half precision move by the error of the log-prob: keep every token clear of a bound by more than that
    old = off_the_edges(exact_logp + case.noise, exact_logp, (0.8, 1.28), 1e-3 if dtype == torch.float32 else 0.08)
    spec = dk.PolicySpec.preset("dapo")

    def fused(h, w, b):
        return dk.policy_loss(
            h, dk.Head(w, bias=b), case.targets, case.advantages, old_logprobs=old, spec=spec, config=SMALL
        ).loss

    def eager(h, w, b):
        return ppo(h, w, b, case, old)

    actual, own, exact = (
        gradients(f, case.leaves(d)) for f, d in ((fused, dtype), (eager, dtype), (eager, torch.float64))
    )
    check(actual, own, exact, dtype, shape[2])


SPECS = {
    "ppo": dk.PolicySpec(),
    "grpo": dk.PolicySpec.preset("grpo", kl_coef=0.1),
    "dapo": dk.PolicySpec.preset("dapo"),
    "dr_grpo": dk.PolicySpec.preset("dr_grpo"),
    "dual": dk.PolicySpec(dual_clip=1.5),
    "delta": dk.PolicySpec(delta=1.4),
    "cispo": dk.PolicySpec.preset("cispo", clip_low=None, clip_high=0.5),
    "sapo": dk.PolicySpec.preset("sapo"),
    "reinforce": dk.PolicySpec(objective="reinforce"),
    "everything": dk.PolicySpec(kl_coef=0.1, kl_estimator="k3+", entropy_coef=0.05, z_loss_coef=0.01, dual_clip=3.0),
    "sums": dk.PolicySpec(aggregation="sequence_mean_token_sum", kl_coef=0.2, kl_estimator="k1"),
    "corrected": dk.PolicySpec(
        correction="token_truncate", correction_bounds=(0.0, 1.2), kl_coef=0.3, kl_estimator="abs"
    ),
    "masked": dk.PolicySpec(correction="sequence_mask", correction_bounds=(0.5, 2.0), entropy_coef=0.1),
    "dppo_tv": dk.PolicySpec.preset("dppo_tv", clip_low=0.01, clip_high=0.002, delta=1.3),
    "dppo_kl": dk.PolicySpec.preset("dppo_kl", clip_low=2e-4, clip_high=1e-4, entropy_coef=0.1),
    "dro": dk.PolicySpec.preset("dro", dro_beta=0.3, kl_coef=0.1, kl_unbiased=True),
    "gppo": dk.PolicySpec.preset("ce_gppo", gppo_weights=(0.75, 0.9), kl_coef=0.1),
    "unbiased": dk.PolicySpec(kl_coef=0.2, kl_unbiased=True, kl_estimator="k3+"),
    "gspo": dk.PolicySpec.preset(
        "gspo", clip_low=0.1, clip_high=0.05, kl_coef=0.1, kl_unbiased=True, entropy_coef=0.02
    ),
    "gspo_token": dk.PolicySpec.preset("gspo_token", clip_low=0.1, clip_high=0.05, z_loss_coef=0.01),
    "luspo": dk.PolicySpec.preset("luspo", clip_low=0.1, clip_high=0.05),
    "gmpo": dk.PolicySpec.preset("gmpo", clip_low=0.2, clip_high=0.1),
    "vespo": dk.PolicySpec.preset("vespo", correction="token_truncate"),
    "off_policy": dk.PolicySpec(off_policy_threshold=0.01, correction="sequence_truncate"),
    "sequence_cispo": dk.PolicySpec(objective="cispo", ratio="sequence", clip_high=0.05),
    "sequence_sapo": dk.PolicySpec(objective="sapo", ratio="sequence_token"),
    "clip_cov": dk.PolicySpec.preset("clip_cov", cov_share=0.2, cov_bounds=(0.2, 5.0)),
    "kl_cov": dk.PolicySpec.preset("kl_cov", cov_share=0.2, kl_coef=0.1),
    "corrected_dro": dk.PolicySpec.preset("dro", dro_beta=0.3, correction="token_mask"),
    "corrected_kl_cov": dk.PolicySpec.preset("kl_cov", cov_share=0.2, correction="sequence_truncate"),
    "abs+": dk.PolicySpec(kl_coef=0.2, kl_estimator="abs+"),
    "far_dppo": dk.PolicySpec.preset("dppo_kl", clip_low=0.02, clip_high=0.05, delta=0.9),
}


@EACH_ISA
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("head", [{}, {"softcap": 3.0, "logit_scale": 1.3, "temperature": 0.6}, {"temperature": "row"}])
def test_every_spec_in_double_equals_autograd(name, head, isa):
    """The real driver in double, three chunks and more, against full logits and autograd."""
    case, spec = make_case(40, 9, 61, seed=3), SPECS[name]
    if head.get("temperature") == "row":
        head = {"temperature": torch.linspace(0.5, 2.0, 40)}
    with torch.no_grad():
        exact = loose.linear_logprob(case.hidden, dk.Head(case.weight, bias=case.bias), case.targets, **head).logprobs
    data = {
        "old_logprobs": off_the_edges(exact + case.noise, exact, (0.8, 1.2, 1.4, 1.5)),
        "ref_logprobs": exact + 0.5 * case.noise.roll(1),
    }
    data["rollout_logprobs"] = data["old_logprobs"] + 0.3 * case.noise.roll(2)
    data |= {"cu_seqlens": torch.tensor([0, 11, 12, 30, 40], dtype=torch.int32), "token_weights": case.token_weights}
    outputs = ("logprobs", "entropy", "lse", "is_top1", "mean_logits", "log_sum_sq_probs", "ratio", "kl", "clipped")

    def run(backend):
        config = dk.KernelConfig(backend=backend, workspace_bytes=8 * (61 + 18) * 11)
        leaves = case.leaves(torch.float64)
        out = loose.policy_loss(
            leaves[0],
            dk.Head(leaves[1], bias=leaves[2]),
            case.targets,
            case.advantages,
            spec=spec,
            outputs=outputs,
            config=config,
            generator=torch.Generator().manual_seed(0),
            **data,
            **head,
        )
        return out, torch.autograd.grad(out.loss, leaves)

    ours, oracle = run("cpu"), run("reference")
    torch.testing.assert_close(ours[0].loss, oracle[0].loss, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(ours[1], oracle[1], rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(ours[0].outputs, oracle[0].outputs, rtol=1e-10, atol=1e-12)
    for key, (total, count) in ours[0].metrics.items():
        torch.testing.assert_close((total, count), oracle[0].metrics[key])


@pytest.mark.parametrize("name", SPECS)
def test_on_policy_is_ratio_one(name):
    """old_logprobs=None equals passing the policy's own log-probs, in value and gradient."""
    spec = SPECS[name]
    if spec.correction:
        spec = replace(spec, correction=None)
    if spec.off_policy_threshold is not None:
        pytest.skip("compares with old_logprobs, which it needs")
    case = make_case(20, 9, 61, seed=4)
    with torch.no_grad():
        own = dk.linear_logprob(case.hidden, dk.Head(case.weight, bias=case.bias), case.targets).logprobs
    common = {"spec": spec, "ref_logprobs": own + case.noise, "cu_seqlens": torch.tensor([0, 11, 20])}

    def run(h, w, b, old):
        generator = torch.Generator().manual_seed(0)
        options = {"old_logprobs": old, "bias": b, "generator": generator, **common}
        return loose.policy_loss(h, w, case.targets, case.advantages, **options).loss

    without, given = (gradients(lambda *x, o=o: run(*x, o), case.leaves(torch.float64)) for o in (None, own))
    torch.testing.assert_close(without, given, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_correction_weighs_the_penalty_of_dro_too(backend):
    """Its objective is not linear in the advantage: (−A·logp + β/2·d²) as a whole is multiplied."""
    case, spec = make_case(20, 9, 61, seed=6, masked=0.0), dk.PolicySpec.preset("dro", dro_beta=0.7)
    with torch.no_grad():
        logp = dk.linear_logprob(case.hidden, case.weight, case.targets).logprobs
    old, rollout = logp + case.noise, logp + case.noise + case.noise.roll(1)
    out = dk.policy_loss(
        case.hidden,
        case.weight,
        case.targets,
        case.advantages,
        old_logprobs=old,
        rollout_logprobs=rollout,
        spec=replace(spec, correction="token_truncate", correction_bounds=(0.0, 1.1)),
        config=dk.KernelConfig(backend=backend),
    )
    factor = (old - rollout).exp().clamp(max=1.1)
    expected = (factor * (-case.advantages * logp + 0.7 / 2 * (logp - old) ** 2)).mean()
    torch.testing.assert_close(out.loss, expected)


def test_further_outputs_beside_gradients():
    """Statistics without a gradient, asked for in a call that has one."""
    case = make_case(20, 9, 61, seed=7)
    names = ("lse", "is_top1", "mean_logits", "log_sum_sq_probs")
    found = []
    for backend in ("cpu", "reference"):
        h, w, b = case.leaves(torch.float64)
        config = dk.KernelConfig(backend=backend)
        out = dk.linear_logprob(h, dk.Head(w, bias=b), case.targets, outputs=names, config=config)
        assert not any(value.requires_grad for value in out.outputs.values())
        found.append((out.logprobs, out.outputs, *torch.autograd.grad(out.logprobs.sum(), (h, w, b))))
    torch.testing.assert_close(*found)


def test_advantages_per_segment_and_padded_inputs():
    """[S] advantages over cu_seqlens, and a padded [B, L] batch, give what per-token ones over packed rows give."""
    case, spec = make_case(24, 9, 61, seed=5, masked=0.0), dk.PolicySpec.preset("grpo")
    lengths, segment_advantages = [8, 3, 13], torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    cu = torch.tensor([0, 8, 11, 24])
    owner = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    packed = dk.policy_loss(case.hidden, case.weight, case.targets, segment_advantages, cu_seqlens=cu, spec=spec).loss
    tokens = dk.policy_loss(
        case.hidden, case.weight, case.targets, segment_advantages[owner], segment_ids=owner, spec=spec
    ).loss
    hidden, targets = torch.zeros(3, 13, 9, dtype=torch.float64), torch.full((3, 13), -100)
    for i, part in enumerate(torch.arange(24).split(lengths)):
        hidden[i, : len(part)], targets[i, : len(part)] = case.hidden[part], case.targets[part]
    padded = dk.policy_loss(hidden, case.weight, targets, segment_advantages, spec=spec, outputs=("logprobs",))
    assert padded.logprobs.shape == (3, 13)
    torch.testing.assert_close(tokens, packed)
    torch.testing.assert_close(padded.loss, packed)


def focal(logp, advantages):
    return -advantages * logp * (1 - logp.exp()) ** 2


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_pointwise_loss_takes_any_function(backend):
    case = make_case(40, 9, 61, seed=6)
    config = dk.KernelConfig(backend=backend, workspace_bytes=8 * 80 * 11)

    def fused(h, w, b):
        return dk.pointwise_loss(
            h, dk.Head(w, bias=b, softcap=4.0), case.targets, focal, case.advantages, config=config
        ).loss

    def eager(h, w, b):
        mask = case.targets >= 0
        z = 4.0 * torch.tanh(F.linear(h, w, b) / 4.0)
        logp = torch.log_softmax(z, -1).gather(-1, case.targets.clamp(min=0)[:, None])[:, 0]
        return focal(logp, case.advantages)[mask].mean()

    actual, exact = (gradients(f, case.leaves(torch.float64)) for f in (fused, eager))
    torch.testing.assert_close(actual, exact, rtol=1e-10, atol=1e-13)


def test_pointwise_loss_refuses_what_it_would_get_wrong():
    case = make_case(10, 9, 61, masked=0.0)
    args = (case.hidden, case.weight, case.targets)
    with pytest.raises(ValueError, match="differs from fn of two parts"):
        dk.pointwise_loss(*args, lambda logp: -logp / logp.exp().sum())
    with pytest.raises(ValueError, match="not reduce"):
        dk.pointwise_loss(*args, lambda logp: -logp.mean())
    with pytest.raises(ValueError, match="requires grad"):
        dk.pointwise_loss(*args, focal, case.advantages.clone().requires_grad_())
    with pytest.raises(ValueError, match="has shape"):
        dk.pointwise_loss(*args, focal, case.advantages[:3])
    with pytest.raises(TypeError, match="fn returned a float"):
        dk.pointwise_loss(*args, lambda logp: 1.0)


OF_OTHERS = {
    "pairs": lambda logp, a: -F.logsigmoid(logp[0::2] - logp[1::2]).repeat_interleave(2),
    "a neighbour's gradient": lambda logp, a: -a * (logp.detach() + (logp - logp.detach()).flip(0)),
    "a neighbour's advantage": lambda logp, a: -logp * a.flip(0),
    "blocks": lambda logp, a: -logp * a.view(-1, 2).mean(1).repeat_interleave(2),
    "running minimum": lambda logp, a: -a * logp.cummin(0).values,
    "sorted": lambda logp, a: -a * logp.sort(descending=True).values,
    "the token before": lambda logp, a: -torch.minimum(logp, torch.cat((logp[:1], logp[:-1]))),
    "improbable neighbours": lambda logp, a: -a * torch.where(logp < -5, logp.roll(1), logp),
}


@pytest.mark.parametrize("count", [2, 24])
@pytest.mark.parametrize("name", OF_OTHERS)
def test_pointwise_loss_refuses_a_function_that_reads_other_tokens(name, count):
    case = make_case(count, 9, 61, masked=0.0)
    with pytest.raises(ValueError, match="may read that token alone"):
        dk.pointwise_loss(case.hidden, case.weight, case.targets, OF_OTHERS[name], case.advantages)


def test_pointwise_loss_takes_functions_whose_gradients_cancel():
    """Each equals its gradient's exact multiple under the check, however large its terms are."""
    case = make_case(64, 9, 61, masked=0.0)
    for fn in (
        lambda logp, old: 1e4 * ((old - logp).exp() - (old - logp) - 1),
        lambda logp, old: -(logp - old).exp().clamp(0.8, 1.2) * old,
        lambda logp, old: -((1 - logp.exp()) ** 2) * logp,
        lambda logp, old: logp.exp() ** 2,
        lambda logp, old: old * 0,
    ):
        assert dk.pointwise_loss(case.hidden, case.weight, case.targets, fn, case.noise).loss.isfinite()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_pointwise_loss_refuses_a_closure_that_would_get_no_gradient(backend):
    case, config = make_case(10, 9, 61), dk.KernelConfig(backend=backend)
    args, power = (case.hidden, case.weight, case.targets), torch.tensor(2.0, requires_grad=True)

    def fn(logp):
        return -logp * (1 - logp.exp()) ** power.exp()

    with pytest.raises(ValueError, match=r"fn reads a \(\) tensor that requires grad.*detach it, or.*linear_logprob"):
        dk.pointwise_loss(*args, fn, config=config)
    with torch.no_grad():  # nobody waits for a gradient
        expected = dk.pointwise_loss(*args, fn, config=config).loss
    power.requires_grad_(False)
    assert dk.pointwise_loss(*args, fn, config=config).loss == expected


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_several_targets_a_row(backend):
    """rows= gives what repeating the hidden rows gives; their gradients add up."""
    case = make_case(12, 9, 61, seed=7)
    g = torch.Generator().manual_seed(0)
    rows = torch.sort(torch.randint(0, 12, (30,), generator=g)).values
    targets = torch.randint(0, 61, (30,), generator=g)
    targets[::7] = -100
    advantages, old = torch.randn(30, generator=g, dtype=torch.float64), torch.full((30,), -4.0, dtype=torch.float64)
    temperature = torch.linspace(0.5, 2.0, 12)
    spec = dk.PolicySpec(entropy_coef=0.05, z_loss_coef=0.01)
    config = dk.KernelConfig(backend=backend, workspace_bytes=8 * 80 * 5)

    def shared(h, w, b):
        out = dk.policy_loss(
            h,
            dk.Head(w, bias=b, temperature=temperature),
            targets,
            advantages,
            old_logprobs=old,
            rows=rows,
            spec=spec,
            config=config,
            outputs=("logprobs", "entropy"),
        )
        logprobs = dk.linear_logprob(h, dk.Head(w, bias=b), targets, rows=rows, entropy_gradient=True, config=config)
        return out.loss + (logprobs.logprobs * advantages).sum() + logprobs.entropy.square().sum(), out

    def repeated(h, w, b):
        out = dk.policy_loss(
            h[rows],
            dk.Head(w, bias=b, temperature=temperature[rows]),
            targets,
            advantages,
            old_logprobs=old,
            spec=spec,
            outputs=("logprobs", "entropy"),
        )
        logprobs = dk.linear_logprob(h[rows], dk.Head(w, bias=b), targets, entropy_gradient=True)
        return out.loss + (logprobs.logprobs * advantages).sum() + logprobs.entropy.square().sum(), out

    results = [gradients(lambda *x, f=f: f(*x)[0], case.leaves(torch.float64)) for f in (shared, repeated)]
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)
    outs = [f(*case.leaves(torch.float64))[1].outputs for f in (shared, repeated)]
    torch.testing.assert_close(outs[0], outs[1])


@EACH_ISA
@pytest.mark.parametrize("softcap", [0.5, 30.0, 1e3, 1e5, 1e7])
def test_softcap_keeps_its_digits_whatever_its_size(softcap, isa):
    case = make_case(20, 9, 61, masked=0.0)
    leaves = [t.float() for t in (case.hidden, case.weight)]
    exact = dk.linear_logprob(case.hidden, dk.Head(case.weight, softcap=softcap), case.targets).logprobs
    actual = dk.linear_logprob(leaves[0], dk.Head(leaves[1], softcap=softcap), case.targets).logprobs
    assert (actual.double() - exact).abs().max() < 5e-6


@pytest.mark.parametrize("objective", ["clip", "cispo"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_clip_metrics_do_not_depend_on_what_else_is_asked_for(objective, backend):
    case, spec = make_case(40, 9, 61, seed=8), dk.PolicySpec(objective=objective)
    old, found = torch.full((40,), -6.0, dtype=torch.float64), []
    for outputs in ((), ("clipped",), ("clipped", "logprobs")):
        out = dk.policy_loss(
            case.hidden,
            case.weight,
            case.targets,
            case.advantages,
            old_logprobs=old,
            token_weights=case.token_weights,
            spec=spec,
            outputs=outputs,
            config=dk.KernelConfig(backend=backend),
        )
        found.append({name: (int(total), int(count)) for name, (total, count) in out.metrics.items()})
    assert found[0] == found[1] == found[2]
    assert found[0]["clip_ratio/region_mean"][0] > 0


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gmpo_reads_the_mean_advantage_also_where_no_weighted_token_has_one(backend):
    """The advantage sits on a token of weight 0: the other one's loss is −mean(A)·exp(mean of log-ratios) all the same."""
    case = make_case(4, 9, 61, seed=9, masked=0.0)
    advantages, weights = torch.tensor([3.0, 0.0, 0.0, 0.0]).double(), torch.tensor([0.0, 1.0, 1.0, 1.0]).double()
    logp = torch.log_softmax(case.hidden @ case.weight.t(), -1).gather(1, case.targets[:, None])[:, 0]
    options = {"old_logprobs": logp - 0.05, "token_weights": weights, "cu_seqlens": torch.tensor([0, 2, 4])}
    options |= {"spec": dk.PolicySpec.preset("gmpo"), "config": dk.KernelConfig(backend=backend)}
    loss = loose.policy_loss(case.hidden, case.weight, case.targets, advantages, **options).loss
    mean_log_ratio = (0.05 + 0.0) / 2  # of sign(A)·min(…): a token without an advantage has none
    torch.testing.assert_close(loss, torch.tensor(-1.5 * math.exp(mean_log_ratio) / 2 / 2).double())
