"""Kinds of heads: LoRA without the merged weight, frozen, tied, fp32 master weights, gradients added in place."""

import loose
import pytest
import torch
import torch.nn.functional as F
from count_products import Blocks, room_for
from torch.utils.checkpoint import checkpoint

import drift_kernels as dk
from drift_kernels.testing import gradients, make_case, within_budget

CASE = make_case(40, 9, 61, seed=11)
OLD = torch.full((40,), -4.1, dtype=torch.float64)
MANY = dk.KernelConfig(workspace_bytes=8 * (61 + 18) * 7)
SEGMENTS = torch.tensor([0, 11, 12, 30, 40])


def low_rank(dtype=torch.float64, r=3):
    g = torch.Generator().manual_seed(5)
    A, B = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((r, 9), (61, r)))
    return A.to(dtype).requires_grad_(), B.to(dtype).requires_grad_()


def losses(hidden, weight, bias=None, config=MANY, **head):
    """One number of every op, so that each op's gradients count."""
    common = {"bias": bias, "config": config, "softcap": 4.0, **head}
    args = (hidden, weight, CASE.targets)
    ce = loose.weighted_cross_entropy(*args, CASE.token_weights, **common).loss
    ppo = loose.policy_loss(*args, CASE.advantages, old_logprobs=OLD, **common).loss
    gspo = loose.policy_loss(
        *args, CASE.advantages, old_logprobs=OLD, cu_seqlens=SEGMENTS, spec=dk.PolicySpec.preset("gspo"), **common
    ).loss
    pointwise = loose.pointwise_loss(*args, lambda logp, a: a * logp.square(), CASE.advantages, **common).loss
    plain = loose.linear_logprob(*args, entropy_gradient=True, **common)
    return ce + ppo + gspo + pointwise + (plain.logprobs * CASE.noise).sum() + plain.entropy.square().sum()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_lora_head_is_the_merged_weight(backend):
    config = dk.KernelConfig(backend=backend, workspace_bytes=MANY.workspace_bytes)
    h, w, b = CASE.leaves(torch.float64)
    A, B = low_rank()

    def fused(h, w, b, A, B):
        return losses(h, w, b, config, lora=dk.LoRAHead(A, B, 0.7))

    def merged(h, w, b, A, B):
        return losses(h, w + 0.7 * B @ A, b)

    leaves = (h, w, b, A, B)
    torch.testing.assert_close(gradients(fused, leaves), gradients(merged, leaves), rtol=1e-9, atol=1e-11)


def test_a_frozen_weight_under_lora_gets_no_gradient_and_costs_none():
    h, w, _ = CASE.leaves(torch.float64)
    A, B = low_rank()
    w = w.detach()
    head = dk.LoRAHead(A, B, 0.7)

    def fused(h, A, B):
        return dk.weighted_cross_entropy(h, dk.Head(w, lora=dk.LoRAHead(A, B, 0.7)), CASE.targets, config=MANY).loss

    def merged(h, A, B):
        return dk.weighted_cross_entropy(h, w + 0.7 * B @ A, CASE.targets).loss

    torch.testing.assert_close(gradients(fused, (h, A, B)), gradients(merged, (h, A, B)), rtol=1e-10, atol=1e-12)
    loss = dk.weighted_cross_entropy(h, dk.Head(w, lora=head), CASE.targets).loss
    saved = loss.grad_fn.saved_tensors
    assert max(t.numel() for t in saved) < w.numel(), "a gradient of the frozen weight's size was made"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])  # torch's products and ours
def test_a_lora_head_makes_nothing_of_the_weights_size(dtype, monkeypatch):
    """Neither W + scale·B·A, nor its gradient where W is frozen, of student and teacher."""
    h, w, b = (t.detach() for t in CASE.leaves(dtype))
    A, B = low_rank(dtype)
    teacher = dk.Teacher(h, dk.Head(w, lora=dk.LoRAHead(A.detach(), B.detach(), 0.3)))
    config = room_for(2, h, w)

    def everything(h, lora):
        distilled = dk.distill_loss(h, dk.Head(w, lora=lora), teacher, config=config).loss
        both = {"distill_weights": None, "policy_weights": None}
        hybrid = loose.self_distill_loss(
            h, dk.Head(w, lora=lora), CASE.targets, teacher, CASE.advantages, config=config, **both
        )
        return losses(h, w, b, config, lora=lora) + distilled + hybrid.loss

    hidden, trained = h.clone().requires_grad_(), w.clone().requires_grad_()
    with Blocks(monkeypatch, w.numel(), w, trained) as blocks:
        everything(hidden, dk.LoRAHead(A, B, 0.7)).backward()
        assert A.grad.abs().sum() > 0
        assert not blocks.found
        dk.weighted_cross_entropy(h, dk.Head(trained, lora=teacher.head.lora), CASE.targets, config=config)
        assert blocks.found  # the gradient of one that is trained


def test_gradcheck_through_a_lora_head():
    case = make_case(6, 5, 7, seed=1, masked=0.2)
    h, w, b = case.leaves(torch.float64)
    A = torch.randn(2, 5, dtype=torch.float64).requires_grad_()
    B = torch.randn(7, 2, dtype=torch.float64).requires_grad_()
    config = dk.KernelConfig(workspace_bytes=8 * (7 + 10) * 2)

    def op(h, w, b, A, B):
        return dk.weighted_cross_entropy(
            h, dk.Head(w, bias=b, lora=dk.LoRAHead(A, B, 0.5)), case.targets, config=config
        ).loss

    assert torch.autograd.gradcheck(op, (h, w, b, A, B))


def test_bad_lora_heads_are_named():
    h, w, _ = CASE.leaves(torch.float64)
    A, B = low_rank()
    for lora, error, words in (
        (dk.LoRAHead(A, B.t().contiguous()), ValueError, r"lora.B \(3, 61\)"),
        (dk.LoRAHead(A[:, :4], B), ValueError, r"lora.A \(3, 4\) must be \[r, D = 9\]"),
        (dk.LoRAHead(A.float(), B), TypeError, "lora.A is torch.float32"),
        ((A, B), TypeError, "it must be LoRAHead"),
    ):
        with pytest.raises(error, match=words):
            dk.weighted_cross_entropy(h, dk.Head(w, lora=lora), CASE.targets)


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_heads(frozen):
    """Only hidden needs a gradient: the same numbers, under any loss on top of linear_logprob too."""
    h, w, b = CASE.leaves(torch.float64)
    full = gradients(lambda h, w, b: losses(h, w, b), (h, w, b))
    some = gradients(lambda h: losses(h, w.detach() if frozen else w, b.detach()), (h,))
    torch.testing.assert_close(full[:2], some, rtol=1e-9, atol=1e-11)


def test_a_tied_head_adds_up_with_the_embedding():
    ids = torch.arange(40) % 61

    def fused(table):
        return dk.weighted_cross_entropy(F.embedding(ids, table), table, CASE.targets, config=MANY).loss

    def eager(table):
        return F.cross_entropy(F.embedding(ids, table) @ table.t(), CASE.targets)

    table = CASE.weight.clone().requires_grad_()
    torch.testing.assert_close(gradients(fused, (table,)), gradients(eager, (table,)), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_hidden_states_with_an_fp32_master_weight(half):
    """The product is that of the fp32 weight, and its gradient comes back in fp32."""
    case = make_case(60, 33, 501, seed=2, dtype=half)
    weight = (case.weight * 1.001).float()  # not a bf16 number any more
    h = case.hidden.to(half).requires_grad_()
    w = weight.clone().requires_grad_()
    loss = dk.weighted_cross_entropy(h, w, case.targets, case.token_weights).loss
    loss.backward()
    exact = gradients(
        lambda h, w: dk.weighted_cross_entropy(h, w, case.targets, case.token_weights).loss,
        (case.hidden.clone().requires_grad_(), weight.double().requires_grad_()),
    )
    assert w.grad.dtype == torch.float32
    assert h.grad.dtype == half
    torch.testing.assert_close(loss.double(), exact[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(w.grad.double(), exact[2], rtol=1e-4, atol=1e-7)
    ok, line = within_budget(h.grad, exact[1].to(half), exact[1], half)
    assert ok, line


def accumulated(config, h, w, parts=((0, 25), (25, 40))):
    for start, stop in parts:
        part = slice(start, stop)
        out = dk.policy_loss(
            h[part],
            w,
            CASE.targets[part],
            CASE.advantages[part],
            normalizer=17.0,
            old_logprobs=OLD[part],
            config=config,
        )
        (out.loss * 0.25).backward()


def test_accumulate_into_grad_adds_what_autograd_would():
    results = []
    for scale in (None, 0.25):
        h, w, _ = CASE.leaves(torch.float64)
        config = dk.KernelConfig(workspace_bytes=MANY.workspace_bytes, accumulate_into_grad=scale)
        accumulated(config, h, w)
        accumulated(config, h, w)  # weight.grad exists by now
        results.append((h.grad, w.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-11, atol=1e-14)
    assert results[0][1].abs().max() > 0


def test_accumulate_into_grad_takes_what_single_precision_makes_of_the_number():
    """A third is another number in fp32: one micro-batch of three may say 1 / 3 on both sides."""
    for scale in (1 / 3, 0.1, 0.37, 1e-9):
        h, w, _ = CASE.leaves(torch.float32)
        config = dk.KernelConfig(accumulate_into_grad=scale)
        (dk.weighted_cross_entropy(h, w, CASE.targets, config=config).loss * scale).backward()
        (plain,) = torch.autograd.grad(dk.weighted_cross_entropy(h, w, CASE.targets).loss * scale, w)
        torch.testing.assert_close(w.grad, plain)
        with pytest.raises(RuntimeError, match="pass that number"):
            (dk.weighted_cross_entropy(h, w, CASE.targets, config=config).loss * (scale * 1.001)).backward()


def test_accumulate_into_grad_makes_no_gradient_of_its_own():
    h, w, _ = CASE.leaves(torch.float64)
    loss = dk.weighted_cross_entropy(h, w, CASE.targets, config=dk.KernelConfig(accumulate_into_grad=1.0)).loss
    assert max(t.numel() for t in loss.grad_fn.saved_tensors) < w.numel()
    pointwise = dk.pointwise_loss(
        h, w, CASE.targets, lambda logp: -logp, config=dk.KernelConfig(accumulate_into_grad=1.0)
    ).loss
    (loss + pointwise).backward()
    (plain,) = torch.autograd.grad(2 * dk.weighted_cross_entropy(h, w, CASE.targets).loss, w)
    torch.testing.assert_close(w.grad, plain)


def test_accumulate_into_grad_refuses_what_would_count_it_wrongly():
    """A second backward would leave it out; a checkpointed forward runs twice."""
    config = dk.KernelConfig(accumulate_into_grad=1.0)
    h, w, _ = CASE.leaves(torch.float64)
    (expected,) = torch.autograd.grad(dk.weighted_cross_entropy(h, w, CASE.targets).loss, w)

    def loss(h, w):
        return dk.weighted_cross_entropy(h, w, CASE.targets, config=config).loss

    twice = loss(h, w)
    twice.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        twice.backward()
    torch.testing.assert_close(w.grad, expected)
    w.grad = None
    with pytest.raises(RuntimeError, match="activation checkpointing"):
        checkpoint(loss, h, w, use_reentrant=False)
    assert w.grad is None
    checkpoint(loss, h, w, use_reentrant=True).backward()  # its first forward makes no gradient
    torch.testing.assert_close(w.grad, expected)


def test_accumulate_into_grad_checks_its_contract():
    h, w, _ = CASE.leaves(torch.float32)
    config = dk.KernelConfig(accumulate_into_grad=1.0)

    def loss(weight, config=config):
        return dk.weighted_cross_entropy(h, weight, CASE.targets, config=config).loss

    with pytest.raises(RuntimeError, match=r"backward scales the loss by 0\.5"):
        (0.5 * loss(w)).backward()
    with pytest.raises(RuntimeError, match="not a leaf"):
        loss(w * 1.0)
    half = w.detach().bfloat16().requires_grad_()
    with pytest.raises(RuntimeError, match=r"weight is torch\.bfloat16"):
        dk.weighted_cross_entropy(h.bfloat16(), half, CASE.targets, config=config)
    with pytest.raises(ValueError, match="losses made in one pass"):
        dk.linear_logprob(h, w, CASE.targets, config=config)
    hooked = w.detach().clone().requires_grad_()
    hooked.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(RuntimeError, match="hooks"):
        loss(hooked)
    transposed = w.detach().clone().requires_grad_()
    transposed.grad = torch.zeros(9, 61).t()
    with pytest.raises(RuntimeError, match="strides"):
        loss(transposed)
    with torch.no_grad():
        loss(w)  # nothing to accumulate, nothing to refuse


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own tracer reads it
def test_accumulate_into_grad_is_refused_where_others_wait_for_the_gradient(monkeypatch):
    h, w, _ = CASE.leaves(torch.float32)
    config = dk.KernelConfig(accumulate_into_grad=1.0)

    def refused(weight, words, loss=dk.weighted_cross_entropy):
        before = weight.grad
        with pytest.raises(RuntimeError, match=words):
            loss(h, weight, CASE.targets, config=config)
        assert weight.grad is before

    hooked = w.detach().clone().requires_grad_()
    handle = hooked.register_hook(lambda grad: None)
    refused(hooked, "hooks on weight")
    handle.remove()
    dk.weighted_cross_entropy(h, hooked, CASE.targets, config=config).loss.backward()

    other = w.detach().clone().requires_grad_()
    other.grad_dtype = None  # any
    other.grad = torch.zeros(61, 9, dtype=torch.bfloat16)
    refused(other, r"weight\.grad is torch\.bfloat16")

    def loss(*args, **options):
        return loose.weighted_cross_entropy(*args, **options).loss

    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    refused(w, "a compiled graph may move or repeat it", compiled)

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    refused(w, "several processes run")
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    dk.weighted_cross_entropy(h, w, CASE.targets, config=config).loss.backward()
    torch.testing.assert_close(w.grad, hooked.grad)
