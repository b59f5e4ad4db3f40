"""Bad arguments: an error that names the argument, its value and what would do."""

import math
import re

import loose
import numpy as np
import pytest
import torch

import drift_kernels as dk
from drift_kernels.backends import available_backends

H, W, Y, A = torch.randn(6, 4), torch.randn(11, 4), torch.arange(6), torch.ones(6)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"targets": torch.arange(5)}, ValueError, r"targets \(5,\)"),
        ({"targets": torch.arange(6).int()}, TypeError, "must be int64"),
        ({"targets": torch.tensor([0, 1, 2, 3, 4, 11])}, IndexError, r"0…11.*\[0, 11\).*ignore_index=-100"),
        ({"targets": torch.tensor([0, 1, 2, 3, 4, -1])}, IndexError, "-1…4"),
        ({"head": torch.randn(11, 5)}, ValueError, "weight"),
        ({"head": torch.randn(11, 4).double()}, TypeError, "weight is torch.float64"),
        ({"hidden": torch.ones(6, 4).int()}, TypeError, "hidden has dtype"),
        ({"bias": torch.randn(4)}, ValueError, r"bias has shape \(4,\)"),
        ({"temperature": 0.0}, ValueError, "temperature=0.0"),
        ({"temperature": torch.ones(3)}, ValueError, r"temperature has shape \(3,\)"),
        ({"softcap": -1.0}, ValueError, "softcap=-1.0"),
        ({"normalizer": 0.0}, ValueError, "normalizer=0.0"),
        ({"normalizer": torch.ones(2)}, ValueError, "normalizer has shape"),
        ({"normalizer": torch.tensor(0)}, ValueError, r"normalizer=0\.0 must be positive"),
        ({"normalizer": torch.tensor([-2.5])}, ValueError, r"normalizer=-2\.5 must be positive"),
        ({"normalizer": "3"}, TypeError, "normalizer='3' must be a number"),
        ({"normalizer": True}, TypeError, "normalizer=True must be a number"),
        ({"outputs": ("logits",)}, ValueError, "'logits'.*logprobs, entropy"),
        ({"old_logprobs": torch.ones(3)}, ValueError, r"old_logprobs has shape \(3,\)"),
        ({"advantages": torch.ones(3)}, ValueError, "pass cu_seqlens"),
        ({"advantages": torch.ones(3), "cu_seqlens": torch.tensor([0, 6])}, ValueError, "one a segment"),
        ({"cu_seqlens": torch.tensor([0.0, 6.0])}, ValueError, "cu_seqlens must be"),
        ({"spec": dk.PolicySpec.preset("grpo")}, ValueError, "sequence_mean_token_mean: pass cu_seqlens"),
        ({"spec": dk.PolicySpec(kl_coef=0.1)}, ValueError, "kl_coef=0.1 needs ref_logprobs"),
        ({"spec": dk.PolicySpec(correction="token_mask")}, ValueError, "needs old_logprobs and rollout_logprobs"),
        ({"active": torch.tensor([[0]])}, ValueError, "active must be"),
        ({"rows": torch.arange(5)}, ValueError, "with rows="),
        ({"rows": torch.tensor([0, 1, 0, 2, 3, 4])}, ValueError, "rows must be sorted"),
        ({"rows": torch.tensor([-1, 0, 1, 2, 3, 4])}, IndexError, r"rows holds -1…4; it must lie in \[0, 6\)"),
        ({"active": torch.tensor([0, 6])}, IndexError, "active holds 0…6"),
        ({"active": torch.tensor([-1])}, IndexError, "active holds -1"),
        ({"active": torch.tensor([1, 0, 1])}, ValueError, "active holds a position twice"),
        ({"cu_seqlens": torch.tensor([2, 4, 6])}, ValueError, "must rise from 0 to the number of tokens, 6"),
        ({"cu_seqlens": torch.tensor([0, 2, 9])}, ValueError, "must rise from 0"),
        ({"cu_seqlens": torch.tensor([0, 5, 3, 6])}, ValueError, "must rise from 0"),
        ({"segment_ids": torch.tensor([-1, 0, 0, 1, 1, 1])}, ValueError, "segment_ids holds -1"),
        ({"segment_ids": torch.arange(6), "cu_seqlens": torch.tensor([0, 6])}, ValueError, "pass one of them"),
        ({"old_logprobs": torch.zeros(6, device="meta")}, ValueError, "old_logprobs lies on meta"),
        ({"spec": "dapo"}, TypeError, r"spec='dapo' must be a PolicySpec, such as PolicySpec\.preset"),
        ({"config": "cpu"}, TypeError, r"config='cpu' must be a KernelConfig"),
        ({"rows": [0, 1]}, TypeError, "rows is a list; it must be a tensor"),
        ({"active": [0, 1]}, TypeError, "active is a list"),
        ({"bias": 0.5}, TypeError, "bias is a float"),
        ({"cu_seqlens": [0, 6]}, TypeError, "cu_seqlens is a list"),
        ({"segment_ids": [0] * 6}, TypeError, "segment_ids is a list"),
        ({"advantages": 1.0}, TypeError, "advantages is a float"),
        ({"advantages": torch.ones(6, requires_grad=True)}, ValueError, "advantages requires grad"),
        ({"outputs": "entropy"}, TypeError, "pass a tuple of names"),
        ({"temperature": "2"}, TypeError, "temperature='2' must be a number"),
    ],
)
def test_policy_loss_names_what_is_wrong(change, error, words):
    args = {"hidden": H, "head": W, "targets": Y, "advantages": A} | change
    with pytest.raises(error, match=words):
        loose.policy_loss(**args)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"objective": "trpo"}, "objective='trpo'.*'clip', 'cispo'"),
        ({"clip_low": 1.5}, "clip_low=1.5"),
        ({"clip_high": -0.1}, "clip_high=-0.1"),
        ({"dual_clip": 0.9}, "dual_clip=0.9 must exceed 1"),
        ({"delta": 1.1}, "delta=1.1 must exceed"),
        ({"objective": "dppo_tv", "delta": 0.0}, "delta=0.0 must exceed 0"),
        ({"objective": "kl_cov", "correction": "token_mask", "kl_coef": 0.1}, "second call"),
        ({"objective": "sapo", "dual_clip": 3.0}, "belongs to objective='clip'"),
        ({"kl_estimator": "k4"}, "kl_estimator='k4'"),
        ({"aggregation": "mean"}, "aggregation='mean'"),
        ({"correction": "clip"}, "correction='clip'"),
        ({"correction_bounds": (2.0, 1.0)}, "correction_bounds"),
        ({"sapo_temperatures": (0.0, 1.0)}, "sapo_temperatures"),
        ({"sapo_temperatures": (1.0, 1.0, 1.0)}, "2 numbers"),
        ({"clip_high": float("nan")}, "clip_high is NaN"),
    ],
)
def test_specs_are_checked(options, words):
    with pytest.raises(ValueError, match=words):
        dk.PolicySpec(**options)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_temperature_a_row_is_positive_where_it_counts(backend):
    """A padded row may hold anything; a greedy sample's 0 would be NaN, and a negative one another distribution."""
    config = dk.KernelConfig(backend=backend)
    teacher = dk.Teacher(H, W)
    masked = Y.clone()
    masked[1] = -100
    for bad in (0.0, -1.0):
        warm = torch.ones(len(Y), dtype=H.dtype)
        warm[1] = bad
        for op in (
            lambda y, t: dk.linear_logprob(H, dk.Head(W, temperature=t), y, config=config).logprobs.sum(),
            lambda y, t: dk.weighted_cross_entropy(H, dk.Head(W, temperature=t), y, config=config).loss,
            lambda y, t: dk.distill_loss(H, dk.Head(W, temperature=t), teacher, targets=y, config=config).loss,
            lambda y, t: dk.distill_loss(H, W, dk.Teacher(H, dk.Head(W, temperature=t)), targets=y, config=config).loss,
        ):
            assert op(masked, warm).isfinite()
            with pytest.raises(ValueError, match="it must be positive"):
                op(Y, warm)
    with pytest.raises(ValueError, match="temperature requires grad"):
        dk.linear_logprob(H, dk.Head(W, temperature=torch.ones(len(Y), requires_grad=True)), Y)


def test_odd_tensors_and_options_are_named():
    def refused(error, words, op=dk.weighted_cross_entropy, *args, **options):
        with pytest.raises(error, match=words):
            op(*(args or (H, W, Y)), **options)

    refused(TypeError, "weight has layout torch.sparse_coo; it must be dense", dk.linear_logprob, H, W.to_sparse(), Y)
    refused(ValueError, "D at least 1", dk.linear_logprob, H[:, :0], W[:, :0], Y)
    meta = (H.to("meta"), W.to("meta"), Y.to("meta"))
    refused(RuntimeError, "no kernels for device meta", dk.linear_logprob, *meta)
    for scale in (math.nan, math.inf, "2"):
        with pytest.raises(ValueError, match="must be a finite number"):
            dk.LoRAHead(W[:2], W[:, :2], scale)
    refused(
        ValueError, "may read that token alone", dk.pointwise_loss, H, W, Y, lambda logp: torch.ones(len(Y)) * logp[0]
    )
    teacher = dk.Teacher(H, W)
    refused(TypeError, "spec=None must be a DistillSpec", dk.distill_loss, H, W, teacher, spec=None)
    weights = {"distill_weights": None, "policy_weights": None}
    both = (dk.self_distill_loss, H, W, Y, teacher, A)
    refused(TypeError, "policy='dapo' must be a PolicySpec", *both, policy="dapo", **weights)
    refused(TypeError, "distill=0.5 must be a DistillSpec", *both, distill=0.5, **weights)
    refused(TypeError, "exploration=True must be", *both, exploration=True, **weights)
    refused(TypeError, "has_teacher is a list", *both, has_teacher=[True] * len(Y), **weights)
    turns = dk.Exploration(dk.ExplorationSpec(), [0] * len(Y))
    refused(TypeError, "turn_ids is a list", *both, exploration=turns, **weights)
    refused(TypeError, "head is a list", dk.linear_logprob, H, [1.0], Y)
    for coef in (math.nan, math.inf, "a", torch.ones(3)):
        refused(ValueError, "distill_coef=", *both, distill_coef=coef, **weights)


def test_presets():
    assert dk.PolicySpec.preset("dapo").clip_high == 0.28
    assert dk.PolicySpec.preset("grpo", kl_coef=0.04).kl_coef == 0.04
    with pytest.raises(ValueError, match=r"preset='gspoo'.*'dapo'"):
        dk.PolicySpec.preset("gspoo")


def test_backends_say_why_they_cannot_run():
    reasons = available_backends()
    assert reasons["cpu"] is None
    assert reasons["reference"] is None
    for name in ("triton", "cuda"):
        reason = reasons[name]
        assert reason
        with pytest.raises(RuntimeError, match=re.escape(f"backend='{name}' cannot run: {reason}")):
            dk.linear_logprob(H, W, Y, config=dk.KernelConfig(backend=name))
    with pytest.raises(ValueError, match="backend='metal'"):
        dk.KernelConfig(backend="metal")
    with pytest.raises(ValueError, match="workspace_bytes=0"):
        dk.KernelConfig(workspace_bytes=0)
    with pytest.raises(TypeError, match="check_finite='yes' must be True or False"):
        dk.KernelConfig(check_finite="yes")


def test_numbers_of_other_libraries_and_infinite_bounds_travel():
    """numpy scalars and infinities are what users pass; an op's schema carries them as text."""
    spec = dk.PolicySpec(clip_high=np.float64(0.28), correction="token_truncate", correction_bounds=(0, math.inf))
    data = {"old_logprobs": -A, "rollout_logprobs": -A}
    losses = [
        loose.policy_loss(
            H, dk.Head(W, softcap=np.float64(30)), Y, A, spec=spec, config=dk.KernelConfig(backend=b), **data
        ).loss
        for b in ("cpu", "reference")
    ]
    torch.testing.assert_close(losses[0], losses[1])
    assert dk.PolicySpec(clip_high=math.inf).clip_high > 1e20
    assert hash(spec) == hash(dk.PolicySpec(clip_high=0.28, correction="token_truncate", correction_bounds=[0.0, 1e30]))


def test_shift_targets():
    ids = torch.tensor([5, 6, 7, 8, 9])
    assert dk.shift_targets(ids).tolist() == [6, 7, 8, 9, -100]
    assert dk.shift_targets(ids, torch.tensor([0, 2, 2, 5])).tolist() == [6, -100, 8, 9, -100]
    assert dk.shift_targets(ids[None]).tolist() == [[6, 7, 8, 9, -100]]
    with pytest.raises(TypeError, match="input_ids is a list"):
        dk.shift_targets([1, 2])
    with pytest.raises(TypeError, match="cu_seqlens is a list"):
        dk.shift_targets(ids, [0, 5])
    with pytest.raises(ValueError, match="packed"):
        dk.shift_targets(ids[None], torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="must rise from 0"):
        dk.shift_targets(ids, torch.tensor([2, -1]))
    with pytest.raises(TypeError, match="uint8"):
        dk.shift_targets(ids.to(torch.uint8))
