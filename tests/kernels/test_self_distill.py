"""The hybrid of a policy loss and a distillation, against both apart."""

import math

import loose
import pytest
import torch
from self_distill_cases import (
    BACKENDS,
    CASE,
    CU,
    DISTILL_WEIGHTS,
    HAS_TEACHER,
    HEAD,
    MANY,
    MASK,
    OLD,
    POLICIES,
    POLICY_WEIGHTS,
    RANDOM,
    REBELLIOUS,
    SEEN,
    TARGETS,
    TEACHER,
    TEACHER_WEIGHT,
    TEACHERS,
    TURNS,
    D,
    T,
    V,
    hybrid,
    same,
)

import drift_kernels as dk
from drift_kernels import cpu_sweep, distill_driver
from drift_kernels.testing import make_case

PAIRS = [(name, "mixed") for name in POLICIES] + [("everything", name) for name in TEACHERS]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("policy", "teacher"), PAIRS)
def test_is_both_losses_apart(policy, teacher, backend):
    spec, (known, distill) = POLICIES[policy], TEACHERS[teacher]
    data = {"ref_logprobs": OLD + 0.1, "cu_seqlens": CU}
    if spec.correction:
        data["rollout_logprobs"] = OLD + 0.3 * CASE.noise.roll(2)
    config = dk.KernelConfig(backend=backend, workspace_bytes=MANY.workspace_bytes)
    total, outputs = MASK.sum(), ("logprobs", "entropy", "ratio", "kl", "clipped", "divergence")

    def apart(h, w, b, full=False):
        common = {"bias": b, "old_logprobs": OLD, "normalizer": total, **HEAD}
        policy = loose.policy_loss(
            h,
            w,
            TARGETS,
            CASE.advantages,
            token_weights=POLICY_WEIGHTS,
            spec=spec,
            outputs=outputs[:5],
            **data,
            **common,
        )
        distilled = loose.distill_loss(
            h, w, known, DISTILL_WEIGHTS, targets=TARGETS, spec=distill, outputs=outputs[5:], **common
        )
        return (policy, distilled) if full else policy.loss + 0.3 * distilled.loss

    def together(h, w, b, full=False, **options):
        options = {"policy": spec, "distill": distill, "distill_coef": 0.3, "config": config, **data, **options}
        if spec.aggregation == "token_sum":
            options["normalizer"] = total
        return hybrid(h, w, b, known, full, **options)

    same(together, apart)
    leaves = [t.detach() for t in CASE.leaves(torch.float64)]
    out, (policy, distilled) = together(*leaves, full=True, outputs=outputs), apart(*leaves, full=True)
    torch.testing.assert_close(out.outputs, policy.outputs | distilled.outputs)
    torch.testing.assert_close(out.metrics, policy.metrics | distilled.metrics)
    fewer = together(*leaves, full=True).metrics
    torch.testing.assert_close(fewer, {name: out.metrics[name] for name in fewer})


def low_rank(width, seed):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=g, dtype=torch.float64) * 0.4 for shape in ((3, width), (V, 3))]


@pytest.mark.parametrize("teacher", ["mixed", "top_k", "stored", "mixed, explored", "top_k, explored"])
@pytest.mark.parametrize(
    ("backend", "dtype", "near"),
    [
        ("cpu", torch.float64, 1e-9),
        ("reference", torch.float64, 1e-9),
        ("cpu", torch.float32, 2e-5),
        ("cpu", torch.bfloat16, 0.05),
    ],
)
def test_low_rank_heads_are_the_merged_ones(teacher, backend, dtype, near):
    """Of student and teacher, the student's weight trained and frozen, against merged weights in double."""
    known, distill = TEACHERS[teacher.split(",")[0]]
    its, options = low_rank(5, 1), {"distill": distill, "old_logprobs": OLD}
    if "explored" in teacher:
        options |= {"exploration": dk.ExplorationSpec(entropy_warmup=True), "turn_ids": TURNS, "cu_seqlens": CU}
        options |= {"rebellious_weights": REBELLIOUS, "mean_difference": 0.3, "mean_entropy": 3.0}

    def run(dtype, fused, frozen=False):
        h, w, b = CASE.leaves(dtype)
        A, B, a, c, seen, head = (t.to(dtype) for t in (*low_rank(D, 2), *its, SEEN, TEACHER_WEIGHT))
        leaves = (h, A.requires_grad_(), B.requires_grad_(), *(() if frozen else (w, b)))
        lora = dk.LoRAHead(A, B, 0.7) if fused else None
        weight = w.detach() if frozen else w
        weight = weight if fused else weight + 0.7 * B @ A
        taught = known
        if isinstance(known, dk.Teacher):
            merged = dk.Teacher(seen, dk.Head(head + 0.3 * c @ a, temperature=1.2))
            taught = dk.Teacher(seen, dk.Head(head, lora=dk.LoRAHead(a, c, 0.3), temperature=1.2)) if fused else merged
        config = dk.KernelConfig(backend=backend if fused else "reference", workspace_bytes=MANY.workspace_bytes)
        loss = hybrid(h, weight, b, taught, lora=lora, config=config, **options)
        return [t.detach().double() for t in (loss, *torch.autograd.grad(loss, leaves))]

    exact = run(torch.float64, fused=False)
    for frozen in (False, True):
        for actual, e in zip(run(dtype, True, frozen), exact):
            assert (actual - e).abs().max() < near * e.abs().max()


def test_rows_are_computed_where_something_reads_them(monkeypatch):
    students, teachers = [], []
    sweep, head = cpu_sweep.CpuSweep.__init__, distill_driver.TeacherLogits.run

    def spy(self, x, call, plan, *rest):
        sweep(self, x, call, plan, *rest)
        students.append(plan.count)

    def spy_teacher(self, sweep, index, targets):
        teachers[-1] += len(index.teacher)
        return head(self, sweep, index, targets)

    monkeypatch.setattr(cpu_sweep.CpuSweep, "__init__", spy)
    monkeypatch.setattr(distill_driver.TeacherLogits, "run", spy_teacher)

    def rows_of(**options):
        teachers.append(0)
        hybrid(CASE.hidden, CASE.weight, None, **options)
        return students[-1], teachers[-1]

    paid = MASK & (POLICY_WEIGHTS != 0) & (CASE.advantages != 0)
    learns = MASK & (DISTILL_WEIGHTS != 0)
    explored = {"exploration": dk.ExplorationSpec(), "turn_ids": TURNS, "has_teacher": HAS_TEACHER}
    assert rows_of() == (int((paid | learns).sum()), int(learns.sum()))
    assert rows_of(has_teacher=HAS_TEACHER)[1] == int((learns & HAS_TEACHER).sum())
    assert rows_of(outputs=("entropy",)) == (int(MASK.sum()), int(learns.sum()))
    assert rows_of(**explored) == (int((paid | (MASK & HAS_TEACHER)).sum()), int((MASK & HAS_TEACHER).sum()))
    assert rows_of(distill_weights=torch.zeros(T)) == (int(paid.sum()), 0)
    assert rows_of(active=learns.nonzero()[:4, 0]) == (4, 4)


SMALL = make_case(14, 4, 13, seed=3, masked=0.1)
SMALL_TEACHER = (
    torch.randn(14, 3, generator=RANDOM, dtype=torch.float64),
    torch.randn(13, 3, generator=RANDOM).double(),
)


@pytest.mark.parametrize("k", [None, 4])
def test_gradcheck_through_the_real_driver(k):
    """Weights that no gradient flows through are held where a difference would move them."""

    def op(h, w, b):
        return dk.self_distill_loss(
            h,
            dk.Head(w, bias=b, softcap=4.0),
            SMALL.targets,
            dk.Teacher(*SMALL_TEACHER),
            SMALL.advantages,
            distill_weights=SMALL.token_weights,
            policy_weights=None,
            old_logprobs=torch.full((14,), -2.5).double(),
            ref_logprobs=torch.full((14,), -2.4).double(),
            policy=dk.PolicySpec(objective="sapo", kl_coef=0.1, entropy_coef=0.05, z_loss_coef=0.02),
            distill=dk.DistillSpec(0.4, k),
            config=dk.KernelConfig(workspace_bytes=8 * 60 * 4),
        ).loss

    assert torch.autograd.gradcheck(op, SMALL.leaves(torch.float64), atol=1e-6)


def test_autograd_contract(monkeypatch):
    leaves = CASE.leaves(torch.float64)
    explored = {"exploration": dk.ExplorationSpec(), "turn_ids": TURNS, "mean_difference": 0.2}
    once = torch.autograd.grad(hybrid(*leaves, **explored), leaves)
    loss = hybrid(*leaves, **explored)
    torch.testing.assert_close(torch.autograd.grad(3 * loss, leaves, retain_graph=True), tuple(3 * g for g in once))
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), once)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(hybrid(*leaves), leaves, create_graph=True)
    frozen = hybrid(leaves[0], leaves[1].detach(), None, **explored)
    alone = hybrid(leaves[0], leaves[1], None, **explored)
    torch.testing.assert_close(torch.autograd.grad(frozen, leaves[0]), torch.autograd.grad(alone, leaves[0]))

    def refuse(*_):
        raise AssertionError("a gradient was made")

    monkeypatch.setattr(cpu_sweep.CpuSweep, "add_gradients", refuse)
    with torch.no_grad():
        torch.testing.assert_close(hybrid(*leaves, **explored), loss)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [0, T])
def test_nothing_to_train_gives_zero(size, backend):
    leaves, s = CASE.leaves(torch.float64), slice(0, size)
    teacher = dk.Teacher(SEEN[s], TEACHER_WEIGHT)
    out = dk.self_distill_loss(
        leaves[0][s],
        dk.Head(leaves[1], bias=leaves[2]),
        torch.full((size,), -100),
        teacher,
        CASE.advantages[s],
        distill_weights=None,
        policy_weights=None,
        config=dk.KernelConfig(backend=backend),
        exploration=dk.Exploration(
            dk.ExplorationSpec(entropy_warmup=True),
            turn_ids=TURNS[s],
            weights=REBELLIOUS[s],
            mean_difference=torch.tensor(0.1),
            mean_entropy=2.0,
        ),
    )
    assert out.loss.item() == 0
    assert all(g.abs().sum() == 0 for g in torch.autograd.grad(out.loss, leaves))
    assert all(int(count) == 0 for _, count in out.metrics.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_a_row_that_counts_shows(backend):
    hidden = CASE.hidden.clone()
    hidden[(MASK & (DISTILL_WEIGHTS != 0) & (POLICY_WEIGHTS == 0)).nonzero()[0, 0]] = math.nan
    assert hybrid(hidden, CASE.weight, None, config=dk.KernelConfig(backend=backend)).isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_agrees_with_double(dtype):
    case, seen = make_case(64, 32, 2003, dtype=dtype, masked=0.2), torch.randn(64, 32, generator=RANDOM).to(dtype)
    turns = torch.arange(64) // 9
    results = []
    for d in (dtype, torch.float64):
        h, w, b = case.leaves(d)
        out = dk.self_distill_loss(
            h,
            dk.Head(w, bias=b),
            case.targets,
            dk.Teacher(seen.to(d), w),
            case.advantages,
            distill_weights=case.token_weights,
            policy_weights=None,
            exploration=dk.Exploration(
                dk.ExplorationSpec(entropy_warmup=True),
                turn_ids=turns,
                weights=case.token_weights,
                mean_difference=0.1,
                mean_entropy=7.0,
            ),
        )
        results.append([t.detach().double() for t in (out.loss, *torch.autograd.grad(out.loss, (h, w, b)))])
    for a, e in zip(*results):
        assert (a - e).abs().max() < (2e-2 if dtype == torch.bfloat16 else 1e-4) * max(float(e.abs().max()), 1e-3)


def test_what_cannot_be_honoured_raises():
    def refused(match, teacher=TEACHER, **options):
        with pytest.raises(ValueError, match=match):
            hybrid(CASE.hidden, CASE.weight, None, teacher, **options)

    for name in ("grpo", "gspo", "gmpo", "vespo", "clip_cov"):
        refused("reads more than a token", policy=dk.PolicySpec.preset(name), cu_seqlens=CU)
    refused("needs ref_logprobs", policy=dk.PolicySpec(kl_coef=0.1))
    refused("cu_seqlens", policy=POLICIES["corrected"], rollout_logprobs=OLD)
    refused("importance_clip=2.0 needs old_logprobs", distill=dk.DistillSpec(importance_clip=2.0), old_logprobs=None)
    explored = {"exploration": dk.ExplorationSpec()}
    refused("turn_ids must be integers", turn_ids=TURNS[:3], **explored)
    refused("pass a Teacher", TEACHERS["stored"][0], turn_ids=TURNS, **explored)
    refused("mean_entropy has shape", turn_ids=TURNS, mean_entropy=torch.ones(2), **explored)
    refused("must be None if teacher is None", None)
    refused("outputs has 'rhythm'", outputs=("rhythm",))
    refused("has_teacher must be bool", has_teacher=torch.ones(T))
    refused("policy_weights has shape", policy_weights=torch.ones(3))
    for options in ({"rhythm_maximum": 1.0}, {"gate_floor": 1.5}, {"gate_power": -1.0}, {"bonus_maximum": 0.5}):
        with pytest.raises(ValueError, match=next(iter(options))):
            dk.ExplorationSpec(**options)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own tracer
def test_a_step_compiles_as_one_graph():
    backbone = torch.nn.Sequential(torch.nn.Embedding(61, 16), torch.nn.Linear(16, 9), torch.nn.Tanh()).double()
    head, ids = torch.nn.Parameter(CASE.weight.clone()), torch.arange(T) % 61

    def step(ids, targets, advantages, old, turns, mean):
        hidden = backbone(ids)
        out = dk.self_distill_loss(
            hidden,
            head,
            targets,
            dk.Teacher(hidden.detach() * 2, head),
            advantages,
            distill_weights=DISTILL_WEIGHTS,
            policy_weights=POLICY_WEIGHTS,
            old_logprobs=old,
            policy=dk.PolicySpec(entropy_coef=0.1),
            exploration=dk.Exploration(dk.ExplorationSpec(), turn_ids=turns, mean_difference=mean),
        )
        return out.loss, out.metrics["difference"][0]

    results = []
    for fn in (step, torch.compile(step, fullgraph=True)):
        loss, difference = fn(ids, TARGETS, CASE.advantages, OLD, TURNS, torch.tensor(0.2))
        results.append((loss, difference, *torch.autograd.grad(loss, [head, *backbone.parameters()])))
    torch.testing.assert_close(results[0], results[1])
