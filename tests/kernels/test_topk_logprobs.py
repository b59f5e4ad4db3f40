"""The teacher to keep: the likeliest tokens of each row."""

import math

import loose
import pytest
import torch
from distill_cases import (
    BACKENDS,
    CASE,
    HEAD,
    logits_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import drift_kernels as dk


@pytest.mark.parametrize("backend", BACKENDS)
def test_topk_logprobs(backend):
    config = dk.KernelConfig(backend=backend, workspace_bytes=8 * 80 * 11)
    log_p = logits_of(CASE.hidden, CASE.weight, CASE.bias, **HEAD).log_softmax(-1)
    active = torch.tensor([2, 3, 11, 29])
    for k in (1, 7, 60, 61):
        found = loose.topk_logprobs(CASE.hidden, dk.Head(CASE.weight, bias=CASE.bias), k, config=config, **HEAD)
        values, ids = log_p.topk(k)
        assert torch.equal(found.ids, ids)
        torch.testing.assert_close(found.logprobs, values)
        rest = log_p.scatter(-1, ids, -math.inf).logsumexp(-1) if k < 61 else torch.full((30,), -math.inf).double()
        torch.testing.assert_close(found.rest, rest)
        some = loose.topk_logprobs(
            CASE.hidden, dk.Head(CASE.weight, bias=CASE.bias), k, config=config, active=active, **HEAD
        )
        assert torch.equal(some.ids[active], ids[active])
        torch.testing.assert_close(some.rest[active], rest[active])
        assert some.logprobs.abs().sum() == some.logprobs[active].abs().sum()
    ties = dk.topk_logprobs(torch.ones(1, 2), torch.ones(500, 2), 300, config=config)
    assert torch.equal(ties.ids[0], torch.arange(300))  # the lower of equal ids first
    padded = dk.topk_logprobs(CASE.hidden.reshape(2, 15, 9), CASE.weight, 3, config=config)
    assert padded.ids.shape == padded.logprobs.shape == (2, 15, 3)
    assert padded.rest.shape == (2, 15)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 40), st.integers(0, 10_000))
def test_top_k_of_any_row(V, k, seed):
    k = min(k, V)
    weight = torch.randn(V, 1, generator=torch.Generator().manual_seed(seed)).round(decimals=2)  # with ties
    found = dk.topk_logprobs(torch.ones(1, 1), weight, k)
    assert torch.equal(found.ids[0], weight[:, 0].sort(descending=True, stable=True).indices[:k])
