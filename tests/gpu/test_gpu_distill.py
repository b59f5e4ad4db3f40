"""Losses with a teacher on each GPU backend, against `reference` in float64 on the same GPU; what they wait for, and repeats."""

import math

import loose
import pytest
import torch
from small_ops import DTYPES, REFERENCE, D, T, V, case_on, close, config, leaves, three

import drift_kernels as dk

MODES = {
    "KL(t‖s)": dk.DistillSpec(0.0),
    "JSD": dk.DistillSpec(0.3),
    "KL(s‖t)": dk.DistillSpec(1.0),
    "top k": dk.DistillSpec(0.5, top_k=20),
    "top k, renormalised": dk.DistillSpec(1.0, top_k=20, tail=False),
    "stored": dk.DistillSpec(0.5),
    "sampled": dk.DistillSpec(1.0),
}
POLICY = dk.PolicySpec(objective="reinforce", entropy_coef=0.02, z_loss_coef=0.01)


def teacher_of(device, mode, dtype, kind):
    """What there is of a teacher in `mode`, its numbers exact in `dtype`, as `kind`."""
    seen = case_on(device, T, D + 8, V, dtype=dtype, seed=50)
    if mode == "sampled":
        return dk.TeacherLogprobs(torch.linspace(-8.0, -2.0, T, device=device))
    if mode == "stored":
        known = dk.topk_logprobs(seen.hidden, seen.weight, 20, config=REFERENCE)
        return dk.TeacherTopK(known.ids, known.logprobs.to(kind), known.rest.to(kind))
    warm = torch.linspace(0.5, 2.0, T, device=device)
    hidden, weight, bias = (t.to(kind) for t in (seen.hidden, seen.weight, seen.bias))
    return dk.Teacher(hidden, dk.Head(weight, bias, softcap=6.0, temperature=warm))


def hybrid(device, mode, case, dtype, active=None):
    """self_distill_loss with all that goes with `mode`, as `three` takes it."""
    rows = torch.arange(T, device=device)
    explored = {"exploration": dk.ExplorationSpec(), "turn_ids": rows // 9, "mean_difference": 0.1}

    def loss(h, w, b, config):
        kind = torch.float64 if h.dtype == torch.float64 else dtype
        known = teacher_of(device, mode, dtype, kind)
        options = explored if isinstance(known, dk.Teacher) else {}
        weights = case.token_weights.to(torch.float64 if kind == torch.float64 else torch.float32)
        return loose.self_distill_loss(
            h,
            dk.Head(w, bias=b),
            case.targets,
            known,
            case.advantages.to(weights.dtype),
            distill_weights=weights,
            policy_weights=weights.roll(3),
            has_teacher=rows % 4 != 1,
            policy=POLICY,
            distill=MODES[mode],
            active=active,
            config=config,
            **options,
        ).loss

    return loss


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_distill_loss(backend, device, mode, dtype):
    case = case_on(device, dtype=dtype, seed=51)

    def loss(h, w, b, config):
        known = teacher_of(device, mode, dtype, h.dtype)
        options = {"targets": case.targets, "spec": MODES[mode], "temperature": 0.7, "softcap": 5.0}
        return loose.distill_loss(h, dk.Head(w, bias=b), known, case.token_weights, config=config, **options).loss

    close(three(loss, case, dtype, backend), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chosen", [False, True])
def test_a_policy_loss_and_a_distillation(backend, device, mode, dtype, chosen):
    case = case_on(device, dtype=dtype, seed=52)
    active = torch.arange(0, T, 2, device=device).flip(0) if chosen else None
    close(three(hybrid(device, mode, case, dtype, active), case, dtype, backend), dtype, scale=float(T))


@pytest.mark.parametrize("dtype", DTYPES)
def test_topk_logprobs(backend, device, dtype):
    case = case_on(device, dtype=dtype, seed=53)
    for k in (1, 100, V):
        tensors = (case.hidden.to(dtype), case.weight.to(dtype))
        found = dk.topk_logprobs(*tensors, k, bias=case.bias.to(dtype), config=config(backend, dtype))
        exact = dk.topk_logprobs(case.hidden, dk.Head(case.weight, bias=case.bias), k, config=REFERENCE)
        torch.testing.assert_close(found.logprobs.double(), exact.logprobs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.rest.double(), exact.rest, rtol=1e-4, atol=1e-5)
        own = torch.log_softmax(case.hidden @ case.weight.t() + case.bias, -1).gather(-1, found.ids)
        torch.testing.assert_close(own, exact.logprobs, rtol=1e-5, atol=1e-5)  # near ties may change places


def test_equally_likely_tokens_come_by_their_ids(backend, device):
    hidden, weight = torch.ones(3, 8, device=device), torch.ones(5000, 8, device=device)
    found = dk.topk_logprobs(hidden, weight, 300, config=config(backend))
    assert torch.equal(found.ids, torch.arange(300, device=device).expand(3, -1))
    assert torch.allclose(found.logprobs, torch.full_like(found.logprobs, -math.log(5000)))


@pytest.mark.parametrize("mode", ["JSD", "top k", "stored"])
def test_results_repeat_bitwise(backend, device, mode):
    case, found = case_on(device, dtype=torch.bfloat16, seed=54), []
    loss = hybrid(device, mode, case, torch.bfloat16)
    for _ in range(3):
        h, w, b = leaves(case, torch.bfloat16)
        value = loss(h, w, b, config(backend, torch.bfloat16))
        found.append((value.detach(), *torch.autograd.grad(value, (h, w, b))))
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1]))
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[2]))


@pytest.mark.parametrize("mode", ["JSD", "top k", "stored", "sampled"])
def test_active_reads_nothing_back(backend, device, cuda, mode):
    case = case_on(device, dtype=torch.bfloat16, seed=55)
    known, active = teacher_of(device, mode, torch.bfloat16, torch.bfloat16), torch.arange(0, T, 2, device=device)
    h, w, b = leaves(case, torch.bfloat16)
    data = {"targets": case.targets, "active": active, "spec": MODES[mode], "bias": b}
    weights, found = case.token_weights.float(), []
    for quietly in (False, True):  # the first compiles
        torch.cuda.set_sync_debug_mode("error" if quietly else "default")
        try:
            loss = loose.distill_loss(h, w, known, weights, config=config(backend, torch.bfloat16), **data).loss
            found.append((loss.detach(), *torch.autograd.grad(loss, (h, w, b))))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(*found))
