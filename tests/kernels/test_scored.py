"""`policy_token_loss` against `policy_loss`, which has its own derivatives and starts from hidden states."""

from __future__ import annotations

from dataclasses import replace

import loose
import pytest
import torch
from preset_specs import PRESET_SPECS

import drift_kernels as dk
from drift_kernels.testing import make_case

CASE = make_case(24, 7, 41, seed=3)
CU = torch.tensor([0, 5, 6, 15, 24])
SPECS = {name: spec for name, spec in PRESET_SPECS.items() if spec.scope != "batch"}
SPECS |= {
    "kl": dk.PolicySpec(kl_coef=0.2, kl_unbiased=True),
    "dual": dk.PolicySpec(dual_clip=1.5),
    "token-correction": dk.PolicySpec(correction="token_mask", correction_bounds=(0.8, 1.2)),
    "sequence-correction": dk.PolicySpec(correction="sequence_truncate", correction_bounds=(0.5, 1.1)),
    "dro-correction": dk.PolicySpec(
        objective="dro", dro_beta=0.3, correction="token_mask", correction_bounds=(0.8, 1.2)
    ),
    "vespo-correction": dk.PolicySpec(objective="vespo", correction="token_truncate", correction_bounds=(0.5, 1.5)),
    "off-policy": dk.PolicySpec(off_policy_threshold=0.01),
}


def given():
    mask = CASE.targets != -100
    logprobs = dk.linear_logprob(CASE.hidden, CASE.weight, CASE.targets).logprobs
    generator = torch.Generator().manual_seed(0)
    move = torch.randn(2, 24, generator=generator, dtype=torch.float64) * 0.3
    data = {"old_logprobs": logprobs + move[0], "rollout_logprobs": logprobs + move[1], "ref_logprobs": logprobs - 0.2}
    return mask, data


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_it_is_what_policy_loss_adds_up(name, padded):
    spec = replace(SPECS[name], aggregation="token_sum")
    mask, data = given()
    hidden, targets, advantages = CASE.hidden, CASE.targets, CASE.advantages
    where = {} if padded else {"cu_seqlens": CU}
    if padded:
        hidden = hidden.reshape(4, 6, -1)
        targets, advantages, mask = (t.reshape(4, 6) for t in (targets, advantages, mask))
        data = {k: v.reshape(4, 6) for k, v in data.items()}
    leaves = [hidden.clone().requires_grad_() for _ in range(2)]
    whole = loose.policy_loss(
        leaves[0], CASE.weight, targets, advantages, spec=spec, outputs=("ratio", "clipped"), **where, **data
    )
    whole.loss.backward()
    logprobs = dk.linear_logprob(leaves[1], CASE.weight, targets).logprobs
    terms = dk.policy_token_loss(logprobs, advantages, mask.long(), spec=spec, **where, **data)
    assert terms["loss"].shape == targets.shape
    assert not terms["loss"][~mask].any()
    terms["loss"].sum().backward()
    torch.testing.assert_close(terms["loss"].sum(), whole.loss)
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
    for output in ("ratio", "clipped"):
        torch.testing.assert_close(terms[output], whole.outputs[output])
        assert not terms[output].requires_grad


def test_on_policy_and_nothing_at_all():
    mask, _ = given()
    logprobs = torch.randn(24, dtype=torch.float64).requires_grad_()
    loss = dk.policy_token_loss(logprobs, CASE.advantages, mask)["loss"]
    torch.testing.assert_close(loss, torch.where(mask, -CASE.advantages, 0.0))
    loss.sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.where(mask, -CASE.advantages, 0.0))
    spec = dk.PolicySpec.preset("gspo")
    nothing = dk.policy_token_loss(logprobs, CASE.advantages, mask & False, spec=spec, cu_seqlens=CU)
    assert not nothing["loss"].any()


def test_what_it_refuses():
    mask, data = given()
    logprobs = torch.zeros(24)
    for message, options in {
        "needs the logits": {"spec": dk.PolicySpec(entropy_coef=0.1)},
        "or the whole batch": {"spec": dk.PolicySpec.preset("clip_cov")},
        "old_logprobs has shape": {"old_logprobs": torch.zeros(3)},
        "need ref_logprobs": {"spec": dk.PolicySpec(kl_coef=0.1)},
        "need old_logprobs": {"spec": SPECS["token-correction"]},
        "needs rollout_logprobs or old_logprobs": {"spec": dk.PolicySpec(off_policy_threshold=0.5), "cu_seqlens": CU},
        "reads whole sequences": {"spec": SPECS["gspo"], "old_logprobs": data["old_logprobs"]},
    }.items():
        with pytest.raises(ValueError, match=message):
            dk.policy_token_loss(logprobs, CASE.advantages, mask, **options)
