"""The Triton kernels of distillation in the interpreter against float64: every divergence, option, size and output type."""

import math

import pytest
import torch
from row_oracle import make_rows, padded
from teacher_oracle import bucketed, distilled, logits, make_pair, without_a_target

from drift_kernels.backends import triton as backend
from drift_kernels.backends.contract import BucketSlopes, Coefs, TeacherChunk
from drift_kernels.backends.triton import launch
from drift_kernels.calls import HeadOptions
from drift_kernels.testing import within_budget

ALPHAS = [0.0, 0.1, 0.5, 1.0]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CAPPED = HeadOptions(softcap=3.0, logit_scale=1.3, temperature=0.6)
HEADS = {
    "plain": {},
    "everything": {"head": CAPPED, "bias": True},
    "per row": {"per_row": True, "head": HeadOptions(logit_scale=-0.7)},
}
VOCABS = [1, 2, 127, 1024, 1027, 4099, 9001]


def close(name, actual, own, wanted, dtype=torch.float32, scale=None):
    ok, line = within_budget(actual, own, wanted, dtype, scale)
    assert ok, f"{name}: {line}"


def arguments(pair):
    """What every gradient takes of other terms, by the backend's own statistics."""
    stats = backend.row_stats(pair.student.x, pair.student.chunk, ("lse", "entropy"))
    coefs = pair.coefs
    others = (coefs["logprobs"], coefs["entropy"], stats["entropy"], coefs["lse"]) if coefs else ()
    return stats["lse"], *others


def size_of(pair):
    """How large the numbers are that cancel in a divergence and in its gradient."""
    z = logits(pair.student, pair.student.x).abs().max()
    return max(1.0, math.log(pair.student.x.shape[1]), float(z))


def buffer(pair, dtype):
    """For gradients, 7 in it and around it: what lies behind the vocabulary has a gradient of NaN."""
    out = pair.student.out(dtype)
    out._base.fill_(7.0)
    return out


def outside_is_untouched(out):
    whole = out._base.clone()
    whole[1:-1, : out.shape[1]] = 0
    return int((whole == 7).sum()) == whole.numel() - out.numel()


def check_distill(pair, alpha, dtype=torch.float32):
    x, y = pair.student.x, pair.teacher.x
    before = x.clone(), y.clone()
    its = backend.row_stats(y, pair.teacher.chunk, ("lse",))["lse"]
    lse, *others = arguments(pair)
    teacher = TeacherChunk(y, pair.teacher.chunk, its, pair.taught)
    out = buffer(pair, dtype)
    coefs = Coefs(lse, *others)
    values, live = backend.fused_distill(x, pair.student.chunk, coefs, teacher, pair.weights, alpha, out=out)
    alone, nothing = backend.fused_distill(x, pair.student.chunk, Coefs(lse), teacher, pair.weights, alpha)
    assert nothing is None
    assert torch.equal(alone, values)
    own, exact = (distilled(pair, alpha, d) for d in (torch.float32, torch.float64))
    close("divergence", values, own[0], exact[0], scale=size_of(pair))
    # a gradient is s·(log-ratio − divergence): its error is that of the log-ratio times s
    largest = max(float(exact[1].abs().max()), float(torch.softmax(logits(pair.student, x), -1).max()))
    close("gradient", out, own[1].to(dtype), exact[1], dtype, scale=largest)
    assert outside_is_untouched(out), "wrote outside the rows"
    assert torch.equal(x, before[0]), "products stay what they are"
    assert torch.equal(y, before[1])
    trained = (pair.weights != 0) & (pair.index >= 0)
    for coefs in pair.coefs.values():
        trained |= coefs != 0
    assert torch.equal(live.bool(), trained)
    assert bool((out[~trained] == 0).all())


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_divergence_and_gradient(alpha, head, dtype):
    check_distill(make_pair(6, 150, seed=1, **HEADS[head]), alpha, dtype)


@pytest.mark.parametrize(
    ("vocab", "alpha"), [*((vocab, 0.5) for vocab in VOCABS), (1027, 0.0), (1027, 1.0), (4099, 0.0), (4099, 1.0)]
)
def test_every_size(vocab, alpha):
    check_distill(make_pair(4, vocab, seed=2, **HEADS["everything"]), alpha, torch.bfloat16)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("some", [False, True])
def test_without_other_terms(alpha, some):
    check_distill(make_pair(6, 150, seed=3, some=some, others=False), alpha)


def test_a_vocabulary_of_more_than_two_to_the_seventeen():
    check_distill(make_pair(2, 131_075, seed=4, **HEADS["everything"]), 0.5, torch.float16)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_sure_rows_far_apart(alpha):
    """Probabilities that are 0 in fp32 on one side and not on the other: nothing overflows, and no 0·∞ comes up."""
    pair = make_pair(4, 300, seed=5, some=False, others=False)
    for rows, column in ((pair.student, 3), (pair.teacher, 200)):
        rows.x[:, column] = 150.0
    check_distill(pair, alpha)


@pytest.mark.parametrize("alpha", [0.1, 0.5])
def test_masked_logits_on_both_sides(alpha):
    pair = make_pair(4, 1100, seed=6, some=False, others=False)
    pair.student.x[:, 100:400] = float("-inf")
    pair.teacher.x[:, 300:600] = float("-inf")
    pair.teacher.chunk.targets.fill_(0)
    check_distill(pair, alpha)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_masked_logits_where_the_divergence_is_finite(alpha):
    pair = make_pair(4, 1100, seed=7, some=False, others=False)
    (pair.student if alpha else pair.teacher).x[:, 300:600] = float("-inf")
    check_distill(pair, alpha)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_equal_rows_have_neither_divergence_nor_gradient(alpha):
    pair = make_pair(3, 2000, seed=8, some=False, others=False)
    pair.teacher.x.copy_(pair.student.x)
    pair.teacher.chunk = pair.student.chunk
    lse = backend.row_stats(pair.student.x, pair.student.chunk, ("lse",))["lse"]
    out = pair.student.out(torch.float32)
    teacher = TeacherChunk(pair.teacher.x, pair.student.chunk, lse)
    values, _ = backend.fused_distill(
        pair.student.x, pair.student.chunk, Coefs(lse), teacher, pair.weights, alpha, out=out
    )
    assert float(values.abs().max()) < 1e-6
    assert float(out.abs().max()) < 1e-6


@pytest.mark.parametrize(("alpha", "column"), [(0.0, 0), (0.5, 1023), (0.5, 1099), (1.0, 1024)])
def test_a_nan_shows_in_its_row_alone_and_only_where_the_teacher_counts(alpha, column):
    pair = without_a_target(make_pair(6, 1100, seed=9), 3)
    pair.weights[3] = 0  # taught, but of no weight
    named = {row: int(pair.index[row]) for row in (0, 3)}
    for j in named.values():
        pair.teacher.x[j, column] = float("nan")
    its = backend.row_stats(pair.teacher.x, pair.teacher.chunk, ("lse",))["lse"]
    lse, *others = arguments(pair)
    out = pair.student.out(torch.bfloat16)
    teacher = TeacherChunk(pair.teacher.x, pair.teacher.chunk, its, pair.taught)
    values, live = backend.fused_distill(
        pair.student.x, pair.student.chunk, Coefs(lse, *others), teacher, pair.weights, alpha, out=out
    )
    assert values.isnan().tolist() == [j in named.values() for j in range(len(values))]
    assert out.isnan().any(1).tolist() == [row == 0 for row in range(6)]
    assert live[3] == 0


# ---- the k largest


def largest(rows, k):
    """Ids [C, k] by the logits as fp32 has them: the kernel's order is that of the logits it sees."""
    z = logits(rows, rows.x).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    return torch.sort(z, dim=-1, descending=True, stable=True).indices[:, :k]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("vocab", "k"), [(1, 1), (150, 1), (150, 9), (150, 150), (4099, 100), (9001, 130)])
def test_top_k(head, vocab, k):
    pair = make_pair(5, vocab, seed=10, **HEADS[head])
    found = backend.top_k(pair.student.x, pair.student.chunk, pair.taught, len(pair.its), k)
    z = logits(pair.student, pair.student.x.double())[pair.its]
    assert found.shape == (len(pair.its), k)
    assert all(len(set(row.tolist())) == k for row in found), "an id twice"
    values, wanted = z.gather(1, found), z.gather(1, largest(pair.student, k)[pair.its])
    torch.testing.assert_close(values, wanted, rtol=1e-6, atol=1e-6)  # logits closer than that may change places
    if head == "plain":
        assert torch.equal(found, largest(pair.student, k)[pair.its])


def test_of_equal_logits_the_lower_ids_come_first():
    rows = make_rows(4, 9001, seed=11)
    rows.x[0] = 1.5
    rows.x[1] = torch.randint(0, 3, (9001,), generator=torch.Generator().manual_seed(0)).float()
    rows.x[2] = torch.tensor([0.0, -0.0]).repeat(4501)[:9001]
    rows.x[3] = float("-inf")
    for k in (1, 64, 4097):
        assert torch.equal(backend.top_k(rows.x, rows.chunk, None, 4, k), largest(rows, k)), k


def test_a_nan_comes_last_and_infinities_in_their_places():
    rows = make_rows(2, 5000, seed=12)
    rows.x[:, [0, 4999, 2500]] = torch.tensor([float("nan"), float("inf"), float("nan")])
    rows.x[1, 7:4990] = float("-inf")
    for k in (5, 17, 40):
        assert torch.equal(backend.top_k(rows.x, rows.chunk, None, 2, k), largest(rows, k))


@pytest.mark.parametrize("k", [40, 200])
def test_the_largest_may_all_lie_in_one_lane(k):
    """So that many columns pass the bound by the lanes' maxima. One program takes all rows."""
    rows = make_rows(3, 9001, seed=14)
    rows.x[0] = torch.arange(9001).float()
    rows.x[1, 5 :: launch.KEY_BLOCK] += 50.0
    rows.x[2] = torch.arange(9001).remainder(launch.KEY_BLOCK).float()  # rising in each block: ties across blocks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "CANDIDATES", 1)
        assert torch.equal(backend.top_k(rows.x, rows.chunk, None, 3, k), largest(rows, k))


def test_candidates_stay_within_their_room(monkeypatch):
    """Where blocks fall off, one lane maximum too few would let all columns of the first blocks through."""
    V, k, empty, behind = 10_000, 40, torch.empty, []

    def guarded(shape, **options):
        if not isinstance(shape, tuple) or options.get("dtype") != torch.int64:
            return empty(shape, **options)
        size = math.prod(shape)
        whole = torch.full((size + V,), -1)
        behind.append(whole[size:])
        return whole[:size].view(shape)

    rows = make_rows(2, V, seed=18)
    rows.x.copy_(-torch.arange(V).float().expand(2, V))
    monkeypatch.setattr(torch, "empty", guarded)
    ids = backend.top_k(rows.x, rows.chunk, None, 2, k)
    assert len(behind) == 1
    assert bool((behind[0] == -1).all()), "wrote behind the list"
    assert torch.equal(ids, torch.arange(k).expand(2, k))


def test_top_k_of_a_large_vocabulary():
    rows = make_rows(1, 131_075, seed=13)
    assert torch.equal(backend.top_k(rows.x, rows.chunk, None, 1, 100), largest(rows, 100))


def test_rows_that_nobody_names_hold_ids_of_the_vocabulary():
    rows = make_rows(3, 100, seed=14)
    found = backend.top_k(rows.x, rows.chunk, torch.tensor([0, -1, -1]), 3, 4)
    assert torch.equal(found[0], largest(rows, 4)[0])
    assert bool(((found >= 0) & (found < 100)).all())


# ---- log-probs of a few tokens and the rest


def check_buckets(pair, ids, tail=True, dtype=torch.float32, drest=None, dlogprobs=None):
    g = torch.Generator().manual_seed(1)
    (n, k), x, chunk = ids.shape, pair.student.x, pair.student.chunk
    if dlogprobs is None:
        dlogprobs = torch.randn(n, k, generator=g)
        dlogprobs[0] = 0
    if tail and drest is None:
        drest = torch.randn(n, generator=g)
        drest[: n if k == x.shape[1] else n // 2] = 0  # where nothing is left, nothing hangs on the rest
    lse, *others = arguments(pair)
    logprobs, rest = backend.bucket_logprobs(x, chunk, pair.taught, lse, ids, tail)
    own, exact = (bucketed(pair, ids, dlogprobs, drest, d) for d in (torch.float32, torch.float64))
    scale = size_of(pair)
    close("logprobs", logprobs, own[0], exact[0], scale=scale)
    if tail:
        finite = exact[1].isfinite()
        assert torch.equal(rest.isfinite(), finite)
        close("rest", rest[finite], own[1][finite], exact[1][finite], scale=scale)
    out = buffer(pair, dtype)
    slopes = BucketSlopes(ids, dlogprobs, rest, drest)
    live = backend.grad_buckets(x, chunk, Coefs(lse, *others), pair.taught, slopes, out=out)
    close("gradient", out, own[2].to(dtype), exact[2], dtype, scale=max(1.0, float(exact[2].abs().max())))
    assert outside_is_untouched(out)
    trained = torch.zeros(x.shape[0], dtype=torch.bool)
    trained[pair.its] = (dlogprobs != 0).any(1) if drest is None else (dlogprobs != 0).any(1) | (drest != 0)
    for coefs in pair.coefs.values():
        trained |= coefs != 0
    assert torch.equal(live.bool(), trained)
    assert bool((out[~trained] == 0).all())


def some_ids(pair, k, seed=0):
    """Ids [n, k] in no order, the target and the largest logit of some rows among them."""
    V = pair.student.x.shape[1]
    g = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(V, generator=g)[:k] for _ in pair.its])
    for row, at in enumerate(pair.its.tolist()):
        wanted = int(pair.student.chunk.targets[at]) if row % 2 else int(pair.student.x[at].argmax())
        if wanted >= 0 and wanted not in ids[row]:
            ids[row, row % k] = wanted
    return ids


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_buckets(head, tail, dtype):
    pair = make_pair(6, 150, seed=15, **HEADS[head])
    check_buckets(pair, some_ids(pair, 7), tail, dtype)


@pytest.mark.parametrize(("vocab", "k"), [(1, 1), (2, 1), (127, 126), (4096, 3), (4099, 129), (9001, 100)])
@pytest.mark.parametrize("others", [True, False])
def test_buckets_of_every_size(vocab, k, others):
    pair = make_pair(5, vocab, seed=16, others=others, **HEADS["everything"])
    check_buckets(pair, some_ids(pair, k), dtype=torch.bfloat16)


def test_buckets_of_a_large_vocabulary():
    pair = make_pair(2, 131_075, seed=17)
    check_buckets(pair, some_ids(pair, 100), dtype=torch.bfloat16)


@pytest.mark.parametrize("lead", [3.0, 8.0, 30.0])
def test_what_the_kept_tokens_leave_does_not_cancel(lead):
    """Kept tokens with nearly all of the probability: the rest is summed, not subtracted from 1."""
    pair = make_pair(5, 5000, seed=18, others=False)
    ids = backend.top_k(pair.student.x, pair.student.chunk, pair.taught, len(pair.its), 20)
    for row, at in enumerate(pair.its.tolist()):
        pair.student.x[at, ids[row]] += lead
    lse = backend.row_stats(pair.student.x, pair.student.chunk, ("lse",))["lse"]
    logprobs, rest = backend.bucket_logprobs(pair.student.x, pair.student.chunk, pair.taught, lse, ids, True)
    zeros = torch.zeros(len(pair.its))
    own, exact = (bucketed(pair, ids, zeros[:, None], None, d)[1] for d in (torch.float32, torch.float64))
    assert bool((logprobs.exp().sum(1) > 0.5).all())
    close("rest", rest, own, exact, scale=float(exact.abs().max()))
    # The gradient that a divergence of the rest's share alone would have: its derivative by log rest is the share itself.
    check_buckets(pair, ids, drest=exact.exp().float() / exact.exp().max().float())


def test_all_tokens_leave_nothing():
    pair = make_pair(3, 40, seed=19, some=False)
    ids = torch.stack([torch.randperm(40, generator=torch.Generator().manual_seed(i)) for i in range(3)])
    check_buckets(pair, ids, drest=torch.zeros(3))
    rest = backend.bucket_logprobs(pair.student.x, pair.student.chunk, None, *arguments(pair)[:1], ids, True)[1]
    assert rest.tolist() == [-math.inf] * 3


def test_an_id_outside_the_vocabulary_is_nan_and_touches_nothing():
    pair = make_pair(4, 100, seed=20, some=False)
    ids = some_ids(pair, 5)
    ids[1, 2], ids[2, 0] = 100, -1
    lse = arguments(pair)[0]
    logprobs, rest = backend.bucket_logprobs(pair.student.x, pair.student.chunk, None, lse, ids, True)
    assert logprobs.isnan().any(1).tolist() == [False, True, True, False]
    assert rest.isnan().tolist() == [False, True, True, False]


# ---- what it cannot read


def test_what_it_cannot_read_raises():
    pair = make_pair(2, 100, some=False, others=False)
    x, y, chunk, its = pair.student.x, pair.teacher.x, pair.student.chunk, pair.teacher.chunk
    one = torch.ones(2)
    with pytest.raises(TypeError, match="float32"):
        backend.fused_distill(x, chunk, Coefs(one), TeacherChunk(y.double(), its, one), one, 0.5)
    narrow = TeacherChunk(padded(2, 99, torch.float32), its, one)
    with pytest.raises(ValueError, match="99 columns"):
        backend.fused_distill(x, chunk, Coefs(one), narrow, one, 0.5)
    with pytest.raises(ValueError, match="weights"):
        backend.fused_distill(x, chunk, Coefs(one), TeacherChunk(y, its, one), torch.ones(4)[::2], 0.5)
    several = make_rows(4, 100, several=True)
    with pytest.raises(ValueError, match="row_ptr"):
        backend.top_k(several.x, several.chunk, None, 4, 1)
    ids = torch.zeros(2, 1, dtype=torch.int64)
    slopes = BucketSlopes(ids, one[:, None], None, one)
    with pytest.raises(ValueError, match="drest needs rest"):
        backend.grad_buckets(x, chunk, Coefs(one), None, slopes, out=x.clone())
    slopes = BucketSlopes(ids, one[:, None], one, one)
    with pytest.raises(ValueError, match="entropy"):
        backend.grad_buckets(x, chunk, Coefs(one, None, one), None, slopes, out=x.clone())
