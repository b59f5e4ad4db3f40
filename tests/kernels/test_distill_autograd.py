"""Distillation's autograd contract: gradcheck, what is computed for whom, one graph."""

import loose
import pytest
import torch
import torch.nn.functional as F
from distill_cases import (
    BACKENDS,
    CASE,
    MODES,
    OLD,
    TEACHER_HIDDEN,
    TEACHER_WEIGHT,
    WEIGHTS,
    jsd,
    loss_of,
    stored,
)

import drift_kernels as dk
from drift_kernels import cpu_sweep
from drift_kernels.testing import make_case


@pytest.mark.parametrize("mode", [name for name in MODES if name != "sampled"])  # which holds its factor fixed
def test_gradcheck_through_the_real_driver(mode):
    case, seen, spec = make_case(12, 4, 11, seed=3), TEACHER_HIDDEN[:12], MODES[mode][1]
    head = TEACHER_WEIGHT[:11]
    teacher = dk.topk_logprobs(seen, head, 4) if mode == "stored" else dk.Teacher(seen, head)
    options = {"spec": spec, "softcap": 4.0, "config": dk.KernelConfig(workspace_bytes=8 * 60 * 3)}

    def op(h, w, b):
        return loose.distill_loss(
            h, dk.Head(w, bias=b), teacher, case.token_weights, targets=case.targets, **options
        ).loss

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

    monkeypatch.setattr(cpu_sweep.CpuSweep, "add_gradients", refuse)
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
    out = dk.distill_loss(hidden, weight, dk.Teacher(teacher_hidden, weight), config=config)
    s, t = (F.linear(h, w).log_softmax(-1) for h, w in ((hidden, weight), (teacher_hidden, weight.detach())))
    exact = jsd(s, t, 0.5).mean()
    torch.testing.assert_close(out.loss, exact)
    grads = (torch.autograd.grad(loss, (hidden, weight)) for loss in (out.loss, exact))
    torch.testing.assert_close(next(grads), next(grads))
    with pytest.raises(ValueError, match=r"teacher.hidden requires grad"):
        dk.distill_loss(hidden, weight, dk.Teacher(hidden, weight), config=config)


def test_weight_gradients_added_in_place():
    leaves = CASE.leaves(torch.float32)
    (grad,) = torch.autograd.grad(dk.distill_loss(leaves[0], leaves[1], stored()).loss, leaves[1])
    leaves[1].grad = torch.ones_like(leaves[1])
    dk.distill_loss(*leaves[:2], stored(), config=dk.KernelConfig(accumulate_into_grad=1.0)).loss.backward()
    torch.testing.assert_close(leaves[1].grad, grad + 1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own tracer
def test_a_step_compiles_as_one_graph():
    backbone = torch.nn.Sequential(torch.nn.Embedding(61, 16), torch.nn.Linear(16, 9), torch.nn.Tanh()).double()
    head, ids = torch.nn.Parameter(CASE.weight.clone()), torch.arange(30) % 61

    def step(ids, targets, weights):
        hidden = backbone(ids)
        spec = dk.DistillSpec(importance_clip=2.0)
        full = dk.distill_loss(
            hidden, head, dk.Teacher(hidden.detach() * 2, head), weights, targets=targets, old_logprobs=OLD, spec=spec
        )
        kept = dk.topk_logprobs(TEACHER_HIDDEN, TEACHER_WEIGHT, 5)
        return full.loss + dk.distill_loss(hidden, head, kept, weights).loss, full.metrics["divergence"][0]

    results = []
    for fn in (step, torch.compile(step, fullgraph=True)):
        loss, divergence = fn(ids, CASE.targets, WEIGHTS)
        results.append((loss, divergence, *torch.autograd.grad(loss, [head, *backbone.parameters()])))
    torch.testing.assert_close(results[0], results[1])
