"""Inputs of the GPU tests: tests/kernels/test_losses.py's losses on a GPU, in any dtype, with a workspace of a few rows."""

import math

import torch

import drift_kernels as dk
from drift_kernels import gpu_sweep
from drift_kernels.testing import gradients, make_case, off_the_edges, within_budget

REFERENCE = dk.KernelConfig(backend="reference")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("loss", "hidden", "weight", "bias")
T, D, V, BLOCK = 90, 40, 1003, 10
EDGES = (
    0.8,
    0.9,
    0.95,
    1.05,
    1.1,
    1.2,
    1.28,
    1.4,
    1.5,
    3.0,
    math.exp(-0.2),
    math.exp(0.1),
)  # of SPECS; gmpo's are logs
STARTS = [0, 9, 10, 40, T]  # of sequences


def config(backend, dtype=torch.float32, vocabulary=V, width=D, **options):
    """A workspace of ten rows of logits and a gradient buffer of forty."""
    size, padded = dtype.itemsize, gpu_sweep.padded(vocabulary)
    logits, gradient = 4 * padded + width * size, size * padded + width * (size + 4)
    return dk.KernelConfig(backend=backend, workspace_bytes=BLOCK * (logits + 4 * gradient), **options)


def case_on(device, *shape, **options):
    """A `make_case` whose tensors lie on `device`."""
    case = make_case(*(shape or (T, D, V)), **options)
    for name, value in vars(case).items():
        setattr(case, name, value.to(device))
    return case


def leaves(case, dtype):
    return case.leaves(dtype, case.hidden.device)


def policy_data(case, dtype):
    """What a `PolicySpec` may read, ratios kept off clip edges by more than the dtype's log-probs are off."""
    exact = dk.linear_logprob(
        case.hidden, dk.Head(case.weight, bias=case.bias), case.targets, config=REFERENCE
    ).logprobs
    margin = 1e-3 if dtype == torch.float32 else 0.01
    old = off_the_edges(exact + case.noise, exact, EDGES, margin)
    return {
        "old_logprobs": old,
        "ref_logprobs": exact + 0.5 * case.noise.roll(1),
        "rollout_logprobs": old + 0.3 * case.noise.roll(2),
        "cu_seqlens": torch.tensor(STARTS, dtype=torch.int32, device=case.hidden.device),
        "token_weights": case.token_weights,
    }


def three(loss, case, dtype, backend, **options):
    """(loss, gradients) by the backend, by torch in the same dtype, and in float64; `loss` takes (h, w, b, config)."""
    chosen = options.pop("config", config(backend, dtype, case.weight.shape[0], case.weight.shape[1]))
    runs = ((chosen, dtype), (REFERENCE, dtype), (REFERENCE, torch.float64))
    return [gradients(lambda h, w, b, c=c: loss(h, w, b, c), leaves(case, d)) for c, d in runs]


def close(found, dtype, scale=1.0, names=NAMES):
    """Every value within twice torch's own error and a few ulp."""
    for name, a, o, e in zip(names, *found):
        bounds = (torch.float32, max(scale, math.log(V), float(e.abs().max()))) if name == "loss" else (dtype, None)
        ok, line = within_budget(a, o, e, *bounds)
        assert ok, f"{name}: {line}"
