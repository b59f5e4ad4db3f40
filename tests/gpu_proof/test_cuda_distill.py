"""The CUDA kernels of distillation, run on the CPU by `simt/`, against float64: options, dtypes, layouts, launches, edges."""

from __future__ import annotations

import mmap

import pytest
import torch
from distill_case import Pair
from emulate import H100_SHARED, ORDERS, build_as_asked, launches, padded, running
from test_cuda_values import LAUNCHES, check, gradient_of, gradients
from torch import Tensor

from drift_kernels.backends import cpu, cuda
from drift_kernels.backends.contract import BucketSlopes, Chunk, Coefs, TeacherChunk
from drift_kernels.calls import HeadOptions

INF, NAN = float("inf"), float("nan")
SIZES = (1, 5, 33, 1001, 4096, 131_075)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return build_as_asked(tmp_path_factory.mktemp("kernels"))


def placed(x: Tensor, lead: int, gap: int) -> Tensor:
    """x in NaN-filled rows that begin `lead` elements past a boundary."""
    view = padded(*x.shape, x.dtype, lead, gap)
    view[:] = x
    return view


def rows_for(V: int) -> int:
    return 8 if V < 9999 else 3


def fused(case: Pair, alpha: float, out: Tensor | None, x: Tensor | None = None, y: Tensor | None = None):
    student = case.student.x if x is None else x
    teacher = case.teacher.x if y is None else y
    rows = TeacherChunk(teacher, case.teacher.chunk, case.teacher.lse(), case.taught)
    return cuda.fused_distill(student, case.student.chunk, Coefs(*case.others()), rows, case.weights, alpha, out=out)


@pytest.mark.parametrize("head", ["plain", "temperature", "everything"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("V", SIZES)
def test_fused_distill(library, monkeypatch, V, alpha, head):
    case = Pair(rows_for(V), V, head, seed=V)
    x, wide = case.student.x, case.student.x.double()
    own, exact = case.divergences(x, alpha), case.divergences(wide, alpha)
    dx_own = gradient_of(lambda x: case.loss(x, alpha), x)
    dx = gradient_of(lambda x: case.loss(x, alpha), wide)
    largest = max(
        1.0, float(case.student.logits(wide).abs().max()), float(case.teacher.logits(case.teacher.x).abs().max())
    )
    with running(library, monkeypatch):
        for k, (name, launch) in enumerate(LAUNCHES.items()):
            if V > 9999 and name in ("one block", "two blocks"):
                continue  # a pair of rows does not fit into their shared memory
            student = placed(x, k % 4, k % 3)
            teacher = placed(case.teacher.x, (k + k // 2) % 4, k % 3 + 4)  # sometimes aligned with it
            with monkeypatch.context() as patch:
                launches(patch, **launch)
                out = gradients(case, lambda out, s=student, t=teacher: fused(case, alpha, out, s, t), k)
                values, live = fused(case, alpha, out, student, teacher)
                alone, none = fused(case, alpha, None, student, teacher)
            assert torch.equal(student, x), "products must be left as they are"
            assert torch.equal(teacher, case.teacher.x)
            check(f"divergence, {name}", values, own, exact, largest)
            check(f"divergence alone, {name}", alone, own, exact, largest)
            check(f"gradient, {name}", out, dx_own, dx, case.scale)
            assert none is None
            assert live is not None
            assert torch.equal(live.bool(), case.live(case.weights[case.where] != 0))
            assert (out[live == 0] == 0).all()


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_every_row_has_a_teacher_or_none_has(library, monkeypatch, alpha):
    case, taught = Pair(5, 201, "everything", some=False), torch.full((5,), -1)
    x, chunk, out = case.student.x, case.student.chunk, torch.empty(5, 201)
    nobody = TeacherChunk(torch.empty(0, 201), case.teacher.chunk, torch.empty(0), taught)
    coefs = Coefs(*case.others())

    def values(dtype):
        wide = x.to(dtype)
        losses = (lambda x: case.loss(x, alpha), case.other_losses)
        return (case.divergences(wide, alpha), *(gradient_of(loss, wide) for loss in losses))

    own, exact = values(torch.float32), values(torch.float64)
    with running(library, monkeypatch):
        for launch in LAUNCHES.values():
            with monkeypatch.context() as patch:
                launches(patch, **launch)
                found, _ = fused(case, alpha, out)
                check("divergence", found, own[0], exact[0], 3.0)
                check("gradient", out, own[1], exact[1], case.scale)
                found, live = cuda.fused_distill(x, chunk, coefs, nobody, case.weights, alpha, out=out)
                assert found.shape == (0,)
                assert live is not None
                assert live.tolist() == [1, 0, 1, 0, 1]
                check("gradient without a teacher", out, own[2], exact[2], case.scale)


def edges() -> tuple[Tensor, Tensor]:
    """Students' and teachers' logits [8, 70] where probabilities are 0, all there is, tiny, or not finite."""
    g = torch.Generator().manual_seed(0)
    s, t = torch.randn(8, 70, generator=g), torch.randn(8, 70, generator=g)
    s[0, 3], t[0, 3] = -INF, -INF  # neither has it
    s[0, 9] = -INF  # the teacher alone has it
    t[1, 5:40] = -INF  # the student alone has them
    s[2], t[2] = 0, 0
    s[2, 7], t[2, 9] = 300, 300  # both sure, of different tokens
    s[3] = t[3]  # the same
    s[4] *= 60
    t[4] *= 60
    s[5, 69] = NAN
    t[6, 0] = NAN
    s[7] = t[7] + 1e-4 * torch.randn(70, generator=g)
    return s, t


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_edges_are_where_the_cpu_kernels_have_them(library, monkeypatch, alpha):
    """Values, infinities and NaN; and divergence.h gives the same numbers in both."""
    s, t = edges()
    chunk = Chunk(torch.zeros(8, dtype=torch.int64), None, None, None, HeadOptions())
    lse, teacher_lse, weights = s.logsumexp(-1), t.logsumexp(-1), torch.rand(8) + 0.5
    others = (torch.randn(8), torch.randn(8), torch.rand(8), torch.randn(8))
    theirs = s.clone()
    rest = (Coefs(lse, *others), TeacherChunk(t, chunk, teacher_lse), weights, alpha)
    expected, live = cpu.fused_distill(theirs, chunk, *rest, out=theirs)
    with running(library, monkeypatch):
        for launch in LAUNCHES.values():
            with monkeypatch.context() as patch:
                launches(patch, **launch)
                out = torch.empty(8, 70)
                values, alive = cuda.fused_distill(s, chunk, *rest, out=out)
            assert alive is not None
            assert torch.equal(alive, live)
            torch.testing.assert_close(values, expected, rtol=1e-5, atol=2e-6, equal_nan=True)
            torch.testing.assert_close(out, theirs, rtol=2e-5, atol=4e-6, equal_nan=True)
            assert out[5].isnan().all()
            assert bool(out[6].isnan().any()) or alpha == 0


@pytest.mark.parametrize("launch", LAUNCHES)
def test_results_repeat_bitwise_in_every_order_of_warps_and_lanes(library, monkeypatch, launch):
    case, found = Pair(5, 4099, "everything", seed=9), []
    ids = torch.stack([torch.randperm(4099, generator=case.g)[:300] for _ in case.where])
    dlogprobs, drest = torch.randn(ids.shape, generator=case.g), torch.randn(len(ids), generator=case.g)
    x, chunk = case.student.x, case.student.chunk
    with running(library, monkeypatch) as choose, monkeypatch.context() as patch:
        launches(patch, **LAUNCHES[launch])
        for order in (*ORDERS, 0):
            choose(order)
            out, other = (padded(case.C, case.V, torch.bfloat16, 3, 1) for _ in range(2))
            values, live = fused(case, 0.4, out)
            lse, *coefs = case.others()
            logprobs, rest = cuda.bucket_logprobs(x, chunk, case.taught, lse, ids, True)
            assert live is not None
            assert rest is not None
            slopes = BucketSlopes(ids, dlogprobs, rest, drest)
            alive = cuda.grad_buckets(x, chunk, Coefs(lse, *coefs), case.taught, slopes, out=other)
            halves = (t.contiguous().view(torch.int16) for t in (out, other))
            words = (t.view(torch.int32) for t in (values, logprobs, rest))
            found.append([*halves, *words, live, alive, cuda.top_k(x, chunk, case.taught, len(ids), 300)])
    for repeated in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], repeated))


def test_rows_begin_beyond_two_to_the_31(library, monkeypatch):
    """Rows so far apart that 32-bit offsets wrap; only the pages that are touched exist."""
    case, far = Pair(2, 33, some=False), 2**31 + 5

    def sparse(values: Tensor) -> Tensor:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
        memory = mmap.mmap(-1, (far + 64) * values.dtype.itemsize, flags=flags)
        view = torch.frombuffer(memory, dtype=values.dtype).as_strided((2, 33), (far, 1))
        return view.copy_(values)

    x, y, out = sparse(case.student.x), sparse(case.teacher.x), sparse(torch.empty(2, 33, dtype=torch.bfloat16))
    near = torch.empty(2, 33, dtype=torch.bfloat16)
    ids = torch.tensor([[3, 32], [0, 7]])
    with running(library, monkeypatch):
        values, _ = fused(case, 0.5, out, x, y)
        expected, _ = fused(case, 0.5, near)
        assert torch.equal(out, near)
        assert torch.equal(values, expected)
        found, of_near = (cuda.top_k(some, case.student.chunk, None, 2, 9) for some in (x, case.student.x))
        assert torch.equal(found, of_near)
        given = (case.student.chunk, Coefs(case.student.lse()), None, BucketSlopes(ids, torch.randn(2, 2)))
        cuda.grad_buckets(x, *given, out=out)
        cuda.grad_buckets(case.student.x, *given, out=near)
        assert torch.equal(out, near)


# ---- top-k


def best(z: Tensor, k: int) -> Tensor:
    """The k largest of each row, the lower of equal ones first; a NaN is −∞."""
    return torch.where(z.isnan(), -INF, z).sort(dim=-1, descending=True, stable=True).indices[:, :k]


@pytest.mark.parametrize("head", ["plain", "temperature", "reversed"])
@pytest.mark.parametrize("V", SIZES)
def test_top_k(library, monkeypatch, V, head):
    case = Pair(rows_for(V), V, head, seed=V)
    case.student.x[0] = case.student.x[0].round()  # ties
    expected = case.student.logits(case.student.x)[case.where]
    with running(library, monkeypatch):
        for i, k in enumerate(sorted({1, min(V, 2), min(V, 64), min(V, 1024), V if V < 9999 else 1})):
            x = placed(case.student.x, i % 4, i % 3)
            for launch in ({}, {"threads": 32}):
                with monkeypatch.context() as patch:
                    launches(patch, **launch)
                    ids = cuda.top_k(x, case.student.chunk, case.taught, len(case.where), k)
                assert torch.equal(ids, best(expected, k)), (k, launch)
            assert torch.equal(x, case.student.x)


def test_top_k_of_what_is_equal_ordered_or_not_a_number(library, monkeypatch):
    V = 9000
    x = torch.randn(8, V)
    x[0] = 0
    x[0, 1::3] = -0.0  # equal to 0
    x[1], x[2] = torch.arange(V), torch.arange(V).flip(0)
    x[3, ::2], x[3, 5] = NAN, INF
    x[4] = -INF
    x[4, 77], x[4, 78] = NAN, -3.0e38
    x[5, 100:] = x[5, :100].max()
    x[6] = NAN
    x[7] = torch.randint(0, 3, (V,)).float() * 1e-42  # subnormal
    chunk = Chunk(torch.zeros(8, dtype=torch.int64), None, None, None, HeadOptions())
    with running(library, monkeypatch):
        for k in (1, 50, 1024, 4000):
            assert torch.equal(cuda.top_k(x, chunk, None, 8, k), best(x, k))


def test_top_k_of_bias_and_softcap_is_that_of_logits(library, monkeypatch):
    """Up to the rounding of tanh: what is chosen lies as high as what should be."""
    case, k = Pair(8, 1001, "everything"), 100
    z = case.student.logits(case.student.x.double())[case.where]
    with running(library, monkeypatch):
        ids = cuda.top_k(case.student.x, case.student.chunk, case.taught, len(case.where), k)
    assert all(len(set(row)) == k for row in ids.tolist())
    torch.testing.assert_close(z.gather(1, ids), z.sort(dim=-1, descending=True).values[:, :k], rtol=0, atol=2e-6)


# ---- buckets


def some_ids(case: Pair, k: int, logits: Tensor) -> Tensor:
    """k distinct ids a row [n, k]: even rows' likeliest, odd rows' any, with first, last and the edges of a tile."""
    ids = torch.stack([torch.randperm(case.V, generator=case.g)[:k] for _ in case.where])
    for i, row in enumerate(ids):
        if i % 2 == 0:
            ids[i] = logits[case.where[i]].topk(k).indices
        elif k > 8 and case.V > 40_000:
            edges = torch.tensor([0, case.V - 1, 16_383, 16_384, 32_767, 32_768])
            ids[i] = torch.cat([edges, row[~torch.isin(row, edges)]])[:k]
    return ids


@pytest.mark.parametrize("head", ["plain", "temperature", "everything"])
@pytest.mark.parametrize("V", SIZES)
def test_buckets(library, monkeypatch, V, head):
    case = Pair(rows_for(V), V, head, seed=V)
    x, wide, n = case.student.x, case.student.x.double(), len(case.where)
    largest = max(1.0, float(case.student.logits(wide).abs().max()))
    for i, k in enumerate(sorted({1, min(V, 17), min(V, 600)})):
        ids = some_ids(case, k, case.student.logits(wide))
        case.student.targets[0] = ids[case.taught[0], 0] if case.taught is not None else 0  # one of its own bucket
        dlogprobs, drest = torch.randn(n, k, generator=case.g), torch.randn(n, generator=case.g)
        if n > 2:
            drest[2], dlogprobs[2] = 0, 0
        if k == V:
            drest[:] = 0  # there is no rest
        own, exact = case.bucket_logprobs(x, ids), case.bucket_logprobs(wide, ids)

        def loss(x, ids=ids, dlogprobs=dlogprobs, drest=drest, k=k):
            logprobs, rest = case.bucket_logprobs(x, ids)
            total = (dlogprobs.to(x.dtype) * logprobs).sum() + case.other_losses(x)
            return total if k == V else total + (drest.to(x.dtype) * rest).sum()

        dx_own, dx = gradient_of(loss, x), gradient_of(loss, wide)
        moved = placed(x, (i + 1) % 4, i % 2)
        lse, *coefs = case.others()
        with running(library, monkeypatch):
            for j, launch in enumerate(({}, {"threads": 64})):
                with monkeypatch.context() as patch:
                    launches(patch, **launch)
                    logprobs, rest = cuda.bucket_logprobs(moved, case.student.chunk, case.taught, lse, ids, True)
                    again, none = cuda.bucket_logprobs(moved, case.student.chunk, case.taught, lse, ids, False)
                    assert rest is not None
                    assert none is None
                    slopes = BucketSlopes(ids, dlogprobs, rest, drest)
                    given = (case.student.chunk, Coefs(lse, *coefs), case.taught, slopes)
                    out = gradients(case, lambda out, g=given, m=moved: cuda.grad_buckets(m, *g, out=out), 2 * i + j)
                    live = cuda.grad_buckets(moved, *given, out=out)
                assert torch.equal(moved, x), "products must be left as they are"
                assert torch.equal(again, logprobs)
                assert (logprobs <= 0).all()
                check("log-probs", logprobs, own[0], exact[0], largest)
                if k == V:
                    assert (rest == -INF).all()
                else:
                    check("rest", rest, own[1], exact[1], largest)
                slopes = dlogprobs.abs().sum(-1) + drest.abs()
                check("gradient", out, dx_own, dx, case.scale + float(slopes.max()) * largest)
                assert torch.equal(live.bool(), case.live((drest != 0) | (dlogprobs != 0).any(-1)))
                assert (out[live == 0] == 0).all()


def test_a_small_rest_does_not_cancel(library, monkeypatch):
    """Down to e^-200, of which 1 − Σp knows nothing."""
    x = torch.randn(4, 70)
    for i, below in enumerate((10, 40, 100, 200)):
        x[i, :3] = x[i, :3].abs() + below
    ids, exact = torch.tensor([[0, 1, 2]] * 4), x.double()
    chunk = Chunk(torch.zeros(4, dtype=torch.int64), None, None, None, HeadOptions())
    expected = exact[:, 3:].logsumexp(-1) - exact.logsumexp(-1)
    with running(library, monkeypatch):
        _, rest = cuda.bucket_logprobs(x, chunk, None, x.logsumexp(-1), ids, True)
        assert rest is not None
        torch.testing.assert_close(rest.double(), expected, rtol=1e-6, atol=0)
        drest, out, theirs = torch.tensor([1.0, -1.0, 1e-3, 1.0]), torch.empty(4, 70), x.clone()
        given = (chunk, Coefs(x.logsumexp(-1)), None, BucketSlopes(ids, torch.zeros(4, 3), rest, drest))
        cuda.grad_buckets(x, *given, out=out)
    cpu.grad_buckets(theirs, *given, out=theirs)
    torch.testing.assert_close(out, theirs, rtol=1e-5, atol=1e-7)


def test_an_id_outside_the_vocabulary_is_nan_and_touches_nothing(library, monkeypatch):
    case = Pair(2, 40, some=False)
    x, out = placed(case.student.x, 1, 2), padded(2, 40, torch.float32, 1, 2)
    ids = torch.tensor([[3, 100_040], [-100_001, 5]])
    with running(library, monkeypatch):
        logprobs, rest = cuda.bucket_logprobs(x, case.student.chunk, None, case.student.lse(), ids, True)
        assert rest is not None
        assert logprobs.isnan().tolist() == [[False, True], [True, False]]
        assert rest.isnan().all()
        given = (case.student.chunk, Coefs(case.student.lse()), None, BucketSlopes(ids, logprobs, rest, rest))
        cuda.grad_buckets(x, *given, out=out)
    assert out.isnan().all()


# ---- what is refused


def test_what_the_binding_refuses(library, monkeypatch):
    case = Pair(3, 5000, some=False)
    x, chunk, teacher, lse = case.student.x, case.student.chunk, case.teacher.x, case.student.lse()
    several = Chunk(chunk.targets, torch.arange(4), None, None, chunk.head)
    ids, out = torch.zeros(3, 1, dtype=torch.int64), torch.empty(3, 5000)

    buckets = (Coefs(lse), None, BucketSlopes(ids, torch.zeros(3, 1)))

    def run(x=x, chunk=chunk, rows=None, teacher=teacher, alpha=0.5, out=out):
        teacher_rows = TeacherChunk(teacher, case.teacher.chunk, lse, rows)
        return cuda.fused_distill(x, chunk, Coefs(lse), teacher_rows, case.weights, alpha, out=out)

    with running(library, monkeypatch) as choose:
        for error, says, call in (
            (ValueError, "need the student's vocabulary", lambda: run(teacher=teacher[:, :40])),
            (TypeError, "float64; this backend takes float32", lambda: run(teacher=teacher.double())),
            (ValueError, "one target a row", lambda: run(chunk=several)),
            (ValueError, "out overlaps the logits", lambda: run(out=x)),
            (ValueError, "cannot be read as it is", lambda: run(rows=torch.zeros(6, dtype=torch.int64)[::2])),
            (RuntimeError, "fused_distill: cudaErrorInvalidValue", lambda: run(alpha=1.5)),
            (ValueError, "k=0 of a vocabulary of 5000", lambda: cuda.top_k(x, chunk, None, 3, 0)),
            (ValueError, "k=5001 of a vocabulary of 5000", lambda: cuda.top_k(x, chunk, None, 3, 5001)),
            (ValueError, "one target a row", lambda: cuda.top_k(x, several, None, 3, 1)),
            (ValueError, "one target a row", lambda: cuda.bucket_logprobs(x, several, None, lse, ids, True)),
            (ValueError, "one target a row", lambda: cuda.grad_buckets(x, several, *buckets, out=out)),
        ):
            with pytest.raises(error, match=says):
                call()
        choose(shared=49_152)
        assert torch.equal(cuda.top_k(x, chunk, None, 3, 2048), best(x, 2048))
        with pytest.raises(ValueError, match=r"k=2049 does not fit into 49152 bytes .* takes k ≤ 2048"):
            cuda.top_k(x, chunk, None, 3, 2049)
        choose(shared=H100_SHARED)
        monkeypatch.setattr(cuda, "choose", lambda *a: cuda.Launch(48, 1, False))
        with pytest.raises(RuntimeError, match=r"top_k: cudaErrorInvalidValue .*DRIFT_TUNING"):
            cuda.top_k(x, chunk, None, 3, 2)
