"""Every loss of TRL's GRPOTrainer against `policy_loss`: values, gradients and metrics, over random options."""

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
    compared,
    importance,
    logprobs,
    make_batch,
    masked_mean,
    of_level,
    ours,
    ratio,
    settle,
)
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl_peer import (
    CLIPPED,
    LOSSES,
    Options,
    clear_of_entropy,
    given_of,
    high_entropy,
    importance_sampling_ratio,
    off_the_edges,
    rloo,
    spec_of,
    trl,
    with_its_entropy_bonus,
)

import drift_kernels as dk

MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
MASKS = MODES[1::2]
CLIP_METRICS = {f"clip_ratio/{side}_mean": f"clip_ratio/{side}_mean" for side in ("low", "high", "region")}
DEFAULTS = {field.name: field.default for field in dataclasses.fields(GRPOConfig)}


@st.composite
def cases(draw: st.DrawFn, loss_type: str, level: str) -> tuple[Batch, Options]:
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    narrow = level == "sequence"  # a mean of log-ratios moves less
    high = pick(1.02, 1.3, 5.0) if loss_type == "cispo" else pick(*((0.03, 0.1) if narrow else (0.2, 0.28, 0.5)))
    mode = pick(None, *(MODES[:2] if loss_type == "vespo" else MODES))
    beta = pick(0.0, 0.07)
    old = mode is not None or pick(True, True, False)
    quantile = pick(1.0, 1.0, 0.65, 0.35)
    bonus = loss_type not in ("grpo", "sapo") and (beta == 0 or quantile == 1)  # else two calls: see below
    o = Options(
        loss_type=loss_type,
        importance_sampling_level=level,
        epsilon=pick(*((0.03, 0.1) if narrow else (0.1, 0.2))),
        epsilon_high=high,
        delta=pick(None, 1.6) if loss_type in CLIPPED else None,
        beta=beta,
        use_bias_correction_kl=pick(False, True) if beta else False,
        off_policy_mask_threshold=pick(None, 0.02) if old else None,
        sapo=pick((1.0, 1.0625), (0.5, 2.0)),  # TRL makes fp32 numbers of them, whatever it computes in
        vespo=pick((2.0, 3.0, 3.0, 2.0), (1.0, 1.5, 0.5, 0.75)),
        mode=mode,
        clip=pick((None, 3.0), (None, 1.2), (0.8, 1.25), (0.7, None)),
        entropy_coef=pick(0.0, 0.05) if bonus else 0.0,
        top_entropy_quantile=quantile,
        old=old,
        tool_mask=pick(False, True),
        items=pick(None, 37.0),
        horizon=pick(None, 64),
        accumulation=pick(1, 1, 4),
        steps=pick(None, 2),
        training=pick(True, True, False),
    )
    batch = off_the_edges(draw(batches()), o)
    return batch, o if clear_of_entropy(batch, o) else dataclasses.replace(o, top_entropy_quantile=1.0)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss(loss_type, level):
    if loss_type == "vespo" and level == "sequence":
        with pytest.raises(ValueError, match="ratio"):  # TRL warns, and ignores the level
            dk.PolicySpec(objective="vespo", ratio="sequence")
        return

    @bounded
    @given(cases(loss_type, level))
    def check(case):
        batch, o = case
        outputs = ("entropy", "kl") if o.beta else ("entropy",)
        names = {name: name for name in outputs}
        if loss_type in CLIPPED and level == "token" and o.mode not in MASKS and o.top_entropy_quantile == 1:
            names |= CLIP_METRICS
        spec, given = with_its_entropy_bonus(spec_of(o), batch, o), given_of(batch, o)
        mine, peer = batch, lambda b: trl(b, o)
        if o.top_entropy_quantile < 1:
            kept = high_entropy(batch, o)
            if o.beta:  # KL stays on every token
                a = batch.advantages if batch.advantages.dim() == 2 else batch.advantages[:, None]
                mine = dataclasses.replace(batch, advantages=a * kept)
                peer = lambda b: trl(dataclasses.replace(b, advantages=batch.advantages.to(b.old.dtype)), o)  # noqa: E731
            else:
                given |= {"token_weights": kept.double()}
        assert_same(mine, peer, spec, metrics=names, outputs=outputs, **given)

    check()


@pytest.mark.parametrize(
    ("preset", "options", "changes"),
    [
        ("grpo", Options("grpo"), {}),
        ("bnpo", Options("bnpo"), {}),
        ("ppo", Options("bnpo"), {}),
        ("dapo", Options("dapo", epsilon_high=0.28), {}),
        ("dr_grpo", Options("dr_grpo"), {}),
        ("gspo", Options("grpo", "sequence", epsilon=3e-4, epsilon_high=4e-4), {}),
        ("luspo", Options("luspo", "sequence", epsilon=3e-4, epsilon_high=4e-4), {}),
        ("sapo", Options("sapo"), {}),
        ("vespo", Options("vespo"), {}),
        ("gmpo", Options("gmpo", "sequence", epsilon=0.4, epsilon_high=0.4), {}),
        ("cispo", Options("cispo", epsilon_high=1.2), {"clip_low": None}),
        ("reinforce", Options("cispo", epsilon_high=1.0, old=False), {}),  # it has no loss of that name
        ("gpg", Options("cispo", epsilon_high=1.0, old=False), {}),
    ],
)
def test_presets_are_its_losses(preset, options, changes):
    batch = off_the_edges(make_batch(3, 4, 8, False), options)
    spec = dk.PolicySpec.preset(preset, **changes)
    rtol = 1e-7 if preset == "sapo" else 1e-10  # 1.05 is an fp32 number in TRL
    assert_same(batch, lambda b: trl(b, options), spec, rtol, **given_of(batch, options))


def test_every_name_it_knows_is_compared():
    assert compared(GRPOTrainer._compute_loss, "self.loss_type") == set(LOSSES)
    assert compared(GRPOTrainer._compute_loss, "self.importance_sampling_level") == {"token", "sequence"}
    generation = GRPOTrainer._generate_and_score_completions
    assert compared(generation, "self.vllm_importance_sampling_mode") == set(MODES)


@bounded
@given(st.data())
def test_its_gmpo_trainer(data):
    pick = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    beta = pick(0.0, 0.07)
    o = Options(
        "gmpo",
        "sequence",
        epsilon=pick(0.1, 0.4),
        epsilon_high=pick(0.1, 0.4),
        beta=beta,
        top_entropy_quantile=1.0 if beta else pick(1.0, 0.65),
        old=pick(True, True, False),
        tool_mask=pick(False, True),
        accumulation=pick(1, 4),
        training=pick(True, False),
    )
    batch = off_the_edges(data.draw(batches(per_token=False)), o)
    names, kept, peer = CLIP_METRICS | {"entropy": "entropy"}, batch, lambda b: trl(b, o)
    if o.top_entropy_quantile < 1:  # here it takes tokens out of the mean, as a target of -100 does
        assume(clear_of_entropy(batch, o))
        kept, names = dataclasses.replace(batch, mask=high_entropy(batch, o)), {}
        assume(kept.mask.any(-1).all())  # without a token its loss is a constant
        peer = lambda b: trl(dataclasses.replace(b, mask=batch.mask), o)  # noqa: E731
    assert_same(kept, peer, spec_of(o), metrics=names, outputs=("entropy",), **given_of(batch, o))


def test_high_entropy_tokens_with_kl_and_a_bonus_take_two_calls():
    """top_entropy_quantile leaves KL on every token, and the bonus on the others alone: one call has one set of weights."""
    o = Options("bnpo", top_entropy_quantile=0.35, beta=0.1, entropy_coef=0.05)
    batch = off_the_edges(make_batch(5, 4, 8, True), o)
    kept = high_entropy(batch, o)
    assert clear_of_entropy(batch, o)
    assert 0 < kept.sum() < batch.mask.sum()
    mine = dataclasses.replace(batch, advantages=batch.advantages * kept)
    policy = ours(mine, dk.PolicySpec(kl_coef=0.1), torch.float64, False, old=True, ref=True)
    silent = dataclasses.replace(batch, advantages=torch.zeros_like(batch.advantages))
    bonus = ours(
        silent, dk.PolicySpec(entropy_coef=0.05), torch.float64, False, token_weights=kept, normalizer=kept.sum()
    )
    for x, y, z in zip(policy.flat(), bonus.flat(), trl(batch.to(torch.float64), o).flat()):
        torch.testing.assert_close(x + y, z)


# What TRL does, and where it differs from verl or from us.


def test_its_rollout_correction_masks_sequences_of_a_product_above_3():
    assert DEFAULTS["vllm_importance_sampling_mode"] == "sequence_mask"
    assert (DEFAULTS["vllm_importance_sampling_clip_min"], DEFAULTS["vllm_importance_sampling_clip_max"]) == (None, 3.0)
    old = torch.tensor([[-1.0, -1.0, -1.0], [-1.0, -1.0, -1.0]], dtype=torch.float64)
    rollout = old - torch.tensor(
        [[0.3], [0.4]], dtype=torch.float64
    )  # products e^0.9 = 2.46, e^1.2 = 3.32; means 1.35, 1.49
    factor = importance_sampling_ratio(old, rollout, torch.ones_like(old), "sequence_mask", (None, 3.0))
    torch.testing.assert_close(factor, torch.tensor([[2.4596031111569494], [0.0]], dtype=torch.float64))


def test_its_gspo_ratio_is_a_mean_of_log_ratios():
    o = Options("grpo", "sequence", epsilon=0.9, epsilon_high=9.0)
    batch = make_batch(6, 3, 7, False)
    expected = (-masked_mean(batch.logp - batch.old, batch.mask, -1).exp()[:, 0] * batch.advantages).mean()
    torch.testing.assert_close(trl(batch.to(torch.float64), o).loss, expected)


@pytest.mark.parametrize("cap", [1.2, 5.0])
def test_its_cispo_caps_the_ratio_at_epsilon_high_itself(cap):
    batch = settle(make_batch(7, 3, 8, False), "old", (ratio, (cap, 2.2)))
    batch.old[0] = batch.logp[0].float() - 0.7
    o = Options("cispo", epsilon_high=cap)
    assert_same(
        batch, lambda b: trl(b, o), dk.PolicySpec(objective="cispo", clip_low=None, clip_high=cap - 1), old=True
    )
    if cap == 1.2:  # not 1 + ε, as in verl and in the paper's notation
        assert_differs(
            batch, lambda b: trl(b, o), dk.PolicySpec(objective="cispo", clip_low=None, clip_high=cap), old=True
        )


def test_its_default_epsilon_would_cap_cispo_at_one_fifth():
    """Ours cannot say that: a cap below 1 would scale even on-policy tokens down."""
    assert (DEFAULTS["epsilon"], DEFAULTS["epsilon_high"]) == (0.2, None)
    batch = make_batch(8, 2, 5, False)
    o = Options("cispo", epsilon_high=0.2, old=False)
    on_policy = ours(batch, dk.PolicySpec(objective="cispo"), torch.float64, False).loss
    torch.testing.assert_close(trl(batch.to(torch.float64), o).loss, 0.2 * on_policy)
    with pytest.raises(ValueError, match="clip_high"):
        dk.PolicySpec(objective="cispo", clip_low=None, clip_high=0.2 - 1)


def test_it_counts_clipped_cispo_tokens_of_positive_advantage_alone():
    """Ours counts every token whose ratio the cap holds."""
    o = Options("cispo", epsilon_high=1.1)
    batch = settle(make_batch(9, 4, 9, True), "old", (ratio, (1.1,)))
    above, positive = batch.mask & (ratio(batch) > 1.1), batch.advantages > 0
    assert (above & positive).any()
    assert (above & ~positive).any()
    theirs = trl(batch.to(torch.float64), o).metrics["cispo_clip_ratio"]
    mine = ours(batch, spec_of(o), torch.float64, True, old=True).metrics["clip_ratio/high_mean"]
    assert theirs == pytest.approx(float((above & positive).sum() / batch.mask.sum()), abs=1e-6)
    assert mine == pytest.approx(float(above.sum() / batch.mask.sum()))


def test_it_counts_clipped_sequences_where_ours_counts_their_tokens():
    o = Options("grpo", "sequence", epsilon=0.02, epsilon_high=0.02)
    batch = off_the_edges(make_batch(10, 5, 8, False), o)
    a, r = batch.advantages[:, None], of_level("sequence")(batch)
    clipped = ((r > 1.02) & (a > 0)) | ((r < 0.98) & (a < 0))
    tokens = batch.mask.sum(-1, keepdim=True)
    assert 0 < clipped.sum() < 5
    theirs, mine = trl(batch.to(torch.float64), o), ours(batch, spec_of(o), torch.float64, False, old=True)
    assert theirs.metrics["clip_ratio/region_mean"] == pytest.approx(float(clipped.double().mean()))
    assert mine.metrics["clip_ratio/region_mean"] == pytest.approx(float((clipped * tokens).sum() / tokens.sum()))


def test_it_counts_clipped_tokens_that_the_rollout_correction_masks_and_ours_does_not():
    o = Options("bnpo", mode="token_mask", clip=(0.8, 1.25))
    batch = off_the_edges(make_batch(19, 5, 9, True), o)
    clipped = batch.mask & torch.where(batch.advantages > 0, ratio(batch) > 1.2, ratio(batch) < 0.8)
    kept = clipped & ((importance("token")(batch) - 1.025).abs() < 0.225)
    assert 0 < kept.sum() < clipped.sum()
    theirs = trl(batch.to(torch.float64), o).metrics["clip_ratio/region_mean"]
    mine = ours(batch, spec_of(o), torch.float64, False, old=True, rollout=True).metrics["clip_ratio/region_mean"]
    assert theirs == pytest.approx(float(clipped.sum() / batch.mask.sum()))
    assert mine == pytest.approx(float(kept.sum() / batch.mask.sum()))


def test_its_delta_is_verls_dual_clip():
    """Two names of one bound: delta acts where A < 0 alone, since it exceeds 1 + ε."""
    assert DEFAULTS["delta"] is None
    o = Options("bnpo", delta=1.5)
    batch = settle(make_batch(11, 4, 9, True), "old", (ratio, (0.8, 1.2, 1.5)))
    assert ((ratio(batch) > 1.5) & (batch.advantages < 0) & batch.mask).any()
    for spec in (dk.PolicySpec(delta=1.5), dk.PolicySpec(dual_clip=1.5)):
        assert_same(batch, lambda b: trl(b, o), spec, old=True)


def test_it_has_no_bound_on_a_negative_advantage_without_delta():
    o, batch = Options("bnpo"), make_batch(12, 2, 4, False)
    batch.advantages[:] = -1.0
    batch.old[:] = batch.logp.float() - 3.0
    assert_same(batch, lambda b: trl(b, o), dk.PolicySpec(), old=True)
    torch.testing.assert_close(trl(batch.to(torch.float64), o).loss, masked_mean(ratio(batch), batch.mask))
    assert float(ours(batch, dk.PolicySpec(dual_clip=3.0), torch.float64, False, old=True).loss) == 3.0


def test_it_does_not_clamp_log_ratios_and_ours_does_at_20():
    o, batch = Options("bnpo"), make_batch(13, 1, 3, False)
    batch.advantages[:] = -1.0
    batch.old[:] = batch.logp.float() - 25.0
    mine, theirs = assert_differs(batch, lambda b: trl(b, o), dk.PolicySpec(), old=True)
    assert mine == pytest.approx(torch.tensor(20.0).double().exp().item())
    assert theirs == pytest.approx(torch.tensor(25.0).double().exp().item(), rel=1e-5)


def test_it_counts_sequences_without_a_trained_token_and_ours_does_not():
    """A sequence that is all mask (a truncated completion) still divides TRL's mean."""
    batch = off_the_edges(make_batch(14, 4, 6, False), Options())
    batch.mask[1] = False
    mine, theirs = assert_differs(batch, lambda b: trl(b, Options()), spec_of(Options()), old=True)
    assert mine == pytest.approx(theirs * 4 / 3)
    assert_same(batch, lambda b: trl(b, Options()), spec_of(Options()), old=True, normalizer=4.0)


def test_its_entropy_bonus_is_a_token_mean_whatever_the_loss():
    """So it depends on how a batch is split where the loss does not; ours is aggregated as the loss is."""
    o = Options("dapo", entropy_coef=0.1)
    batch = off_the_edges(make_batch(15, 4, 8, False), o)
    items = float(batch.mask.sum())
    halves = [cut(batch, slice(0, 1)), cut(batch, slice(1, 4))]
    with_items = dataclasses.replace(o, items=items)
    without = dataclasses.replace(with_items, entropy_coef=0.0)
    assert_same(batch, lambda b: trl(b, with_items), spec_of(o), old=True, normalizer=items)
    whole, bare = (trl(batch.to(torch.float64), x).loss for x in (with_items, without))
    torch.testing.assert_close(sum(trl(half.to(torch.float64), without).loss for half in halves), bare)
    # two micro-batches: TRL divides their bonuses by 2, and means of unequal halves are not the mean of the whole
    accumulated = dataclasses.replace(o, items=items, accumulation=2)
    assert not torch.allclose(sum(trl(half.to(torch.float64), accumulated).loss for half in halves), whole, rtol=1e-6)
    parts = [ours(half, spec_of(o), torch.float64, True, old=True, normalizer=items).loss for half in halves]
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("loss_type", ["grpo", "sapo", "dr_grpo", "luspo"])
def test_its_entropy_bonus_is_not_ours_under_other_aggregations(loss_type):
    """Where the loss is a sum over tokens another coefficient makes them the same (test_every_loss); grpo and sapo have none."""
    o = Options(loss_type, entropy_coef=0.1)
    batch = off_the_edges(make_batch(16, 4, 8, False), o)
    theirs = assert_differs(batch, lambda b: trl(b, o), spec_of(o), **given_of(batch, o))[1]
    entropy = float(masked_mean(logprobs(batch.hidden, batch.weight, batch.targets)[1], batch.mask))
    bare = ours(
        batch, dataclasses.replace(spec_of(o), entropy_coef=0.0), torch.float64, False, **given_of(batch, o)
    ).loss
    assert theirs == pytest.approx(float(bare) - 0.1 * entropy)


def test_it_takes_a_missing_rollout_log_prob_as_no_correction_and_ours_as_nan():
    """vLLM leaves NaN where it could not score a token; `rollout = where(isnan, old, rollout)` is TRL's answer."""
    o = Options("dapo", mode="token_truncate")
    batch = off_the_edges(make_batch(17, 3, 7, False), o)
    missing = dataclasses.replace(batch, rollout=batch.rollout.clone())
    missing.rollout[0, batch.lengths[0] - 1] = torch.nan
    assert ours(missing, spec_of(o), torch.float64, False, old=True, rollout=True).loss.isnan()
    filled = dataclasses.replace(missing, rollout=torch.where(missing.rollout.isnan(), batch.old, missing.rollout))
    mine = ours(filled, spec_of(o), torch.float64, False, old=True, rollout=True)
    for a, b in zip(mine.flat(), trl(missing.to(torch.float64), o).flat()):
        torch.testing.assert_close(a, b)


def test_its_kl_is_k3_times_the_ratio_by_default():
    assert DEFAULTS["use_bias_correction_kl"] is True
    o = Options("bnpo", beta=0.3, use_bias_correction_kl=True)
    batch = off_the_edges(make_batch(18, 3, 7, False), o)
    d = batch.logp - batch.ref
    kl = float(masked_mean(((-d).exp() + d - 1) * ratio(batch), batch.mask))
    assert trl(batch.to(torch.float64), o).metrics["kl"] == pytest.approx(kl)
    assert ours(batch, spec_of(o), torch.float64, False, old=True, ref=True, outputs=("kl",)).metrics[
        "kl"
    ] == pytest.approx(kl)


def test_its_rloo_clips_the_product_of_a_sequence_and_ours_has_that_on_policy_alone():
    """There it has the gradient of reinforce, summed over sequences; off-policy ours has a mean of log-ratios or single ones."""
    batch = make_batch(20, 4, 7, False)
    on_policy = dataclasses.replace(batch, old=batch.logp)
    spec = dk.PolicySpec.preset("reinforce", aggregation="sequence_mean_token_sum")
    mine, theirs = ours(on_policy, spec, torch.float64, True), rloo(on_policy.to(torch.float64))
    for a, b in zip(mine.flat()[1:], theirs.flat()[1:]):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(theirs.loss, -batch.advantages.mean())
    product = importance("sequence")(dataclasses.replace(batch, old=batch.logp, rollout=batch.old))[:, 0]
    held = torch.minimum(product * batch.advantages, product.clamp(0.8, 1.2) * batch.advantages)
    assert ((product - 1).abs() > 0.2).any()
    torch.testing.assert_close(rloo(batch.to(torch.float64)).loss, -held.mean())


def cut(batch: Batch, rows: slice) -> Batch:
    """Some of its sequences."""
    made = {n: v[rows] if n not in ("weight", "workspace") else v for n, v in vars(batch).items()}
    return Batch(**made)
