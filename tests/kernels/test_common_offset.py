"""Logits that share an offset far larger than their spread: log-probs and gradients are those of the rounded logits."""

import pytest
import torch

import drift_kernels as dk

OFFSETS = [0.0, 1e4, 1e6, 3e7, -3e7]
T, D, V = 6, 16, 50
DRAWN = torch.Generator().manual_seed(0)
HIDDEN, WEIGHT = torch.randn(T, D, generator=DRAWN), 0.3 * torch.randn(V, D, generator=DRAWN)
TEACHER = torch.randn(V, D, generator=DRAWN) * 0.3
TARGETS = torch.tensor([0, 7, 49, -100, 3, 21])
MASK = TARGETS >= 0
OLD = torch.full((T,), -3.5)


def on(backend, rows=T):
    """A workspace for `rows` rows: fewer than all make an op take several passes."""
    return dk.KernelConfig(backend=backend, workspace_bytes=rows * (V + D + 16) * 4 + 4096)


def rounded(offset, weight=WEIGHT):
    """The logits as fp32 has them, in fp64."""
    return (HIDDEN @ weight.t() + offset).double()


LOSSES = {
    "cross-entropy": lambda head, c: dk.weighted_cross_entropy(HIDDEN, head, TARGETS, config=c).loss,
    "log-probs, backward in another pass": lambda head, c: dk.linear_logprob(
        HIDDEN, head, TARGETS, config=c
    ).logprobs.sum(),
    "entropy": lambda head, c: dk.linear_logprob(
        HIDDEN, head, TARGETS, outputs=("entropy",), entropy_gradient=True, config=c
    ).entropy.sum(),
    "a loss of whole sequences": lambda head, c: (
        dk.policy_loss(
            HIDDEN,
            head,
            TARGETS,
            torch.ones(T),
            old_logprobs=OLD,
            segment_ids=torch.tensor([0, 0, 0, 1, 1, 1]),
            spec=dk.PolicySpec.preset("gspo", clip_low=1.0, clip_high=9.0),
            config=c,
        ).loss
    ),
    "a caller's loss": lambda head, c: dk.pointwise_loss(HIDDEN, head, TARGETS, lambda x: x * x, config=c).loss,
}
for alpha in (0.0, 0.5, 1.0):
    for k in (None, 5, 45):
        LOSSES[f"distillation, alpha={alpha}, top_k={k}"] = lambda head, c, alpha=alpha, k=k: (
            dk.distill_loss(
                HIDDEN,
                head,
                dk.Teacher(HIDDEN, dk.Head(TEACHER, bias=head.bias.detach())),
                targets=TARGETS,
                spec=dk.DistillSpec(alpha=alpha, top_k=k),
                config=c,
            ).loss
        )


@pytest.mark.parametrize("offset", OFFSETS)
def test_probabilities_of_a_row_sum_to_one(offset):
    head, exact = dk.Head(WEIGHT, bias=torch.full((V,), offset)), rounded(offset).log_softmax(-1)
    each = [dk.linear_logprob(HIDDEN, head, torch.full((T,), v), config=on("cpu")) for v in range(V)]
    logprobs = torch.stack([out.logprobs for out in each], 1).double()
    assert (logprobs.exp().sum(1) - 1).abs().max() < 4e-7
    assert (logprobs - exact).abs().max() < 6e-7
    found = dk.topk_logprobs(HIDDEN, head, 45, config=on("cpu"))
    assert (found.logprobs.exp().sum(1) + found.rest.exp() - 1).abs().max() < 6e-7


@pytest.mark.parametrize("rows", [T, 2])
@pytest.mark.parametrize("offset", [1e6, 3e7])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_as_the_reference_has_them(name, offset, rows):
    """The derivative by the bias, too: per token its elements sum to 0, however large the offset."""
    results = {}
    for backend in ("cpu", "reference"):
        bias = torch.full((V,), offset, requires_grad=True)
        loss = LOSSES[name](dk.Head(WEIGHT, bias=bias), on(backend, rows))
        results[backend] = loss, *torch.autograd.grad(loss, [bias])
    (loss, grad), (want, exact) = results["cpu"], results["reference"]
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad, exact, rtol=1e-5, atol=4e-7 * max(1.0, float(exact.abs().max())))
    assert abs(float(grad.double().sum())) < 1e-6 * max(1.0, float(exact.abs().max()))
