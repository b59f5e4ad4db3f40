"""Metrics of losses are sums and counts: of a batch what those of its micro-batches add up to, and what they say they are."""

import loose
import pytest
import torch

import drift_kernels as dk
from drift_kernels.testing import make_case

CASE = make_case(40, 9, 61, seed=8)
CU = torch.tensor([0, 11, 12, 30, 40])
PARTS = [(0, 12), (12, 12), (12, 30), (30, 40)]  # the second holds nothing
MASK = CASE.targets >= 0
LOG_P = torch.log_softmax(CASE.hidden @ CASE.weight.t() + CASE.bias, -1)
LOGP = LOG_P.gather(1, CASE.targets.clamp(min=0)[:, None])[:, 0]
OLD = LOGP + CASE.noise
TOKENS = {
    "old_logprobs": OLD,
    "ref_logprobs": LOGP + 0.5 * CASE.noise.roll(1),
    "rollout_logprobs": OLD + 0.5 * CASE.noise.roll(2),
    "token_weights": CASE.token_weights,
}
SPECS = {
    "ppo": dk.PolicySpec(kl_coef=0.1),
    "dapo": dk.PolicySpec.preset("dapo", dual_clip=1.5, kl_coef=0.1, correction="token_mask"),
    "cispo": dk.PolicySpec.preset("cispo", kl_coef=0.1, aggregation="sequence_mean_token_sum"),
    "dppo_tv": dk.PolicySpec.preset("dppo_tv", clip_low=1e-3, clip_high=2e-3, kl_coef=0.1),
    "gspo": dk.PolicySpec.preset("gspo", kl_coef=0.1, correction="sequence_truncate", correction_bounds=(0.0, 1.1)),
    "gmpo": dk.PolicySpec.preset("gmpo", clip_high=0.1, kl_coef=0.1),
}
OUTPUTS = ("kl", "entropy", "ratio")


def policy_metrics(spec, backend, start=0, stop=40, outputs=OUTPUTS):
    s = slice(start, stop)
    cu = torch.unique(CU.clamp(start, stop)) - start
    data = {name: values[s] for name, values in TOKENS.items()} | {"cu_seqlens": cu, "bias": CASE.bias}
    config = dk.KernelConfig(backend=backend, workspace_bytes=8 * (64 + 18) * 7)
    h, y, A = CASE.hidden[s], CASE.targets[s], CASE.advantages[s]
    return loose.policy_loss(h, CASE.weight, y, A, spec=spec, outputs=outputs, config=config, **data).metrics


def distill_metrics(backend, start=0, stop=40):
    s, config = slice(start, stop), dk.KernelConfig(backend=backend)
    teacher = dk.Teacher(CASE.hidden[s] * 0.5, CASE.weight)
    options = {"targets": CASE.targets[s], "config": config}
    return loose.distill_loss(CASE.hidden[s], CASE.weight, teacher, CASE.token_weights[s], **options).metrics


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", [*SPECS, "distill_loss"])
def test_micro_batches_add_up(name, backend):
    def metrics(*part):
        return distill_metrics(backend, *part) if name not in SPECS else policy_metrics(SPECS[name], backend, *part)

    whole, parts = metrics(), [metrics(*part) for part in PARTS]
    for key, (total, count) in whole.items():
        assert int(count) > 0, key
        torch.testing.assert_close(sum(part[key][0] for part in parts), total, msg=key, check_dtype=False)
        assert sum(int(part[key][1]) for part in parts) == int(count), key
        assert [float(value) for value in parts[1][key]] == [0, 0], key


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_what_they_are_of_tokens(backend):
    """Over unmasked tokens, whatever their weight; clipped are those that the loss reads."""
    spec, d = SPECS["dapo"], LOGP - TOKENS["ref_logprobs"]
    ratio, factor = (LOGP - OLD).exp(), (OLD - TOKENS["rollout_logprobs"]).exp()
    factor = torch.where(factor > 2, 0.0, factor)
    read = MASK & (CASE.token_weights != 0) & (factor != 0)
    low, high = ((read & t) for t in ((ratio < 0.8) & (CASE.advantages < 0), (ratio > 1.28) & (CASE.advantages > 0)))
    expected = {
        "clip_ratio/low_mean": low,
        "clip_ratio/high_mean": high,
        "clip_ratio/region_mean": low | high,
        "kl": (d + (-d).exp() - 1) * MASK,
        "entropy": -(LOG_P.exp() * LOG_P).sum(-1) * MASK,
        "ratio": ratio * MASK,
        "ppo_kl": (OLD - LOGP) * MASK,
        "sampling/importance_sampling_ratio/mean": factor * (MASK & (CASE.token_weights != 0)),
    }
    metrics = policy_metrics(spec, backend)
    assert metrics.keys() == expected.keys()
    assert min(int(low.sum()), int(high.sum())) > 0
    for key, (total, count) in metrics.items():
        torch.testing.assert_close(total.double(), expected[key].double().sum(), msg=key)
        counted = MASK & (CASE.token_weights != 0) if key.startswith("sampling/") else MASK
        assert int(count) == int(counted.sum()), key
    assert not set(OUTPUTS) & policy_metrics(spec, backend, outputs=()).keys()
