"""Tests of the tests: known mistakes, written into the kernels' text, must each turn a check red."""

from __future__ import annotations

import re
from pathlib import Path

import mutants
import pytest
import test_cuda_values as values
import torch
from emulate import ORDERS, launches, padded, running

from drift_kernels.backends import partials

# name: (file below csrc, text, replacement, what the failure says)
MISTAKES = {
    "no barrier before the slope is read": (
        "cuda/rows.cu",
        "return;\n  __syncthreads();\n\n  const Slope c",
        "return;\n\n  const Slope c",
        "error|differ",
    ),
    "no barrier before targets are written": (
        "cuda/rows.cu",
        "if (!c.live) return;\n  __syncthreads();",
        "if (!c.live) return;",
        "error|differ",
    ),
    "no cluster barrier before partial sums are read": (
        "cuda/device.h",
        "partial[warp()] = s;\n  cluster.sync();",
        "partial[warp()] = s;\n  __syncthreads();",
        "error|differ|ended",
    ),
    "no cluster barrier after partial sums are read": (
        "cuda/rows.cu",
        "shared_stats = finish(sums, rows.vocab);\n    cluster.sync();",
        "shared_stats = finish(sums, rows.vocab);\n    __syncthreads();",
        "read after that block has ended",
    ),
    "a barrier that one lane alone reaches": (
        "cuda/device.h",
        "if (lane() == 0) partial[warp()] = s;",
        "if (lane() == 0) { partial[warp()] = s; __syncthreads(); }",
        "barrier",
    ),
    "a tail one column short": ("cuda/device.h", "if (tail < s.end)", "if (tail + 1 < s.end)", "error|padding"),
    "a tail one column long": ("cuda/device.h", "if (tail < s.end)", "if (tail <= s.end)", "error|padding"),
    "clip bounds swapped": (
        "policy.h",
        "const R clip = below ? low : (above ? high : r);",
        "const R clip = below ? high : (above ? low : r);",
        "loss: error",
    ),
    "ignored targets not masked": (
        "cuda/rows.cu",
        "const float w = ignored ? 0.0f : at(o.weights, k, 1.0f);",
        "const float w = at(o.weights, k, 1.0f);",
        "error",
    ),
    "a maximum that does not rescale": (
        "cuda/device.h",
        "if (top > max) rescale(top);",
        "if (top > max) max = top;",
        "error",
    ),
    "a reduction one step short": (
        "cuda/device.h",
        "d /= 2) {\n    Sums o;",
        "d /= 2) {\n    if (d == 1) break;\n    Sums o;",
        "error|differ",
    ),
    "shared targets added once each": (
        "cuda/rows.cu",
        "if (rows.targets[i] == y) own +=",
        "if (i == k) own +=",
        "gradient: error",
    ),
    "softcap without its slope": (
        "cuda/logits.h",
        "if (PLAIN || softcap == 0) return flat;",
        "return flat;",
        "gradient: error",
    ),
    "a part that claims another part's targets": (
        "cuda/rows.cu",
        "y >= 0 && y < rows.vocab ? z : -INFINITY",
        "y >= 0 ? z : -INFINITY",
        "logprobs: error",
    ),
    "sums of a part in another order": (
        "cuda/rows.cu",
        "s.e, s.ed, s.ee, s.z};",
        "s.ed, s.e, s.ee, s.z};",
        "error",
    ),
    "an entropy that forgets its maximum": (
        "cuda/device.h",
        "ed = k * fmaf(fmaxf(shift, FLOOR), e, ed);",
        "ed = k * ed;",
        "entropy: error",
    ),
}


def verify(library: Path, monkeypatch) -> None:
    """A short form of the value tests: every launch in every order, values, padding, repetition."""
    with running(library, monkeypatch) as choose:
        for head in ("plain", "everything"):
            case = values.Case(4, 1001, head, "csr", seed=3)
            own, exact = (case.policy(x, values.SPEC) for x in (case.x, case.x.double()))
            dx_own, dx = (
                values.gradient_of(lambda x: case.policy(x, values.SPEC)["loss"].sum(), x)  # noqa: B023
                for x in (case.x, case.x.double())
            )
            for launch in values.LAUNCHES.values():
                found = []
                for order in ORDERS:
                    choose(order)
                    out = padded(case.C, case.V, torch.float32, 3, 1)
                    with monkeypatch.context() as patch:
                        launches(patch, **launch)
                        outputs, _ = case.fused(values.SPEC, out)
                    values.check_statistics(case, outputs)
                    for name in values.POLICY:
                        values.check(name, outputs[name], own[name], exact[name], 30.0)
                    values.check("gradient", out, dx_own, dx, case.scale)
                    assert values.padding_is_nan(out), "padding was written, or a column was not"
                    found.append(out)
                assert all(torch.equal(found[0], other) for other in found), "orders of warps and lanes differ"
            parts = values.partials_of(case, [300, 301, case.V])
            merged = partials.merge(partials.stack(parts), case.y, case.row_ptr, case.V, values.STATS)
            values.check_statistics(case, merged)


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    changes = {name: mistake[:3] for name, mistake in MISTAKES.items()}
    with mutants.libraries(tmp_path_factory.mktemp("mutants"), changes, "cuda/rows.cu") as found:
        yield found


def test_the_kernels_as_they_are_pass(libraries):
    assert mutants.outcome(verify, libraries[mutants.AS_THEY_ARE].result()) == ""


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_seen(libraries, name):
    said = mutants.outcome(verify, libraries[name].result())
    assert said, "not seen"
    assert re.search(MISTAKES[name][3], said), said


HEAD, SIZES = "everything", "4096-csr-everything or 33-csr-everything or 1-csr-everything"
SANITIZED_RUNS = {  # name: (value tests, change, what it says)
    "as they are": (
        f"row_stats and {HEAD} or fused_policy and ({SIZES}) or grad_logits and {HEAD} or order or finite",
        (),
        "",
    ),
    "too little shared memory": (
        "fused_policy and 4096-one-plain",
        ("cuda/rows.cu", "columns_of(job.rows.vocab, how.cluster) + 4)", "columns_of(job.rows.vocab, how.cluster))"),
        "overflow",
    ),
    "a vector load off its boundary": (
        "fused_policy and 4096-one-plain",
        ("cuda/rows.cu", "source + slice.begin + out_lead) == 0", "source + slice.begin + out_lead) >= 0"),
        "misaligned",
    ),
}


@pytest.fixture(scope="module")
def sanitized_runs(tmp_path_factory):
    runs = {name: (values.__file__, chosen, change or None) for name, (chosen, change, _) in SANITIZED_RUNS.items()}
    with mutants.sanitized(tmp_path_factory.mktemp("sanitized"), runs) as found:
        yield found


@pytest.mark.parametrize("name", SANITIZED_RUNS)
def test_values_under_the_sanitizers(sanitized_runs, name):
    done, says = sanitized_runs[name].result(), SANITIZED_RUNS[name][2]
    output = done.stdout[-4000:] + done.stderr[-4000:]
    assert (done.returncode == 0) == (name == "as they are"), output
    assert says in done.stdout + done.stderr, output
