"""Offsets that 32 bits cannot count, as those of T·V > 2³² logits: matrices whose rows lie 2³² elements and some apart, in memory
of which only the pages with rows are ever there. Whatever cut an offset to 32 bits, signed or not, would find other numbers.
"""

import mmap
import os

import pytest
import torch

import drift_kernels as dk
from drift_kernels import divergences
from drift_kernels.backends import cpu
from drift_kernels.backends.contract import BucketSlopes, Chunk, Coefs, TeacherChunk
from drift_kernels.calls import HeadOptions
from drift_kernels.formulas import Tokens
from drift_kernels.spec import PolicySpec

FAR = 2**32 + 21
MAP_NORESERVE = 0x4000  # of Linux: takes address space alone
ROWS, V, D = 3, 37, 16
RANDOM = torch.Generator().manual_seed(0)
LOGITS, TEACHER = (2 * torch.randn(ROWS, V, generator=RANDOM).double() for _ in range(2))
TARGETS, ONE = torch.tensor([3, 36, 0]), torch.tensor([1.0, -1.0, 0.5]).double()
CHUNK = Chunk(TARGETS, None, None, None, HeadOptions(softcap=3.0))
IDS = torch.tensor([[4, 3], [36, 0], [1, 2]])


def far(values):
    """A copy of `values` [n, m] whose rows lie FAR elements apart."""
    size = (FAR * (len(values) - 1) + values.shape[1]) * values.element_size()
    room = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    return torch.frombuffer(room, dtype=values.dtype).as_strided(values.shape, (FAR, 1)).copy_(values)


@pytest.fixture(autouse=True)
def _little_memory():
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    yield
    assert resident() - before < 256 << 20


def both(call, *matrices, tolerance=0.0):
    """What `call` returns and leaves in its matrices is the same for rows side by side and far apart."""
    near, apart = [t.clone() for t in matrices], [far(t) for t in matrices]
    found, want = call(*apart), call(*near)
    torch.testing.assert_close(found, want, rtol=tolerance, atol=tolerance)
    for a, b in zip(apart, near):
        assert torch.equal(a, b)
    return want, near


def capped(z):
    return 3 * torch.tanh(z / 3)


def entropy_of(log_p):
    return -(log_p.exp() * log_p).sum(-1)


def of_targets(log_p):
    return log_p.gather(1, TARGETS[:, None])[:, 0]


def gradient_of(loss):
    """By the products, of a loss of the logits."""
    products = LOGITS.clone().requires_grad_()
    return torch.autograd.grad(loss(capped(products)).sum(), products)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_statistics(dtype):
    want = ("lse", "logprobs", "entropy", "is_top1", "mean_logits", "log_sum_sq_probs")
    stats, (z,) = both(lambda z: cpu.row_stats(z, CHUNK, want), LOGITS.to(dtype))
    log_p = capped(LOGITS).log_softmax(-1)
    torch.testing.assert_close(z, capped(LOGITS).to(dtype))
    torch.testing.assert_close(stats["logprobs"], of_targets(log_p).to(dtype))
    torch.testing.assert_close(stats["entropy"], entropy_of(log_p).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_policy_loss_and_its_gradient(dtype):
    one = ONE.to(dtype)

    def call(z):
        return cpu.fused_policy(z, CHUNK, PolicySpec(), Tokens(one, weights=one), ("loss",), out=z)

    def exact(z):
        logp = of_targets(z.log_softmax(-1))
        return -(logp - logp.detach()).exp() * ONE * ONE

    (outputs, live), (grad,) = both(call, LOGITS.to(dtype))
    torch.testing.assert_close(outputs["loss"], exact(LOGITS).to(dtype))
    torch.testing.assert_close(grad, gradient_of(exact).to(dtype))
    assert live.all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("raw", [False, True])
def test_gradients_by_coefficients(raw, dtype):
    """From products, or from logits that a pass before has left."""
    log_p, coefs = capped(LOGITS).log_softmax(-1), ONE.to(dtype)
    entropy, lse = entropy_of(log_p).to(dtype), capped(LOGITS).logsumexp(-1).to(dtype)

    def call(z):
        return cpu.grad_logits(z, CHUNK, Coefs(lse, coefs, 2 * coefs, entropy, 3 * coefs), raw=raw, out=z)

    def exact(z):
        log_p = z.log_softmax(-1)
        return ONE * (of_targets(log_p) + 2 * entropy_of(log_p) + 3 * z.logsumexp(-1))

    _, (grad,) = both(call, (LOGITS if raw else capped(LOGITS)).to(dtype))
    torch.testing.assert_close(grad, gradient_of(exact).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_a_divergence_and_its_gradient(alpha, dtype):
    """Both logits far apart, and a row without a teacher between."""
    teacher_rows, weights = torch.tensor([0, -1, 1]), ONE.to(dtype)
    lse, teacher_lse = (z.logsumexp(-1).to(dtype) for z in (capped(LOGITS), TEACHER[:2]))

    def call(z, t):
        return cpu.fused_distill(
            z, CHUNK, Coefs(lse), TeacherChunk(t, CHUNK, teacher_lse, teacher_rows), weights, alpha, out=z
        )

    def exact(z):
        return divergences.divergence(z[[0, 2]].log_softmax(-1), TEACHER[:2].log_softmax(-1), alpha)

    (divergence, live), (grad, _) = both(call, capped(LOGITS).to(dtype), TEACHER[:2].to(dtype))
    torch.testing.assert_close(divergence, exact(capped(LOGITS)).to(dtype))
    torch.testing.assert_close(grad[[0, 2]], gradient_of(lambda z: ONE[[0, 2]] * exact(z))[[0, 2]].to(dtype))
    assert live.tolist() == [1, 0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_likeliest_tokens_and_gradients_by_them(dtype):
    z, slopes = capped(LOGITS).to(dtype), TEACHER[:, :2].to(dtype).contiguous()
    lse = z.logsumexp(-1)
    found, _ = both(lambda z: cpu.top_k(z, CHUNK, None, ROWS, 5), z)
    assert torch.equal(found, z.topk(5).indices)
    (logprobs, rest), _ = both(lambda z: cpu.bucket_logprobs(z, CHUNK, None, lse, IDS, True), z)
    torch.testing.assert_close(logprobs, z.log_softmax(-1).gather(1, IDS))

    def exact(z):
        log_p = z.log_softmax(-1)
        others = log_p.scatter(1, IDS, -1e9).logsumexp(-1)
        return (TEACHER[:, :2] * log_p.gather(1, IDS)).sum(-1) + ONE * others

    by_bucket = BucketSlopes(IDS, slopes, rest, ONE.to(dtype))
    _, (grad,) = both(lambda z: cpu.grad_buckets(z, CHUNK, Coefs(lse), None, by_bucket, out=z), z)
    torch.testing.assert_close(grad, gradient_of(exact).to(dtype))


def test_rows_that_are_squeezed_out():
    live = torch.tensor([0, 1, 1], dtype=torch.uint8)
    (count, order), (moved,) = both(lambda z: cpu.compact(z, live), LOGITS.float())
    assert count == 2
    assert sorted(order.tolist()) == [1, 2]
    assert torch.equal(moved[:2], LOGITS.float()[order])


@pytest.mark.skipif(not cpu.has_gemm(), reason="the products want AVX2")
@pytest.mark.parametrize(
    "operands", [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16,) * 2]
)
def test_products(operands):
    """Every matrix of the three."""
    if operands[0] == torch.bfloat16 and not cpu.has_bf16_gemm():
        pytest.skip("no AVX512-BF16 here")
    pairs = operands[0] == torch.bfloat16
    hidden = torch.randn(ROWS, D, generator=RANDOM).to(operands[0])
    weight = torch.randn(ROWS, D, generator=RANDOM).to(operands[1])  # a vocabulary of three
    dlogits, out = torch.randn(ROWS, ROWS, generator=RANDOM).bfloat16().float(), torch.zeros(ROWS, ROWS)
    scratch = torch.zeros(cpu.gemm_scratch_bytes(ROWS, D, 1, operands[0]), dtype=torch.uint8)
    close = {"rtol": 1e-5, "atol": 1e-5}
    _, (*_, logits) = both(lambda h, w, out: cpu.gemm_nt(h, w, out, scratch, 1), hidden, weight, out)
    torch.testing.assert_close(logits, hidden.float() @ weight.float().t(), **close)
    zeros = torch.zeros(ROWS, D)
    _, (*_, dhidden) = both(lambda g, w, out: cpu.gemm_nn(g, w, out, scratch, 1, pairs=pairs), dlogits, weight, zeros)
    torch.testing.assert_close(dhidden, dlogits @ weight.float(), **close)
    _, (*_, dweight) = both(
        lambda g, h, out: cpu.gemm_tn(g, h, out, scratch, 1, accumulate=True, scale=2.0), dlogits, hidden, zeros + 1
    )
    torch.testing.assert_close(dweight, 1 + 2 * dlogits.t() @ hidden.float(), **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_hidden_states_and_heads_of_whole_ops(dtype):
    """Student's and teacher's, of T·D and V·D > 2³²: values and gradients."""
    tensors = [torch.randn(ROWS, D, generator=RANDOM).to(dtype) for _ in range(4)]
    targets, old = torch.tensor([0, 2, 1]), torch.full((ROWS,), -1.0)

    def call(hidden, weight, seen, theirs):
        leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        policy = dk.policy_loss(*leaves, targets, ONE.float(), old_logprobs=old, spec=PolicySpec(entropy_coef=0.1)).loss
        distill = dk.distill_loss(*leaves, dk.Teacher(seen, theirs), targets=targets).loss
        scored = dk.linear_logprob(*leaves, targets).logprobs
        kept = dk.topk_logprobs(seen, theirs, 2)
        grads = torch.autograd.grad(policy + distill + scored.sum(), leaves)
        return policy.detach(), distill.detach(), scored.detach(), kept.ids, kept.logprobs, *grads

    tolerance = 1e-12 if dtype == torch.float64 else 0.0  # where torch multiplies
    (_, _, scored, *_, dhidden, dweight), _ = both(call, *tensors, tolerance=tolerance)
    exact = (tensors[0].double() @ tensors[1].double().t()).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(scored.double(), exact, rtol=1e-4, atol=1e-4)
    assert dhidden.any(-1).all()
    assert dweight.any(-1).all()
