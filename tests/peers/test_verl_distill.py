"""verl's distillation losses, called as its workers call them, against `distill_loss` and `policy_loss`."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from distill_cases import Lesson, lessons, make_lesson, theirs
from distill_cases import ours as distilled
from hypothesis import given
from hypothesis import strategies as st
from peer_cases import (
    Batch,
    Result,
    V,
    assert_same,
    batches,
    bounded,
    brief,
    gradients,
    logprobs,
    make_batch,
    masked_mean,
    ours,
    ratio,
    settle,
)
from torch import Tensor
from verl.trainer.distillation import losses
from verl.trainer.distillation.fsdp.losses import compute_forward_kl_topk
from verl.workers.config import DistillationLossConfig
from verl_peer import AGGREGATIONS, ESTIMATORS, Options, actor_config, normalizer, off_the_edges

import drift_kernels as dk

RTOL = 1e-7
DOUBLE = torch.float64
SUPERVISED = [name for name in ESTIMATORS if not name.endswith("+") and name != "k1"]  # verl refuses k1 here, not "kl"


def test_every_name_it_knows_is_compared():
    plain = {name for name in ESTIMATORS if not name.endswith("+")}
    assert set(losses.DISTILLATION_LOSS_REGISTRY) == {"forward_kl_topk"} | plain
    with pytest.raises(ValueError, match="k1"):
        DistillationLossConfig(loss_mode="k1", use_policy_gradient=False)


def forward_kl_topk(
    student: Tensor, teacher: Tensor, k: int, chunked: bool = False, floor: float | None = None
) -> dict:
    """What verl makes of the student's logits [B, L, V] and the k likeliest tokens of the teacher; it computes in fp32."""
    found = teacher.log_softmax(-1).topk(k, -1)
    values, ids = (torch.nested.as_nested_tensor(list(x), layout=torch.jagged) for x in (found.values, found.indices))
    options = SimpleNamespace(use_chunked_topk=chunked, chunked_topk_chunk_size=3, log_prob_min_clamp=floor)
    config = SimpleNamespace(distillation_loss=options)
    made = compute_forward_kl_topk(student.reshape(1, -1, V), values, ids, config, "thd")
    return {name: value.reshape(student.shape[:2]) for name, value in made.items()}


def assert_close(mine: Result, found: Result) -> None:
    """As far as fp32 goes."""
    for a, b in zip(mine.flat(), found.flat()):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunked", [False, True])
def test_its_forward_kl_over_a_top_k_lacks_the_rest_that_ours_counts(chunked):
    """Σ p·log(p/q) over the teacher's k alone, neither renormalised nor with the others as one more token: not a divergence,
    and of another gradient. With that token's p·log(p/q) it is ours."""

    @bounded
    @given(lessons(), st.integers(1, 6))
    def check(lesson, k):
        def with_the_rest(student, teacher, x):
            made = forward_kl_topk(student, teacher, k, chunked)
            ids = teacher.topk(k, -1).indices
            q, p = (1 - z.softmax(-1).gather(-1, ids).sum(-1) for z in (student, teacher))
            torch.testing.assert_close(made["teacher_mass"], 1 - p, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(made["student_mass"], 1 - q, rtol=1e-5, atol=1e-5)
            return masked_mean(made["distillation_losses"] + p * (p.log() - q.log()), x.mask)

        mine = distilled(lesson, lambda t: lesson.top(t, k), dk.DistillSpec(0.0), DOUBLE)
        assert_close(mine, theirs(lesson, with_the_rest, DOUBLE))

    check()


def test_its_forward_kl_over_the_whole_vocabulary_is_ours():
    lesson = make_lesson(61)

    def of(k):
        return theirs(
            lesson, lambda s, t, x: masked_mean(forward_kl_topk(s, t, k)["distillation_losses"], x.mask), DOUBLE
        )

    for teacher in (lesson.head, lambda t: lesson.top(t, V)):
        assert_close(distilled(lesson, teacher, dk.DistillSpec(0.0), DOUBLE), of(V))
    for tail in (True, False):
        mine = distilled(lesson, lambda t: lesson.top(t, 4), dk.DistillSpec(0.0, tail=tail), DOUBLE)
        assert not torch.allclose(mine.loss, of(4).loss.double(), rtol=1e-3)


def test_its_log_probs_stop_at_minus_10_with_no_gradient_and_ours_go_on():
    assert DistillationLossConfig().log_prob_min_clamp == -10
    lesson = make_lesson(62)
    lesson.batch.hidden *= 20  # most tokens are far below e⁻¹⁰

    def of(floor):
        each = lambda s, t, x: forward_kl_topk(s, t, V, floor=floor)["distillation_losses"]  # noqa: E731
        return theirs(lesson, lambda s, t, x: masked_mean(each(s, t, x), x.mask), DOUBLE)

    mine, clamped = distilled(lesson, lesson.head, dk.DistillSpec(0.0), DOUBLE), of(-10.0)
    assert_close(mine, of(None))
    assert mine.loss > 1.2 * clamped.loss
    assert mine.hidden.norm() > 1.2 * clamped.hidden.norm()


def distillation_loss(x: Batch, teacher: Tensor, o: Options, config: DistillationLossConfig) -> Tensor:
    """verl's loss of the log-probs of sampled tokens, from packed sequences as its models make them: one token is each prompt."""

    def packed(values: Tensor) -> Tensor:  # verl takes the values of a sequence from the token before it
        return torch.cat([torch.cat([v[:n], v.new_zeros(1)]) for v, n in zip(values, x.lengths.tolist())])

    logp = logprobs(x.hidden, x.weight, x.targets)[0]
    inside = (torch.arange(x.mask.shape[1]) < x.lengths[:, None]).long()
    first = torch.ones(len(inside), 1, dtype=torch.int64)
    data = {
        "prompts": first,
        "responses": x.targets,
        "attention_mask": torch.cat([first, inside], 1),
        "response_mask": x.mask.long(),
        "teacher_logprobs": packed(teacher)[:, None],
        "old_log_probs": x.old,
        "dp_size": o.info.get("dp_size", 1),
        "batch_num_tokens": o.info.get("batch_num_tokens"),
        "global_batch_size": o.info.get("global_batch_size"),
    }
    actor = dataclasses.replace(
        actor_config(o), loss_agg_mode=o.mode, loss_scale_factor=o.info.get("loss_scale_factor")
    )
    wanted = SimpleNamespace(distillation_loss=config)
    return losses.distillation_loss(actor, wanted, {"log_probs": packed(logp)}, data)[0]


@pytest.mark.parametrize("name", SUPERVISED)
def test_its_estimators_of_sampled_tokens_are_a_kl_term_towards_the_teacher(name):
    """policy_loss with the teacher's log-probs as `ref_logprobs` and no advantages."""
    config = DistillationLossConfig(loss_mode=name, use_policy_gradient=False, loss_max_clamp=None)
    infos = ({}, {"dp_size": 2, "batch_num_tokens": 77, "global_batch_size": 12, "loss_scale_factor": 16})

    @brief
    @given(batches(), st.sampled_from([*AGGREGATIONS]), st.sampled_from(infos))
    def check(batch, mode, info):
        o = Options(mode=mode, info=info, kl=(name, 1.0))
        batch = off_the_edges(batch, o)
        mine = dataclasses.replace(batch, advantages=torch.zeros_like(batch.advantages))
        spec = dk.PolicySpec(kl_coef=1.0, kl_estimator=ESTIMATORS[name], aggregation=AGGREGATIONS[mode])

        def peer(x):
            return gradients(distillation_loss(x, x.ref, o, config), x)

        assert_same(mine, peer, spec, RTOL, ref=True, normalizer=normalizer(batch, o))

    check()


@bounded
@given(st.integers(0, 10**6), st.sampled_from([*AGGREGATIONS]))
def test_its_policy_gradient_of_distillation_is_the_clipped_loss_with_that_advantage(seed, mode):
    """k1 as a reward: advantages are the teacher's log-probs less the student's, at most ±10."""
    config = DistillationLossConfig(loss_mode="k1")
    o = Options(mode=mode)
    batch = settle(make_batch(seed, 3, 6, True), "old", (ratio, (0.8, 1.2, 3.0)))
    batch = settle(batch, "ref", (lambda b: b.logp - b.ref, (0.0,)))
    mine = dataclasses.replace(batch, advantages=batch.ref - batch.logp)
    spec = dk.PolicySpec(dual_clip=3.0, aggregation=AGGREGATIONS[mode])

    def peer(x):
        return gradients(distillation_loss(x, x.ref, o, config), x)

    assert_same(mine, peer, spec, RTOL, old=True, normalizer=normalizer(batch, o))


def test_on_policy_that_has_the_gradient_of_teacher_log_probs():
    """`TeacherLogprobs` makes the advantage on its way; the values differ, by what stands in front of the gradient."""
    batch = make_batch(63, 4, 7, True)
    batch = dataclasses.replace(batch, old=batch.logp)
    lesson = Lesson(batch, batch.hidden, batch.weight)
    peer = lambda student, teacher, x: distillation_loss(x, x.ref, Options(), DistillationLossConfig(loss_mode="k1"))  # noqa: E731
    found = theirs(lesson, peer, DOUBLE)
    mine = distilled(lesson, lambda t: dk.TeacherLogprobs(batch.ref.to(t)), dk.DistillSpec(1.0), DOUBLE)
    for a, b in zip(mine.flat()[1:], found.flat()[1:]):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(found.loss, masked_mean(batch.logp - batch.ref, batch.mask))


def test_it_clamps_estimates_at_10_and_ours_does_not():
    assert DistillationLossConfig().loss_max_clamp == 10
    batch = make_batch(64, 2, 4, True)
    batch.ref[:] = batch.logp.float() - 6.0  # d²/2 = 18
    config = DistillationLossConfig(loss_mode="k2", use_policy_gradient=False)
    x = batch.to(DOUBLE)
    found = gradients(distillation_loss(x, x.ref, Options(), config), x)
    assert float(found.loss) == pytest.approx(10)
    assert not found.hidden.any()
    silent = dataclasses.replace(batch, advantages=torch.zeros_like(batch.advantages))
    mine = ours(silent, dk.PolicySpec(kl_coef=1.0, kl_estimator="k2"), DOUBLE, True, ref=True)
    assert float(mine.loss) == pytest.approx(18, rel=1e-5)
