"""Old log-probs that were not shifted to targets raise nothing; the first call looks at them and warns."""

import warnings

import pytest
import torch

import drift_kernels as dk
from drift_kernels import alignment

CU = torch.tensor([0, 20, 32], dtype=torch.int32)


@pytest.fixture(autouse=True)
def first_call(monkeypatch):
    monkeypatch.setattr(alignment, "_checked", False)


def sampled(packed: bool):
    """hidden, weight, targets and a sampler's log-prob of each token; the first of a segment was not sampled."""
    generator = torch.Generator().manual_seed(0)
    shape = (32,) if packed else (2, 16)
    hidden = torch.randn(*shape, 8, generator=generator)
    weight, ids = torch.randn(40, 8, generator=generator), torch.randint(0, 40, shape, generator=generator)
    targets = dk.shift_targets(ids, CU if packed else None)
    per_target = dk.linear_logprob(hidden, weight, targets).logprobs.detach()
    per_token = torch.zeros(shape)
    per_token[..., 1:] = per_target[..., :-1]
    return hidden, weight, targets, per_token


def loss(hidden, weight, targets, old):
    advantages = torch.ones(targets.shape)
    return dk.policy_loss(hidden, weight, targets, advantages, old_logprobs=old, spec=dk.PolicySpec.preset("dapo"))


@pytest.mark.parametrize("packed", [True, False])
def test_log_probs_of_tokens_in_place_of_targets_are_warned_about_once(packed):
    hidden, weight, targets, per_token = sampled(packed)
    with pytest.warns(UserWarning, match=r"pass dk\.shift\(old_logprobs, cu_seqlens\)") as caught:
        assert len([loss(hidden, weight, targets, per_token) for _ in range(2)]) == 2
    assert len(caught) == 1
    assert caught[0].filename == __file__


@pytest.mark.parametrize("packed", [True, False])
def test_shifted_log_probs_and_those_of_another_policy_are_not_warned_about(packed, monkeypatch):
    hidden, weight, targets, per_token = sampled(packed)
    other = torch.rand(targets.shape, generator=torch.Generator().manual_seed(1)) - 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for old in (dk.shift(per_token, CU if packed else None), other):
            monkeypatch.setattr(alignment, "_checked", False)
            out = loss(hidden, weight, targets, old)
            assert alignment._checked
    assert torch.isfinite(out.loss)


def test_looking_changes_neither_loss_nor_gradient(monkeypatch):
    hidden, weight, targets, per_token = sampled(True)
    results = []
    for checked in (False, True):
        monkeypatch.setattr(alignment, "_checked", checked)
        leaf = hidden.clone().requires_grad_()
        out = loss(leaf, weight, targets, dk.shift(per_token, CU) + 0.1)
        out.loss.backward()
        results.append((out.loss.detach(), leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results))
