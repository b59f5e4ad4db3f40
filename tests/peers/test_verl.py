"""Every policy loss of verl, its aggregation, KL penalties and rollout correction, against `policy_loss`."""

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
    compared,
    gradients,
    logprobs,
    make_batch,
    masked_mean,
    ours,
    ratio,
    settle,
)
from verl.trainer.config.algorithm import RolloutCorrectionConfig
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.rollout_corr_helper import SUPPORTED_ROLLOUT_RS_OPTIONS, compute_rollout_correction_weights
from verl.utils.experimental.torch_functional import FusedLinearForPPO
from verl.workers.config import ActorConfig, PolicyLossConfig
from verl_peer import (
    AGGREGATIONS,
    ESTIMATORS,
    LOSSES,
    REJECTIONS,
    Options,
    accepted,
    actor_config,
    corrected,
    covariances,
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
    widest_gap,
)

import drift_kernels as dk
from drift_kernels.spec import PRESETS

RTOL = 1e-7  # verl adds 1e-8 to counts
PPO_KL = [n for n in LOSSES if n not in ("gpg", "kl_cov")]
COUNTS_CLIPPED = ("vanilla", "dppo_tv", "dppo_kl", "gspo", "cispo")


@st.composite
def cases(draw: st.DrawFn, loss: str) -> tuple[Batch, Options]:
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    if loss in ("dppo_tv", "dppo_kl"):  # of divergences, which are small here
        unit = 1e-3 if loss == "dppo_tv" else 1e-4
        low, high = unit * pick(2, 10), unit * pick(5, 20)
    else:
        low, high = (pick(0.03, 0.1), pick(0.03, 0.1)) if loss == "gspo" else (pick(0.1, 0.2), pick(0.2, 0.28))
    level = pick(*AGGREGATIONS)
    info = pick({}, {"dp_size": 2, "batch_num_tokens": 77, "global_batch_size": 12, "loss_scale_factor": 16})
    weighed = loss not in ("dro", "clip_cov", "kl_cov")
    rollout = pick(None, ("token", 1.2), ("token", "0.8_1.25"), ("sequence", 1.3), ("sequence", "0.7_1.5"))
    terms = pick(False, True) and (rollout is None or weighed) and loss not in ("sapo", "geo_mean")
    o = Options(
        loss=loss,
        mode=level,
        low=low,
        high=high,
        c=pick(1.5, 3.0),
        tau=pick((1.0, 1.05), (0.5, 2.0)),
        policy_loss={"dro_beta": pick(0.1, 0.7)} if loss == "dro" else {},
        info=info if loss != "geo_mean" else {},
        rollout=rollout,
        batch_normalize=rollout is not None and not terms and loss != "geo_mean" and pick(False, True),
        kl=("k3", 0.1) if terms else None,
        entropy_coef=0.05 if terms else 0.0,
    )
    batch = off_the_edges(draw(batches()), o)
    assume(o.rollout is None or kept(batch, o).any())
    covariance = covariances(batch).sort().values if loss.endswith("cov") else torch.empty(0)
    half = len(covariance) // 2
    if loss == "clip_cov":  # every candidate is picked
        between = {"clip_cov_lb": widest_gap(covariance[: half + 1]), "clip_cov_ub": float(covariance[-1]) + 1}
        o = dataclasses.replace(o, policy_loss={"clip_cov_ratio": 1.0, **between})
    if loss == "kl_cov":
        share = float((covariance > widest_gap(covariance)).sum() + 0.5) / (len(covariance) + 0.5)
        o = dataclasses.replace(o, policy_loss={"kl_cov_ratio": share, "ppo_kl_coef": pick(0.1, 1.0)})
    return batch, o


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss(loss):
    @bounded
    @given(cases(loss))
    def check(case):
        batch, o = case
        names = {"ppo_kl": "actor/ppo_kl"} if loss in PPO_KL else {}
        counts_zeros = loss not in ("vanilla", "gspo") and not batch.advantages.all()  # ours counts no token of A = 0
        if loss in COUNTS_CLIPPED and not counts_zeros and (o.rollout is None or isinstance(o.rollout[1], float)):
            names |= {"clip_ratio/region_mean": "actor/pg_clipfrac"}
        assert_same(batch, lambda b: verl(b, o), spec_of(o), RTOL, names, outputs=("ratio",), **given_of(batch, o))

    check()


@pytest.mark.parametrize("mode", AGGREGATIONS)
@pytest.mark.parametrize(
    "info",
    [
        {},
        {"dp_size": 4, "batch_num_tokens": 100, "global_batch_size": 16, "loss_scale_factor": 32},
        {"loss_scale_factor": 3},
    ],
)
def test_agg_loss_in_all_its_modes(mode, info):
    """Our denominators, too: without global numbers its are ours, and `normalizer` says the rest."""
    o = Options("gpg", mode=mode, info=info)
    batch = make_batch(21, 4, 7, True)
    batch.mask[2] = False  # neither counts a sequence without trained tokens
    assert_same(batch, lambda b: verl(b, o), spec_of(o), RTOL, normalizer=normalizer(batch, o))
    if not info and not mode.endswith("norm"):
        assert_same(batch, lambda b: verl(b, o), spec_of(o), RTOL)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_kl_penalty_by_every_estimator(name):
    @brief
    @given(
        batches(), st.sampled_from(["vanilla", "gpg"]), st.sampled_from([0.05, 0.3]), st.sampled_from([*AGGREGATIONS])
    )
    def check(batch, loss, coef, mode):
        o = Options(loss, mode=mode, kl=(name, coef))
        batch = off_the_edges(batch, o)
        mine = given_of(batch, o) | {"outputs": ("kl",)}
        assert_same(batch, lambda b: verl(b, o), spec_of(o), RTOL, **mine)
        kl = ours(batch, spec_of(o), torch.float64, True, **mine).metrics["kl"]
        assert kl == pytest.approx(float(masked_mean(core_algos.kl_penalty(batch.logp, batch.ref, name), batch.mask)))

    check()


def test_every_name_it_knows_is_compared():
    assert set(core_algos.POLICY_LOSS_REGISTRY) == {*LOSSES, "bypass_mode"}
    assert compared(core_algos.agg_loss, "loss_agg_mode") == set(AGGREGATIONS)
    estimators = compared(core_algos.kl_penalty_forward, "kl_penalty") - {"full"}  # which raises NotImplementedError
    assert {name.rstrip("+") for name in ESTIMATORS} == estimators
    assert set(ESTIMATORS) == estimators | {f"{name}+" for name in estimators}
    assert set(REJECTIONS) == SUPPORTED_ROLLOUT_RS_OPTIONS
    assert compared(compute_rollout_correction_weights, "rollout_is") == {"token", "sequence"}
    assert compared(core_algos.compute_policy_loss_bypass_mode, "loss_type") == {"reinforce", "ppo_clip"}


def test_it_has_neither_vespo_nor_luspo():
    assert not {"vespo", "luspo"} & set(core_algos.POLICY_LOSS_REGISTRY)
    assert {"vespo", "luspo"} < set(PRESETS)


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


def test_its_product_over_a_sequence_is_over_tokens_that_it_rejects_too():
    """With targets of -100 ours leaves them out; ours says it by weights of 0 and the denominator."""
    o = Options(rejection=("token_k1", "0.8_1.3"), rollout=("sequence", 3.0))
    batch = off_the_edges(make_batch(39, 4, 8, True), o)
    left = accepted(batch, o)
    assert 0 < left.mask.sum() < batch.mask.sum()
    peer = lambda b: verl(dataclasses.replace(b, mask=batch.mask), o)  # noqa: E731
    assert_differs(left, peer, spec_of(o), old=True, rollout=True)
    weights, tokens = left.mask.double(), float(left.mask.sum())
    assert_same(batch, peer, spec_of(o), RTOL, old=True, rollout=True, token_weights=weights, normalizer=tokens)


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


def test_clip_cov_drops_the_tokens_that_the_generator_picks(monkeypatch):
    batch = settle(make_batch(26, 6, 9, True, holes=0.0), "old", (ratio, (0.8, 1.2)))
    low = widest_gap(covariances(batch).sort().values[: int(batch.mask.sum()) // 2])
    o = Options("clip_cov", policy_loss={"clip_cov_ratio": 0.2, "clip_cov_lb": low, "clip_cov_ub": 99.0})
    noise = torch.rand(batch.mask.numel(), generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    a, r = batch.advantages[batch.mask], ratio(batch)[batch.mask]
    unclipped = torch.where(a > 0, r <= 1.2, r >= 0.8)
    candidates = noise[batch.mask.reshape(-1)][(covariances(batch) > low) & unclipped]
    count = int(0.2 * int(batch.mask.sum()))
    assert 1 < count < len(candidates)
    monkeypatch.setattr(torch, "randperm", lambda n: candidates.argsort() if n == len(candidates) else None)
    theirs = verl(batch.to(torch.float64), o)
    generator = torch.Generator().manual_seed(7)
    mine = ours(batch, spec_of(o), torch.float64, False, old=True, generator=generator)
    for x, y in zip(mine.flat(), theirs.flat()):
        torch.testing.assert_close(x, y, rtol=RTOL, atol=RTOL)
    assert theirs.metrics["actor/pg_clipfrac"] == pytest.approx(count / int(batch.mask.sum()))


# What verl does, and where it differs from TRL or from us.


def test_its_defaults_and_ours():
    config = actor_config(Options())
    assert ActorConfig.clip_ratio_c == config.get("clip_ratio_c", 20.0) == 3.0  # so dppo's 20 is never reached
    assert (ActorConfig.tau_pos, ActorConfig.tau_neg) == dk.PolicySpec.preset("sapo").sapo_temperatures
    assert dk.PolicySpec.preset("ppo").dual_clip is None
    assert dk.PolicySpec.preset("dppo_tv").delta == 20.0
    cov, kl_cov = dk.PolicySpec.preset("clip_cov"), dk.PolicySpec.preset("kl_cov")
    assert (PolicyLossConfig.clip_cov_ratio, PolicyLossConfig.kl_cov_ratio) == (cov.cov_share, kl_cov.cov_share)
    assert (PolicyLossConfig.clip_cov_lb, PolicyLossConfig.clip_cov_ub) == cov.cov_bounds
    assert PolicyLossConfig.ppo_kl_coef == 0.1 != kl_cov.cov_kl_coef  # the paper's is 1


def test_its_vanilla_has_the_dual_clip_on_and_delta_is_another_name_for_it():
    o = Options()
    batch = make_batch(27, 4, 8, True)
    batch.old[:, 0] = batch.logp[:, 0].float() - 1.5  # ratio 4.5
    batch.advantages[:, 0] = -1.0
    batch.mask[:, 0] = True
    batch = off_the_edges(batch, o)
    assert_differs(batch, lambda b: verl(b, o), dk.PolicySpec(), old=True)
    for spec in (dk.PolicySpec(dual_clip=3.0), dk.PolicySpec(delta=3.0)):
        assert_same(batch, lambda b: verl(b, o), spec, RTOL, old=True)


def test_its_cispo_clips_at_1_plus_epsilon_on_both_sides():
    o = Options("cispo")
    batch = off_the_edges(make_batch(28, 4, 8, True), o)
    assert ((ratio(batch) < 0.8) & batch.mask).any()
    assert_same(batch, lambda b: verl(b, o), dk.PolicySpec.preset("cispo"), RTOL, old=True)
    assert_differs(batch, lambda b: verl(b, o), dk.PolicySpec(objective="cispo", clip_low=None), old=True)


def test_its_gspo_is_gspo_token_and_equals_gspo_for_one_advantage_a_sequence():
    o = Options("gspo", mode="seq-mean-token-mean", low=0.03, high=0.05)
    batch = off_the_edges(make_batch(29, 4, 8, False), o)
    for name in ("gspo_token", "gspo"):
        spec = dk.PolicySpec.preset(name, clip_low=0.03, clip_high=0.05)
        assert_same(batch, lambda b: verl(b, o), spec, RTOL, old=True)
    batch = off_the_edges(make_batch(29, 4, 8, True), o)
    exact, mine = verl(batch.to(torch.float64), o), ours(batch, spec, torch.float64, True, old=True)
    torch.testing.assert_close(mine.loss, exact.loss, rtol=RTOL, atol=RTOL)
    assert not torch.allclose(mine.hidden, exact.hidden, rtol=1e-3)


def test_its_gspo_caps_the_log_ratio_at_10_and_leftat_20():
    o, batch = Options("gspo", mode="token-mean"), make_batch(30, 1, 3, False)
    batch.advantages[:] = -1.0
    batch.old[:] = batch.logp.float() - 15.0
    mine, theirs = assert_differs(batch, lambda b: verl(b, o), dk.PolicySpec(ratio="sequence_token"), old=True)
    assert theirs == pytest.approx(float(torch.tensor(10.0).exp()))
    assert mine == pytest.approx(float(torch.tensor(15.0).exp()), rel=1e-5)


@pytest.mark.parametrize("loss", ["vanilla", "cispo", "sapo", "dppo_tv"])
def test_it_clamps_log_ratios_at_20_as_leftdoes(loss):
    o, batch = Options(loss, c=1e12, high=1e12, low=0.5), make_batch(31, 2, 4, False)
    batch.advantages[:] = torch.tensor([1.0, -1.0])
    batch.old[:] = batch.logp.float() - torch.tensor([[25.0], [30.0]])
    assert_same(batch, lambda b: verl(b, o), spec_of(o), RTOL, old=True)


@pytest.mark.parametrize("loss", ["clip_cov", "kl_cov"])
def test_its_covariance_losses_do_not_clamp_and_ours_do(loss):
    o, batch = Options(loss, policy_loss={"clip_cov_lb": 98.0, "clip_cov_ub": 99.0}), make_batch(32, 2, 3, False)
    if loss == "kl_cov":
        o = Options(loss, policy_loss={"ppo_kl_coef": 0.0})
    batch.advantages[:] = -1.0
    batch.old[:] = batch.logp.float() - 25.0
    mine, theirs = assert_differs(batch, lambda b: verl(b, o), spec_of(o), old=True)
    assert mine == pytest.approx(float(torch.tensor(20.0).exp()), rel=1e-5)
    assert theirs == pytest.approx(float(torch.tensor(25.0).exp()), rel=1e-5)


def test_its_kl_cov_logs_the_mean_size_of_log_ratios_as_ppo_kl():
    o, batch = Options("kl_cov"), make_batch(33, 3, 6, True)
    theirs = verl(batch.to(torch.float64), o).metrics["actor/ppo_kl"]
    assert theirs == pytest.approx(float(masked_mean((batch.logp - batch.old).abs(), batch.mask)))
    mine = ours(batch, spec_of(o), torch.float64, False, old=True, outputs=("ratio",)).metrics["ppo_kl"]
    assert mine == pytest.approx(float(masked_mean(batch.old - batch.logp, batch.mask)))


def test_its_k3_stops_at_10_with_no_gradient_and_ours_goes_on():
    o, batch = Options("gpg", kl=("k3", 1.0)), make_batch(34, 1, 3, False)
    batch.advantages[:] = 0.0
    batch.ref[:] = batch.logp.float() + 4.0  # e⁴ − 5 = 49.6
    mine, theirs = assert_differs(batch, lambda b: verl(b, o), spec_of(o), ref=True)
    assert theirs == pytest.approx(10.0)
    assert mine == pytest.approx(float(torch.tensor(4.0).exp()) - 5, rel=1e-5)
    assert not verl(batch.to(torch.float64), o).hidden.any()
    assert ours(batch, spec_of(o), torch.float64, False, ref=True).hidden.any()


def test_its_geo_mean_ignores_the_aggregation_and_the_global_denominator():
    """So the loss depends on how a batch is split: halves do not add up to the whole. Ours do."""
    o = Options("geo_mean", info={"dp_size": 1, "global_batch_size": 4, "batch_num_tokens": 20}, low=0.1, high=0.1)
    batch = off_the_edges(make_batch(35, 4, 8, True), o)
    whole = verl(batch.to(torch.float64), o).loss
    for mode in AGGREGATIONS:
        torch.testing.assert_close(verl(batch.to(torch.float64), dataclasses.replace(o, mode=mode)).loss, whole)
    halves = [cut(batch, slice(0, 2)), cut(batch, slice(2, 4))]
    torch.testing.assert_close(sum(verl(half.to(torch.float64), o).loss for half in halves), 2 * whole)
    parts = [ours(half, spec_of(o), torch.float64, True, old=True, normalizer=4.0).loss for half in halves]
    torch.testing.assert_close(sum(parts), whole, rtol=RTOL, atol=RTOL)


def test_its_sapo_ignores_the_aggregation_asked_for():
    """The one it takes is the paper's, and our preset's."""
    o = Options("sapo", mode="token-sum")
    assert dk.PolicySpec.preset("sapo").aggregation == "sequence_mean_token_mean"
    batch = make_batch(36, 4, 8, True)
    assert_differs(batch, lambda b: verl(b, o), spec_of(o, aggregation="token_sum"), old=True)
    assert_same(batch, lambda b: verl(b, o), spec_of(o, aggregation="sequence_mean_token_mean"), RTOL, old=True)


def test_its_correction_of_dro_and_covariance_losses_weighs_their_penalties_too():
    """So does ours, which then refuses terms that must not be weighed."""
    for loss in ("dro", "kl_cov", "clip_cov"):
        settings = {"dro_beta": 0.5} if loss == "dro" else {}
        o = Options(loss, rollout=("token", 1.2), policy_loss=settings)
        with pytest.raises(ValueError, match="second call"):
            spec_of(o, kl_coef=0.1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_fused_linear_for_ppo(dtype, temperature):
    """Log-probs and entropies, and their gradients, of verl's own fused head."""
    batch = make_batch(37, 3, 9, True)
    found = []
    for fused in (True, False):
        x = batch.to(dtype)
        if fused:
            logp, entropy = FusedLinearForPPO(chunk_size=4)(x.hidden, x.weight, x.targets, temperature)
        else:
            out = dk.linear_logprob(x.hidden, x.weight, x.targets, return_entropy=True, temperature=temperature)
            logp, entropy = out.logprobs, out.entropy
        loss = (logp * x.ref).sum() + (entropy * x.old).sum()
        found.append((logp.detach(), entropy.detach(), *torch.autograd.grad(loss, (x.hidden, x.weight))))
    for a, b in zip(*found):
        torch.testing.assert_close(a.to(b.dtype), b, rtol=1e-5, atol=1e-5)  # it computes in fp32 whatever it gets


def cut(batch: Batch, rows: slice) -> Batch:
    """Some of its sequences."""
    return Batch(**{n: v if n in ("weight", "workspace") else v[rows] for n, v in vars(batch).items()})
