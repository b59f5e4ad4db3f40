"""Every op, objective, dtype, head option and edge on each GPU backend, against `reference` in float64 on the same GPU."""

import loose
import pytest
import torch
from small_ops import DTYPES, REFERENCE, D, T, V, case_on, close, config, leaves, policy_data, three
from test_losses import SPECS

import drift_kernels as dk
from drift_kernels.testing import within_budget

OUTPUTS = ("logprobs", "entropy", "lse", "is_top1", "mean_logits", "log_sum_sq_probs")
POLICY_OUTPUTS = (*OUTPUTS, "ratio", "kl", "clipped")
HEADS = [{}, {"softcap": 3.0, "logit_scale": 1.3, "temperature": 0.6}, {"temperature": "row"}]


def head_on(device, head):
    return {"temperature": torch.linspace(0.5, 2.0, T, device=device)} if head.get("temperature") == "row" else head


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SPECS)
def test_every_objective(backend, device, name, dtype, monkeypatch):
    case = case_on(device, dtype=dtype, seed=1)
    data = policy_data(case, dtype)
    chance = torch.rand(T, generator=torch.Generator().manual_seed(0)).to(device)
    monkeypatch.setattr(
        torch, "rand", lambda shape, **options: chance.to(options["dtype"])
    )  # clip_cov's choice, for all

    def loss(h, w, b, config):
        advantages = case.advantages.to(h.dtype if h.dtype == torch.float64 else torch.float32)
        return loose.policy_loss(
            h, dk.Head(w, bias=b), case.targets, advantages, spec=SPECS[name], config=config, **data
        ).loss

    close(three(loss, case, dtype, backend), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("masked", [0.0, 0.4])
def test_weighted_cross_entropy(backend, device, dtype, head, masked):
    case = case_on(device, dtype=dtype, masked=masked)

    def loss(h, w, b, config):
        options = {"bias": b, "config": config, **head_on(device, head)}
        return loose.weighted_cross_entropy(h, w, case.targets, case.token_weights + 0.1, **options).loss

    close(three(loss, case, dtype, backend), dtype)


@pytest.mark.parametrize("head", HEADS)
def test_every_output_and_metric(backend, device, head):
    case, found = case_on(device, seed=2), []
    data = policy_data(case, torch.float32)
    for dtype, chosen in ((torch.float32, config(backend)), (torch.float64, REFERENCE)):
        h, w, b = leaves(case, dtype)
        options = {"bias": b, "outputs": POLICY_OUTPUTS, "config": chosen, **data, **head_on(device, head)}
        found.append(loose.policy_loss(h, w, case.targets, case.advantages.to(dtype), **options))
    for name in POLICY_OUTPUTS:
        if name == "clipped" and head:
            continue  # the head moves ratios onto the edges
        actual, exact = (out.outputs[name].double() for out in found)
        torch.testing.assert_close(actual, exact, rtol=3e-5, atol=3e-5)
    for name, (total, count) in found[0].metrics.items():
        if not name.startswith("clip_ratio") or not head:
            torch.testing.assert_close(total.double(), found[1].metrics[name][0].double(), rtol=1e-4, atol=1e-4)
        assert count == found[1].metrics[name][1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entropy", [False, True])
def test_linear_logprob_under_a_loss_of_ones_own(backend, device, dtype, entropy):
    case = case_on(device, dtype=dtype, seed=3)

    def loss(h, w, b, config):
        out = dk.linear_logprob(h, dk.Head(w, bias=b), case.targets, entropy_gradient=entropy, config=config)
        total = (out.logprobs * case.advantages.to(out.logprobs.dtype)).sum()
        return total + 0.1 * out.entropy.square().sum() if entropy else total

    close(three(loss, case, dtype, backend), dtype, scale=float(T))


@pytest.mark.parametrize("dtype", DTYPES)
def test_scoring_without_gradients(backend, device, dtype):
    """The path without logits in memory, at a width and a vocabulary that tiles do not divide."""
    case = case_on(device, 130, 72, 1003, dtype=dtype, seed=4)
    with torch.no_grad():
        h, w, b = (t.to(dtype) for t in (case.hidden, case.weight, case.bias))
        found = dk.linear_logprob(h, dk.Head(w, bias=b), case.targets, outputs=OUTPUTS, config=config(backend, dtype))
        exact = dk.linear_logprob(
            case.hidden, dk.Head(case.weight, bias=case.bias), case.targets, outputs=OUTPUTS, config=REFERENCE
        )
    for name in OUTPUTS:
        torch.testing.assert_close(found.outputs[name].double(), exact.outputs[name], rtol=3e-5, atol=3e-5)


def focal(logp, advantages):
    return -advantages * logp * (1 - logp.exp()) ** 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_pointwise_loss(backend, device, dtype):
    case = case_on(device, dtype=dtype, seed=5)

    def loss(h, w, b, config):
        data = case.advantages.to(torch.float64 if h.dtype == torch.float64 else torch.float32)
        return dk.pointwise_loss(h, dk.Head(w, bias=b, softcap=4.0), case.targets, focal, data, config=config).loss

    close(three(loss, case, dtype, backend), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_targets_a_row(backend, device, dtype):
    case = case_on(device, 50, D, V, dtype=dtype, seed=6)
    g = torch.Generator().manual_seed(0)
    owner = torch.sort(torch.randint(0, 50, (120,), generator=g)).values.to(device)
    targets = torch.randint(0, V, (120,), generator=g).to(device)
    targets[::7] = -100
    advantages, spec = torch.randn(120, generator=g).to(device), dk.PolicySpec(entropy_coef=0.05, z_loss_coef=0.01)

    def loss(h, w, b, config):
        options = {"rows": owner, "bias": b, "config": config, "temperature": 0.8}
        policy = loose.policy_loss(h, w, targets, advantages, spec=spec, **options).loss
        scored = loose.linear_logprob(h, w, targets, entropy_gradient=True, **options)
        return policy + scored.logprobs.mean() + scored.entropy.square().mean()

    close(three(loss, case, dtype, backend), dtype, scale=float(V) ** 0.5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_lora_head(backend, device, dtype):
    case = case_on(device, dtype=dtype, seed=7)
    g = torch.Generator().manual_seed(0)
    low_rank = [torch.randn(*size, generator=g).to(device, dtype) * 0.2 for size in ((4, D), (V, 4))]
    found = []
    for chosen, kind in ((config(backend, dtype), dtype), (REFERENCE, dtype), (REFERENCE, torch.float64)):
        inputs = [t.detach().to(kind).clone().requires_grad_() for t in (case.hidden, *low_rank)]
        lora = dk.LoRAHead(inputs[1], inputs[2], 0.5)
        out = dk.weighted_cross_entropy(
            inputs[0], dk.Head(case.weight.to(kind), lora=lora), case.targets, config=chosen
        )
        found.append((out.loss.detach(), *torch.autograd.grad(out.loss, inputs)))
    for name, a, o, e in zip(("loss", "hidden", "A", "B"), *found):
        # the low-rank part passes through one more rounding to the inputs' type
        ok, line = within_budget(a, o, e, dtype, 4 * float(e.abs().max()))
        assert ok, f"{name}: {line}"


def test_a_frozen_head(backend, device):
    case, found = case_on(device, seed=8), []
    for dtype, chosen in ((torch.float32, config(backend)), (torch.float64, REFERENCE)):
        h, w, b = leaves(case, dtype)
        out = dk.linear_logprob(h, dk.Head(w.detach(), bias=b.detach()), case.targets, config=chosen).logprobs
        found.append(torch.autograd.grad((out * case.advantages.to(dtype)).sum(), h)[0].double())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_fp32_head_under_narrower_hidden_states(backend, device, dtype):
    case = case_on(device, dtype=dtype, seed=15)

    def run(kinds, chosen):
        h, w = (t.to(kind, copy=True).requires_grad_() for t, kind in zip((case.hidden, case.weight), kinds))
        loss = dk.weighted_cross_entropy(h, dk.Head(w, softcap=3.0), case.targets, config=chosen).loss
        scores = dk.linear_logprob(h, w, case.targets, config=chosen).logprobs
        return (loss.detach(), *torch.autograd.grad(loss - scores.mean(), (h, w)))

    exact = run((torch.float64, torch.float64), REFERENCE)
    for a, e in zip(run((dtype, torch.float32), config(backend)), exact):
        tolerance = torch.finfo(a.dtype).eps if a.dtype == dtype else 1e-5
        torch.testing.assert_close(a.double(), e, rtol=tolerance, atol=tolerance * float(e.abs().max()))


def test_accumulating_into_grad_adds_to_what_is_there(backend, device):
    if backend == "reference":
        pytest.skip("reference lets autograd add")
    case, found = case_on(device, seed=9), []
    for dtype, chosen in ((torch.float32, config(backend, accumulate_into_grad=2.0)), (torch.float64, REFERENCE)):
        h, w, b = leaves(case, dtype)
        w.grad = torch.ones_like(w)
        (2.0 * dk.weighted_cross_entropy(h, dk.Head(w, bias=b), case.targets, config=chosen).loss).backward()
        found.append([t.grad.double() for t in (h, w, b)])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_padded_inputs_and_rows_that_lie_apart(backend, device):
    case, found = case_on(device, 60, D, V, seed=10), []
    for dtype, chosen in ((torch.float32, config(backend)), (torch.float64, REFERENCE)):
        wide = [torch.zeros(t.shape[0], D + 24, dtype=dtype, device=device) for t in (case.hidden, case.weight)]
        for room, t in zip(wide, (case.hidden, case.weight)):
            room[:, :D] = t
        h, w = (room[:, :D].requires_grad_() for room in wide)
        advantages = case.advantages[:3].to(dtype)
        options = {"spec": dk.PolicySpec.preset("grpo"), "config": chosen}
        out = loose.policy_loss(h.view(3, 20, D), w, case.targets.view(3, 20), advantages, **options)
        found.append([t.double() for t in (out.loss.detach(), *torch.autograd.grad(out.loss, (h, w)))])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8, 7), (5, 8, 1), (37, 16, 50_257), (3, 7, 131_075), (2, 16, 256_000)])
def test_edges_of_shape(backend, device, shape, dtype):
    case = case_on(device, *shape, dtype=dtype, masked=0.0)

    def loss(h, w, b, config):
        return dk.weighted_cross_entropy(
            h, dk.Head(w, bias=b), case.targets, case.token_weights + 0.1, config=config
        ).loss

    close(three(loss, case, dtype, backend), dtype)


def test_edges_of_what_counts(backend, device):
    case = case_on(device, 10, D, V, seed=12)
    h, w, b = leaves(case, torch.bfloat16)
    nothing = torch.full((10,), -100, device=device)
    out = dk.weighted_cross_entropy(h, dk.Head(w, bias=b), nothing, config=config(backend, torch.bfloat16))
    assert float(out.loss.detach()) == 0
    assert all(bool((g == 0).all()) for g in torch.autograd.grad(out.loss, (h, w, b)))
    seven, found = case.targets.clamp(min=0), []
    seven[::3] = -100
    for dtype, chosen in ((torch.float32, config(backend)), (torch.float64, REFERENCE)):
        inputs, active = leaves(case, dtype), torch.arange(0, 10, 2, device=device)
        options = {"bias": inputs[2], "active": active, "config": chosen}
        loss = loose.weighted_cross_entropy(*inputs[:2], seven, **options).loss
        found.append([t.double() for t in (loss.detach(), *torch.autograd.grad(loss, inputs))])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_a_target_outside_the_vocabulary_is_nan(backend, device, cuda):
    case = case_on(device, 10, D, V, masked=0.0)
    for bad in (V, -7):
        targets = case.targets.clone()
        targets[5] = bad
        h, w, _ = leaves(case, torch.float32)
        assert bool(dk.weighted_cross_entropy(h, w, targets, config=config(backend)).loss.isnan())


def test_fp16_gradients_do_not_underflow_before_they_are_summed(backend, device):
    case = case_on(device, dtype=torch.float16, seed=13, masked=0.0)

    def loss(h, w, b, config):
        return dk.weighted_cross_entropy(h, dk.Head(w, bias=b), case.targets, normalizer=1e6, config=config).loss * 1e6

    close(three(loss, case, torch.float16, backend), torch.float16, scale=float(T * V))


def test_auto_is_triton(device, cuda):
    assert dk.available_backends()["triton"] is None
    case = case_on(device, 10, D, V)
    args = (case.hidden.bfloat16(), case.weight.bfloat16(), case.targets)
    found = [dk.linear_logprob(*args, config=dk.KernelConfig(backend=name)).logprobs for name in ("auto", "triton")]
    assert torch.equal(*found)
