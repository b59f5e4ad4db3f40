"""Whole ops through the GPU's chunk loop on the emulated CUDA kernels, against `reference` in float64."""

from __future__ import annotations

import dataclasses
import itertools
import math

import loose
import pytest
import test_triton_distill_ops as distilling
import torch
from emulate import build_as_asked, running
from test_losses import SPECS

import drift_kernels as dk
from drift_kernels import backends
from drift_kernels.testing import gradients, make_case, off_the_edges, within_budget


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return build_as_asked(tmp_path_factory.mktemp("kernels"))


@pytest.mark.parametrize("name", SPECS)
def test_every_loss_in_bf16(library, monkeypatch, name):
    spec, case = SPECS[name], make_case(70, 33, 1001, dtype=torch.bfloat16, seed=2)
    exact = dk.linear_logprob(case.hidden, dk.Head(case.weight, bias=case.bias, temperature=0.7), case.targets).logprobs
    edges = (0.8, 1.2, 1.28, 1.4, 1.5, 3.0)
    data = {"old_logprobs": off_the_edges(exact + case.noise, exact, edges), "ref_logprobs": exact + 0.1}
    data |= {"rollout_logprobs": exact - 0.1, "cu_seqlens": torch.tensor([0, 11, 12, 30, 70], dtype=torch.int32)}

    def loss(hidden, weight, bias, backend):
        config = dk.KernelConfig(backend=backend, workspace_bytes=1 << 18)
        head = {"bias": bias, "temperature": 0.7}
        return loose.policy_loss(
            hidden, weight, case.targets, case.advantages, **data, **head, spec=spec, config=config
        ).loss

    def all_of(backend, dtype):
        torch.manual_seed(0)  # of clip_cov's choice
        return gradients(lambda *leaves: loss(*leaves, backend), case.leaves(dtype))

    own, oracle = all_of("reference", torch.bfloat16), all_of("reference", torch.float64)
    monkeypatch.setattr(backends, "resolve", lambda name, device: name)
    with running(library, monkeypatch):
        actual = all_of("cuda", torch.bfloat16)
    for what, a, o, e in zip(("loss", "hidden", "weight", "bias"), actual, own, oracle):
        dtype, scale = (torch.float32, 20.0) if what == "loss" else (torch.bfloat16, None)
        ok, line = within_budget(a, o, e, dtype, scale)
        assert ok, f"{what}: {line}"


DISTILLED = [*itertools.product(["distill", "hybrid"], distilling.MODES, [torch.bfloat16])]


@pytest.mark.parametrize(("op", "mode", "dtype"), [*DISTILLED, ("hybrid", "JSD", torch.float32)])
def test_distillation(library, monkeypatch, op, mode, dtype):
    """The modes and shapes that Triton's ops are tried with, `active=` given and not."""
    case, (teacher, spec) = (
        make_case(distilling.T, distilling.D, distilling.V, dtype=dtype, seed=2),
        distilling.MODES[mode],
    )

    def alone(h, w, b, config):
        known, options = teacher(dtype, h.dtype), {"targets": case.targets, "spec": spec, "softcap": 5.0}
        return loose.distill_loss(
            h, dk.Head(w, bias=b, temperature=0.7), known, case.token_weights, config=config, **options
        ).loss

    loss = alone if op == "distill" else distilling.hybrid(case, mode, dtype, distilling.ACTIVE, temperature=0.8)
    ours = dataclasses.replace(distilling.config(dtype), backend="cuda")

    def all_of(config, kind):
        return gradients(lambda *leaves: loss(*leaves, config), case.leaves(kind))

    own, oracle = (all_of(distilling.REFERENCE, kind) for kind in (dtype, torch.float64))
    monkeypatch.setattr(backends, "resolve", lambda name, device: name)
    with running(library, monkeypatch):
        actual = all_of(ours, dtype)
    for what, a, o, e in zip(("loss", "hidden", "weight", "bias"), actual, own, oracle):
        bounds = (torch.float32, max(1.0, math.log(distilling.V), float(e.abs()))) if what == "loss" else (dtype, None)
        ok, line = within_budget(a, o, e, *bounds)
        assert ok, f"{what}: {line}"


def test_topk_logprobs(library, monkeypatch):
    case = make_case(30, 16, 203, dtype=torch.float32, seed=4)
    exact = dk.topk_logprobs(case.hidden.double(), case.weight.double(), 9, config=distilling.REFERENCE)
    monkeypatch.setattr(backends, "resolve", lambda name, device: name)
    with running(library, monkeypatch):
        found = dk.topk_logprobs(
            case.hidden.float(), case.weight.float(), 9, config=dk.KernelConfig(backend="cuda", workspace_bytes=1 << 16)
        )
    assert torch.equal(found.ids, exact.ids)
    torch.testing.assert_close(found.logprobs.double(), exact.logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.rest.double(), exact.rest, rtol=1e-5, atol=1e-5)
