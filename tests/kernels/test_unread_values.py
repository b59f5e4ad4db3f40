"""NaN where a weight or a mask says that nothing counts: it reaches no loss, no gradient and no metric of other tokens."""

import pytest
import torch

import drift_kernels as dk

T, D, V = 8, 6, 11
DRAWN = torch.Generator().manual_seed(0)
HIDDEN, WEIGHT = torch.randn(T, D, generator=DRAWN), torch.randn(V, D, generator=DRAWN)
TARGETS = torch.tensor([1, 2, 3, -100, 4, 5, 6, 7])
ADVANTAGES = torch.tensor([1.0, 0.5, 1.2, 1.0, -1.0, -0.7, -1.0, -1.3])
ENDS = torch.tensor([0, 4, 8])
NOTHING = torch.tensor([1.0, 0, 1, 1, 1, 1, 1, 1])  # token 1 has no weight
BACKENDS = ["cpu", "reference"]
GIVEN = ("hidden", "advantages", "old_logprobs", "ref_logprobs", "rollout_logprobs")


def on(backend):
    return dk.KernelConfig(backend=backend)


@pytest.mark.parametrize("loss_mask", ["masked", "weighted"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_frozen_head_with_nan_from_above_at_a_masked_row(backend, loss_mask):
    """A caller's own loss, whose ratio is NaN where the target is ignored."""
    old = torch.full((T,), -2.0)
    old[3] = -torch.inf
    keeps = TARGETS >= 0
    grads = []
    for trained in (False, True):
        hidden, weight = HIDDEN.clone().requires_grad_(), WEIGHT.clone().requires_grad_(trained)
        logprobs = dk.linear_logprob(hidden, weight, TARGETS, config=on(backend)).logprobs
        ratio = (logprobs - old).exp()
        loss = torch.where(keeps, ratio, 0.0).sum() if loss_mask == "masked" else (ratio * keeps).nansum()
        loss.backward()
        grads.append(hidden.grad)
    assert not grads[0][3].any()
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-6)


SPECS = {
    "ppo": (dk.PolicySpec.preset("ppo", kl_coef=0.1, correction="token_truncate"), GIVEN),
    "sapo": (dk.PolicySpec.preset("sapo", kl_coef=0.1), GIVEN[:4]),
    "dro": (dk.PolicySpec.preset("dro", dro_beta=0.1, correction="token_truncate"), (*GIVEN[:3], GIVEN[4])),
    "gspo": (dk.PolicySpec.preset("gspo", kl_coef=0.1, correction="token_truncate"), ("advantages", *GIVEN[3:])),
    "vespo": (dk.PolicySpec.preset("vespo", kl_coef=0.1), ("advantages", "ref_logprobs")),
    "clip_cov": (dk.PolicySpec.preset("clip_cov", cov_share=0.3, cov_bounds=(-9.0, 9.0)), GIVEN[:3]),
    "kl_cov": (dk.PolicySpec.preset("kl_cov", cov_share=0.3), GIVEN[:3]),
}


@pytest.mark.parametrize(("name", "where"), [(name, where) for name, (_, given) in SPECS.items() for where in given])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_at_a_weight_of_zero(backend, name, where):
    """The data that a token's own loss alone reads; a sequence's ratio reads log-probs of tokens without a weight too."""
    if where in ("hidden", "advantages") and name in ("clip_cov", "kl_cov"):
        pytest.skip("a selection over the call counts every token, those of weight 0 too, as verl does")
    spec, results = SPECS[name][0], []
    for value in (0.3, torch.nan):
        data = {"hidden": HIDDEN.clone(), "advantages": ADVANTAGES.clone()}
        data |= {key: torch.full((T,), -2.0) for key in GIVEN[2:]}
        data[where][1] = value
        hidden, advantages = data.pop("hidden").requires_grad_(), data.pop("advantages")
        weight = WEIGHT.clone().requires_grad_()
        generator = torch.Generator().manual_seed(3)
        out = dk.policy_loss(
            hidden,
            weight,
            TARGETS,
            advantages,
            cu_seqlens=ENDS,
            token_weights=NOTHING,
            spec=spec,
            generator=generator,
            config=on(backend),
            **data,
        )
        out.loss.backward()
        hidden_grad = hidden.grad.clone()
        assert not hidden_grad[1].any() or name in ("gspo", "vespo")
        results.append((out.loss.detach(), hidden_grad, weight.grad))
        ratio = out.metrics.get("sampling/importance_sampling_ratio/mean")
        assert ratio is None or (ratio[0].isfinite() and int(ratio[1]) == 6)
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("objective", ["clip_cov", "kl_cov"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_covariance_objectives_with_an_off_policy_threshold(backend, objective):
    """Sequences that have moved too far lose their objective; the others keep it, and sequences must be known."""
    options = {"cov_share": 0.3} | ({"cov_bounds": (-9.0, 9.0)} if objective == "clip_cov" else {})
    old = torch.tensor([-2.0] * 4 + [9.0] * 4)

    def loss(threshold, advantages, **sequences):
        spec = dk.PolicySpec(objective=objective, off_policy_threshold=threshold, aggregation="token_sum", **options)
        out = dk.policy_loss(
            HIDDEN,
            WEIGHT,
            TARGETS,
            advantages,
            old_logprobs=old,
            spec=spec,
            generator=torch.Generator().manual_seed(3),
            outputs=("logprobs",),
            config=on(backend),
            **sequences,
        )
        return float(out.loss)

    far = loss(0.5, ADVANTAGES, cu_seqlens=ENDS)
    assert far != pytest.approx(loss(None, ADVANTAGES, cu_seqlens=ENDS))  # the second sequence is dropped
    assert loss(1e6, ADVANTAGES, cu_seqlens=ENDS) == pytest.approx(loss(None, ADVANTAGES, cu_seqlens=ENDS))
    assert loss(0.5, -ADVANTAGES.abs(), segment_ids=torch.zeros(T, dtype=torch.int64)) == 0.0
    with pytest.raises(ValueError, match="off_policy_threshold: pass cu_seqlens"):
        loss(0.5, ADVANTAGES)


@pytest.mark.parametrize("k", [2, 3, 5, V])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_a_top_k_beyond_the_tokens_that_are_possible(alpha, k):
    """Three tokens of the vocabulary have a probability; the rest of a top k of three has none."""
    bias = torch.full((V,), -torch.inf)
    bias[:3] = 0
    results = []
    for backend in BACKENDS:
        hidden = HIDDEN.clone().requires_grad_()
        out = dk.distill_loss(
            hidden,
            dk.Head(WEIGHT, bias=bias),
            dk.Teacher(HIDDEN * 0.5, dk.Head(WEIGHT, bias=bias)),
            targets=TARGETS % 3,
            spec=dk.DistillSpec(alpha=alpha, top_k=k),
            config=on(backend),
        )
        out.loss.backward()
        assert hidden.grad.isfinite().all()
        results.append((out.loss.detach(), hidden.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)
