"""A test of the tests: each mutation of a kernel's text, loaded in the kernel's place, must turn a check red."""

import importlib.util
import sys
from pathlib import Path

import mutants
import pytest
import test_triton_distill as distill_tests
import test_triton_distill_ops as distill_ops
import test_triton_machine as machine
import test_triton_ops as ops
import test_triton_rows as row_tests
import test_triton_score as score_tests
import torch
from row_oracle import make_rows
from teacher_oracle import make_pair

import drift_kernels as dk
from drift_kernels import gpu_sweep, registered, sweeps
from drift_kernels.backends import triton as backend
from drift_kernels.backends.contract import Chunk
from drift_kernels.backends.triton import scorer
from drift_kernels.calls import HeadOptions
from drift_kernels.testing import make_case

PACKAGE = Path(backend.__file__).parent
ROOM = "drift_kernels.backends.triton."
DRIVERS = ("gpu_sweep", "distill_driver")


def everything():
    rows = make_rows(3, 4099, seed=21, bias=True, head=row_tests.CAPPED)
    row_tests.check_policy(rows, row_tests.SPECS["everything"])


def clipping():
    row_tests.check_policy(make_rows(40, 50, seed=22), row_tests.SPECS["ppo"])


def kl():
    row_tests.check_policy(make_rows(20, 50, seed=23), row_tests.SPECS["kl k3"])


def several():
    row_tests.check_policy(make_rows(3, 300, seed=24, several=True), row_tests.SPECS["everything"])


def small_probabilities():
    rows = make_rows(3, 9001, seed=25)
    rows.x[:, :5000] -= 40.0  # the running maximum comes late
    row_tests.check_statistics(rows, backend.row_stats(rows.x, rows.chunk, row_tests.STATISTICS))


def blocks():
    rows = make_rows(3, 9001, seed=29)
    row_tests.check_statistics(rows, backend.row_stats(rows.x, rows.chunk, row_tests.STATISTICS))


def scores():
    """With the vocabulary in several spans, and in one."""
    for dtype, programs in ((torch.float32, scorer.PROGRAMS), (torch.bfloat16, 1)):
        case = make_case(70, 40, 515, dtype=dtype, masked=0.1, seed=26)
        targets = torch.where(case.targets < 0, -1, case.targets)
        targets[3] = 514
        chunk = Chunk(targets, None, None, None, HeadOptions())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scorer, "PROGRAMS", programs)
            found = backend.score(case.hidden.to(dtype), case.weight.to(dtype), chunk, row_tests.STATISTICS)
        score_tests.check(found, case, chunk, dtype)


def pointers():
    """An odd width, which descriptors do not take; NaN behind each row."""
    case = make_case(70, 33, 515, masked=0.0, seed=27)
    wide = torch.full((70, 40), float("nan"))
    wide[:, :33] = case.hidden
    chunk = Chunk(case.targets, None, None, None, HeadOptions())
    found = backend.score(wide[:, :33], case.weight.float(), chunk, row_tests.STATISTICS)
    score_tests.check(found, case, chunk, torch.float32)


def staged():
    case = make_case(ops.T, ops.D, ops.V, seed=28)

    def loss(h, w, b, config):
        return dk.weighted_cross_entropy(h, dk.Head(w, bias=b), case.targets, case.token_weights, config=config).loss

    ops.close(ops.NAMES, *ops.three(loss, case, torch.float32), torch.float32)


def diverging(alpha):
    def check():
        distill_tests.check_distill(make_pair(6, 1027, seed=30, **distill_tests.HEADS["everything"]), alpha)

    check.__name__ = f"diverging, alpha {alpha}"
    return check


FORWARD, MIXED, REVERSE = (diverging(alpha) for alpha in (0.0, 0.1, 1.0))


def masked_teacher():
    distill_tests.test_masked_logits_where_the_divergence_is_finite(0.0)


def untaught():
    distill_tests.test_a_nan_shows_in_its_row_alone_and_only_where_the_teacher_counts(0.5, 1099)


def largest():
    distill_tests.test_of_equal_logits_the_lower_ids_come_first()
    distill_tests.test_a_nan_comes_last_and_infinities_in_their_places()


def overfull():
    with pytest.MonkeyPatch.context() as patch:
        distill_tests.test_candidates_stay_within_their_room(patch)


def crowded():
    distill_tests.test_the_largest_may_all_lie_in_one_lane(200)  # more candidates than LIST


def buckets():
    pair = make_pair(6, 4099, seed=31, **distill_tests.HEADS["everything"])
    distill_tests.check_buckets(pair, distill_tests.some_ids(pair, 7))


def kept():
    distill_tests.test_what_the_kept_tokens_leave_does_not_cancel(8.0)


def hybrid():
    case = make_case(distill_ops.T, distill_ops.D, distill_ops.V, seed=32, dtype=torch.float32)
    op = distill_ops.hybrid(case, "JSD", torch.float32, distill_ops.ACTIVE.flip(0))
    distill_ops.check(op, case, torch.float32)


def far():
    machine.check_far_rows(described=False)


def many_columns():
    """More than 16 bits number."""
    row_tests.test_a_vocabulary_of_more_than_two_to_the_seventeen("plain")
    distill_tests.test_top_k_of_a_large_vocabulary()


MUTATIONS = [
    ("rows", "inside = cols < V\n", "inside = cols < V + 1\n", everything),  # a mask one column too wide
    ("rows", "if whole < V:", "if whole > V:", everything),  # no last block
    ("rows", "mask=cols < V)", "mask=cols < V + 1)", everything),
    ("rows", "whole = V // BLOCK * BLOCK", "whole = V // BLOCK * BLOCK - BLOCK", everything),
    ("rows", "tl.where(cols == y, coef, 0.0)", "tl.where(cols == y + 1, coef, 0.0)", everything),
    ("rows", "g -= tl.where(p != 0, E * p", "g += tl.where(p != 0, E * p", everything),
    ("rows", "tl.load(row_ptr + row + 1)", "tl.load(row_ptr + row)", several),
    ("rows", "for k in range(begin, end):\n            g +=", "for k in range(begin, begin + 1):\n            g +=", several),
    ("online", "s0 = tl.where(up, s0 * e + 1.0", "s0 = tl.where(up, s0 + 1.0", small_probabilities),
    ("online", "e * (s1 - d * s0)", "e * s1", blocks),
    ("online", "tl.sum(k * s0, axis=0)", "tl.sum(s0, axis=0)", everything),
    ("online", "slope = slope * (1.0 - t * t)", "slope = slope * (1.0 - t)", everything),
    ("policy", "(below, low, tl.where(above, high, r))", "(below, high, tl.where(above, low, r))", clipping),
    ("policy", "free <= bound", "free >= bound", clipping),
    ("policy", "tl.where(unbound, capped, below | above)", "tl.where(unbound, capped, above)", clipping),
    ("policy", "value = 1.0 - tl.exp(-d)", "value = tl.exp(-d) - 1.0", kl),
    ("scorer", "return top, k * s0 + tl.sum(e, axis=1)", "return top, s0 + tl.sum(e, axis=1)", scores),
    ("scorer", "inside = (cols < V)[None, :]", "inside = (cols < V + 1)[None, :]", scores),
    ("scorer", "first = split * tiles * BLOCK", "first = (split * tiles + 1) * BLOCK", scores),
    ("scorer", "y < tl.minimum(col0 + BLOCK, V)", "y < tl.minimum(col0 + BLOCK, V) - 1", scores),
    ("scorer", "(cols < D)[None, :]", "(cols < D + 1)[None, :]", pointers),
    ("partials", "(k * s0).sum(0)", "s0.sum(0)", score_tests.test_a_part_without_the_largest_logit_is_scaled_down),
    ("rows", "if start + BLOCK <= V:\n        z =", "if start < V:\n        z =", MIXED),
    ("rows", "element_ty), mask=cols < V)", "element_ty), mask=cols < V + 1)", MIXED),
    ("distill", "tl.where(more, alpha, 1.0 - alpha)", "tl.where(more, 1.0 - alpha, alpha)", MIXED),
    ("distill", "(1.0 - alpha) * kl + alpha * kl_t", "alpha * kl + (1.0 - alpha) * kl_t", MIXED),
    ("distill", "(of_s - kl)", "of_s", MIXED),
    ("distill", "log_s - log_t - kl", "log_s - log_t", REVERSE),
    ("distill", "weight * (s - tl.exp(log_t))", "weight * s", FORWARD),
    ("distill", "tl.where(t != 0, t * (log_t - log_s), 0.0)", "t * (log_t - log_s)", masked_teacher),
    ("distill", "tl.where(named, tl.load(weights + row), 0.0)", "tl.load(weights + row)", FORWARD),
    ("distill", "if weight != 0:", "if named:", untaught),
    ("buckets", "(bits >> 31) & 0x7FFFFFFF", "(bits >> 31) & 0x0", largest),
    ("buckets", "tl.where(z == 0, 0.0, z)", "z", largest),
    ("buckets", "tl.where(z == z, z, float(\"-inf\"))", "z", largest),
    ("buckets", "tl.cumsum(same, 0) <= k", "tl.cumsum(same, 0) < k", largest),
    ("buckets", "(u > best), u, best)", "(u > best), u, u)", overfull),
    ("buckets", "bit = bit >> 1", "bit = bit >> 2", overfull),
    ("buckets", "larger >= k, candidate", "larger > k, candidate", crowded),
    ("buckets", "for a in range(LIST, count, LIST):", "for a in range(LIST, LIST, LIST):", crowded),
    ("buckets", "rows, tl.num_programs(0)):", "rows, rows):", crowded),
    ("buckets", "if kept > 0.5:", "if kept > 2.0:", kept),
    ("buckets", "tl.load(ids + p).to(tl.int32), float(\"-inf\"), z)", "tl.load(ids + p).to(tl.int32), z, z)", kept),
    ("buckets", "tl.load(edges + block + 1)", "tl.load(edges + block)", buckets),
    ("buckets", "P_kept - d * share", "P_kept + d * share", kept),
    ("buckets", "P_kept += d", "P_kept += 0.0 * d", buckets),
    ("buckets", "log_s + H)", "log_s - H)", buckets),
    ("rows", "out + row * out_stride", "out + row * stride", everything),
    ("distill", "y + its * y_stride", "y + its * stride", MIXED),
    ("distill", "out + row * out_stride", "out + row * stride", MIXED),
    ("buckets", "out + row * out_stride", "out + row * stride", buckets),
    ("scorer", "tile(weight, weight_stride,", "tile(weight, hidden_stride,", pointers),
    ("scorer", "tile(hidden, hidden_stride,", "tile(hidden, weight_stride,", pointers),
    ("rows", "tl.program_id(0).to(tl.int64) * ROWS", "tl.program_id(0) * ROWS", far),
    ("distill", "tl.program_id(0).to(tl.int64)", "tl.program_id(0)", far),
    ("buckets", "row = tl.program_id(0).to(tl.int64)", "row = tl.program_id(0)", far),
    ("buckets", "range(tl.program_id(0).to(tl.int64), rows", "range(tl.program_id(0), rows", far),
    ("scorer", "rows.to(tl.int64)[:, None] * stride", "rows[:, None] * stride", far),
    ("rows", "y = tl.load(targets + row).to(tl.int32)", "y = tl.load(targets + row).to(tl.int16)", many_columns),
    ("buckets", "u.to(tl.int64) << 31", "u << 31", many_columns),
    ("buckets", "(V - 1 - cols).to(tl.int64)", "(V - 1 - cols).to(tl.int16).to(tl.int64)", many_columns),
    ("distill_driver", "policy_weights.masked_fill(self.unread, 0.0)", "policy_weights", hybrid),
    ("distill_driver", "x.active.sort().values", "x.active", hybrid),
    ("gpu_sweep", "add=self.weight_started", "add=False", staged),
    ("gpu_sweep", "grads.bias += dlogits", "grads.bias = dlogits", staged),
    ("gpu_sweep", "index_copy_(0, index, dhidden)", "index_copy_(0, index.flip(0), dhidden)", staged),
]  # fmt: skip


def load(name, text, folder, monkeypatch):
    """A module of this text; a file, since Triton reads the source of its kernels."""
    path = folder / f"mutant_{name}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    return module


def mutate(room, old, new, folder, monkeypatch):
    """Puts the mutated room, and those that import it, in the backend's place."""
    homes = {"partials": PACKAGE.parent, **dict.fromkeys(DRIVERS, Path(gpu_sweep.__file__).parent)}
    path = homes.get(room, PACKAGE) / f"{room}.py"
    text = path.read_text()
    assert text.count(old) >= 1, f"{room}.py has no {old!r} any more: mutate what it has now"
    mutant = load(room, text.replace(old, new), folder, monkeypatch)
    if room == "gpu_sweep":
        monkeypatch.setattr(sweeps, "GpuSweep", mutant.GpuSweep)
    if room == "distill_driver":
        monkeypatch.setattr(registered, "distill_driver", mutant)
    if room in DRIVERS:
        return
    for user in ("rows", "scorer", "distill", "buckets"):
        text = (PACKAGE / f"{user}.py").read_text()
        module = mutant
        if user != room:
            home = "drift_kernels.backends." if room == "partials" else ROOM
            module = load(user, text.replace(f"from {home}{room} ", f"from mutant_{room} "), folder, monkeypatch)
        if user != "scorer":
            monkeypatch.setattr(backend, "kernels" if user == "rows" else user, module)
        else:
            monkeypatch.setattr(scorer, "score_kernel", module.score_kernel)
    if room == "partials":
        monkeypatch.setattr(backend, "merge", mutant.merge)


CHECKS = {check.__name__: check for *_, check in MUTATIONS}


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_the_checks_pass_without_a_mutation(check):
    check()


@pytest.mark.filterwarnings("ignore:All-NaN")
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m[0]}: {m[2].strip()}")
def test_a_mutation_turns_its_check_red(mutation, tmp_path):
    """In a process of its own: some mutants write where other things lie, which later tests would suffer from."""
    *change, check = mutation

    def run(folder, monkeypatch):
        mutate(*change, folder, monkeypatch)
        check()

    said = mutants.outcome(run, tmp_path)
    assert "AssertionError" in said or said.startswith("ended by signal"), said or "not seen"
