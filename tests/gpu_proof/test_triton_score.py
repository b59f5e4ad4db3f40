"""The scoring kernel, and parts of rows merged, in the interpreter against float64."""

import math
from dataclasses import replace

import pytest
import torch
from row_oracle import exact, make_rows, per_entry

from drift_kernels import reference
from drift_kernels.backends import triton as backend
from drift_kernels.backends.contract import Chunk
from drift_kernels.backends.params import ROW_OUTPUTS
from drift_kernels.backends.triton import launch, scorer
from drift_kernels.calls import HeadOptions
from drift_kernels.testing import make_case, within_budget

STATISTICS = ("logprobs", "lse", "entropy", "is_top1", "mean_logits", "log_sum_sq_probs")
CAPPED = HeadOptions(softcap=3.0, logit_scale=1.3, temperature=0.6)


def check(found, case, chunk, dtype):
    results = []
    for kind in (dtype, torch.float64):
        bias = None if chunk.bias is None else chunk.bias.to(kind)
        inverse = None if chunk.inv_temperature is None else 1 / chunk.inv_temperature.to(kind)
        z = reference.logits(case.hidden.to(kind), case.weight.to(kind), bias, inverse, chunk.head)
        results.append(reference.statistics(z, chunk.targets, None, chunk.targets >= 0))
    for name in STATISTICS:
        values = torch.where(chunk.targets >= 0, found[name], 0.0)
        scale = max(1.0, math.log(case.weight.shape[0])) * (4 if dtype == torch.float32 else 1)
        ok, line = within_budget(values, *(r[name] for r in results), torch.float32, scale)
        assert ok, f"{name}: {line}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 8, 1), (3, 33, 257), (70, 64, 1000), (130, 40, 515)])
@pytest.mark.parametrize("head", [{}, {"head": CAPPED, "bias": True}, {"per_row": True}])
@pytest.mark.parametrize("programs", [1, 264])  # the vocabulary in one span of tiles, and in many
def test_scores(shape, dtype, head, programs, monkeypatch):
    T = shape[0]
    monkeypatch.setattr(scorer, "PROGRAMS", programs)
    case = make_case(*shape, dtype=dtype, seed=1)
    targets = torch.where(case.targets < 0, -1, case.targets)
    chunk = Chunk(
        targets,
        None,
        torch.linspace(0.5, 2.0, T) if "per_row" in head else None,
        case.bias.float() if "bias" in head else None,
        head.get("head", HeadOptions()),
    )
    found = backend.score(case.hidden.to(dtype), case.weight.to(dtype), chunk, STATISTICS)
    check(found, case, chunk, dtype)


@pytest.mark.parametrize("described", [True, False])
def test_descriptors_and_pointers_read_the_same(described, monkeypatch):
    case = make_case(70, 40, 515, dtype=torch.bfloat16, masked=0.0)
    chunk = Chunk(case.targets, None, None, None, HeadOptions())
    h, w = case.hidden.bfloat16(), case.weight.bfloat16()
    assert scorer.has_descriptors(h, w)
    assert not scorer.has_descriptors(h[:, :33], w[:, 1:34]), "rows that begin at odd bytes"
    monkeypatch.setattr(scorer, "has_descriptors", lambda *_: described)
    check(backend.score(h, w, chunk, STATISTICS), case, chunk, torch.bfloat16)


def test_scores_agree_with_those_from_logits():
    """To the bound that the documentation states: a few ulp of the largest logit."""
    case = make_case(64, 96, 3000, dtype=torch.bfloat16, masked=0.0)
    chunk = Chunk(case.targets, None, None, None, HeadOptions())
    tiled = backend.score(case.hidden.bfloat16(), case.weight.bfloat16(), chunk, ("logprobs", "entropy"))
    whole = backend.row_stats((case.hidden.float() @ case.weight.float().t()), chunk, ("logprobs", "entropy"))
    for name in tiled:
        assert float((tiled[name] - whole[name]).abs().max()) < 1e-5


@pytest.mark.filterwarnings("ignore:All-NaN")  # numpy's, from the interpreter's maximum
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_nan_or_an_infinity_shows_in_its_row_alone(value):
    case = make_case(5, 16, 300, masked=0.0)
    h = case.hidden.float()
    h[2, 3] = value
    chunk = Chunk(case.targets, None, None, None, HeadOptions())
    found = backend.score(h, case.weight.float(), chunk, ("logprobs", "lse"))
    for values in found.values():
        assert values.isnan().tolist() == [False, False, True, False, False]


def test_a_target_outside_the_vocabulary_is_nan():
    case = make_case(3, 16, 300, masked=0.0)
    chunk = Chunk(torch.tensor([300, 1 << 40, 5]), None, None, None, HeadOptions())
    found = backend.score(case.hidden.float(), case.weight.float(), chunk, ("logprobs",))["logprobs"]
    assert found.isnan().tolist() == [True, True, False]


def test_fp32_operands_follow_torchs_setting():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:  # by hand: the setting is no attribute that could be deleted, which is how `monkeypatch` undoes
        for setting in ("ieee", "tf32"):
            matmul.fp32_precision = setting
            assert scorer.precision(torch.float32) == setting
            assert scorer.precision(torch.bfloat16) == "ieee"
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize(("rows", "V"), [(1, 1), (1, 151_936), (100, 5000), (8192, 151_936), (100_000, 151_936)])
def test_splits_cover_the_vocabulary_once(rows, V):
    chosen = launch.score_rule(rows, "half", (9, 0), True, True)
    splits, tiles = scorer.splits_of(rows, V, chosen)
    assert (splits - 1) * tiles * chosen.block < V <= splits * tiles * chosen.block


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("cuts", [[1000], [1, 1000], [300, 301, 700, 1000], [999, 1000]])
@pytest.mark.parametrize("head", [{}, {"head": CAPPED, "bias": True, "per_row": True}])
def test_parts_of_the_vocabulary_merge_to_the_whole(several, cuts, head):
    rows = make_rows(5, 1000, several=several, seed=2, **head)
    parts, first = [], 0
    for last in cuts:
        bias = None if rows.chunk.bias is None else rows.chunk.bias[first:last].contiguous()
        chunk = replace(rows.chunk, bias=bias)
        parts.append(backend.partial_stats(rows.x[:, first:last], chunk, STATISTICS, first))
        first = last
    found = backend.merge(backend.stack(parts), rows.chunk.targets, rows.chunk.row_ptr, 1000, STATISTICS)
    again = backend.merge(backend.stack(parts), rows.chunk.targets, rows.chunk.row_ptr, 1000, STATISTICS)
    own, wanted = exact(rows, torch.float32).statistics, exact(rows, torch.float64).statistics
    for name in STATISTICS:
        assert torch.equal(found[name], again[name])
        values = per_entry(rows, found[name], name, ROW_OUTPUTS)
        ok, line = within_budget(values, own[name].detach(), wanted[name].detach(), torch.float32, 10.0)
        assert ok, f"{name}: {line}"


def test_a_part_without_the_largest_logit_is_scaled_down():
    """Parts whose maxima lie far apart: what a merge without rescaling gets wrong."""
    rows = make_rows(2, 1000, seed=3)
    rows.chunk.targets[:] = 10
    rows.x[:, :500] -= 60.0
    parts = [backend.partial_stats(rows.x[:, a : a + 500], rows.chunk, STATISTICS, a) for a in (0, 500)]
    found = backend.merge(backend.stack(parts), rows.chunk.targets, None, 1000, STATISTICS)
    wanted = exact(rows, torch.float64).statistics
    for name in ("lse", "logprobs", "entropy", "log_sum_sq_probs"):
        torch.testing.assert_close(found[name].double(), wanted[name].detach(), rtol=1e-5, atol=1e-4)
