"""The autograd contract: what is computed, when, and what raises; one graph."""

import gc

import loose
import pytest
import torch

import drift_kernels as dk
from drift_kernels import cpu_sweep
from drift_kernels.testing import make_case

CASE = make_case(30, 9, 61, seed=1)
MANY = dk.KernelConfig(workspace_bytes=8 * (61 + 18) * 7)  # at least three chunks in double
OLD = torch.full((30,), -4.1, dtype=torch.float64)


def cross_entropy(h, w, b, **options):
    return loose.weighted_cross_entropy(
        h, dk.Head(w, bias=b), CASE.targets, CASE.token_weights, config=MANY, **options
    ).loss


def policy(h, w, b, **options):
    spec = dk.PolicySpec(kl_coef=0.1, entropy_coef=0.05, z_loss_coef=0.02)
    data = {"old_logprobs": OLD, "ref_logprobs": OLD + 0.1, "token_weights": CASE.token_weights}
    return loose.policy_loss(
        h, dk.Head(w, bias=b), CASE.targets, CASE.advantages, spec=spec, config=MANY, **data, **options
    ).loss


def pointwise(h, w, b, **options):
    return loose.pointwise_loss(
        h, dk.Head(w, bias=b), CASE.targets, lambda logp, a: a * logp.square(), CASE.advantages, config=MANY, **options
    ).loss


def logprob(h, w, b):
    return dk.linear_logprob(h, dk.Head(w, bias=b), CASE.targets, config=MANY).logprobs.mul(CASE.noise).sum()


def logprob_and_entropy(h, w, b):
    out = dk.linear_logprob(
        h, dk.Head(w, bias=b, temperature=1.3, softcap=4.0), CASE.targets, entropy_gradient=True, config=MANY
    )
    assert out.entropy is not None
    return (out.logprobs * CASE.noise).sum() + (out.entropy.square() * CASE.advantages).sum()


def sequences(h, w, b):
    """Sequence-level ratios in one pass (short sequences) and in two (one of 20 rows, chunks of 7)."""
    spec = dk.PolicySpec.preset("gspo", clip_low=0.2, clip_high=0.3, kl_coef=0.1, entropy_coef=0.05, z_loss_coef=0.02)
    data = {"old_logprobs": OLD, "ref_logprobs": OLD + 0.1, "token_weights": CASE.token_weights}
    data |= {"cu_seqlens": torch.tensor([0, 6, 26, 30])}
    return loose.policy_loss(h, dk.Head(w, bias=b), CASE.targets, CASE.advantages, spec=spec, config=MANY, **data).loss


OPS = [cross_entropy, policy, pointwise, sequences, logprob, logprob_and_entropy]


@pytest.mark.parametrize("op", OPS)
def test_gradcheck_through_the_real_driver(op):
    assert torch.autograd.gradcheck(op, CASE.leaves(torch.float64), atol=1e-6)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("subset", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1)])
def test_only_what_requires_grad_is_computed_and_it_is_the_same(op, subset):
    full = torch.autograd.grad(op(*(leaves := CASE.leaves(torch.float64))), leaves)
    leaves = [t.detach().requires_grad_(bool(on)) for t, on in zip(CASE.leaves(torch.float64), subset)]
    op(*leaves).backward()
    for leaf, grad, on in zip(leaves, full, subset):
        if on:
            torch.testing.assert_close(leaf.grad, grad, rtol=1e-10, atol=1e-13)
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("op", OPS)
def test_incoming_gradients_and_two_backwards(op):
    leaves = CASE.leaves(torch.float64)
    once = torch.autograd.grad(op(*leaves), leaves)
    loss = op(*leaves)
    tripled = torch.autograd.grad(3 * loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves, retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward()
    for o, t, a, leaf in zip(once, tripled, again, leaves):
        torch.testing.assert_close(t, 3 * o)
        torch.testing.assert_close(a, o)
        torch.testing.assert_close(leaf.grad, 2 * o)


@pytest.mark.parametrize("op", OPS)
def test_double_backward_raises(op):
    leaves = CASE.leaves(torch.float64)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(op(*leaves), leaves, create_graph=True)


@pytest.mark.parametrize("op", OPS)
def test_no_grad_costs_no_gradient(op, monkeypatch):
    def refuse(*_):
        raise AssertionError("a gradient was made")

    monkeypatch.setattr(cpu_sweep.CpuSweep, "add_gradients", refuse)
    leaves = CASE.leaves(torch.float64)
    with torch.no_grad():
        loss = op(*leaves)
    assert not loss.requires_grad
    op(*(t.detach() for t in leaves))
    if op is not logprob and op is not logprob_and_entropy:
        with pytest.raises(AssertionError, match="a gradient was made"):
            op(*leaves)


def test_rows_that_nothing_reads_are_not_computed(monkeypatch):
    computed = []
    original = cpu_sweep.CpuSweep.__init__

    def spy(self, x, call, plan, *beside):
        original(self, x, call, plan, *beside)
        computed.append(plan.count)

    monkeypatch.setattr(cpu_sweep.CpuSweep, "__init__", spy)
    unmasked = CASE.targets >= 0
    weighted = unmasked & (CASE.token_weights != 0)
    paid = weighted & (CASE.advantages != 0)
    h, w, y = CASE.hidden, CASE.weight, CASE.targets

    def rows_of(spec=dk.PolicySpec(), **options):
        data = {"old_logprobs": OLD, "ref_logprobs": OLD, "token_weights": CASE.token_weights}
        loose.policy_loss(h, w, y, CASE.advantages, spec=spec, **data, **options)
        return computed[-1]

    assert rows_of() == int(paid.sum()) < int(weighted.sum()) < int(unmasked.sum())
    assert rows_of(dk.PolicySpec(kl_coef=0.1)) == int(weighted.sum())
    assert rows_of(dk.PolicySpec(entropy_coef=0.1)) == int(weighted.sum())
    assert rows_of(outputs=("entropy",)) == int(unmasked.sum())
    assert rows_of(active=paid.nonzero()[:3, 0]) == 3
    leaves = CASE.leaves(torch.float64)
    (dk.linear_logprob(*leaves[:2], y).logprobs * paid).sum().backward()
    assert computed[-2:] == [int(unmasked.sum()), int(paid.sum())]


def test_active_equals_masking():
    leaves = CASE.leaves(torch.float64)
    active = (CASE.targets >= 0).nonzero()[::2, 0]
    targets = torch.full_like(CASE.targets, -100).index_copy(0, active, CASE.targets[active])
    results = []
    for y, options in ((CASE.targets, {"active": active}), (targets, {})):
        out = loose.policy_loss(
            leaves[0], leaves[1], y, CASE.advantages, old_logprobs=OLD, outputs=("logprobs",), **options
        )
        single = loose.linear_logprob(leaves[0], leaves[1], y, **options).logprobs
        results.append((out.loss, out.logprobs, single, torch.autograd.grad(out.loss + single.sum(), leaves[:2])))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("kind", ["empty", "masked", "weightless"])
def test_nothing_to_train_gives_zero(backend, kind):
    leaves = CASE.leaves(torch.float32)
    hidden, targets, weights = leaves[0], CASE.targets, CASE.token_weights
    if kind == "empty":
        hidden, targets, weights = hidden[:0], targets[:0], weights[:0]
    elif kind == "masked":
        targets = torch.full_like(targets, -100)
    else:
        weights = torch.zeros_like(weights)
    config = dk.KernelConfig(backend=backend)
    ce = dk.weighted_cross_entropy(hidden, dk.Head(leaves[1], bias=leaves[2]), targets, weights, config=config)
    pg = dk.policy_loss(
        hidden, dk.Head(leaves[1], bias=leaves[2]), targets, weights, token_weights=weights, config=config
    )
    logprobs = dk.linear_logprob(hidden, dk.Head(leaves[1], bias=leaves[2]), targets, config=config).logprobs
    assert ce.loss.item() == pg.loss.item() == 0
    grads = torch.autograd.grad(ce.loss + pg.loss + 0 * logprobs.sum(), leaves)
    assert all(g.abs().sum() == 0 for g in grads)


def test_nan_in_an_active_row_shows_and_elsewhere_does_not():
    for row, shows in (((CASE.targets >= 0).nonzero()[0, 0], True), ((CASE.targets < 0).nonzero()[0, 0], False)):
        hidden, w, b = CASE.leaves(torch.float32)
        with torch.no_grad():
            hidden[row] = float("nan")
        loss = dk.weighted_cross_entropy(hidden, dk.Head(w, bias=b), CASE.targets).loss
        loss.backward()
        assert loss.isnan() == shows
        assert w.grad.isnan().any() == shows


def test_non_finite_old_logprobs_raise_when_asked():
    old = OLD.clone()
    old[(CASE.targets < 0).nonzero()[0, 0]] = float("nan")
    args = (CASE.hidden, CASE.weight, CASE.targets, CASE.advantages)
    config = dk.KernelConfig(check_finite=True)
    assert dk.policy_loss(*args, old_logprobs=old, config=config).loss.isfinite()
    counting = (CASE.targets >= 0) & (CASE.advantages != 0)
    old[counting.nonzero()[0, 0]] = float("inf")
    with pytest.raises(ValueError, match="old_logprobs has 1 non-finite"):
        dk.policy_loss(*args, old_logprobs=old, config=config)


def test_results_repeat_bitwise_and_logprobs_are_never_positive():
    case = make_case(50, 16, 3001, dtype=torch.bfloat16)
    runs = []
    for _ in range(2):
        leaves = case.leaves(torch.bfloat16)
        out = dk.policy_loss(leaves[0] * 30, leaves[1], case.targets, case.advantages, outputs=("logprobs", "is_top1"))
        runs.append((out.loss, out.logprobs, *torch.autograd.grad(out.loss, leaves[:2])))
        assert out.logprobs.max() <= 0
    for a, b in zip(*runs):
        assert torch.equal(a, b)


def test_autocast_and_mixed_dtypes():
    h, w, b = CASE.leaves(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = dk.weighted_cross_entropy(h, dk.Head(w, bias=b), CASE.targets).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert w.grad.dtype == torch.float32
    want = dk.weighted_cross_entropy(h.bfloat16(), dk.Head(w.bfloat16(), bias=b.bfloat16()), CASE.targets).loss
    torch.testing.assert_close(loss, want)
    with pytest.raises(TypeError, match=r"weight is torch.float16 but hidden is torch.bfloat16"):
        dk.weighted_cross_entropy(h.bfloat16(), w.half(), CASE.targets)


def test_saved_memory_is_given_back():
    gc.collect()
    before = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
    for _ in range(3):
        leaves = CASE.leaves(torch.float64)
        policy(*leaves).backward()
    del leaves
    gc.collect()
    assert sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()) <= before + 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own tracer
def test_a_small_models_step_compiles_as_one_graph():
    torch.manual_seed(0)
    backbone = torch.nn.Sequential(torch.nn.Embedding(61, 16), torch.nn.Linear(16, 9), torch.nn.Tanh()).double()
    head = torch.nn.Parameter(CASE.weight.clone())
    low_rank = [torch.randn(2, 9).double().requires_grad_(), torch.randn(61, 2).double().requires_grad_()]
    ids = torch.arange(30) % 61

    def step(ids, targets, advantages, old):
        hidden = backbone(ids)
        ce = dk.weighted_cross_entropy(hidden, dk.Head(head, softcap=5.0), targets, advantages.abs()).loss
        out = dk.policy_loss(
            hidden,
            head,
            targets,
            advantages,
            old_logprobs=old,
            outputs=("entropy",),
            spec=dk.PolicySpec(entropy_coef=0.1),
        )
        logprobs = dk.linear_logprob(hidden, head, targets).logprobs
        whole = dk.policy_loss(
            hidden,
            dk.Head(head, lora=dk.LoRAHead(*low_rank, 0.5)),
            targets,
            advantages[:3],
            old_logprobs=old,
            cu_seqlens=torch.tensor([0, 10, 20, 30]),
            spec=dk.PolicySpec.preset("gspo"),
        )
        return ce + out.loss + whole.loss + (logprobs * advantages).mean(), out.outputs["entropy"]

    results = []
    for fn in (step, torch.compile(step, fullgraph=True)):
        loss, entropy = fn(ids, CASE.targets, CASE.advantages, OLD)
        results.append((loss, entropy, *torch.autograd.grad(loss, [head, *low_rank, *backbone.parameters()])))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("of", ["logprobs", "entropy"])
def test_expanded_incoming_gradients(of):
    """sum() hands an expanded gradient over; with no row masked nothing else makes it contiguous."""
    targets, grads = CASE.targets.abs() % 61, []
    for backend in ("cpu", "reference"):
        leaves = CASE.leaves(torch.float64)
        out = dk.linear_logprob(*leaves[:2], targets, entropy_gradient=True, config=dk.KernelConfig(backend=backend))
        grads.append(torch.autograd.grad(getattr(out, of).sum(), leaves[:2]))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("objective", ["clip", "cispo", "sapo", "reinforce"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_nan_shows_on_policy_too(objective, backend):
    hidden = CASE.hidden.float().clone()
    hidden[(CASE.targets >= 0).nonzero()[0, 0]] = float("nan")
    spec, config = dk.PolicySpec(objective=objective), dk.KernelConfig(backend=backend)
    loss = dk.policy_loss(hidden, CASE.weight.float(), CASE.targets, torch.ones(30), spec=spec, config=config).loss
    assert loss.isnan()


@pytest.mark.parametrize("frozen_head", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_further_outputs_come_with_the_differentiable_ones(backend, frozen_head):
    names = ("is_top1", "log_sum_sq_probs", "lse", "logprobs", "entropy", "mean_logits")
    leaves = [CASE.hidden.clone().requires_grad_(), CASE.weight.clone().requires_grad_(not frozen_head)]
    config = dk.KernelConfig(backend=backend)
    out = dk.linear_logprob(*leaves, CASE.targets, outputs=names, config=config)
    out.logprobs.mul(CASE.noise).sum().backward()
    with torch.no_grad():
        p = torch.log_softmax(CASE.hidden @ CASE.weight.t(), -1)
    mask = CASE.targets != -100
    z = (CASE.hidden @ CASE.weight.t())[mask]
    expected = {
        "is_top1": (z.argmax(-1) == CASE.targets[mask]).double(),
        "log_sum_sq_probs": (p[mask].exp() ** 2).sum(-1).log(),
        "lse": z.exp().sum(-1).log(),
        "logprobs": p[mask, CASE.targets[mask]],
        "entropy": -(p[mask].exp() * p[mask]).sum(-1),
        "mean_logits": z.mean(-1),
    }
    assert tuple(out.outputs) == names
    for name, value in expected.items():
        assert not out.outputs[name].requires_grad
        torch.testing.assert_close(out.outputs[name][mask].double(), value.double(), rtol=1e-5, atol=1e-5)
        assert not out.outputs[name][~mask].any()
    again = [t.detach().clone().requires_grad_(t.requires_grad) for t in leaves]
    dk.linear_logprob(*again, CASE.targets, config=config).logprobs.mul(CASE.noise).sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(leaves, again) if a.requires_grad)
