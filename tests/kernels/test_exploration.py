"""Exploration weights made on the way, against the method's formulas written out here."""

import math

import loose
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from self_distill_cases import (
    BACKENDS,
    CASE,
    CU,
    DISTILL_WEIGHTS,
    HAS_TEACHER,
    HEAD,
    LOG_S,
    LOG_T,
    MANY,
    MASK,
    OLD,
    POLICIES,
    POLICY_WEIGHTS,
    REBELLIOUS,
    SEEN,
    TARGETS,
    TEACHER,
    TEACHER_WEIGHT,
    TEACHERS,
    TURNS,
    D,
    T,
    hybrid,
    same,
)

import drift_kernels as dk
from drift_kernels.divergences import DistillTokens
from drift_kernels.exploration import TokenStats, explore


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
    student, teacher = (
        TokenStats.of({"logprobs": nothing, "entropy": entropy}, nothing[:1]),
        TokenStats(nothing, nothing, nothing),
    )
    lessons = DistillTokens(taught=one, continues=torch.tensor([False, True, True]), mean_difference=torch.tensor(1e-9))
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
        outputs=("difference",),
        config=dk.KernelConfig(backend=backend),
        exploration=dk.Exploration(dk.ExplorationSpec(), turn_ids=TURNS.clamp(max=0)),
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
        teacher = dk.Teacher(SEEN[s], dk.Head(TEACHER_WEIGHT, temperature=1.2))
        data = {"distill_weights": DISTILL_WEIGHTS, "policy_weights": POLICY_WEIGHTS, "old_logprobs": OLD}
        data |= {"has_teacher": HAS_TEACHER, "turn_ids": TURNS, "rebellious_weights": REBELLIOUS}
        data = {name: value[s] for name, value in data.items()}
        out = loose.self_distill_loss(
            h[s], dk.Head(w, bias=b), TARGETS[s], teacher, CASE.advantages[s], **data, **explored, **HEAD
        )
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
    packed = loose.self_distill_loss(
        *args, cu_seqlens=torch.tensor([0, 10, 20, 30, 40]), **weights, **options, turn_ids=turns
    )
    padded = loose.self_distill_loss(
        CASE.hidden.reshape(*shape, D),
        CASE.weight,
        CASE.targets.reshape(shape),
        dk.Teacher(SEEN.reshape(*shape, 5), dk.Head(TEACHER_WEIGHT, temperature=1.2)),
        torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64),
        distill_weights=DISTILL_WEIGHTS.reshape(shape),
        policy_weights=None,
        **options,
        turn_ids=turns.reshape(shape),
    )
    torch.testing.assert_close(padded.outputs["difference"].reshape(-1), packed.outputs["difference"])
    assert (packed.outputs["difference"][[0, 10, 20, 30]] == 0).all()
