"""TRL's divergences between a student and a teacher against `distill_loss`: its beta is our alpha, its temperature ours."""

from types import SimpleNamespace

import loose
import pytest
import torch
from distill_cases import assert_same_divergence, lessons, make_lesson, ours, theirs
from hypothesis import given
from hypothesis import strategies as st
from peer_cases import brief, logprobs, masked_mean
from trl.experimental.gkd.gkd_trainer import GKDTrainer
from trl.experimental.iw_opd.iw_opd_trainer import IWOPDTrainer
from trl.experimental.sdpo import loss_utils as sdpo
from trl.experimental.server_distillation.server_distillation_trainer import ServerDistillationTrainer
from trl.trainer.distillation_trainer import _chunked_divergence_loss

import drift_kernels as dk

BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)


def labels(batch):
    return torch.where(batch.mask, batch.targets, -100)


@pytest.mark.parametrize("beta", BETAS)
def test_gkd(beta):
    """No factor of temperature² is in either."""

    @brief
    @given(lessons(), st.sampled_from([0.7, 1.0, 2.0]), st.sampled_from([None, 37.0]))
    def check(lesson, temperature, items):
        def gkd(student, teacher, x):
            return GKDTrainer.generalized_jsd_loss(
                student, teacher, labels(x), beta, temperature, num_items_in_batch=items
            )

        given = {"temperature": temperature, "normalizer": items}
        head = lambda dtype: lesson.head(dtype, temperature=temperature)  # noqa: E731
        assert_same_divergence(lesson, gkd, head, dk.DistillSpec(beta), **given)

    check()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("beta", BETAS)
def test_chunked_divergence(beta, bias):
    """In fp32, as it is: all the options of two heads, and the student's entropy."""

    @brief
    @given(st.data())
    def check(data):
        pick = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
        lesson = data.draw(lessons())
        x, temperature, items = lesson.batch.to(torch.float32), pick(1.0, 0.7), pick(None, 37)
        own, its = ({"softcap": pick(None, 1.7), "logit_scale": pick(1.0, 1.3)} for _ in range(2))
        biases = [torch.linspace(-1, 1, len(x.weight)), torch.linspace(2, 0, len(x.weight))] if bias else [None, None]
        leaves = (x.hidden, x.weight, *(b.requires_grad_() for b in biases[:1] if b is not None))
        theirs_, entropy, count = _chunked_divergence_loss(
            x.hidden,
            lesson.hidden.float(),
            x.weight,
            lesson.weight.float(),
            x.mask,
            beta,
            items,
            student_lm_head_bias=biases[0],
            teacher_lm_head_bias=biases[1],
            student_logit_scale=own["logit_scale"],
            teacher_logit_scale=its["logit_scale"],
            student_final_logit_softcapping=own["softcap"],
            teacher_final_logit_softcapping=its["softcap"],
            temperature=temperature,
        )
        out = loose.distill_loss(
            x.hidden,
            dk.Head(x.weight, bias=biases[0], temperature=temperature),
            lesson.head(torch.float32, bias=biases[1], temperature=temperature, **its),
            targets=labels(x),
            spec=dk.DistillSpec(beta),
            normalizer=items,
            outputs=("entropy",),
            config=dk.KernelConfig(backend="cpu", workspace_bytes=x.workspace),
            **own,
        )
        assert count == x.mask.sum()
        found, wanted = ((loss, *torch.autograd.grad(loss, leaves)) for loss in (out.loss, theirs_))
        mine = (out.outputs["entropy"] * x.mask).sum()
        for a, b in zip((mine, *found), (entropy, *wanted)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

    check()


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("beta", BETAS)
def test_self_distillation_over_the_top_k_of_the_student(beta, tail):
    """Of SDPO, with its importance clipping."""

    @brief
    @given(lessons(), st.integers(1 if tail else 2, 6), st.sampled_from([None, 1.1, 2.0]))
    def check(lesson, k, clip):
        def over_top_k(student, teacher, x):
            each = sdpo.compute_topk_self_distillation_loss(
                student, teacher, distillation_topk=k, distillation_alpha=beta, distillation_add_tail=tail
            )
            if clip is not None:
                logp = logprobs(x.hidden, x.weight, x.targets)[0]
                each = sdpo.apply_importance_sampling_clipping(each, logp, x.old, clip)
            return masked_mean(each, x.mask)

        spec = dk.DistillSpec(beta, top_k=k, tail=tail, importance_clip=clip)
        assert_same_divergence(lesson, over_top_k, lesson.head, spec, old=clip is not None)

    check()


@pytest.mark.parametrize("beta", BETAS)
def test_self_distillation_over_the_vocabulary(beta):
    @brief
    @given(lessons())
    def check(lesson):
        def full(student, teacher, x):
            each = sdpo.compute_full_logit_self_distillation_loss(student, teacher, distillation_alpha=beta)
            return masked_mean(each, x.mask)

        assert_same_divergence(lesson, full, lesson.head, dk.DistillSpec(beta))

    check()


@brief
@given(lessons(), st.sampled_from([None, 1.1, 2.0]))
def test_self_distillation_on_sampled_tokens(lesson, clip):
    def sampled(student, teacher, x):
        each = sdpo.compute_sampled_token_self_distillation_loss(student, teacher, x.targets, distillation_alpha=1.0)
        if clip is not None:
            logp = logprobs(x.hidden, x.weight, x.targets)[0]
            each = sdpo.apply_importance_sampling_clipping(each, logp, x.old, clip)
        return masked_mean(each, x.mask)

    teacher = lambda dtype: dk.TeacherLogprobs(lesson.sampled(dtype))  # noqa: E731
    spec = dk.DistillSpec(1.0, importance_clip=clip)
    assert_same_divergence(lesson, sampled, teacher, spec, old=clip is not None)


@pytest.mark.parametrize("tail", [True, False])
def test_forward_kl_over_what_a_server_sends(tail):
    """The teacher's top k, `TeacherTopK` here."""
    trainer = SimpleNamespace(
        loss_add_tail=tail, _reduce_divergence_loss=ServerDistillationTrainer._reduce_divergence_loss
    )

    @brief
    @given(lessons(), st.integers(1 if tail else 2, 6))
    def check(lesson, k):
        def served(student, teacher, x):
            found = teacher.log_softmax(-1).topk(k, -1)
            result = {"topk_logprobs": found.values, "topk_token_ids": found.indices}
            log_probs = student.log_softmax(-1)
            return ServerDistillationTrainer._compute_server_forward_kl_loss(trainer, result, log_probs, labels(x))

        assert_same_divergence(lesson, served, lambda t: lesson.top(t, k), dk.DistillSpec(0.0, tail=tail))

    check()


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_on_policy_distillation_takes_the_top_k_of_the_one_whose_expectation_it_is(beta, tail):
    """IW-OPD: of the teacher at 0, as a `TeacherTopK`; of the student at 1, as `top_k`."""

    @brief
    @given(lessons(), st.integers(1 if tail else 2, 6), st.sampled_from([1.0, 0.7]))
    def check(lesson, k, temperature):
        def opd(student, teacher, x):
            return IWOPDTrainer.generalized_jsd_loss(
                student, teacher, labels(x), beta, temperature, top_k=k, add_tail=tail
            )

        def teacher(dtype):
            head = lesson.head(dtype, temperature=temperature)
            if beta:
                return head
            return dk.topk_logprobs(head.hidden, head.head, k)

        spec = dk.DistillSpec(beta, top_k=k, tail=tail)
        assert_same_divergence(lesson, opd, teacher, spec, temperature=temperature)

    check()


@pytest.mark.parametrize("tail", [True, False])
def test_between_the_ends_its_top_k_is_the_union_of_both_and_ours_is_the_students(tail):
    """Ours has no union; with k the whole vocabulary there is nothing to choose."""
    lesson = make_lesson(51)

    def opd(k):
        return lambda student, teacher, x: IWOPDTrainer.generalized_jsd_loss(
            student, teacher, labels(x), 0.3, top_k=k, add_tail=tail
        )

    mine = ours(lesson, lesson.head, dk.DistillSpec(0.3, top_k=4, tail=tail), torch.float64)
    assert not torch.allclose(mine.loss, theirs(lesson, opd(4), torch.float64).loss, rtol=1e-3)
    assert_same_divergence(lesson, opd(23), lesson.head, dk.DistillSpec(0.3))
