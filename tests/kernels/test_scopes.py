"""Losses that read whole sequences: how many rows go through which product, and when two passes are one."""

import loose
import pytest
import torch
from count_products import watch_products

import drift_kernels as dk
from drift_kernels import products
from drift_kernels.testing import make_case

D, V = 9, 61
GSPO = dk.PolicySpec.preset("gspo", clip_low=0.05, clip_high=0.05)


@pytest.fixture
def rows_through(monkeypatch):
    return watch_products(monkeypatch)


def workspace(rows):
    return dk.KernelConfig(workspace_bytes=8 * (products.row_stride(V, torch.float64) + 2 * D) * rows)


def run(case, advantages, cu, spec=GSPO, rows=1000, seed=0, **options):
    h, w, _ = case.leaves(torch.float64)
    with torch.no_grad():
        own = dk.linear_logprob(h, w, case.targets).logprobs
    g = torch.Generator().manual_seed(seed)
    old = own + 0.05 * torch.randn(own.shape, generator=g, dtype=torch.float64)
    config = workspace(rows)
    out = loose.policy_loss(
        h, w, case.targets, advantages, old_logprobs=old, cu_seqlens=cu, spec=spec, config=config, **options
    )
    return out, lambda: torch.autograd.grad(out.loss, (h, w))


def test_one_pass_where_a_chunk_holds_whole_sequences(rows_through):
    case = make_case(40, D, V, masked=0.0)
    cu = torch.tensor([0, 11, 12, 30, 40])
    for rows in (1000, 18, 19, 25):  # 18: the longest sequence
        rows_through.update(logits=0)
        run(case, torch.ones(4, dtype=torch.float64), cu, rows=rows)
        assert rows_through["logits"] == 40 + 40  # the other forty are own log-probs in `run`


def test_two_passes_for_the_rows_that_count_where_it_does_not(rows_through):
    case = make_case(40, D, V, masked=0.0)
    cu = torch.tensor([0, 30, 40])
    advantages = torch.tensor([1.0, 1.0], dtype=torch.float64)
    whole = run(case, advantages, cu)[1]()
    rows_through.update(logits=0, dhidden=0)
    pieces = run(case, advantages, cu, rows=10)[1]()
    live = int((pieces[0].abs().sum(1) > 0).sum())
    long_live = int((pieces[0][:30].abs().sum(1) > 0).sum())
    assert rows_through["dhidden"] == live
    assert rows_through["logits"] == 40 + 40 + long_live
    torch.testing.assert_close(pieces, whole, rtol=1e-10, atol=1e-13)


def test_clipped_sequences_reach_no_gradient_product(rows_through):
    case = make_case(40, D, V, masked=0.0)
    tight = dk.PolicySpec.preset("gspo", clip_low=0.0, clip_high=0.0)
    out, grads = run(
        case, torch.tensor([1.0, 1.0, -1.0, 1.0], dtype=torch.float64), torch.tensor([0, 11, 12, 30, 40]), tight
    )
    live = int((grads()[0].abs().sum(1) > 0).sum())
    assert 0 < live < 40
    assert rows_through["dhidden"] == rows_through["dweight"] == live
    assert int(out.metrics["clip_ratio/region_mean"][0]) == 40 - live


def test_sequences_without_advantage_reach_no_product_at_all(rows_through):
    case = make_case(40, D, V, masked=0.0)
    advantages = torch.tensor([0.0, 1.0, 0.0, 2.0], dtype=torch.float64)
    run(case, advantages, torch.tensor([0, 11, 12, 30, 40]))
    assert rows_through["logits"] == 40 + 11


def test_rows_shared_by_sequences():
    """rows= with a sequence-level ratio equals repeating the hidden rows."""
    case = make_case(12, D, V, seed=7, masked=0.0)
    g = torch.Generator().manual_seed(0)
    rows = torch.sort(torch.randint(0, 12, (30,), generator=g)).values
    targets, segments = torch.randint(0, V, (30,), generator=g), torch.randint(0, 4, (30,), generator=g)
    old = -4 + 0.05 * torch.randn(30, generator=g, dtype=torch.float64)
    spec = dk.PolicySpec.preset("gspo", clip_low=0.3, clip_high=0.3, entropy_coef=0.1, z_loss_coef=0.01)
    advantages = torch.randn(4, generator=g, dtype=torch.float64)
    results = []
    for shared in (True, False):
        h, w, _ = case.leaves(torch.float64)
        hidden, options = (h, {"rows": rows}) if shared else (h[rows], {})
        for budget in (1000, 5):
            out = loose.policy_loss(
                hidden,
                w,
                targets,
                advantages,
                old_logprobs=old,
                segment_ids=segments,
                spec=spec,
                config=workspace(budget),
                outputs=("logprobs", "entropy", "ratio"),
                **options,
            )
            found = (out.loss, *out.outputs.values(), *torch.autograd.grad(out.loss, (h, w), retain_graph=True))
            results.append([t.detach() for t in found])
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=1e-10, atol=1e-12)


def test_clip_cov_follows_its_generator():
    case = make_case(200, D, V, seed=3, masked=0.0)
    spec = dk.PolicySpec.preset("clip_cov", cov_share=0.05, cov_bounds=(-10.0, 10.0))
    cu = torch.tensor([0, 200])
    advantages = case.advantages.sign() + 0.1

    def grads(seed):
        return run(case, advantages, cu, spec, rows=30, generator=torch.Generator().manual_seed(seed))[1]()[0]

    dropped = [set((grads(seed).abs().sum(1) == 0).nonzero().flatten().tolist()) for seed in (0, 0, 1)]
    plain = set((run(case, advantages, cu, dk.PolicySpec())[1]()[0].abs().sum(1) == 0).nonzero().flatten().tolist())
    assert dropped[0] == dropped[1] != dropped[2]
    assert all(plain <= d and len(d - plain) == 10 for d in dropped)


def test_what_a_sequence_is_must_be_said():
    case = make_case(10, D, V)
    for preset in ("gmpo", "vespo", "gspo"):
        with pytest.raises(ValueError, match="pass cu_seqlens"):
            dk.policy_loss(case.hidden, case.weight, case.targets, case.advantages, spec=dk.PolicySpec.preset(preset))
    spec, cu = dk.PolicySpec(off_policy_threshold=0.1), torch.tensor([0, 10])
    with pytest.raises(ValueError, match="needs rollout_logprobs or old_logprobs"):
        dk.policy_loss(case.hidden, case.weight, case.targets, case.advantages, spec=spec, cu_seqlens=cu)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"objective": "dro"}, "needs dro_beta"),
        ({"objective": "gmpo"}, "ratio='sequence'"),
        ({"objective": "vespo", "ratio": "sequence"}, "pass ratio='token'"),
        ({"objective": "gmpo", "ratio": "sequence", "correction": "token_mask"}, "sequence form"),
        ({"objective": "sapo", "delta": 3.0}, "delta belongs to"),
        ({"cov_share": 0.0}, "share of the call's tokens"),
        ({"cov_bounds": (2.0, 1.0)}, "low < high"),
        ({"vespo_weights": (1.0, 1.0)}, "must be 4 numbers"),
        ({"vespo_weights": (1.0, 0.0, 1.0, 1.0)}, "must be positive"),
        ({"dro_beta": -1.0}, "must be positive"),
        ({"ratio": "turn"}, "'sequence_token'"),
    ],
)
def test_specs_that_make_no_sense(options, words):
    with pytest.raises(ValueError, match=words):
        dk.PolicySpec(**options)
