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
    make_batch,
    masked_mean,
    ours,
    ratio,
    settle,
)
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
    actor_config,
    covariances,
    given_of,
    kept,
    normalizer,
    off_the_edges,
    spec_of,
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
        mine = given_of(batch, o)
        assert_same(batch, lambda b: verl(b, o), spec_of(o), RTOL, outputs=("kl",), **mine)
        kl = ours(batch, spec_of(o), torch.float64, True, outputs=("kl",), **mine).metrics["kl"]
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


def test_its_gspo_caps_the_log_ratio_at_10_and_ours_at_20():
    o, batch = Options("gspo", mode="token-mean"), make_batch(30, 1, 3, False)
    batch.advantages[:] = -1.0
    batch.old[:] = batch.logp.float() - 15.0
    mine, theirs = assert_differs(batch, lambda b: verl(b, o), dk.PolicySpec(ratio="sequence_token"), old=True)
    assert theirs == pytest.approx(float(torch.tensor(10.0).exp()))
    assert mine == pytest.approx(float(torch.tensor(15.0).exp()), rel=1e-5)


@pytest.mark.parametrize("loss", ["vanilla", "cispo", "sapo", "dppo_tv"])
def test_it_clamps_log_ratios_at_20_as_ours_does(loss):
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
            out = dk.linear_logprob(
                x.hidden, dk.Head(x.weight, temperature=temperature), x.targets, entropy_gradient=True
            )
            logp, entropy = out.logprobs, out.entropy
        loss = (logp * x.ref).sum() + (entropy * x.old).sum()
        found.append((logp.detach(), entropy.detach(), *torch.autograd.grad(loss, (x.hidden, x.weight))))
    for a, b in zip(*found):
        torch.testing.assert_close(a.to(b.dtype), b, rtol=1e-5, atol=1e-5)  # it computes in fp32 whatever it gets


def cut(batch: Batch, rows: slice) -> Batch:
    """Some of its sequences."""
    return Batch(**{n: v if n in ("weight", "workspace") else v[rows] for n, v in vars(batch).items()})
