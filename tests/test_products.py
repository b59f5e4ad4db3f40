"""The bf16 products against float64, and that both ways to multiply give the same losses and gradients."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import drift_kernels as dk
from drift_kernels import _cpu, products
from drift_kernels.backends import cpu
from drift_kernels.testing import gradients, make_case, within_budget

native = pytest.mark.skipif(not cpu.has_bf16_gemm(), reason="needs a CPU with AVX512-BF16")
NAN = float("nan")
KINDS = ["nt", "nn", "tn"]
EDGES = [1, 2, 7, 8, 9, 15, 16, 17, 33, 47, 48, 49, 127, 129, 383, 384, 385, 481, 513, 770]  # about tiles and blocks
SIZES = st.one_of(st.integers(1, 60), st.sampled_from(EDGES))


def inside(values: torch.Tensor, pad: int) -> torch.Tensor:
    """The same values as a view of a matrix with `pad` more columns, NaN where the values are not."""
    whole = torch.full((values.shape[0] + 2, values.shape[1] + pad), NAN, dtype=values.dtype)
    view = whole[1:-1, : values.shape[1]]
    return view.copy_(values)


def operands(kind: str, m: int, n: int, k: int, pad: int, seed: int = 0):
    """A and B as the product takes them, and both as float64 [m, k] and [k, n] after the rounding."""
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(m, k, generator=g), torch.randn(k, n, generator=g).bfloat16()
    exact = a.bfloat16().double(), b.double()
    if kind == "nt":
        return inside(a.bfloat16(), pad), inside(b.t(), pad), *exact
    return inside(a if kind == "nn" else a.t(), pad), inside(b, pad), *exact


def multiply(kind: str, a, b, out, threads: int = 2, accumulate: bool = False, rounded=None) -> torch.Tensor:
    """Runs one product in a scratch of NaN that must hold it."""
    made = out if rounded is None else rounded
    rows, width = {"nt": a.shape, "nn": made.shape, "tn": b.shape}[kind]
    need = cpu.gemm_scratch_bytes(rows, width, threads)
    scratch = torch.full((need + 64,), 0xFF, dtype=torch.uint8)
    more = {"accumulate": accumulate, "rounded": rounded} if kind == "tn" else {}
    getattr(cpu, f"gemm_{kind}")(a, b, out, scratch, threads, **more)
    assert bool((scratch[need:] == 0xFF).all()), "wrote behind the scratch"
    return out


@native
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None, derandomize=True)
@example(m=9, n=49, k=384, pad=0, accumulate=False)  # a whole block of k, and two
@example(m=8, n=48, k=768, pad=1, accumulate=True)
@example(m=130, n=700, k=385, pad=0, accumulate=True)  # more than one block of every other kind
@example(m=514, n=1000, k=385, pad=1, accumulate=False)
@given(m=SIZES, n=SIZES, k=SIZES, pad=st.integers(0, 3), accumulate=st.booleans())
def test_products_match_float64(kind, m, n, k, pad, accumulate):
    a, b, left, right = operands(kind, m, n, k, pad)
    accumulate &= kind == "tn"
    start = torch.randn(m, n, generator=torch.Generator().manual_seed(1)) if accumulate else torch.full((m, n), NAN)
    results = []
    for threads in (1, 2, 3):
        out = inside(start, pad)
        whole = out._base
        multiply(kind, a, b, out, threads, accumulate)
        results.append(out.clone())
        assert int(whole.isnan().sum()) == whole.numel() - m * n, "wrote outside the matrix"
    want, size = left @ right, left.abs() @ right.abs()
    if accumulate:
        want, size = want + start.double(), size + start.abs().double()
    assert bool(((results[0].double() - want).abs() <= torch.finfo(torch.float32).eps * (k + 4) * size).all())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@native
@settings(max_examples=40, deadline=None, derandomize=True)
@example(m=130, n=700, k=385, pad=0, accumulate=True)
@example(m=257, n=49, k=1000, pad=1, accumulate=False)
@given(m=SIZES, n=SIZES, k=SIZES, pad=st.integers(0, 3), accumulate=st.booleans())
def test_a_rounded_product_is_the_fp32_one_rounded(m, n, k, pad, accumulate):
    """Bit by bit, whatever was in C before, which is left alone."""
    a, b, *_ = operands("tn", m, n, k, pad)
    start = torch.randn(m, n, generator=torch.Generator().manual_seed(1)) if accumulate else torch.full((m, n), NAN)
    full = multiply("tn", a, b, inside(start, pad), 2, accumulate)
    before = inside(start, pad) if accumulate else None
    rounded = torch.full((m, n), NAN, dtype=torch.bfloat16)
    multiply("tn", a, b, before, 2, accumulate, rounded)
    assert torch.equal(rounded, full.bfloat16())
    assert before is None or torch.equal(before, start)


@native
def test_the_last_chunk_rounds_the_gradient_of_the_weight(monkeypatch):
    """One chunk makes no fp32 [V, D]; several make one, and a last chunk without a gradient changes nothing."""
    case = make_case(60, 50, 1001, masked=0.0, dtype=torch.bfloat16)
    made = []
    original = products.huge_pages
    monkeypatch.setattr(
        products.Native, "empty", staticmethod(lambda size, dtype: made.append((size, dtype)) or original(size, dtype))
    )
    h, w, _ = case.leaves(torch.bfloat16)
    with torch.no_grad():
        old = dk.linear_logprob(h, w, case.targets).logprobs - 1  # clipped where A > 0
    advantages = torch.cat([-torch.ones(40), torch.ones(20)])
    grads = []
    for rows in (100, 20):
        budget = cpu.gemm_scratch_bytes(8, 50, 1) + rows * 5000
        made.clear()
        loss = dk.policy_loss(
            h, w, case.targets, advantages, old_logprobs=old, config=dk.KernelConfig(workspace_bytes=budget)
        ).loss
        grads.append(torch.autograd.grad(loss, w)[0])
        assert (((1001, 50), torch.float32) in made) == (rows == 20)
    assert grads[0].dtype == torch.bfloat16
    torch.testing.assert_close(grads[0].float(), grads[1].float(), rtol=2**-7, atol=1e-6)


@native
@pytest.mark.parametrize("kind", KINDS)
def test_a_product_over_nothing_is_zero_and_an_empty_one_does_nothing(kind):
    a, b, *_ = operands(kind, 5, 7, 0, 1)
    assert torch.equal(multiply(kind, a, b, torch.full((5, 7), NAN)), torch.zeros(5, 7))
    for m, n in ((0, 7), (5, 0)):
        a, b, *_ = operands(kind, m, n, 3, 1)
        multiply(kind, a, b, torch.empty(m, n))


@native
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
def test_nan_and_infinity_reach_what_they_should_and_nothing_else(kind, value):
    a, b, *_ = operands(kind, 19, 53, 387, 0)
    a[3, 5], b[-1, -2] = value, value
    out = multiply(kind, a, b, torch.empty(19, 53))
    left, right = a.float().t() if kind == "tn" else a.float(), b.float().t() if kind == "nt" else b.float()
    want = left @ right
    assert torch.equal(out.isnan(), want.isnan())
    assert torch.equal(out.isinf(), want.isinf())
    assert bool(out[want.isinf()].eq(want[want.isinf()]).all())


@native
@pytest.mark.parametrize("kind", ["nn", "tn"])
def test_rounding_is_to_the_nearest_even_and_keeps_nan(kind):
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1 + 2**-8 + 2**-20, 3e38, 3.4028e38, float("inf")])
    quiet_bits_only_below = torch.tensor([0x7F800001], dtype=torch.int32).view(torch.float32)
    values = torch.cat([ties, quiet_bits_only_below])[None]
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    a = values.t().contiguous() if kind == "nn" else values
    out = multiply(kind, a, one, torch.empty(8, 1)).squeeze(1)
    assert torch.equal(out[:7], ties.bfloat16().float())
    assert bool(out[7].isnan())


@pytest.fixture
def avx2():
    """A CPU without bf16 products: torch's, of a weight that is widened tile by tile."""
    if "avx2" not in _cpu.isas():
        pytest.skip("needs AVX2")
    _cpu.limit_isa("avx2")
    assert not cpu.has_bf16_gemm()
    yield
    _cpu.limit_isa(None)


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("V", [1, 5, 7, 8, 9, 15, 50])  # tiles of 7 rows: less than one, a last one of a row
def test_a_widened_gradient_is_the_fp32_sum_rounded(V, transposed, chunks, avx2, monkeypatch):
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
    dlogits = products.block_of_rows(by, count, V, torch.float32)
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


def test_one_chunk_of_widened_operands_makes_no_fp32_gradient(avx2, monkeypatch):
    """Nor any [V, D] of fp32: a tile at a time. Several chunks sum in one."""
    case = make_case(60, 50, 3001, masked=0.0, dtype=torch.bfloat16)
    monkeypatch.setattr(products, "TILE_BYTES", 0)
    made = []
    original = products.Widened.empty
    monkeypatch.setattr(products.Widened, "empty", staticmethod(lambda *what: made.append(what) or original(*what)))
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


def test_bf16_operands_alone_are_multiplied_as_they_are():
    h, w = torch.zeros(4, 8, dtype=torch.bfloat16), torch.zeros(16, 8, dtype=torch.bfloat16)
    assert products.is_native(h, w) == cpu.has_bf16_gemm()
    assert products.is_native(h[:, :5], w[:, :5]) == cpu.has_bf16_gemm()
    assert not products.is_native(h.half(), w.half())
    assert not products.is_native(h.float(), w.float())
    assert not products.is_native(h, torch.zeros(8, 16, dtype=torch.bfloat16).t())
    assert not products.is_native(torch.zeros(8, 4, dtype=torch.bfloat16).t(), w)


@native
@pytest.mark.parametrize("masked", [0.0, 0.6])
def test_both_ways_give_the_same_loss_and_gradients(masked, monkeypatch):
    case = make_case(75, 50, 1001, masked=masked, dtype=torch.bfloat16)
    config = dk.KernelConfig(workspace_bytes=cpu.gemm_scratch_bytes(8, 50, 1) + 40 * 5000)  # about 40 rows a chunk

    def run(dtype, config):
        def loss(h, w, b):
            return dk.weighted_cross_entropy(h, w, case.targets, case.token_weights, bias=b, config=config).loss

        return gradients(loss, case.leaves(dtype))

    exact, eager = (run(dtype, dk.KernelConfig(backend="reference")) for dtype in (torch.float64, torch.bfloat16))
    ours = run(torch.bfloat16, config)
    monkeypatch.setattr(products, "is_native", lambda hidden, weight: False)
    widened = run(torch.bfloat16, config)
    assert abs(float(ours[0] - widened[0])) <= 1e-5 * float(exact[0].abs()), "logits and loss are fp32 in both"
    for mine, other, own, want in zip(ours, widened, eager, exact):
        ok, line = within_budget(mine, own, want, torch.bfloat16)
        assert ok, line
        ok, line = within_budget(mine, other, want, torch.bfloat16, scale=float(want.abs().max()) / 8)
        assert ok, f"against widened operands: {line}"
