"""Tests of the tests of distillation: known mistakes, written into the kernels' text, must each turn a check red."""

from __future__ import annotations

import re
from pathlib import Path

import mutants
import pytest
import test_cuda_distill as values
import torch
from distill_case import Pair
from emulate import ORDERS, launches, padded, running
from test_cuda_values import check, gradient_of, padding_is_nan

from drift_kernels.backends import cuda
from drift_kernels.backends.contract import BucketSlopes, Chunk, Coefs
from drift_kernels.calls import HeadOptions

LAUNCHES = [
    {"threads": 64, "cluster": 1, "on_chip": False},
    {"threads": 64, "cluster": 1, "on_chip": True},
    {"threads": 32, "cluster": 4, "on_chip": True},
]
# name: (file below csrc, text, replacement, what the failure says)
DISTILL = {
    "student and teacher swapped in the ratio": (
        "divergence.h", "const R u = log_t - log_s;", "const R u = log_s - log_t;", "error",
    ),
    "student and teacher swapped in the sums": (
        "cuda/distill.cu", "some.add({both.student, both.teacher});", "some.add({both.teacher, both.student});", "error",
    ),
    "alpha for 1 - alpha": (
        "divergence.h", "const R own = more ? alpha : R(1) - alpha;", "const R own = more ? R(1) - alpha : alpha;", "error",
    ),
    "a gradient without the divergence itself": (
        "divergence.h", "t.weight * s * (kept - t.student_kl)", "t.weight * s * kept", "gradient 1.0: error",
    ),
    "a mixed gradient without the divergence itself": (
        "divergence.h", "(R(1) - t.alpha) * s * (kept - t.student_kl)", "(R(1) - t.alpha) * s * kept", "gradient 0.4: error",
    ),
    "the student's row of the teacher's": (
        "cuda/distill.cu", "Row(job.teacher_rows, other);", "Row(job.teacher_rows, row);", "error|signal",
    ),
    "no look at which row is taught": (
        "cuda/terms.h", "return taught ? taught[row] : row;", "return row;", "error|signal|Error",
    ),
    "the teacher's head forgotten": (
        "cuda/distill.cu", "Row(job.teacher_rows, other);",
        "[&] { Row r(job.teacher_rows, other); r.t = student.t, r.plain = student.plain; return r; }();", "error",
    ),
    "a weight of 0 ignored": (
        "cuda/distill.cu", "const Kind slope = t.weight != 0 ? kind : Kind::none;", "const Kind slope = Kind::none;", "error",
    ),
    "the target's own term forgotten": (
        "cuda/distill.cu", "static_cast<int>(j) + i == others.column ? others.target : 0.0f", "0.0f", "error",
    ),
    "the target one column off": (
        "cuda/distill.cu",
        "static_cast<int>(j) + i == others.column ?", "static_cast<int>(j) + i + 1 == others.column ?", "error",
    ),
    "the slope of the softcap forgotten": (
        "cuda/distill.cu", "student.t.slope(z) * (gradient_at", "student.t.flat * (gradient_at", "error",
    ),
    "logits kept one column off": (
        "cuda/distill.cu", "keep<N>(kept + j + u * step, y + u * N);", "keep<N>(kept + j + u * step, z + u * N);", "error",
    ),
    "a divergence written by every block's row": (
        "cuda/distill.cu", "put(job.teacher.divergence, other,", "put(job.teacher.divergence, row,", "error|signal",
    ),
    "no cluster barrier after the sums": (
        "cuda/device.h", "if (threadIdx.x == 0) total = s;\n  cluster.sync();",
        "if (threadIdx.x == 0) total = s;\n  __syncthreads();", "ended",
    ),
    "no barrier after the sums": (
        "cuda/device.h", "if (threadIdx.x == 0) total = s;\n  cluster.sync();", "if (threadIdx.x == 0) total = s;",
        "error|differ|ended|nan",
    ),
    "a tail one column short": ("cuda/device.h", "if (tail < s.end)", "if (tail + 1 < s.end)", "error|padding"),
    "live rows not told": (
        "cuda/distill.cu", "if (first) job.live[row] = live;", "if (first) job.live[row] = 1;", "live",
    ),
}  # fmt: skip
BUCKETS = {
    "no barrier before the counts are read": (
        "cuda/buckets.cu", "found[turn][warp()] = mine;\n    __syncthreads();", "found[turn][warp()] = mine;", "top.k|signal",
    ),
    "one set of counts": (
        "cuda/buckets.cu", "begin < V; begin += tile, turn ^= 1)", "begin < V; begin += tile)", "top.k|signal",
    ),
    "no barrier in the sort": (
        "cuda/buckets.cu", "apart /= 2) {\n      __syncthreads();", "apart /= 2) {", "top.k|signal",
    ),
    "no barrier after the sort": (
        "cuda/buckets.cu", "list[a] = y, list[b] = x;\n      }\n    }\n  __syncthreads();",
        "list[a] = y, list[b] = x;\n      }\n    }", "top.k|signal",
    ),
    "a NaN first": ("cuda/buckets.cu", "z == z ? z + 0.0f : -INFINITY", "z + 0.0f", "top-k"),
    "-0 below 0": ("cuda/buckets.cu", "z == z ? z + 0.0f", "z == z ? z", "top-k"),
    "negative numbers the wrong way round": ("cuda/buckets.cu", "bits >> 31 ? ~bits :", "bits >> 31 ? bits :", "top-k"),
    "the higher of equal ones first": (
        "cuda/buckets.cu", "uint64_t(image) << 32 | ~static_cast<uint32_t>(column)",
        "uint64_t(image) << 32 | static_cast<uint32_t>(column) ^ 0x55", "top-k",
    ),
    "a list cut before it is full": (
        "cuda/buckets.cu", "count = count < k ? count : k;", "count = count < k ? count : k - 1;", "top.k|signal",
    ),
    "the row's first columns left out": (
        "cuda/buckets.cu", "int64_t begin = lead ? lead - N : 0;", "int64_t begin = lead;", "top-k",
    ),
    "kept tokens in the rest": ("cuda/buckets.cu", "marked[ids[a] - begin] = 1;", "marked[ids[a] - begin] = 0;", "rest"),
    "marks left from the last tile": (
        "cuda/buckets.cu", "words[i] = 0;\n", "if (begin == 0) words[i] = 0;\n", "rest",
    ),
    "no barrier before marks are read": (
        "cuda/buckets.cu", "marked[ids[a] - begin] = 1;\n    __syncthreads();", "marked[ids[a] - begin] = 1;", "rest|differ",
    ),
    "no barrier before marks are cleared": (
        "cuda/buckets.cu", "sums.add(z);\n    });\n    __syncthreads();", "sums.add(z);\n    });", "rest|differ",
    ),
    "1 - kept": ("cuda/buckets.cu", "if (kept.of[0] > 0.5f) {", "if (kept.of[0] > 2.0f) {", "rest"),
    "the rest's share as if all had it": (
        "cuda/buckets.cu", "- drest * share;", "+ drest;", "gradient",
    ),
    "a token of the buckets that counts as one of the rest": (
        "cuda/buckets.cu", "(of_ids.lse.log_prob(z), 0.0f, of_ids)", "(of_ids.lse.log_prob(z), 0.0f, of_rest)", "gradient",
    ),
    "the target forgotten in its bucket": (
        "cuda/buckets.cu", "(ids[a] == others.column ? others.target : 0.0f)", "0.0f", "gradient",
    ),
    "no barrier before buckets are written": (
        "cuda/buckets.cu", "if (!live) return;\n  __syncthreads();", "if (!live) return;", "gradient|differ",
    ),
    "no look at which row is taught": (
        "cuda/terms.h", "return taught ? taught[row] : row;", "return row;", "",
    ),
}  # fmt: skip


def verify_distill(library: Path, monkeypatch) -> None:
    """A short form of the value tests: every launch in every order, values, padding, repetition."""
    with running(library, monkeypatch) as choose:
        for alpha in (0.0, 0.4, 1.0):
            case = Pair(5, 1001, "everything", seed=3)
            x, wide = case.student.x, case.student.x.double()
            dx_own, dx = (gradient_of(lambda x: case.loss(x, alpha), x) for x in (x, wide))  # noqa: B023
            found = []
            for launch in LAUNCHES:
                for order in ORDERS:
                    choose(order)
                    out = padded(case.C, case.V, torch.float32, 3, 1)
                    with monkeypatch.context() as patch:
                        launches(patch, **launch)
                        divergence, live = values.fused(
                            case, alpha, out, values.placed(x, 2, 1), values.placed(case.teacher.x, 1, 2)
                        )
                    check(
                        f"divergence {alpha}",
                        divergence,
                        case.divergences(x, alpha),
                        case.divergences(wide, alpha),
                        3.0,
                    )
                    check(f"gradient {alpha}", out, dx_own, dx, case.scale)
                    assert padding_is_nan(out), "padding was written, or a column was not"
                    assert torch.equal(live.bool(), case.live(case.weights[case.where] != 0)), "live rows are others"
                    found.append(out)
                assert all(torch.equal(found[-1], other) for other in found[-4:]), "orders of warps and lanes differ"


def verify_buckets(library: Path, monkeypatch) -> None:
    """Likewise."""
    case = Pair(4, 17_000, "temperature", seed=3)
    x, wide, k = case.student.x, case.student.x.double(), 40
    ids = values.some_ids(case, k, case.student.logits(wide))
    ids[:, 0] = torch.tensor([4, 16_999, 6])  # in both tiles
    ids[:, 1:3] = torch.tensor([16_383, 16_384])
    ids[1, 3:] = case.student.logits(wide)[case.where[1]].topk(k + 5).indices[5 : 5 + k - 3]
    case.student.targets[0] = ids[case.taught[0], 0]
    sure = case.student.x[case.where[0]]
    sure[4], sure[16_384 + 4] = 30.0, 12.0  # nearly all there is, and nearly all the rest, at the same place of a tile
    ids[0, 3:] = torch.arange(100, 100 + k - 3)
    lse, *coefs = case.others()
    dlogprobs, drest = torch.randn(3, k, generator=case.g), torch.randn(3, generator=case.g)

    def loss(x):
        logprobs, rest = case.bucket_logprobs(x, ids)
        total = (dlogprobs.to(x.dtype) * logprobs).sum() + case.other_losses(x)
        return total + (drest.to(x.dtype) * rest).sum()

    dx_own, dx = gradient_of(loss, x), gradient_of(loss, wide := case.student.x.double())
    own, exact, found = case.bucket_logprobs(x, ids), case.bucket_logprobs(wide, ids), []
    ordered = torch.randn(4, 3000, generator=case.g).round(decimals=1)
    ordered[0] = ordered[0].sort().values
    ordered[1, ::7] = float("nan")
    ordered[2] = -ordered[2].abs() - 1
    ordered[2, 5::9], ordered[2, 6::9] = 0.0, -0.0
    ordered[1:, 0] = 9.0
    plain = Chunk(torch.zeros(4, dtype=torch.int64), None, None, None, HeadOptions())
    moved = values.placed(x, 1, 1)
    with running(library, monkeypatch) as choose, monkeypatch.context() as patch:
        launches(patch, threads=64)
        for order in ORDERS:
            choose(order)
            best = cuda.top_k(values.placed(ordered, 1, 1), plain, None, 4, 100)
            assert torch.equal(best, values.best(ordered, 100)), "top-k is another"
            logprobs, rest = cuda.bucket_logprobs(moved, case.student.chunk, case.taught, lse, ids, True)
            check("log-probs", logprobs, own[0], exact[0], 10.0)
            check("rest", rest, own[1], exact[1], 10.0)
            out = padded(case.C, case.V, torch.float32, 3, 1)
            slopes = BucketSlopes(ids, dlogprobs, exact[1].float(), drest)
            given = (case.student.chunk, Coefs(lse, *coefs), case.taught, slopes)
            cuda.grad_buckets(moved, *given, out=out)
            check("gradient", out, dx_own, dx, case.scale)
            assert padding_is_nan(out), "padding was written, or a column was not"
            found.append([logprobs, rest, out])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other)), "orders of warps and lanes differ"


def libraries_of(kernel: str, mistakes: dict, folder: Path):
    return mutants.libraries(folder, {name: mistake[:3] for name, mistake in mistakes.items()}, f"cuda/{kernel}.cu")


@pytest.fixture(scope="module")
def distill_libraries(tmp_path_factory):
    with libraries_of("distill", DISTILL, tmp_path_factory.mktemp("distill")) as found:
        yield found


@pytest.fixture(scope="module")
def buckets_libraries(tmp_path_factory):
    with libraries_of("buckets", BUCKETS, tmp_path_factory.mktemp("buckets")) as found:
        yield found


def see(said: str, expected: str):
    assert said, "not seen"
    assert re.search(expected, said), said


def test_the_kernels_as_they_are_pass(distill_libraries, buckets_libraries):
    assert mutants.outcome(verify_distill, distill_libraries[mutants.AS_THEY_ARE].result()) == ""
    assert mutants.outcome(verify_buckets, buckets_libraries[mutants.AS_THEY_ARE].result()) == ""


@pytest.mark.parametrize("name", DISTILL)
def test_a_mistake_in_the_divergence_is_seen(distill_libraries, name):
    see(mutants.outcome(verify_distill, distill_libraries[name].result()), DISTILL[name][3])


@pytest.mark.parametrize("name", BUCKETS)
def test_a_mistake_in_the_buckets_is_seen(buckets_libraries, name):
    see(mutants.outcome(verify_buckets, buckets_libraries[name].result()), BUCKETS[name][3])


SANITIZED_RUNS = {  # name: (value tests, file, text, replacement, what it says)
    mutants.AS_THEY_ARE: (
        "fused_distill and everything and (33 or 1001) or every_row or edges or order or buckets and 1001-everything or "
        "outside or small_rest or top_k and 1001-plain",
        (),
        "",
    ),
    "too little shared memory for the pair": (
        "fused_distill and 1001-0.3-plain",
        ("cuda/distill.cu", "2 * (columns_of(job.rows.vocab, how.cluster) + 4)", "2 * columns_of(job.rows.vocab, how.cluster)"),
        "overflow",
    ),
    "an unaligned teacher read as aligned": (
        "fused_distill and 1001-0.3-plain",
        ("cuda/distill.cu", "lead_of(teacher.x + slice.begin) == lead;", "lead_of(teacher.x + slice.begin) >= 0;"),
        "misaligned",
    ),
    "a tile of top-k that reads past the row": (
        "top_k and 1001-plain",
        ("cuda/buckets.cu", "if (j >= 0 && j + N <= V) {", "if (j >= 0 && j < V) {"),
        "AssertionError|AddressSanitizer",
    ),
    "an id outside the vocabulary read": (
        "outside",
        ("cuda/buckets.cu", "ids[a] >= 0 && ids[a] < V ? logits.at(ids[a]) : NAN", "logits.at(ids[a])"),
        "AssertionError|AddressSanitizer",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def sanitized_runs(tmp_path_factory):
    runs = {name: (values.__file__, chosen, change or None) for name, (chosen, change, _) in SANITIZED_RUNS.items()}
    with mutants.sanitized(tmp_path_factory.mktemp("sanitized"), runs) as found:
        yield found


@pytest.mark.parametrize("name", SANITIZED_RUNS)
def test_values_under_the_sanitizers(sanitized_runs, name):
    done, says = sanitized_runs[name].result(), SANITIZED_RUNS[name][2]
    output = done.stdout[-4000:] + done.stderr[-4000:]
    assert (done.returncode == 0) == (name == mutants.AS_THEY_ARE), output
    assert re.search(says, done.stdout + done.stderr), output
