"""The Triton row kernels in the interpreter against float64: every statistic, loss term, option and output type."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from row_oracle import exact, linear, make_rows, outside_is_untouched, per_entry, policy

from drift_kernels.backends import triton as backend
from drift_kernels.backends.contract import Coefs
from drift_kernels.backends.params import POLICY_OUTPUTS, ROW_OUTPUTS
from drift_kernels.calls import HeadOptions
from drift_kernels.formulas import Tokens
from drift_kernels.spec import PolicySpec
from drift_kernels.testing import within_budget

STATISTICS = ("logprobs", "lse", "entropy", "is_top1", "mean_logits", "log_sum_sq_probs")
CAPPED = HeadOptions(softcap=3.0, logit_scale=1.3, temperature=0.6)
HEADS = {
    "plain": {},
    "everything": {"head": CAPPED, "bias": True},
    "per row": {"per_row": True, "head": HeadOptions(logit_scale=0.7)},
    "several": {"several": True, "head": CAPPED, "bias": True, "per_row": True},
}
VOCABS = [1, 2, 127, 1000, 4096, 4099, 9001]
SPECS = {
    "ppo": PolicySpec(),
    "dapo": PolicySpec.preset("dapo"),
    "dual": PolicySpec(dual_clip=1.5),
    "delta": PolicySpec(delta=1.4),
    "cispo": PolicySpec.preset("cispo", clip_low=None, clip_high=0.5),
    "cispo, both": PolicySpec.preset("cispo"),
    "sapo": PolicySpec.preset("sapo"),
    "reinforce": PolicySpec(objective="reinforce"),
    "everything": PolicySpec(kl_coef=0.1, kl_estimator="k3+", entropy_coef=0.05, z_loss_coef=0.01, dual_clip=3.0),
    "dppo_tv": PolicySpec.preset("dppo_tv", clip_low=1e-3, clip_high=2e-3),
    "dppo_kl": PolicySpec.preset("dppo_kl", clip_low=1e-4, clip_high=1e-4, kl_coef=0.1),
    "dppo, capped": PolicySpec(objective="dppo_tv", clip_low=None, clip_high=1.0, delta=2.1),
    "dro": PolicySpec(objective="dro", dro_beta=0.3),
    "gppo": PolicySpec(objective="gppo", gppo_weights=(0.75, 0.9), kl_coef=0.1),
    "unbiased": PolicySpec(kl_coef=0.2, kl_unbiased=True),
    "unbiased k3+": PolicySpec(kl_coef=0.2, kl_unbiased=True, kl_estimator="k3+"),
    "z": PolicySpec(z_loss_coef=0.02),
    "entropy": PolicySpec(entropy_coef=0.2),
    **{f"kl {kind}": PolicySpec(kl_coef=0.3, kl_estimator=kind) for kind in ("k1", "k2", "k3", "abs", "k1+")},
}


def close(name, actual, own, wanted, dtype=torch.float32, scale=None):
    ok, line = within_budget(actual, own, wanted, dtype, scale)
    assert ok, f"{name}: {line}"


def check_statistics(rows, found, names=STATISTICS):
    own, wanted = exact(rows, torch.float32).statistics, exact(rows, torch.float64).statistics
    scale = max(1.0, math.log(rows.x.shape[1]), float(rows.x.abs().max()))
    for name in names:
        actual = per_entry(rows, found[name], name, ROW_OUTPUTS)
        close(name, actual, own[name].detach(), wanted[name].detach(), scale=scale)


def check_policy(rows, spec, dtype=torch.float32):
    out, want = rows.out(dtype), (*STATISTICS, *POLICY_OUTPUTS)
    found, live = backend.fused_policy(rows.x, rows.chunk, spec, Tokens(**rows.entries), want, out=out)
    own, own_gradient = policy(rows, spec, torch.float32)
    wanted, gradient = policy(rows, spec, torch.float64)
    scale = max(1.0, math.log(rows.x.shape[1]), float(rows.x.abs().max()))
    for name in want:
        size = scale if name in STATISTICS else max(1.0, float(wanted[name].abs().max()))
        close(name, per_entry(rows, found[name], name, ROW_OUTPUTS), own[name], wanted[name], scale=size)
    close("gradient", out, own_gradient.to(dtype), gradient, dtype)
    assert outside_is_untouched(out), "wrote outside the rows"
    assert torch.equal(live.bool(), (gradient != 0).any(1) | (out != 0).any(1))


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("head", HEADS)
def test_statistics(vocab, head):
    rows = make_rows(5, vocab, **HEADS[head])
    before = rows.x.clone()
    check_statistics(rows, backend.row_stats(rows.x, rows.chunk, STATISTICS))
    assert torch.equal(rows.x, before), "products stay what they are"


@pytest.mark.parametrize("name", STATISTICS)
def test_each_statistic_by_itself(name):
    rows = make_rows(3, 1000, **HEADS["several"])
    found = backend.row_stats(rows.x, rows.chunk, (name,))
    assert set(found) == {name}
    check_statistics(rows, found, (name,))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("head", HEADS)
def test_policy(spec, head):
    check_policy(make_rows(5, 150, seed=1, **HEADS[head]), SPECS[spec])


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_policy_at_every_size_and_type(vocab, dtype):
    check_policy(make_rows(4, vocab, seed=2, bias=True, head=CAPPED), SPECS["everything"], dtype)


@pytest.mark.parametrize("head", ["plain", "several"])
def test_a_vocabulary_of_more_than_two_to_the_seventeen(head):
    check_policy(make_rows(3, 131_075, seed=3, **HEADS[head]), SPECS["everything"], torch.bfloat16)


@pytest.mark.parametrize("missing", ["advantages", "old", "ref", "weights"])
@pytest.mark.parametrize("head", ["plain", "several"])
def test_what_is_not_given_has_its_default(missing, head):
    rows = make_rows(5, 150, seed=4, **HEADS[head])
    rows.entries[missing] = None
    spec = PolicySpec(kl_coef=0.1 if missing != "ref" else 0.0, entropy_coef=0.05)
    check_policy(rows, spec)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("given", [("coefs",), ("entropy",), ("coefs", "entropy"), ("coefs", "entropy", "lse_coefs")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_from_coefficients(head, given, dtype):
    rows = make_rows(5, 150, seed=5, **HEADS[head])
    g = torch.Generator().manual_seed(0)
    coefs = torch.randn(len(rows.owner), generator=g) if "coefs" in given else None
    entropy_coefs, lse_coefs = (
        torch.randn(5, generator=g) if name in given else None for name in ("entropy", "lse_coefs")
    )
    for values in (entropy_coefs, lse_coefs):
        if values is not None:
            values[3] = 0
    stats = backend.row_stats(rows.x, rows.chunk, ("lse", "entropy"))
    out = rows.out(dtype)
    entropy = None if entropy_coefs is None else stats["entropy"]
    live = backend.grad_logits(
        rows.x, rows.chunk, Coefs(stats["lse"], coefs, entropy_coefs, entropy, lse_coefs), raw=True, out=out
    )
    own, wanted = (linear(rows, coefs, entropy_coefs, lse_coefs, d) for d in (torch.float32, torch.float64))
    close("gradient", out, own.to(dtype), wanted, dtype, scale=max(1.0, float(wanted.abs().max())))
    assert outside_is_untouched(out)
    assert torch.equal(live.bool(), (out != 0).any(1))


def test_gradient_of_logits_equals_that_of_products():
    rows = make_rows(4, 1000, seed=6, head=CAPPED, bias=True)
    lse = backend.row_stats(rows.x, rows.chunk, ("lse",))["lse"]
    coefs = torch.ones(4)
    from_products, from_logits = rows.out(torch.float32), rows.out(torch.float32)
    backend.grad_logits(rows.x, rows.chunk, Coefs(lse, coefs), raw=True, out=from_products)
    z = 0.6**-1 * 3.0 * torch.tanh(1.3 * (rows.x + rows.chunk.bias) / 3.0)
    backend.grad_logits(z, rows.chunk, Coefs(lse, coefs), raw=False, out=from_logits)
    torch.testing.assert_close(from_products, from_logits, rtol=1e-4, atol=1e-6)


def test_a_share_of_the_columns_gives_its_share_of_the_gradient():
    """As a rank of a vocabulary split has it: statistics merged over the shares, targets of other shares past its width."""
    rows = make_rows(5, 301, seed=12, head=CAPPED, bias=True)
    chunk, cuts, g = rows.chunk, (0, 100, 107, 301), torch.Generator().manual_seed(0)
    coefs, entropy_coefs, lse_coefs = (torch.randn(5, generator=g) for _ in range(3))
    shares, parts = [], []
    for first, last in pairwise(cuts):
        here = (chunk.targets >= first) & (chunk.targets < last)
        targets = torch.where(here, chunk.targets - first, torch.where(chunk.targets < 0, -1, last - first))
        share = replace(chunk, targets=targets, bias=chunk.bias[first:last].contiguous())
        shares.append((rows.x[:, first:last], share))
        whole = replace(share, targets=chunk.targets)
        parts.append(backend.partial_stats(rows.x[:, first:last], whole, ("lse", "entropy"), first))
    stats = backend.merge(backend.stack(parts), chunk.targets, None, 301, ("lse", "entropy"))
    out = rows.out(torch.float32)
    for (x, share), (first, last) in zip(shares, pairwise(cuts)):
        terms = Coefs(stats["lse"], coefs, entropy_coefs, stats["entropy"], lse_coefs)
        backend.grad_logits(x, share, terms, raw=True, out=out[:, first:last])
    own, wanted = (linear(rows, coefs, entropy_coefs, lse_coefs, d) for d in (torch.float32, torch.float64))
    close("gradient", out, own, wanted, scale=max(1.0, float(wanted.abs().max())))
    assert outside_is_untouched(out)


def test_a_sure_target_has_no_gradient_and_log_probability_zero():
    rows = make_rows(3, 5000, seed=7)
    rows.chunk.targets.fill_(17)
    rows.x[:, 17] = 200.0
    out = rows.out(torch.float32)
    spec = PolicySpec(objective="reinforce")
    found, _ = backend.fused_policy(rows.x, rows.chunk, spec, Tokens(), ("logprobs",), out=out)
    assert bool((found["logprobs"] == 0).all())
    assert bool((out == 0).all())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("column", [0, 4095, 4096, 4098])
def test_a_nan_or_an_infinity_shows(value, column):
    rows = make_rows(2, 4099, seed=8)
    rows.chunk.targets[:] = 5
    rows.x[0, column] = value
    out = rows.out(torch.bfloat16)
    found, _ = backend.fused_policy(rows.x, rows.chunk, PolicySpec(), Tokens(), ("logprobs", "loss"), out=out)
    assert bool(found["logprobs"][0].isnan())
    assert bool(out[0].isnan().any())
    assert bool(found["logprobs"][1].isfinite())
    assert bool(out[1].isfinite().all())


def test_masked_logits_take_no_part():
    rows = make_rows(2, 4099, seed=9)
    rows.chunk.targets[:] = 5
    rows.x[:, 100:4090] = float("-inf")
    check_statistics(rows, backend.row_stats(rows.x, rows.chunk, STATISTICS), ("logprobs", "lse", "entropy"))


def test_a_target_outside_the_vocabulary_is_nan_and_touches_nothing():
    rows = make_rows(3, 1000, seed=10)
    rows.chunk.targets[:] = torch.tensor([1000, 1 << 40, 3])
    found = backend.row_stats(rows.x, rows.chunk, ("logprobs",))["logprobs"]
    assert found.isnan().tolist() == [True, True, False]


def test_rows_that_nothing_trains_are_zero_whatever_they_hold():
    rows = make_rows(3, 1000, seed=11)
    rows.chunk.targets[:] = torch.tensor([-1, 4, 4])
    rows.x[0] = float("nan")
    rows.entries["weights"][1] = 0
    rows.entries["weights"][2] = 1
    rows.entries["advantages"][2] = 1
    rows.entries["old"] = None
    out = rows.out(torch.bfloat16)
    _, live = backend.fused_policy(rows.x, rows.chunk, PolicySpec(), Tokens(**rows.entries), ("loss",), out=out)
    assert live.tolist() == [0, 0, 1]
    assert bool((out[:2] == 0).all())
    assert bool((out[2] != 0).any())


def test_no_rows_is_no_launch():
    rows = make_rows(1, 100)
    none = backend.Chunk(torch.empty(0, dtype=torch.int64), None, None, None, HeadOptions())
    assert backend.row_stats(rows.x[:0], none, ("lse",))["lse"].shape == (0,)


def test_what_it_cannot_read_raises():
    rows = make_rows(2, 100)
    with pytest.raises(TypeError, match="float32"):
        backend.row_stats(rows.x.double(), rows.chunk, ("lse",))
    with pytest.raises(ValueError, match="out"):
        backend.grad_logits(rows.x, rows.chunk, Coefs(torch.zeros(2)), raw=True, out=torch.zeros(2, 99))
    strided = torch.zeros(4)[::2]
    with pytest.raises(ValueError, match="weights"):
        backend.fused_policy(rows.x, rows.chunk, PolicySpec(), Tokens(weights=strided), ("loss",))
