"""The products against float64 on every instruction set, and that all ways to multiply give the same losses and gradients."""

from contextlib import contextmanager

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import drift_kernels as dk
from drift_kernels import _cpu, memory, products
from drift_kernels.backends import cpu
from drift_kernels.testing import gradients, make_case, within_budget

pairs = pytest.mark.skipif(not cpu.has_bf16_gemm(), reason="needs a CPU with AVX512-BF16")
NAN = float("nan")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
KINDS = ["nt", "nn", "tn"]
EDGES = [
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    9,
    15,
    16,
    17,
    23,
    24,
    25,
    33,
    47,
    48,
    49,
    127,
    129,
    255,
    257,
    383,
    384,
    385,
    481,
    513,
    770,
]
SIZES = st.one_of(st.integers(1, 60), st.sampled_from(EDGES))  # about tiles and blocks
# instruction set, dtype of hidden rows, of the weight
WAYS = [(isa, F32, weight) for isa in ("avx2", "avx512") for weight in (F32, BF16, F16)] + [("avx512", BF16, BF16)]


@pytest.fixture(params=WAYS, ids=lambda way: "-".join(str(part).split(".")[-1] for part in way))
def way(request):
    isa, hidden, weight = request.param
    with held_to(isa):
        if hidden == BF16 and not cpu.has_bf16_gemm():
            pytest.skip("needs AVX512-BF16")
        yield hidden, weight


@contextmanager
def held_to(isa: str):
    """The kernels take this instruction set, or the test is skipped."""
    if isa not in _cpu.isas():
        pytest.skip(f"needs {isa}")
    _cpu.limit_isa(isa)
    try:
        yield
    finally:
        _cpu.limit_isa(None)


def inside(values: torch.Tensor, pad: int) -> torch.Tensor:
    """The same values as a view of a matrix with `pad` more columns, NaN where the values are not."""
    whole = torch.full((values.shape[0] + 2, values.shape[1] + pad), NAN, dtype=values.dtype)
    view = whole[1:-1, : values.shape[1]]
    return view.copy_(values)


def operands(kind: str, way: tuple, m: int, n: int, k: int, pad: int, seed: int = 0):
    """A and B as the product takes them, and both as float64 [m, k] and [k, n] after the rounding."""
    hidden, weight = way
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(m, k, generator=g), torch.randn(k, n, generator=g)
    a = a.to(hidden) if kind == "nt" else a
    b = b.to(hidden if kind == "tn" else weight)
    exact = a.to(hidden).double(), b.double()
    return inside(a.t() if kind == "tn" else a, pad), inside(b.t() if kind == "nt" else b, pad), *exact


def multiply(kind: str, way: tuple, a, b, out, threads: int = 2, **more) -> torch.Tensor:
    """Runs one product in a scratch of NaN that must hold it."""
    made = out if more.get("rounded") is None else more["rounded"]
    rows, width = {"nt": a.shape, "nn": made.shape, "tn": b.shape}[kind]
    need = cpu.gemm_scratch_bytes(rows, width, threads, way[0])
    scratch = torch.full((need + 64,), 0xFF, dtype=torch.uint8)
    if kind == "nn":
        more["pairs"] = way[0] == BF16
    if kind == "tn":
        more.setdefault("accumulate", False)
    getattr(cpu, f"gemm_{kind}")(a, b, out, scratch, threads, **more)
    assert bool((scratch[need:] == 0xFF).all()), "wrote behind the scratch"
    return out


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(m=9, n=49, k=384, pad=0, accumulate=False, scale=1.0)  # a whole block of k, and two
@example(m=8, n=48, k=768, pad=1, accumulate=True, scale=0.5)
@example(m=130, n=700, k=385, pad=0, accumulate=True, scale=1.0)  # more than one block of every other kind
@example(m=514, n=1000, k=385, pad=1, accumulate=False, scale=-3.0)
@given(
    m=SIZES, n=SIZES, k=SIZES, pad=st.integers(0, 3), accumulate=st.booleans(), scale=st.sampled_from([1.0, 0.5, -3.0])
)
def test_products_match_float64(kind, way, m, n, k, pad, accumulate, scale):
    a, b, left, right = operands(kind, way, m, n, k, pad)
    more = {"accumulate": accumulate, "scale": scale} if kind == "tn" else {}
    start = torch.randn(m, n, generator=torch.Generator().manual_seed(1)) if accumulate else torch.full((m, n), NAN)
    results = []
    for threads in (1, 2, 3, 4):
        out = inside(start, pad)
        whole = out._base
        multiply(kind, way, a, b, out, threads, **more)
        results.append(out.clone())
        assert int(whole.isnan().sum()) == whole.numel() - m * n, "wrote outside the matrix"
    want, size = left @ right, left.abs() @ right.abs()
    if kind == "tn":
        want, size = scale * want, abs(scale) * size
        if accumulate:
            want, size = want + start.double(), size + start.abs().double()
    assert bool(((results[0].double() - want).abs() <= torch.finfo(torch.float32).eps * (k + 4) * size).all())
    for other in results[1:]:
        assert torch.equal(results[0], other)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(m=130, n=700, k=385, pad=0, accumulate=True)
@example(m=257, n=49, k=1000, pad=1, accumulate=False)
@given(m=SIZES, n=SIZES, k=SIZES, pad=st.integers(0, 3), accumulate=st.booleans())
def test_a_rounded_product_is_the_fp32_one_rounded(way, m, n, k, pad, accumulate):
    """Bit by bit, whatever was in C before, which is left alone."""
    a, b, *_ = operands("tn", way, m, n, k, pad)
    start = torch.randn(m, n, generator=torch.Generator().manual_seed(1)) if accumulate else torch.full((m, n), NAN)
    full = multiply("tn", way, a, b, inside(start, pad), accumulate=accumulate)
    before = inside(start, pad) if accumulate else None
    rounded = torch.full((m, n), NAN, dtype=torch.bfloat16)
    multiply("tn", way, a, b, before, accumulate=accumulate, rounded=rounded)
    assert torch.equal(rounded, full.bfloat16())
    assert before is None or torch.equal(before, start)


def test_the_last_chunk_rounds_the_gradient_of_the_weight(monkeypatch):
    """One chunk makes no fp32 [V, D]; several make one, and a last chunk without a gradient changes nothing."""
    case = make_case(60, 50, 1001, masked=0.0, dtype=torch.bfloat16)
    made = []
    original = memory.empty
    monkeypatch.setattr(memory, "empty", lambda use, *what: made.append(what) or original(use, *what))
    h, w, _ = case.leaves(torch.bfloat16)
    with torch.no_grad():
        old = dk.linear_logprob(h, w, case.targets).logprobs - 1  # clipped where A > 0
    advantages = torch.cat([-torch.ones(40), torch.ones(20)])
    grads = []
    for rows in (100, 20):
        budget = cpu.gemm_scratch_bytes(8, 50, 1, torch.float32) + rows * 5000
        made.clear()
        loss = dk.policy_loss(
            h, w, case.targets, advantages, old_logprobs=old, config=dk.KernelConfig(workspace_bytes=budget)
        ).loss
        grads.append(torch.autograd.grad(loss, w)[0])
        assert (((1001, 50), torch.float32) in made) == (rows == 20)
    assert grads[0].dtype == torch.bfloat16
    torch.testing.assert_close(grads[0].float(), grads[1].float(), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_product_over_nothing_is_zero_and_an_empty_one_does_nothing(kind, way):
    a, b, *_ = operands(kind, way, 5, 7, 0, 1)
    assert torch.equal(multiply(kind, way, a, b, torch.full((5, 7), NAN)), torch.zeros(5, 7))
    for m, n in ((0, 7), (5, 0)):
        a, b, *_ = operands(kind, way, m, n, 3, 1)
        multiply(kind, way, a, b, torch.empty(m, n))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
def test_nan_and_infinity_reach_what_they_should_and_nothing_else(kind, way, value):
    a, b, *_ = operands(kind, way, 19, 53, 387, 0)
    a[3, 5], b[-1, -2] = value, value
    out = multiply(kind, way, a, b, torch.empty(19, 53))
    left, right = a.float().t() if kind == "tn" else a.float(), b.float().t() if kind == "nt" else b.float()
    want = left @ right
    assert torch.equal(out.isnan(), want.isnan())
    assert torch.equal(out.isinf(), want.isinf())
    assert bool(out[want.isinf()].eq(want[want.isinf()]).all())


TIES = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1 + 2**-8 + 2**-20, 3e38, 3.4028e38, float("inf"), 1e-40])
QUIET_BITS_ONLY_BELOW = torch.tensor([0x7F800001], dtype=torch.int32).view(torch.float32)  # a NaN


@pairs
@pytest.mark.parametrize("kind", ["nn", "tn"])
def test_rounding_of_an_operand_is_to_the_nearest_even_and_keeps_nan(kind):
    values = torch.cat([TIES[:-1], QUIET_BITS_ONLY_BELOW])[None]
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    a = values.t().contiguous() if kind == "nn" else values
    out = multiply(kind, (BF16, BF16), a, one, torch.empty(8, 1)).squeeze(1)
    assert torch.equal(out[:7], TIES[:-1].bfloat16().float())
    assert bool(out[7].isnan())


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_rounding_of_a_result_is_to_the_nearest_even_and_keeps_nan(isa):
    """In whole registers and in what is left over."""
    all_bits = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)  # a NaN that rounding would carry over
    values = torch.cat([TIES, QUIET_BITS_ONLY_BELOW, all_bits]).repeat(3)
    rounded = torch.empty(1, len(values), dtype=torch.bfloat16)
    with held_to(isa):
        multiply("tn", (F32, F32), torch.ones(1, 1), values[None], None, rounded=rounded)
    assert torch.equal(rounded[0].nan_to_num(7.0), values.bfloat16().nan_to_num(7.0))
    assert int(rounded.isnan().sum()) == 6


@pytest.mark.parametrize("weight", [BF16, F16])
@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_every_half_is_widened_exactly(isa, weight):
    """All 65,536 of them as rows of a weight; denormals too."""
    halves = torch.arange(-(2**15), 2**15).to(torch.int16).view(weight)[:, None]
    with held_to(isa):
        out = multiply("nt", (F32, weight), torch.ones(1, 1), halves, torch.empty(1, 2**16))
    torch.testing.assert_close(out[0], halves[:, 0].float(), rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def baseline():
    """A CPU without AVX2: torch's products, of a weight that is widened tile by tile."""
    with held_to("baseline"):
        assert not cpu.has_gemm()
        yield


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("V", [1, 5, 7, 8, 9, 15, 50])  # tiles of 7 rows: less than one, a last one of a row
def test_a_widened_gradient_is_the_fp32_sum_rounded(V, transposed, chunks, baseline, monkeypatch):
    """Bit by bit: whole numbers, whose sums are exact in fp32, and more than bf16 can hold."""
    D, count = 33, 10 * chunks
    g = torch.Generator().manual_seed(V)
    monkeypatch.setattr(products, "TILE_BYTES", 0)
    monkeypatch.setattr(products, "TILE_ROWS", 7)
    weight = torch.randint(-9, 10, (V, D), generator=g).bfloat16()
    by = products.choose(weight, weight.t().contiguous().t() if transposed else weight, torch.float32, 1 << 20)
    assert isinstance(by, products.Widened)
    assert by.tile == min(V, 7)
    hidden = torch.randint(-9, 10, (count, D), generator=g).float()
    dlogits = products.block_of_rows("logits", count, V, torch.float32)
    dlogits.copy_(torch.randint(-99, 100, (count, V), generator=g))
    out, back = torch.full((count, V + 3), NAN)[:, :V], torch.full((count, D), NAN)
    by.logits(hidden, out)
    by.dhidden(dlogits, back)
    assert torch.equal(out, hidden @ weight.float().t())
    assert torch.equal(back, dlogits @ weight.float())
    gradient = products.WeightGradient(by)
    for n in range(chunks):
        rows = slice(10 * n, 10 * n + 10)
        gradient.add(dlogits[rows], hidden[rows], final=n == chunks - 1)
    want = dlogits.double().t() @ hidden.double()
    assert bool((want != want.bfloat16()).any())
    assert torch.equal(gradient.result(), want.bfloat16())
    assert (gradient.sums is None) == (chunks == 1)


def test_one_chunk_of_widened_operands_makes_no_fp32_gradient(baseline, monkeypatch):
    """Nor any [V, D] of fp32: a tile at a time. Several chunks sum in one."""
    case = make_case(60, 50, 3001, masked=0.0, dtype=torch.bfloat16)
    monkeypatch.setattr(products, "TILE_BYTES", 0)
    made = []
    original = memory.empty
    monkeypatch.setattr(memory, "empty", lambda use, *what: made.append(what) or original(use, *what))
    grads = []
    for workspace in (8 << 20, 400_000):
        h, w, _ = case.leaves(torch.bfloat16)
        made.clear()
        config = dk.KernelConfig(workspace_bytes=workspace)
        loss = dk.weighted_cross_entropy(h, w, case.targets, case.token_weights, config=config).loss
        grads.append(torch.autograd.grad(loss, w)[0])
        assert (((3001, 50), torch.float32) in made) == (workspace == 400_000)
        assert ((3001, 50), torch.bfloat16) in made
    assert grads[0].dtype == torch.bfloat16
    torch.testing.assert_close(grads[0].float(), grads[1].float(), rtol=2**-7, atol=1e-6)


def test_what_the_kernels_multiply_and_in_what_dtype():
    h, w = torch.zeros(4, 8), torch.zeros(16, 8)
    own, half = (F32 if cpu.has_gemm() else None), (BF16 if cpu.has_bf16_gemm() else F32 if cpu.has_gemm() else None)
    assert products.native_operand(h.bfloat16(), w.bfloat16()) == half
    assert products.native_operand(h.bfloat16()[:, :5], w.bfloat16()[:, :5]) == half
    for a, b in ((F32, F32), (F16, F16), (BF16, F32), (F32, BF16)):
        assert products.native_operand(h.to(a), w.to(b)) == own
    assert products.native_operand(h.double(), w.double()) is None
    assert products.native_operand(h, torch.zeros(8, 16).t()) is None
    assert products.native_operand(torch.zeros(8, 4).t(), w) is None
    with held_to("baseline"):
        assert products.native_operand(h, w) is None
    with held_to("avx2"):
        assert products.native_operand(h.bfloat16(), w.bfloat16()) == F32


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
@pytest.mark.parametrize("masked", [0.0, 0.6])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_all_ways_give_the_same_loss_and_gradients(dtype, masked, isa, monkeypatch):
    case = make_case(75, 50, 1001, masked=masked, dtype=dtype)
    config = dk.KernelConfig(workspace_bytes=cpu.gemm_scratch_bytes(8, 50, 1, F32) + 40 * 5000)  # about 40 rows a chunk

    def run(dtype, config):
        def loss(h, w, b):
            return dk.weighted_cross_entropy(
                h, dk.Head(w, bias=b), case.targets, case.token_weights, config=config
            ).loss

        return gradients(loss, case.leaves(dtype))

    exact, eager = (run(kind, dk.KernelConfig(backend="reference")) for kind in (torch.float64, dtype))
    with held_to(isa):
        ours = run(dtype, config)
        monkeypatch.setattr(products, "native_operand", lambda hidden, weight: None)
        widened = run(dtype, config)
    assert abs(float(ours[0] - widened[0])) <= 1e-5 * float(exact[0].abs()), "logits and loss are fp32 in both"
    for mine, other, own, want in zip(ours, widened, eager, exact):
        ok, line = within_budget(mine, own, want, dtype)
        assert ok, line
        ok, line = within_budget(mine, other, want, dtype, scale=float(want.abs().max()) / 8)
        assert ok, f"against widened operands: {line}"
