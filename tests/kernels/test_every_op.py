"""Every op with infinite logits, and under what torch does around it: odd strides, frozen leaves, autocast, checkpointing,
functional transforms.
"""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from op_cases import GSPO, LEAVES, LOSSES, OPS, ROW_BYTES, Batch, Result, V, close, make, run
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import drift_kernels as dk

BACKENDS = ["cpu", "reference"]
of_torch = pytest.mark.filterwarnings(
    "ignore:.torch.jit.script. is deprecated:DeprecationWarning"
)  # its own forward mode
BATCH = make([7, 1, 12], seed=4)


def on(backend, rows=6):
    return dk.KernelConfig(backend=backend, workspace_bytes=ROW_BYTES * rows)


def loss_of(name, batch=BATCH, config=None):
    """A function of the five leaves."""
    config = config or on("auto")
    return lambda *leaves: OPS[name].call(batch.with_leaves(leaves), config, None, ()).loss


def values(dtype=torch.float64):
    return tuple(BATCH.to(dtype).leaf(name).detach().clone() for name in LEAVES)


def transposed(t):
    return t.t().contiguous().t() if t.dim() == 2 else torch.stack((t, t), -1)[..., 0]


def every_other(t):
    return torch.stack((t, torch.full_like(t, 1)), -1).flatten(-2)[..., ::2] if t.dim() else t


def wider(t):
    """Rows lie further apart than they are long; elements side by side."""
    return torch.cat((t, torch.ones_like(t)), -1)[..., : t.shape[-1]] if t.dim() == 2 else every_other(t)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [transposed, every_other, wider])
@pytest.mark.parametrize("name", OPS)
def test_odd_strides(name, layout, dtype):
    """Of hidden states, both heads with their adapters, and all that is given per token."""
    plain = BATCH.to(dtype)
    odd = plain.map(lambda t: layout(t).detach())
    assert not any(t.is_contiguous() for t in (*odd.head.values(), *odd.tokens.values()))
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2}[
        dtype
    ]  # other products, in another order
    close(run(name, odd, config=on("auto")), run(name, plain, config=on("auto")), rtol=tolerance, atol=tolerance / 10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("infinite", [math.inf, -math.inf])
@pytest.mark.parametrize("bias", ["bias", "teacher_bias"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPS)
def test_infinite_logits_through_a_softcap(name, backend, bias, infinite, dtype):
    """tanh(±inf) = ±1: as any logit that large, of the student or the teacher."""

    def with_bias(value):
        change = torch.full((), value, dtype=dtype)
        head = BATCH.to(dtype).head
        return replace(BATCH.to(dtype), head=head | {bias: head[bias].index_put((torch.tensor(5),), change)})

    found = run(name, with_bias(infinite), config=on(backend))
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    close(found, run(name, with_bias(math.copysign(1e6, infinite)), config=on(backend)), rtol=tolerance, atol=tolerance)
    assert all(value.isfinite().all() for value in (found.loss, *found.tokens.values(), *found.head.values()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPS)
def test_a_masked_word_is_none(name, backend):
    """A bias of −inf in both heads, as users mask tokens: as if the vocabulary ended before its last word."""
    last = replace(BATCH, softcap=None)
    targets = last.tokens["targets"].clamp(max=V - 2)
    ids = torch.where(
        last.tokens["ids"] == V - 1, last.tokens["ids"].min(-1, keepdim=True).values - 1, last.tokens["ids"]
    )
    ids = torch.arange(ids.shape[1]).expand_as(ids) if bool((ids < 0).any()) else ids
    last = replace(last, tokens=last.tokens | {"targets": targets, "ids": ids.contiguous()})
    of_words = ("weight", "bias", "B", "teacher_weight", "teacher_bias", "teacher_B")
    fewer = replace(last, head=last.head | {n: last.head[n][:-1] for n in of_words})
    nothing = torch.tensor(-math.inf, dtype=torch.float64)
    minus = {n: last.head[n].index_put((torch.tensor(V - 1),), nothing) for n in ("bias", "teacher_bias")}
    found = run(name, replace(last, head=last.head | minus), config=on(backend))
    for leaf in ("weight", "bias", "B"):
        if leaf in found.head:
            assert not found.head[leaf][-1].any()  # nor NaN
            found.head[leaf] = found.head[leaf][:-1]
    close(found, run(name, fewer, config=on(backend)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LOSSES)
def test_any_subset_of_leaves_may_require_grad(name, backend):
    fn = loss_of(name, config=on(backend))
    full = tuple(t.requires_grad_() for t in values())
    want = torch.autograd.grad(fn(*full), full)
    for subset in product((False, True), repeat=len(LEAVES)):
        some = [t.detach().clone().requires_grad_(need) for t, need in zip(full, subset)]
        loss = fn(*some)
        assert loss.requires_grad == any(subset)
        if any(subset):
            loss.backward()
        for leaf, need, grad in zip(some, subset, want):
            assert (leaf.grad is not None) == need
            if need:
                torch.testing.assert_close(leaf.grad, grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPS)
def test_autocast_casts_every_head(name, half, backend):
    """What single-precision tensors give under autocast is what half ones give without; gradients stay single."""
    single, low = BATCH.to(torch.float32), BATCH.to(half)
    cast = run(name, single, config=on(backend), around=torch.autocast("cpu", dtype=half))
    plain = run(name, low, config=on(backend))
    assert all(cast.head[leaf].dtype == torch.float32 for leaf in cast.head)
    widened = Result(
        plain.loss,
        {n: v.to(cast.tokens[n].dtype) for n, v in plain.tokens.items()},
        {n: v.float() for n, v in plain.head.items()},
        plain.metrics,
    )
    close(cast, widened, rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_activation_checkpointing(name, reentrant):
    """Around the op and what makes its hidden states, or around those alone: computed twice, with the gradients of once."""
    fn, layer = loss_of(name), torch.nn.Linear(BATCH.leaf("hidden").shape[1], BATCH.leaf("hidden").shape[1]).double()
    calls = []

    def backbone(hidden):
        calls.append(1)
        return torch.tanh(layer(hidden))

    def step(hidden, *rest):
        return fn(backbone(hidden), *rest)

    def outside(hidden, *rest):
        return fn(checkpoint(backbone, hidden, use_reentrant=reentrant), *rest)

    def grads(compute):
        leaves = tuple(t.requires_grad_() for t in values())
        layer.zero_grad()
        compute(*leaves).backward()  # the reentrant form knows no other
        return [t.grad.clone() for t in (*leaves, *layer.parameters())]

    plain = grads(step)
    torch.testing.assert_close(grads(outside), plain)
    torch.testing.assert_close(grads(lambda *leaves: checkpoint(step, *leaves, use_reentrant=reentrant)), plain)
    assert len(calls) == 5


TRANSFORMS = {
    "grad": lambda f, h: torch.func.grad(f)(h),
    "vjp": lambda f, h: torch.func.vjp(f, h),
    "jacrev": lambda f, h: torch.func.jacrev(f)(h),
    "jvp": lambda f, h: torch.func.jvp(f, (h,), (h,)),
    "jacfwd": lambda f, h: torch.func.jacfwd(f)(h),
    "vmap": lambda f, h: torch.func.vmap(f)(torch.stack((h, h))),
}


@of_torch
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", OPS)
def test_torch_func_is_refused_in_words(name, transform, backend):
    fn, (hidden, *rest) = loss_of(name, config=on(backend)), values()
    with pytest.raises(RuntimeError, match=r"torch\.func transforms"):
        TRANSFORMS[transform](lambda h: fn(h, *rest), hidden)


@of_torch
@pytest.mark.parametrize("leaf", range(len(LEAVES)))
@pytest.mark.parametrize("name", LOSSES)
def test_forward_mode_is_refused_or_right(name, leaf):
    """The kernels have no forward derivatives, and say so; plain torch has them. Never a tangent that is silently missing."""
    direction = torch.randn(values()[leaf].shape, generator=torch.Generator().manual_seed(0)).double()

    def loss(backend):
        leaves = list(values())
        leaves[leaf] = forward_ad.make_dual(leaves[leaf], direction)
        return loss_of(name, config=on(backend))(*leaves)

    with forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match="jvp"):
            loss("cpu")
        tangent = forward_ad.unpack_dual(loss("reference")).tangent
    grad = [t.requires_grad_() for t in values()]
    (grad,) = torch.autograd.grad(loss_of(name)(*grad), grad[leaf])
    torch.testing.assert_close(tangent, (grad * direction).sum(), rtol=1e-8, atol=1e-10)


DATA = {
    name: [n for n in names if BATCH.tokens[n].is_floating_point()]
    for name, names in {
        "weighted_cross_entropy": ["token_weights", "temperature"],
        "pointwise_loss": ["advantages", "token_weights", "temperature"],
        "policy_loss": ["advantages", "old_logprobs", "ref_logprobs", "token_weights", "temperature"],
        "distill_loss": ["seen", "old_logprobs", "token_weights", "temperature", "teacher_temperature"],
        "distill_loss_stored": ["kept", "rest"],
        "distill_loss_sampled": ["teacher_logprobs"],
        "self_distill_loss_explored": ["seen", "advantages", "policy_weights", "rebellious_weights", "token_weights"],
    }.items()
}


@of_torch
@pytest.mark.parametrize(("name", "data"), [(name, data) for name, names in DATA.items() for data in names])
def test_a_gradient_asked_of_data_is_refused(name, data):
    """Backward or forward: none would reach it."""

    def call(value):
        OPS[name].call(Batch(BATCH.lengths, BATCH.head, BATCH.tokens | {data: value}), on("auto"), None, ())

    value = BATCH.tokens[data]
    with pytest.raises(ValueError, match="requires grad, and no gradient would reach it"):
        call(value.clone().requires_grad_())
    with forward_ad.dual_level(), pytest.raises(ValueError, match="tangent"):
        call(forward_ad.make_dual(value.clone(), torch.ones_like(value)))


@of_torch
def test_losses_on_given_log_probs_are_plain_torch():
    """`policy_token_loss` has derivatives of every kind, where no shape depends on data."""
    g = torch.Generator().manual_seed(0)
    logprobs, old, advantages, direction = (torch.randn(9, generator=g, dtype=torch.float64) for _ in range(4))
    segments, mask = torch.arange(9) // 4, torch.arange(9) % 5 > 0

    def loss(logp):
        options = {"old_logprobs": old, "ref_logprobs": old + 0.1, "segment_ids": segments, "spec": GSPO}
        return dk.policy_token_loss(logp, advantages, mask, **options)["loss"].sum()

    (grad,) = torch.autograd.grad(loss(logprobs.requires_grad_()), logprobs)
    assert grad.any()
    logprobs.requires_grad_(False)
    torch.testing.assert_close(torch.func.grad(loss)(logprobs), grad)
    torch.testing.assert_close(torch.func.jacfwd(loss)(logprobs), grad)
    torch.testing.assert_close(torch.func.jvp(loss, (logprobs,), (direction,))[1], grad @ direction)
    torch.testing.assert_close(torch.func.vmap(loss)(logprobs.repeat(2, 1)), loss(logprobs).expand(2))
