"""Finite differences of every op where hidden rows are shared, left out, or of their own temperature."""

import loose
import pytest
import torch

import drift_kernels as dk
from drift_kernels.testing import make_case

CASE = make_case(6, 3, 7, seed=3, masked=0.2)
GENERATOR = torch.Generator().manual_seed(0)
SEEN, TEACHER_WEIGHT = (torch.randn(n, 3, generator=GENERATOR, dtype=torch.float64) for n in (6, 7))
SHARED = torch.tensor([0, 0, 1, 3, 3, 3, 4, 5, 5])  # row 2 has no entry
ROWS = {"rows": SHARED, "targets": torch.randint(0, 7, (9,), generator=GENERATOR)}
ROWS |= {"values": torch.randn(9, generator=GENERATOR, dtype=torch.float64)}
PLAIN = {"targets": CASE.targets, "values": CASE.advantages}
TEMPERATURE = {"temperature": torch.linspace(0.5, 2, 6)}
WHERE = {
    "rows": ROWS,
    "some": PLAIN | TEMPERATURE | {"active": torch.tensor([5, 0, 3, 4])},
    "some rows": ROWS | TEMPERATURE | {"active": torch.tensor([8, 1, 2, 5, 6])},
}
TIGHT = dk.KernelConfig(workspace_bytes=8 * (8 + 2 * 3) * 2)  # chunks of two rows


def policy(h, w, b, targets, values, preset, **options):
    spec = dk.PolicySpec.preset(preset, clip_high=0.4, kl_coef=0.1, entropy_coef=0.05, z_loss_coef=0.02)
    old = torch.full(values.shape, -2.0).double()
    data = {"old_logprobs": old, "ref_logprobs": old + 0.1, "segment_ids": torch.arange(len(values)) // 4}
    return loose.policy_loss(h, dk.Head(w, bias=b), targets, values, spec=spec, config=TIGHT, **data, **options).loss


def scores(h, w, b, targets, values, entropy=True, **options):
    out = loose.linear_logprob(h, dk.Head(w, bias=b), targets, entropy_gradient=entropy, config=TIGHT, **options)
    return (out.logprobs * values).sum() + (0 if out.entropy is None else (out.entropy.square() * values).sum())


def pointwise(h, w, b, targets, values, **options):
    options |= {"bias": b, "config": TIGHT}
    return loose.pointwise_loss(h, w, targets, lambda logp, a: a * logp.square(), values, **options).loss


def distilled(h, w, b, targets, values, **options):
    options |= {"bias": b, "config": TIGHT, "targets": targets}
    return loose.distill_loss(h, w, dk.Teacher(SEEN, TEACHER_WEIGHT), values.abs(), **options).loss


def hybrid(h, w, b, targets, values, **options):
    options |= {"bias": b, "config": TIGHT, "old_logprobs": torch.full(values.shape, -2.0).double()}
    options |= {"distill_weights": values.abs(), "policy_weights": None, "distill": dk.DistillSpec(0.3, 4)}
    return loose.self_distill_loss(h, w, targets, dk.Teacher(SEEN, TEACHER_WEIGHT), values, **options).loss


OPS = {
    "cross entropy": lambda h, w, b, targets, values, **options: (
        loose.weighted_cross_entropy(h, dk.Head(w, bias=b), targets, values.abs(), config=TIGHT, **options).loss
    ),
    "policy": lambda *args, **options: policy(*args, preset="ppo", **options),
    "one ratio a sequence": lambda *args, **options: policy(*args, preset="gspo", **options),
    "over the call": lambda *args, **options: policy(*args, preset="kl_cov", **options),
    "pointwise": pointwise,
    "scores": scores,
    "scores, frozen": lambda h, w, b, *args, **options: scores(
        h, w.detach(), b.detach(), *args, entropy=False, **options
    ),
    "distilled": distilled,
    "hybrid": hybrid,
}
TAUGHT = ("distilled", "hybrid")  # which take no rows=
PAIRS = [(op, where) for op in OPS for where in WHERE if where == "some" or op not in TAUGHT]


@pytest.mark.parametrize(("op", "where"), PAIRS)
def test_gradcheck_through_the_real_driver(op, where):
    options = dict(WHERE[where])
    data = options.pop("targets"), options.pop("values")
    leaves = CASE.leaves(torch.float64)
    if op == "scores, frozen":
        leaves = (leaves[0], *(t.detach() for t in leaves[1:]))
    assert torch.autograd.gradcheck(lambda *x: OPS[op](*x, *data, **options), leaves, atol=1e-6)
