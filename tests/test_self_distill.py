"""The hybrid of a policy loss and a distillation: against both apart, and against the method's formulas written out here."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import drift_kernels as dk
from drift_kernels import distill_driver, driver
from drift_kernels.divergences import Lessons
from drift_kernels.exploration import Side, explore
from drift_kernels.testing import gradients, make_case, off_the_edges

BACKENDS = ["cpu", "reference"]
T, D, V = 40, 9, 61
CASE = make_case(T, D, V, seed=2, masked=0.0)
RANDOM = torch.Generator().manual_seed(7)
TURNS = torch.repeat_interleave(torch.tensor([-1, 0, -1, 1, 2, -1, 0, 1]), torch.tensor([3, 8, 2, 7, 1, 4, 9, 6]))
CU = torch.tensor([0, 21, 40], dtype=torch.int32)  # the second sequence begins with a row outside any turn
TARGETS = CASE.targets.masked_fill(TURNS < 0, -100)
MASK = TARGETS >= 0
SEEN = torch.randn(T, 5, generator=RANDOM, dtype=torch.float64)
TEACHER_WEIGHT = torch.randn(V, 5, generator=RANDOM, dtype=torch.float64) * 0.5
TEACHER = dk.TeacherHead(SEEN, TEACHER_WEIGHT, temperature=1.2)
HAS_TEACHER = torch.arange(T) < 34
LOG_T = (F.linear(SEEN, TEACHER_WEIGHT) / 1.2).log_softmax(-1)
POLICY_WEIGHTS = CASE.token_weights
DISTILL_WEIGHTS = torch.rand(T, generator=RANDOM, dtype=torch.float64) * (torch.rand(T, generator=RANDOM) > 0.4)
REBELLIOUS = torch.rand(T, generator=RANDOM, dtype=torch.float64) * (torch.rand(T, generator=RANDOM) > 0.3)
HEAD = {"temperature": 0.7, "softcap": 4.0}
LOG_S = (4.0 * torch.tanh(F.linear(CASE.hidden, CASE.weight, CASE.bias) / 4.0) / 0.7).log_softmax(-1)
LOGP = LOG_S.gather(-1, TARGETS.clamp(min=0)[:, None])[:, 0]
OLD = off_the_edges(LOGP + CASE.noise, LOGP, (0.8, 1.2, 2.0))
MANY = dk.KernelConfig(workspace_bytes=8 * (2 * V + 2 * D + 5) * 7)  # several chunks in double


def hybrid(h, w, b, teacher=TEACHER, full=False, **options):
    options = {
        "distill_weights": DISTILL_WEIGHTS,
        "policy_weights": POLICY_WEIGHTS,
        "old_logprobs": OLD,
        "bias": b,
        "config": MANY,
        **HEAD,
        **options,
    }
    out = dk.self_distill_loss(h, w, TARGETS, teacher, CASE.advantages, **options)
    return out if full else out.loss


def same(actual, exact, rtol=1e-9, atol=1e-12):
    actual, exact = (gradients(f, CASE.leaves(torch.float64)) for f in (actual, exact))
    torch.testing.assert_close(actual, exact, rtol=rtol, atol=atol)


POLICIES = {
    "ppo": dk.PolicySpec(),
    "dapo": dk.PolicySpec.preset("dapo", dual_clip=3.0),
    "cispo": dk.PolicySpec.preset("cispo"),
    "sapo": dk.PolicySpec.preset("sapo", aggregation="token_mean"),
    "dppo": dk.PolicySpec.preset("dppo_tv"),
    "reinforce": dk.PolicySpec(objective="reinforce"),
    "everything": dk.PolicySpec(kl_coef=0.1, kl_estimator="k3+", entropy_coef=0.05, z_loss_coef=0.01),
    "corrected": dk.PolicySpec(correction="sequence_truncate", correction_bounds=(0.0, 1.2)),
    "sums": dk.PolicySpec(aggregation="token_sum"),
}
TEACHERS = {
    "forward": (TEACHER, dk.DistillSpec(0.0)),
    "mixed": (TEACHER, dk.DistillSpec(0.4, importance_clip=2.0)),
    "reverse": (TEACHER, dk.DistillSpec(1.0)),
    "top_k": (TEACHER, dk.DistillSpec(0.4, 5, importance_clip=2.0)),
    "stored": (dk.topk_logprobs(SEEN, TEACHER_WEIGHT, 6), dk.DistillSpec(0.4, tail=False)),
    "sampled": (dk.TeacherLogprobs(LOG_T.gather(-1, TARGETS.clamp(min=0)[:, None])[:, 0]), dk.DistillSpec(1.0)),
}
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
        policy = dk.policy_loss(
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
        distilled = dk.distill_loss(
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


def written_out(mean_difference, mean_entropy, spec):
    """Rhythm, gate, rebellious weight and warm-up of every token, in loops, as the method has them."""
    s_entropy, t_entropy = (-(p.exp() * p).sum(-1) for p in (LOG_S, LOG_T))
    logp, its = (p.gather(-1, TARGETS.clamp(min=0)[:, None])[:, 0] for p in (LOG_S, LOG_T))
    difference, rhythm, gate, rebellious, factor = (torch.zeros(T, dtype=torch.float64) for _ in range(5))
    for i in range(T):
        if not MASK[i]:
            continue
        rebellious[i] = factor[i] = 1.0
        if not HAS_TEACHER[i]:
            continue
        first = i == 0 or TURNS[i] != TURNS[i - 1] or i in CU.tolist()
        falls = [0.0 if first else max(float(H[i - 1] - H[i]), 0.0) for H in (s_entropy, t_entropy)]
        difference[i] = abs(falls[0] - falls[1])
        m = spec.rhythm_maximum
        rhythm[i] = 1.0
        if mean_difference is not None:
            rhythm[i] = 1 + (m - 1) * (1 - math.exp(-float(difference[i]) / max(mean_difference, 1e-3)))
        gate[i] = 1.0
        if spec.gate:
            opened = min(max((float(rhythm[i]) - 1) / (m - 1), 0.0), 1.0) ** spec.gate_power
            gate[i] = spec.gate_floor + (1 - spec.gate_floor) * opened
        delta = max(float(logp[i] - its[i]) - spec.margin, 0.0)
        bonus = min(max(math.exp(spec.gamma * delta), 1.0), spec.bonus_maximum)
        rebellious[i] = 1 + REBELLIOUS[i] * (bonus - 1) * gate[i]
        factor[i] = rhythm[i] if spec.weigh_divergence else 1.0
        if spec.entropy_warmup and mean_entropy is not None:
            factor[i] *= s_entropy[i] / mean_entropy
    return difference, rhythm, gate, rebellious, factor, s_entropy


EXPLORATIONS = {
    "plain": (dk.ExplorationSpec(), 0.2, None),
    "quiet": (dk.ExplorationSpec(), 1e-5, None),  # a mean below the least one
    "first_step": (dk.ExplorationSpec(gate_floor=0.25, entropy_warmup=True), None, None),
    "no_gate": (dk.ExplorationSpec(gate=False, weigh_divergence=False), 0.2, None),
    "everything": (dk.ExplorationSpec(3.0, True, True, 0.1, 2.0, 0.4, 0.5, 1.5, True), 0.3, 2.5),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("teacher", ["mixed", "top_k"])
@pytest.mark.parametrize("name", EXPLORATIONS)
def test_exploration_weights_are_the_methods(name, teacher, backend):
    """Made on the way, they are what the caller could have made beforehand and passed as plain weights."""
    spec, mean_difference, mean_entropy = EXPLORATIONS[name]
    known, distill = TEACHERS[teacher]
    difference, rhythm, gate, rebellious, factor, entropy = written_out(mean_difference, mean_entropy, spec)
    config = dk.KernelConfig(backend=backend, workspace_bytes=MANY.workspace_bytes)
    common = {"distill": distill, "policy": POLICIES["dapo"], "config": config}
    explored = {
        "exploration": spec,
        "turn_ids": TURNS,
        "cu_seqlens": CU,
        "has_teacher": HAS_TEACHER,
        "rebellious_weights": REBELLIOUS,
        "mean_difference": mean_difference,
        "mean_entropy": mean_entropy,
    }

    def on_the_way(h, w, b):
        return hybrid(h, w, b, known, **common, **explored)

    def beforehand(h, w, b):
        weights = {
            "distill_weights": torch.where(HAS_TEACHER, DISTILL_WEIGHTS * factor, 0.0),
            "policy_weights": POLICY_WEIGHTS * rebellious,
        }
        return hybrid(h, w, b, known, **common, **weights)

    same(on_the_way, beforehand)
    leaves = [t.detach() for t in CASE.leaves(torch.float64)]
    names = ("difference", "rhythm", "gate", "rebellious")
    out = hybrid(*leaves, known, full=True, outputs=names, **common, **explored)
    taught = MASK & HAS_TEACHER
    exact = dict(zip(names, (difference, rhythm, gate, rebellious)))
    for key, value in exact.items():
        torch.testing.assert_close(out.outputs[key], torch.where(taught, value, 0.0), rtol=1e-9, atol=1e-12)
    for key, value in (exact | {"taught_entropy": entropy}).items():
        torch.testing.assert_close(out.metrics[key], (value[taught].sum(), taught.sum()))
    assert (difference[taught] > 0).any()
    assert name in ("first_step", "quiet") or ((rebellious > 1.01) & (POLICY_WEIGHTS != 0)).any()


def test_a_mean_of_noise_opens_no_gate():
    """The mean difference counts as 1e-3 at least."""
    nothing, one = torch.zeros(3), torch.ones(3, dtype=torch.bool)
    entropy = torch.tensor([1.0, 0.999, 0.9989])
    student, teacher = Side.of({"logprobs": nothing, "entropy": entropy}, nothing[:1]), Side(nothing, nothing, nothing)
    lessons = Lessons(taught=one, continues=torch.tensor([False, True, True]), mean_difference=torch.tensor(1e-9))
    rhythm, _, seen = explore(student, teacher, lessons, dk.ExplorationSpec())
    torch.testing.assert_close(seen["difference"], torch.tensor([0.0, 1e-3, 1e-4]), rtol=1e-2, atol=0)
    torch.testing.assert_close(rhythm, 2 - (-seen["difference"] / 1e-3).exp())


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_outside_any_turn_have_nothing_before_them(backend):
    out = dk.self_distill_loss(
        CASE.hidden,
        CASE.weight,
        CASE.targets,
        TEACHER,
        CASE.advantages,
        distill_weights=None,
        policy_weights=None,
        exploration=dk.ExplorationSpec(),
        turn_ids=TURNS.clamp(max=0),
        outputs=("difference",),
        config=dk.KernelConfig(backend=backend),
    )
    assert (out.outputs["difference"][TURNS < 0] == 0).all()
    assert (out.outputs["difference"] > 0).any()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30_000), st.sampled_from(["mixed", "top_k"]))
def test_turns_may_cross_the_edge_of_a_chunk(workspace, teacher):
    known, distill = TEACHERS[teacher]
    explored = {"exploration": dk.ExplorationSpec(), "turn_ids": TURNS, "rebellious_weights": REBELLIOUS}

    def in_chunks(workspace):
        config = dk.KernelConfig(workspace_bytes=workspace)
        return lambda h, w, b: hybrid(
            h, w, b, known, distill=distill, config=config, mean_difference=0.2, cu_seqlens=CU, **explored
        )

    same(in_chunks(workspace), in_chunks(1 << 24))


@pytest.mark.parametrize("backend", BACKENDS)
def test_sequences_split_over_calls_add_up(backend):
    config = dk.KernelConfig(backend=backend, workspace_bytes=MANY.workspace_bytes)
    explored = {"exploration": dk.ExplorationSpec(), "mean_difference": 0.2, "config": config, "normalizer": 11.0}
    explored["distill"] = dk.DistillSpec(importance_clip=2.0)
    metrics = []

    def part(h, w, b, s):
        teacher = dk.TeacherHead(SEEN[s], TEACHER_WEIGHT, temperature=1.2)
        data = {"distill_weights": DISTILL_WEIGHTS, "policy_weights": POLICY_WEIGHTS, "old_logprobs": OLD}
        data |= {"has_teacher": HAS_TEACHER, "turn_ids": TURNS, "rebellious_weights": REBELLIOUS}
        data = {name: value[s] for name, value in data.items()}
        out = dk.self_distill_loss(h[s], w, TARGETS[s], teacher, CASE.advantages[s], bias=b, **data, **explored, **HEAD)
        metrics.append(out.metrics)
        return out.loss

    def whole(h, w, b):
        return hybrid(
            h, w, b, has_teacher=HAS_TEACHER, turn_ids=TURNS, rebellious_weights=REBELLIOUS, cu_seqlens=CU, **explored
        )

    same(lambda *x: part(*x, slice(0, 21)) + part(*x, slice(21, None)), whole)
    leaves = [t.detach() for t in CASE.leaves(torch.float64)]
    one = hybrid(
        *leaves,
        full=True,
        has_teacher=HAS_TEACHER,
        turn_ids=TURNS,
        rebellious_weights=REBELLIOUS,
        cu_seqlens=CU,
        **explored,
    ).metrics
    for name, (total, count) in one.items():
        torch.testing.assert_close(metrics[0][name][0] + metrics[1][name][0], total)
        assert metrics[0][name][1] + metrics[1][name][1] == count


@pytest.mark.parametrize("backend", BACKENDS)
def test_padded_rows_are_turns_of_their_own(backend):
    """In [B, L] a row's first token never continues the row before it, even where turn numbers repeat."""
    config = dk.KernelConfig(backend=backend)
    shape, turns = (4, 10), torch.zeros(T, dtype=torch.int32)
    options = {
        "exploration": dk.ExplorationSpec(),
        "mean_difference": 0.2,
        "config": config,
        "outputs": ("difference",),
    }
    args = (CASE.hidden, CASE.weight, CASE.targets, TEACHER, CASE.advantages)
    weights = {"distill_weights": DISTILL_WEIGHTS, "policy_weights": None}
    packed = dk.self_distill_loss(
        *args, turn_ids=turns, cu_seqlens=torch.tensor([0, 10, 20, 30, 40]), **weights, **options
    )
    padded = dk.self_distill_loss(
        CASE.hidden.reshape(*shape, D),
        CASE.weight,
        CASE.targets.reshape(shape),
        dk.TeacherHead(SEEN.reshape(*shape, 5), TEACHER_WEIGHT, temperature=1.2),
        torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64),
        turn_ids=turns.reshape(shape),
        distill_weights=DISTILL_WEIGHTS.reshape(shape),
        policy_weights=None,
        **options,
    )
    torch.testing.assert_close(padded.outputs["difference"].reshape(-1), packed.outputs["difference"])
    assert (packed.outputs["difference"][[0, 10, 20, 30]] == 0).all()


def test_rows_are_computed_where_something_reads_them(monkeypatch):
    students, teachers = [], []
    sweep, head = driver.Sweep.__init__, distill_driver.TeacherLogits.run

    def spy(self, x, call, plan, *rest):
        sweep(self, x, call, plan, *rest)
        students.append(plan.count)

    def spy_teacher(self, taught, targets):
        teachers[-1] += len(targets)
        return head(self, taught, targets)

    monkeypatch.setattr(driver.Sweep, "__init__", spy)
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
            w,
            SMALL.targets,
            dk.TeacherHead(*SMALL_TEACHER),
            SMALL.advantages,
            distill_weights=SMALL.token_weights,
            policy_weights=None,
            old_logprobs=torch.full((14,), -2.5).double(),
            ref_logprobs=torch.full((14,), -2.4).double(),
            policy=dk.PolicySpec(objective="sapo", kl_coef=0.1, entropy_coef=0.05, z_loss_coef=0.02),
            distill=dk.DistillSpec(0.4, k),
            bias=b,
            softcap=4.0,
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

    monkeypatch.setattr(driver.Sweep, "add_gradients", refuse)
    with torch.no_grad():
        torch.testing.assert_close(hybrid(*leaves, **explored), loss)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [0, T])
def test_nothing_to_train_gives_zero(size, backend):
    leaves, s = CASE.leaves(torch.float64), slice(0, size)
    teacher = dk.TeacherHead(SEEN[s], TEACHER_WEIGHT)
    out = dk.self_distill_loss(
        leaves[0][s],
        leaves[1],
        torch.full((size,), -100),
        teacher,
        CASE.advantages[s],
        distill_weights=None,
        policy_weights=None,
        exploration=dk.ExplorationSpec(entropy_warmup=True),
        turn_ids=TURNS[s],
        rebellious_weights=REBELLIOUS[s],
        mean_difference=torch.tensor(0.1),
        mean_entropy=2.0,
        bias=leaves[2],
        config=dk.KernelConfig(backend=backend),
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
            w,
            case.targets,
            dk.TeacherHead(seen.to(d), w),
            case.advantages,
            distill_weights=case.token_weights,
            policy_weights=None,
            exploration=dk.ExplorationSpec(entropy_warmup=True),
            turn_ids=turns,
            rebellious_weights=case.token_weights,
            mean_difference=0.1,
            mean_entropy=7.0,
            bias=b,
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
    refused("needs turn_ids", **explored)
    refused("turn_ids must be integers", turn_ids=TURNS[:3], **explored)
    refused("pass a TeacherHead", TEACHERS["stored"][0], turn_ids=TURNS, **explored)
    refused("mean_entropy has shape", turn_ids=TURNS, mean_entropy=torch.ones(2), **explored)
    refused("go with exploration", rebellious_weights=REBELLIOUS)
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
            dk.TeacherHead(hidden.detach() * 2, head),
            advantages,
            distill_weights=DISTILL_WEIGHTS,
            policy_weights=POLICY_WEIGHTS,
            old_logprobs=old,
            policy=dk.PolicySpec(entropy_coef=0.1),
            exploration=dk.ExplorationSpec(),
            turn_ids=turns,
            mean_difference=mean,
        )
        return out.loss, out.metrics["difference"][0]

    results = []
    for fn in (step, torch.compile(step, fullgraph=True)):
        loss, difference = fn(ids, TARGETS, CASE.advantages, OLD, TURNS, torch.tensor(0.2))
        results.append((loss, difference, *torch.autograd.grad(loss, [head, *backbone.parameters()])))
    torch.testing.assert_close(results[0], results[1])
