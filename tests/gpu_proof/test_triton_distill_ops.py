"""The whole ops with a teacher on the Triton backend in the interpreter: chunk loop, kernels, products, autograd."""

import math

import loose
import pytest
import torch

import drift_kernels as dk
from drift_kernels import cpu_sweep, gpu_sweep
from drift_kernels.calls import Call
from drift_kernels.plan import Plan
from drift_kernels.testing import gradients, make_case, within_budget

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
T, D, V, BLOCK = 24, 12, 83, 10
REFERENCE = dk.KernelConfig(backend="reference")
NAMES = ("loss", "hidden", "weight", "bias")
ROWS = torch.arange(T)
TURNS = ROWS // 7
HAS_TEACHER = ROWS % 4 != 1
ACTIVE = torch.tensor([t for t in range(T) if t % 5 != 2])
SEEN = make_case(T, D + 3, V, seed=1)
POLICY = dk.PolicySpec(objective="reinforce", entropy_coef=0.02, z_loss_coef=0.01)
EXPLORED = {
    "exploration": dk.ExplorationSpec(),
    "turn_ids": TURNS,
    "mean_difference": 0.1,
    "mean_entropy": 3.0,
    "rebellious_weights": torch.linspace(0.0, 2.0, T),
}


def config(dtype=torch.float32, **options):
    """A workspace of ten rows of logits, with a teacher's beside them, and a gradient buffer of forty."""
    size, width = dtype.itemsize, gpu_sweep.padded(V)
    block = BLOCK * (8 * width + (2 * D + 3) * size + 900)
    return dk.KernelConfig(
        backend="triton", workspace_bytes=block + 4 * BLOCK * (size * width + D * (size + 4)), **options
    )


def head_of(dtype, kind, lora=None):
    """The teacher's head with numbers exact in `dtype`, as `kind`."""
    hidden, weight, bias = (t.to(dtype).to(kind) for t in (SEEN.hidden, SEEN.weight, SEEN.bias))
    return dk.Teacher(hidden, dk.Head(weight, bias, lora, 6.0, 0.8, torch.linspace(0.5, 2.0, T)))


def stored(dtype, kind, rest=True):
    known = dk.topk_logprobs(SEEN.hidden.to(dtype).double(), SEEN.weight.to(dtype).double(), 7, config=REFERENCE)
    return dk.TeacherTopK(known.ids, known.logprobs.to(kind), known.rest.to(kind) if rest else None)


MODES = {
    "KL(t‖s)": (head_of, dk.DistillSpec(0.0)),
    "JSD": (head_of, dk.DistillSpec(0.3)),
    "KL(s‖t)": (head_of, dk.DistillSpec(1.0)),
    "top k": (head_of, dk.DistillSpec(0.5, top_k=9)),
    "top k, renormalised": (head_of, dk.DistillSpec(1.0, top_k=9, tail=False)),
    "stored": (stored, dk.DistillSpec(0.0)),
    "stored, its rest unknown": (lambda d, k: stored(d, k, False), dk.DistillSpec(0.5)),
    "sampled": (lambda d, k: dk.TeacherLogprobs(torch.linspace(-6.0, -2.0, T)), dk.DistillSpec(1.0)),
}


def check(op, case, dtype, scale=None):
    """Loss and gradients of op(h, w, b, config) by Triton within twice the error of torch in `dtype`."""
    kinds = ((dtype, config(dtype)), (dtype, REFERENCE), (torch.float64, REFERENCE))
    found = [gradients(lambda h, w, b, c=chosen: op(h, w, b, c), case.leaves(d)) for d, chosen in kinds]
    for name, a, o, e in zip(NAMES, *found):
        bounds = (torch.float32, max(1.0, math.log(V), float(e.abs()))) if name == "loss" else (dtype, scale)
        ok, line = within_budget(a, o, e, *bounds)
        assert ok, f"{name}: {line}"


CASES = [(mode, dtype) for mode in MODES for dtype in DTYPES[:2]] + [("JSD", torch.float16), ("top k", torch.float16)]


@pytest.mark.parametrize(("mode", "dtype"), CASES)
def test_distill_loss(mode, dtype):
    case, (teacher, spec) = make_case(T, D, V, dtype=dtype, seed=2), MODES[mode]
    options = {"targets": case.targets, "spec": spec, "temperature": 0.7, "softcap": 5.0}

    def op(h, w, b, config):
        known = teacher(dtype, h.dtype)
        return loose.distill_loss(h, dk.Head(w, bias=b), known, case.token_weights, config=config, **options).loss

    check(op, case, dtype)


def hybrid(case, mode, dtype, active=None, **options):
    teacher, spec = MODES[mode]
    explored = EXPLORED if teacher is head_of else {}

    def op(h, w, b, config):
        return loose.self_distill_loss(
            h,
            dk.Head(w, bias=b),
            case.targets,
            teacher(dtype, h.dtype),
            case.advantages,
            distill_weights=case.token_weights,
            policy_weights=case.token_weights.roll(3),
            has_teacher=HAS_TEACHER,
            policy=POLICY,
            distill=spec,
            active=active,
            config=config,
            **explored,
            **options,
        ).loss

    return op


@pytest.mark.parametrize("mode", ["JSD", "top k"])
@pytest.mark.parametrize(("active", "dtype"), list(zip((None, ACTIVE, ACTIVE.flip(0)), (*DTYPES[1:], torch.float32))))
def test_self_distill_loss_with_exploration(mode, active, dtype):
    case = make_case(T, D, V, dtype=dtype, seed=3)
    check(hybrid(case, mode, dtype, active, temperature=0.8), case, dtype)


@pytest.mark.parametrize("mode", ["KL(s‖t)", "stored", "sampled"])
def test_self_distill_loss_of_other_teachers(mode):
    case = make_case(T, D, V, seed=4, dtype=torch.float32)
    check(hybrid(case, mode, torch.float32, ACTIVE), case, torch.float32)


@pytest.mark.parametrize(
    ("mode", "dtype"), [("JSD", torch.bfloat16), ("JSD", torch.float32), ("stored", torch.float16)]
)
def test_low_rank_heads_on_both_sides(mode, dtype):
    case, g = make_case(T, D, V, dtype=dtype, seed=5), torch.Generator().manual_seed(0)
    rank = [torch.randn(*size, generator=g).to(dtype) * 0.2 for size in ((4, D), (V, 4), (3, D + 3), (V, 3))]
    teacher, spec = MODES[mode]

    def run(kind, chosen):
        A, B, *its = (t.to(kind) for t in rank)
        leaves = [t.clone().requires_grad_() for t in (case.hidden.to(kind), A, B)]
        known = head_of(dtype, kind, dk.LoRAHead(*its, 1.5)) if teacher is head_of else teacher(dtype, kind)
        own = dk.LoRAHead(leaves[1], leaves[2], 0.5)
        out = dk.distill_loss(leaves[0], dk.Head(case.weight.to(kind), lora=own), known, spec=spec, config=chosen)
        return (out.loss.detach(), *torch.autograd.grad(out.loss, leaves))

    actual, own, exact = run(dtype, config(dtype)), run(dtype, REFERENCE), run(torch.float64, REFERENCE)
    for name, a, o, e in zip(("loss", "hidden", "A", "B"), actual, own, exact):
        # both low-rank parts pass through one more rounding to the inputs' type; a teacher's moves what is learnt
        size = 1.0 if name == "loss" else 8 * float(e.abs().max())
        ok, line = within_budget(a, o, e, dtype, size)
        assert ok, f"{name}: {line}"


@pytest.mark.parametrize("active", [None, ACTIVE])
def test_outputs_and_metrics(active):
    case, found = make_case(T, D, V, seed=6, dtype=torch.float32), []
    names = ("logprobs", "entropy", "lse", "is_top1", "teacher_logprobs", "teacher_entropy", "divergence")
    names += ("difference", "rhythm", "gate", "rebellious", "clipped")
    for dtype, chosen in ((torch.float32, config()), (torch.float64, REFERENCE)):
        h, w, b = case.leaves(dtype)
        out = loose.self_distill_loss(
            h,
            dk.Head(w, bias=b),
            case.targets,
            head_of(torch.float32, dtype),
            case.advantages,
            distill_weights=case.token_weights,
            policy_weights=None,
            has_teacher=HAS_TEACHER,
            active=active,
            outputs=names,
            config=chosen,
            **EXPLORED,
        )
        found.append(out)
    for name in names:
        actual, exact = (out.outputs[name].double() for out in found)
        torch.testing.assert_close(actual, exact, rtol=3e-5, atol=3e-5, msg=name)
    for name, (total, count) in found[0].metrics.items():
        torch.testing.assert_close(total.double(), found[1].metrics[name][0].double(), rtol=1e-4, atol=1e-4)
        assert count == found[1].metrics[name][1]


@pytest.mark.parametrize("mode", ["JSD", "top k", "stored"])
def test_active_rows_are_taken_without_looking(mode, monkeypatch):
    """No plan is made, targets and ids go unread; what nothing reads may hold any number, and a teacher's rows NaN."""
    case, looked = make_case(T, D, V, seed=7, dtype=torch.float32), []
    monkeypatch.setattr(Plan, "of", lambda *args: looked.append(args))
    monkeypatch.setattr(cpu_sweep, "check_targets", lambda *args: looked.append(args))
    monkeypatch.setattr(torch.Tensor, "nonzero", lambda *args: looked.append(args))
    op = hybrid(case, mode, torch.float32, ACTIVE)
    whole = gradients(lambda h, w, b: op(h, w, b, config()), case.leaves(torch.float32))
    unread = [t for t in ACTIVE.tolist() if case.targets[t] < 0]
    assert unread
    h, w, b = case.leaves(torch.float32)
    with torch.no_grad():
        h[unread] = 1e3
    if mode != "stored":
        untaught = [t for t in range(T) if t in unread or not HAS_TEACHER[t]]
        monkeypatch.setattr(SEEN, "hidden", SEEN.hidden.index_fill(0, torch.tensor(untaught), float("nan")))
    spoilt = gradients(lambda h, w, b: op(h, w, b, config()), (h, w, b))
    assert not looked
    for a, e in zip(spoilt, whole):
        assert torch.equal(a, e)


def test_a_teachers_id_outside_the_vocabulary_makes_the_loss_nan_where_it_is_read():
    case = make_case(T, D, V, seed=8, dtype=torch.float32, masked=0.0)
    teacher = stored(torch.float32, torch.float32)
    weights = torch.ones(T)
    weights[3] = 0
    for row, nan in ((3, False), (4, True)):
        for bad in (V, -1):
            ids = teacher.ids.clone()
            ids[row, 2] = bad
            known = dk.TeacherTopK(ids, teacher.logprobs, teacher.rest)
            for active in (None, ROWS) if bad == V else (ROWS,):
                h, w, _ = case.leaves(torch.float32)
                loss = dk.distill_loss(h, w, known, weights, active=active, config=config()).loss
                assert bool(loss.isnan()) == nan


@pytest.mark.parametrize(("dtype", "active"), [(torch.float32, None), (torch.bfloat16, ACTIVE)])
def test_topk_logprobs(dtype, active):
    case, head = make_case(T, D, V, seed=9, dtype=dtype), {"temperature": 0.7, "softcap": 4.0, "logit_scale": -1.2}
    for k in (1, 9, V):
        found = loose.topk_logprobs(
            case.hidden.to(dtype),
            dk.Head(case.weight.to(dtype), bias=case.bias.to(dtype)),
            k,
            active=active,
            config=config(dtype),
            **head,
        )
        exact = loose.topk_logprobs(
            case.hidden, dk.Head(case.weight, bias=case.bias), k, active=active, config=REFERENCE, **head
        )
        torch.testing.assert_close(found.logprobs.double(), exact.logprobs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.rest.double(), exact.rest, rtol=1e-4, atol=1e-5)
        differ = found.ids != exact.ids  # only where two log-probs are one in fp32
        assert bool(((found.logprobs.double() - exact.logprobs).abs()[differ] < 1e-5).all())
        assert int(differ.sum()) <= 2


def test_equally_likely_tokens_come_by_their_ids():
    found = dk.topk_logprobs(torch.ones(3, 2), torch.ones(500, 2), 300, config=config())
    assert torch.equal(found.ids, torch.arange(300).expand(3, -1))


def test_fp16_gradients_do_not_underflow_before_they_are_summed():
    case = make_case(T, D, V, dtype=torch.float16, seed=10, masked=0.0)

    def op(h, w, b, config):
        known = head_of(torch.float16, h.dtype)
        return dk.distill_loss(h, dk.Head(w, bias=b), known, normalizer=1e6, config=config).loss * 1e6

    check(op, case, torch.float16)


def test_an_fp32_head_under_narrower_hidden_states_on_both_sides():
    case, dtype = make_case(T, D, V, seed=11, dtype=torch.bfloat16), torch.bfloat16

    def run(kinds, chosen):
        h, w = (t.to(kind).requires_grad_() for t, kind in zip((case.hidden, case.weight), kinds))
        known = dk.Teacher(SEEN.hidden.to(dtype).to(kinds[0]), SEEN.weight.float().to(kinds[1]))
        loss = dk.distill_loss(h, w, known, config=chosen).loss
        return (loss.detach(), *torch.autograd.grad(loss, (h, w)))

    for a, e in zip(run((dtype, torch.float32), config(dtype)), run((torch.float64, torch.float64), REFERENCE)):
        tolerance = torch.finfo(a.dtype).eps if a.dtype == dtype else 1e-5
        torch.testing.assert_close(a.double(), e, rtol=tolerance, atol=tolerance * float(e.abs().max()))


def test_evaluation_repeats_and_nothing_taught_is_zero():
    case = make_case(T, D, V, seed=12, dtype=torch.bfloat16)
    h, w, b = case.leaves(torch.bfloat16)
    known = head_of(torch.bfloat16, torch.bfloat16)
    with torch.no_grad():
        once, again = (
            dk.distill_loss(h, dk.Head(w, bias=b), known, config=config(torch.bfloat16)).loss for _ in range(2)
        )
    trained = dk.distill_loss(h, dk.Head(w, bias=b), known, config=config(torch.bfloat16)).loss
    assert torch.equal(once, again)
    torch.testing.assert_close(trained.detach(), once)
    for active in (None, ACTIVE):
        none = dk.distill_loss(
            h, dk.Head(w, bias=b), known, torch.zeros(T), active=active, config=config(torch.bfloat16)
        )
        assert float(none.loss.detach()) == 0
        assert all(bool((g == 0).all()) for g in torch.autograd.grad(none.loss, (h, w, b)))


def test_accumulating_into_grad_adds_to_what_is_there():
    case, results = make_case(T, D, V, seed=13, dtype=torch.float32), []
    for dtype, chosen in ((torch.float32, config(accumulate_into_grad=2.0)), (torch.float64, REFERENCE)):
        h, w, b = case.leaves(dtype)
        w.grad = torch.ones_like(w)
        (2.0 * dk.distill_loss(h, dk.Head(w, bias=b), head_of(torch.float32, dtype), config=chosen).loss).backward()
        results.append((h.grad, w.grad, b.grad))
    for a, e in zip(*results):
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-5)


def test_the_ops_are_registered_for_cuda_and_pass_opcheck():
    for op in ("distill", "top_k"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"drift_kernels::{op}", "CUDA")
    case = make_case(10, D, V, seed=14, dtype=torch.float32)
    call = Call(config=config())
    args = (case.hidden.float(), case.weight.float(), None, None, None, case.targets.clamp(min=0), None, None, None, 4)
    torch.library.opcheck(
        torch.ops.drift_kernels.top_k, (*args, call.encode()), test_utils=("test_schema", "test_faketensor")
    )


def test_float64_is_refused_by_name():
    case = make_case(10, D, V, masked=0.0)
    h, w, _ = case.leaves(torch.float64)
    with pytest.raises(TypeError, match=r"backend='triton' computes in float32.*float64"):
        dk.distill_loss(h, w, dk.Teacher(case.hidden, case.weight), config=config())
