"""verl's rollout correction, its rejection, and the losses that make both inside, against `policy_loss`."""

import dataclasses

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from peer_cases import (
    Batch,
    assert_differs,
    assert_same,
    batches,
    bounded,
    brief,
    gradients,
    logprobs,
    make_batch,
    masked_mean,
    ours,
)
from verl.trainer.config.algorithm import RolloutCorrectionConfig
from verl.trainer.ppo import core_algos
from verl_peer import (
    AGGREGATIONS,
    REJECTIONS,
    Options,
    accepted,
    actor_config,
    corrected,
    criteria,
    given_of,
    kept,
    normalizer,
    of_current,
    off_the_edges,
    rollout_weights,
    spec_of,
    statistic,
    verl,
)

import drift_kernels as dk

RTOL = 1e-7  # verl adds 1e-8 to counts


@pytest.mark.parametrize("rollout", [("token", 1.2), ("token", "0.8_1.25"), ("sequence", 1.3), ("sequence", "0.7_1.5")])
def test_rollout_correction_weights(rollout):
    """Ours is their factor, token by token (a token's own gradient is its factor times that of −logp)."""
    o = Options("gpg", mode="token-sum", rollout=rollout)
    batch = off_the_edges(make_batch(23, 5, 8, True), o)
    weights, metrics = rollout_weights(batch, o)
    assert (weights == rollout[1]).sum() > 0 if isinstance(rollout[1], float) else metrics["rollout_is_oob_ratio"] > 0
    assert_same(batch, lambda b: verl(b, o), spec_of(o), RTOL, old=True, rollout=True)
    mine = ours(batch, spec_of(o), torch.float64, True, old=True, rollout=True).metrics
    factor = float(masked_mean(weights, batch.mask))
    assert mine["sampling/importance_sampling_ratio/mean"] == pytest.approx(factor)
    if rollout[0] == "token":
        assert metrics["rollout_is_mean"] == pytest.approx(factor)


def test_it_fails_where_the_correction_masks_every_token_and_ours_is_zero():
    o, batch = Options("gpg", rollout=("token", "0.8_1.25")), make_batch(38, 2, 4, True)
    batch.rollout[:] = batch.old - 1
    with pytest.raises(ZeroDivisionError):
        verl(batch, o)
    mine = ours(batch, spec_of(o), torch.float64, True, old=True, rollout=True)
    assert not mine.loss.any()
    assert not mine.hidden.any()


def test_batch_normalized_weights_are_a_factor_of_the_denominator_and_of_the_other_terms():
    """Their mean divides the objective: KL and entropy, which it leaves alone, take it into their coefficients."""
    o = Options(rollout=("token", 1.2), batch_normalize=True, kl=("k3", 0.1), entropy_coef=0.05)
    batch = off_the_edges(make_batch(24, 4, 7, True), o)
    mean = rollout_weights(batch, o)[1]["rollout_is_batch_norm_factor"]
    assert not 0.99 < mean < 1.01
    spec = spec_of(o, kl_coef=0.1 * mean, entropy_coef=0.05 * mean)
    assert_same(batch, lambda b: verl(b, o), spec, RTOL, **given_of(batch, o))


@pytest.mark.parametrize("weights", [None, ("token", 1.2), ("sequence", 1.3)])
def test_compute_policy_loss_reinforce(weights):
    """With old_logprobs the current ones, since its weights are current/rollout."""
    o = Options("gpg", mode="seq-mean-token-sum", rollout=weights)
    batch = make_batch(25, 4, 7, True)
    batch = dataclasses.replace(batch, old=batch.logp.float().double())
    batch = off_the_edges(batch, o)
    spec = spec_of(o, aggregation="sequence_mean_token_sum")

    def reinforce(b: Batch):
        logp, mask = logprobs(b.hidden, b.weight, b.targets)[0], b.mask.long()
        factor = None if weights is None else rollout_weights(b, o)[0]
        loss, metrics = core_algos.compute_policy_loss_reinforce(
            b.rollout, logp, b.advantages, mask, config=actor_config(o), rollout_is_weights=factor
        )
        return gradients(loss, b, metrics)

    assert_same(batch, reinforce, spec, RTOL, old=True, rollout=weights is not None)


@st.composite
def rejections(draw: st.DrawFn, kind: str, kinds: tuple[str, ...] = tuple(REJECTIONS)) -> tuple[str, str | float]:
    """`kind`, alone or in a chain with another; each with its threshold, or one for both."""
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    other = pick(None, *(k for k in kinds if k != kind))
    if other is None:
        return kind, pick(REJECTIONS[kind], 1.2 if kind.endswith("k1") else float(REJECTIONS[kind]))
    if kind[-2:] == other[-2:] and pick(False, True):
        return f"{kind},{other}", REJECTIONS[kind]
    return f"{kind},{other}", f"{REJECTIONS[kind]},{REJECTIONS[other]}"


@pytest.mark.parametrize("kind", REJECTIONS)
def test_targets_of_minus_100_are_its_rollout_rejection(kind):
    """Its mask changes the sums, the denominators and the sequences' means alike, and so does ours."""

    @brief
    @given(st.data())
    def check(data):
        pick = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
        rejection = data.draw(rejections(kind))
        whole = "token" not in rejection[0]  # sequences alone: its product over a sequence is over all tokens
        o = Options(
            loss=pick("vanilla", "gspo", "cispo", "sapo", "geo_mean", "dppo_tv", "gpg"),
            mode=pick(*AGGREGATIONS),
            rejection=rejection,
            rollout=pick(None, ("token", 1.2), ("token", "0.7_1.4"), *([("sequence", 1.3)] if whole else [])),
        )
        if o.loss not in ("sapo", "geo_mean") and pick(False, True):
            o = dataclasses.replace(o, kl=("k3", 0.1), entropy_coef=0.05)
        low = {"gspo": 0.05, "dppo_tv": 2e-3}.get(o.loss, 0.2)
        o = dataclasses.replace(o, low=low, high=low)
        batch = off_the_edges(data.draw(batches()), o)
        left = accepted(batch, o)
        expected = batch.mask
        for name, least, most in criteria(rejection):
            value = statistic(name)(batch)
            expected = expected & (value >= least) & (value <= most)
        assert torch.equal(left.mask, expected)
        assume(left.mask.any() and (o.rollout is None or kept(left, o).any()))
        given = given_of(left, o)
        if o.loss == "geo_mean":  # it counts sequences without a token
            given["normalizer"] = float(len(batch.mask))
        peer = lambda b: verl(dataclasses.replace(b, mask=batch.mask), o)  # noqa: E731
        assert_same(
            left, peer, spec_of(o), RTOL, {"ppo_kl": "actor/ppo_kl"} if o.loss != "gpg" else {}, ("ratio",), **given
        )

    check()


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_its_product_over_a_sequence_is_over_tokens_that_it_rejects_too(mode):
    """With targets of -100 ours leaves them out; ours says it by weights of 0 and the denominator."""
    o = Options(mode=mode, rejection=("token_k1", "0.8_1.3"), rollout=("sequence", 3.0))
    batch = off_the_edges(make_batch(39, 4, 8, True), o)
    left = accepted(batch, o)
    assert 0 < left.mask.sum() < batch.mask.sum()
    peer = lambda b: verl(dataclasses.replace(b, mask=batch.mask), o)  # noqa: E731
    assert_differs(left, peer, spec_of(o), **given_of(left, o))
    weights = left.mask.double()
    if mode == "seq-mean-token-mean":  # ours divides by all of a sequence's tokens
        weights = weights * batch.mask.sum(-1, keepdim=True) / left.mask.sum(-1, keepdim=True).clamp(min=1)
    assert_same(batch, peer, spec_of(o), RTOL, **given_of(left, o), token_weights=weights)


@st.composite
def bypassed(draw: st.DrawFn, loss_type: str, rollout: tuple[str, float | str] | None) -> tuple[Batch, Options]:
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    whole = tuple(kind for kind in REJECTIONS if kind.startswith("seq"))
    kinds = whole if rollout is not None and rollout[0] == "sequence" else tuple(REJECTIONS)
    o = Options(
        "bypass_mode",
        mode=pick(*AGGREGATIONS),
        c=pick(1.5, 3.0),
        info=pick({}, {"dp_size": 2, "batch_num_tokens": 77, "global_batch_size": 12, "loss_scale_factor": 16}),
        bypass=loss_type,
        rollout=rollout,
        batch_normalize=pick(False, True),
        rejection=draw(rejections(pick(*kinds), kinds)) if pick(False, True) else None,
    )
    return off_the_edges(draw(batches()), o), o


@pytest.mark.parametrize(
    "rollout", [None, ("token", 1.2), ("token", "0.8_1.25"), ("sequence", 1.3), ("sequence", "0.7_1.5")]
)
@pytest.mark.parametrize("loss_type", ["ppo_clip", "reinforce"])
def test_bypass_mode(loss_type, rollout):
    """Its old log-probs are the sampler's: ppo_clip is the clipped loss, and reinforce takes its weights from the current policy.

    Token weights up to c are CISPO. Others are reinforce with a correction, which reads the current log-probs as `old`: they
    have to be there before, from `linear_logprob`.
    """

    @bounded
    @given(bypassed(loss_type, rollout))
    def check(case):
        batch, o = case
        left, names = accepted(batch, o), {"ppo_kl": "actor/ppo_kl"}
        now = of_current(batch)
        assume(left.mask.any() and (rollout is None or kept(now, o).any()))
        plain = dataclasses.replace(o, loss="vanilla" if loss_type == "ppo_clip" else "gpg", rollout=None)
        spec, given, mine = spec_of(plain), {"old": True, "normalizer": normalizer(left, o)}, left
        if loss_type == "reinforce" and rollout == ("token", 1.2):
            spec = dk.PolicySpec(objective="cispo", clip_low=None, clip_high=0.2, aggregation=AGGREGATIONS[o.mode])
        elif loss_type == "reinforce" and rollout is not None:
            spec, names = spec_of(dataclasses.replace(plain, rollout=rollout)), {}
            mine, given = dataclasses.replace(now, mask=left.mask), given | {"rollout": True}
        if loss_type == "reinforce" and rollout is not None and o.batch_normalize:  # the mean before the rejection
            given["normalizer"] *= corrected(now, o)[2]["rollout_corr/rollout_is_batch_norm_factor"]
        peer = lambda b: verl(dataclasses.replace(b, mask=batch.mask, old=batch.old.to(b.old)), o)  # noqa: E731
        assert_same(mine, peer, spec, RTOL, names, ("ratio",), **given)

    check()


def test_bypass_mode_clips_unless_told_otherwise():
    assert RolloutCorrectionConfig.loss_type == "ppo_clip"
    assert RolloutCorrectionConfig.rollout_is == "sequence"
