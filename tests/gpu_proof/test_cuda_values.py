"""The CUDA row kernels, run on the CPU by `simt/`, against float64: every output, dtype, option, layout and launch."""

from __future__ import annotations

import mmap
from dataclasses import replace

import pytest
import torch
from emulate import ORDERS, build_as_asked, launches, padded, running
from test_losses import SPECS
from torch import Tensor

from drift_kernels import formulas
from drift_kernels.backends import cpu, cuda, partials
from drift_kernels.backends.contract import Chunk, Coefs
from drift_kernels.calls import HeadOptions
from drift_kernels.formulas import Tokens
from drift_kernels.spec import PolicySpec
from drift_kernels.testing import off_the_edges, within_budget

STATS = ("logprobs", "is_top1", "lse", "entropy", "mean_logits", "log_sum_sq_probs")
POLICY = ("loss", "ratio", "kl", "clipped")
HEADS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "rows": {"temperature": "row"},
    "everything": {"temperature": "row", "bias": True, "softcap": 3.0, "logit_scale": 1.3},
}
SPEC = PolicySpec(kl_coef=0.1, entropy_coef=0.05, z_loss_coef=0.01, dual_clip=3.0)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return build_as_asked(tmp_path_factory.mktemp("kernels"))


class Case:
    """Products of C rows and what goes with them, exact in fp32. `entries`: "one" a row, or "csr", 0 to 70 a row."""

    def __init__(self, rows: int, V: int, head: str, entries: str, seed: int = 0):
        g = torch.Generator().manual_seed(seed)
        self.g, self.V, self.C = g, V, rows
        self.x = 3 * torch.randn(rows, V, generator=g)
        options = dict(HEADS[head])
        self.bias = torch.randn(V, generator=g) if options.pop("bias", False) else None
        self.inverse = None
        if options.get("temperature") == "row":
            options.pop("temperature")
            self.inverse = 0.5 + torch.rand(rows, generator=g)
        self.head = HeadOptions(**options)
        counts = torch.ones(rows, dtype=torch.int64)
        if entries == "csr":
            counts = torch.tensor([0, 1, 3, 70, 33])[torch.arange(rows) % 5]
        self.owner = torch.repeat_interleave(torch.arange(rows), counts)
        self.row_ptr = None if entries == "one" else torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        self.N = N = len(self.owner)
        # half of the targets are among a row's first columns, so that entries share them; first and last columns occur
        self.y = torch.where(torch.rand(N, generator=g) < 0.5, V, min(V, 3))
        self.y = (torch.rand(N, generator=g) * self.y).long().clamp(max=V - 1)
        self.y[::5], self.y[1::7], self.y[4::9] = V - 1, 0, -100
        self.advantages, self.weights = torch.randn(N, generator=g), torch.rand(N, generator=g)
        self.advantages[2::6], self.weights[3::8] = 0, 0
        with torch.no_grad():
            exact = self.statistics(self.x.double())["logprobs"]
        edges = (0.8, 1.2, 1.28, 1.4, 1.5, 3.0)
        noise = 0.3 * torch.randn(2, N, generator=g, dtype=torch.float64)
        self.old, self.ref = off_the_edges(exact + noise[0], exact, edges).float(), (exact + noise[1]).float()

    @property
    def scale(self) -> float:
        """What a row's gradient is added up from and may cancel: its entries' |advantages|, times its logits' size."""
        sums = torch.zeros(self.C).index_add_(0, self.owner, self.advantages.abs())
        return max(1.0, float(sums.max())) * max(1.0, float(self.logits(self.x).abs().max()))

    @property
    def chunk(self) -> Chunk:
        return Chunk(self.y, self.row_ptr, self.inverse, self.bias, self.head)

    def logits(self, x: Tensor) -> Tensor:
        """softcap(scale·(x + b)) / temperature in x's dtype."""
        u = self.head.logit_scale * (x if self.bias is None else x + self.bias.to(x.dtype))
        if self.head.softcap:
            u = self.head.softcap * torch.tanh(u / self.head.softcap)
        return u / self.head.temperature if self.inverse is None else u * self.inverse.to(x.dtype)[:, None]

    def statistics(self, x: Tensor) -> dict[str, Tensor]:
        """Per row [C] and per entry [N], in x's dtype, differentiable."""
        z = self.logits(x)
        log_p = torch.log_softmax(z, -1)
        y = self.y.clamp(min=0)
        return {
            "lse": torch.logsumexp(z, -1),
            "entropy": -(log_p.exp() * log_p).sum(-1),
            "mean_logits": z.mean(-1),
            "log_sum_sq_probs": torch.logsumexp(2 * log_p, -1),
            "logprobs": torch.where(self.y >= 0, log_p[self.owner, y], 0.0),
            "is_top1": ((z[self.owner, y] >= z.max(-1).values[self.owner]) & (self.y >= 0)).to(z.dtype),
        }

    def policy(self, x: Tensor, spec: PolicySpec) -> dict[str, Tensor]:
        """Weighted token losses and terms [N] by the torch formulas, on statistics of x."""
        s = self.statistics(x)
        data = (self.advantages, self.old, self.ref, self.weights)
        tokens = formulas.Tokens(*(v.to(x.dtype) for v in data))
        w, rows = self.weights.to(x.dtype), self.owner
        loss = formulas.token_loss(s["logprobs"], tokens, s["entropy"][rows], s["lse"][rows], spec)
        with torch.no_grad():
            terms = {
                "ratio": formulas.ratio_of(s["logprobs"], tokens, spec),
                "kl": formulas.kl_term(s["logprobs"], tokens, spec),
                "clipped": torch.where(w != 0, formulas.clipped(s["logprobs"], tokens, spec), 0.0),
            }
        out = {"loss": w * loss, **terms}
        return s | {name: torch.where(self.y >= 0, value, 0.0) for name, value in out.items()}

    def fused(self, spec: PolicySpec, out: Tensor | None, x: Tensor | None = None, old: bool = True):
        x = self.x.clone() if x is None else x
        old_logprobs = self.old if old else None
        tokens = Tokens(self.advantages, old_logprobs, self.ref, self.weights)
        return cuda.fused_policy(x, self.chunk, spec, tokens, STATS + POLICY, out=out)


def gradient_of(f, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x), x)[0]


def check(name: str, actual: Tensor, own: Tensor, exact: Tensor, scale: float | None = None):
    ok, line = within_budget(actual, own, exact, actual.dtype, scale)
    assert ok, f"{name}: {line}"


def check_statistics(case: Case, outputs: dict[str, Tensor]):
    own, exact = case.statistics(case.x), case.statistics(case.x.double())
    largest = float(case.logits(case.x.double()).abs().max())
    for name in STATS:
        scale = 1.0 if name == "is_top1" else max(1.0, largest, float(exact[name].abs().max()) if case.N else 0)
        check(name, outputs[name], own[name], exact[name], scale)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("entries", ["one", "csr"])
def test_row_stats(library, monkeypatch, head, entries):
    with running(library, monkeypatch):
        for V in (1, 2, 33, 1001, 4096, 131_075):
            for lead, gap, launch in ((0, 0, {}), (1, 2, {"threads": 64, "cluster": 4}), (3, 1, {"threads": 32})):
                case = Case(5 if V < 9999 else 2, V, head, entries)
                x = padded(case.C, V, torch.float32, lead, gap)
                x[:] = case.x
                with monkeypatch.context() as patch:
                    launches(patch, **launch)
                    check_statistics(case, cuda.row_stats(x, case.chunk, STATS))
                assert torch.equal(x, case.x), "products must be left as they are"


@pytest.mark.parametrize("head", ["plain", "everything"])
@pytest.mark.parametrize("entries", ["one", "csr"])
@pytest.mark.parametrize("launch", [{}, {"threads": 64, "cluster": 4}])
def test_parts_of_the_vocabulary_merge_to_the_whole(library, monkeypatch, head, entries, launch):
    case = Case(5, 1001, head, entries)
    case.x[:, 300:700] -= 60.0  # parts whose maxima lie far apart
    case.x[2, :300] = -float("inf")  # and one of nothing
    case.y[case.owner == 2] = 700
    with running(library, monkeypatch), monkeypatch.context() as patch:
        launches(patch, **launch)
        for cuts in ([1001], [1, 1001], [300, 301, 700, 1001]):
            parts = partials_of(case, cuts)
            found = partials.merge(partials.stack(parts), case.y, case.row_ptr, case.V, STATS)
            own, exact = case.statistics(case.x), case.statistics(case.x.double())
            for name in set(STATS) - {"entropy", "mean_logits"}:
                check(name, found[name], own[name], exact[name], 100.0)
            finite = torch.arange(case.C) != 2
            for name in ("entropy", "mean_logits"):
                check(name, found[name][finite], own[name][finite], exact[name][finite], 100.0)
            assert found["entropy"].isfinite().all()


def test_a_share_of_the_columns_gives_its_share_of_the_gradient(library, monkeypatch):
    case = Case(5, 1001, "everything", "csr")
    whole, shares = torch.empty(5, 1001), torch.empty(5, 1001)
    with running(library, monkeypatch):
        found = cuda.row_stats(case.x, case.chunk, ("lse", "entropy"))
        coefs = Coefs(found["lse"], case.advantages, torch.ones(5), found["entropy"])
        cuda.grad_logits(case.x, case.chunk, coefs, raw=True, out=whole)
        for first, last in ((0, 300), (300, 301), (301, 1001)):
            here = (case.y >= first) & (case.y < last)
            elsewhere = torch.where(case.y < 0, case.y, last - first)  # beyond the share, and not masked
            bias = None if case.bias is None else case.bias[first:last].contiguous()
            chunk = replace(case.chunk, targets=torch.where(here, case.y - first, elsewhere), bias=bias)
            cuda.grad_logits(case.x[:, first:last], chunk, coefs, raw=True, out=shares[:, first:last])
    torch.testing.assert_close(shares, whole)


def partials_of(case: Case, cuts: list[int]) -> list[partials.Partials]:
    """Of the columns up to each cut."""
    parts = []
    for first, last in zip([0, *cuts], cuts):
        bias = None if case.bias is None else case.bias[first:last].contiguous()
        parts.append(cuda.partial_stats(case.x[:, first:last], replace(case.chunk, bias=bias), STATS, first))
    return parts


def padding_is_nan(x: Tensor) -> bool:
    """Whether nothing was written beside the columns of a `padded` tensor."""
    count = x.untyped_storage().nbytes() // x.element_size()
    whole = torch.as_strided(x, (count,), (1,), 0)
    inside = torch.zeros(count, dtype=torch.bool)
    rows, columns = torch.arange(x.shape[0])[:, None] * x.stride(0), torch.arange(x.shape[1])
    inside[(x.storage_offset() + rows + columns).flatten()] = True
    return bool(whole[~inside].isnan().all()) and not bool(whole[inside].isnan().any())


LAUNCHES = {
    "rule": {},
    "two sweeps": {"threads": 64, "cluster": 1, "on_chip": False},
    "one block": {"threads": 128, "cluster": 1, "on_chip": True},
    "two blocks": {"threads": 32, "cluster": 2, "on_chip": True},
    "eight blocks": {"threads": 64, "cluster": 8, "on_chip": True},
    "eight blocks, two sweeps": {"threads": 64, "cluster": 8, "on_chip": False},
}


def gradients(case: Case, f, k: int) -> Tensor:
    """f(out) writes gradients; into fp32 [C, V] returned, and into halves which must be the same numbers rounded."""
    full = padded(case.C, case.V, torch.float32, (3 * k) % 4, (k + 1) % 2)
    f(full)
    assert padding_is_nan(full)
    for dtype in (torch.bfloat16, torch.float16):
        out = padded(case.C, case.V, dtype, (3 * k) % 8, (k + 1) % 2)
        f(out)
        assert padding_is_nan(out)
        assert torch.equal(out, full.to(dtype))
    return full


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("entries", ["one", "csr"])
@pytest.mark.parametrize("V", [1, 5, 33, 1001, 4096, 131_075])
def test_fused_policy(library, monkeypatch, V, head, entries):
    with running(library, monkeypatch):
        case = Case(5 if V < 9999 else 4, V, head, entries, seed=V)
        own, exact = case.policy(case.x, SPEC), case.policy(case.x.double(), SPEC)
        dx_own = gradient_of(lambda x: case.policy(x, SPEC)["loss"].sum(), case.x)
        dx = gradient_of(lambda x: case.policy(x, SPEC)["loss"].sum(), case.x.double())
        for k, (name, launch) in enumerate(LAUNCHES.items()):
            if V > 9999 and name in ("one block", "two blocks"):
                continue  # a row does not fit into their shared memory
            x = padded(case.C, V, torch.float32, k % 4, k % 3)
            x[:] = case.x
            with monkeypatch.context() as patch:
                launches(patch, **launch)
                out = gradients(case, lambda out, x=x: case.fused(SPEC, out, x), k)
                outputs, live = case.fused(SPEC, out, x)
            assert torch.equal(x, case.x), "products must be left as they are"
            check_statistics(case, outputs)
            for term in POLICY:
                scale = max(1.0, float(exact["lse"].abs().max()) ** 2)
                check(term, outputs[term], own[term], exact[term], scale)
            check(f"gradient, {name}", out, dx_own, dx, case.scale)
            assert torch.equal(live.bool(), (dx != 0).any(-1)) or V == 1


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("raw", [True, False])
def test_grad_logits(library, monkeypatch, head, raw):
    with running(library, monkeypatch):
        for V, entries in ((1, "one"), (33, "csr"), (1001, "one"), (4096, "csr"), (131_075, "csr")):
            case = Case(5 if V < 9999 else 4, V, head, entries, seed=V)
            coefs, entropy_coefs = case.advantages, torch.randn(case.C, generator=case.g)
            lse_coefs = torch.randn(case.C, generator=case.g)
            entropy_coefs[1], lse_coefs[:3] = 0, 0
            stats = {k: v.float() for k, v in case.statistics(case.x.double()).items()}

            def loss(x, case=case, coefs=coefs, entropy_coefs=entropy_coefs, lse_coefs=lse_coefs):
                s = case.statistics(x)
                terms = {"logprobs": coefs, "entropy": entropy_coefs, "lse": lse_coefs}
                return sum((s[name] * c.to(x.dtype)).sum() for name, c in terms.items())

            own, exact = gradient_of(loss, case.x), gradient_of(loss, case.x.double())
            x = padded(case.C, V, torch.float32, 2, 1)
            x[:] = case.x if raw else case.logits(case.x.double()).float()
            before, chunk, live = x.clone(), case.chunk, torch.empty(0)
            terms = Coefs(stats["lse"], coefs, entropy_coefs, stats["entropy"], lse_coefs)
            for k, launch in enumerate(({}, {"threads": 64, "cluster": 4})):
                with monkeypatch.context() as patch:
                    launches(patch, **launch)
                    out = gradients(case, lambda out, a=(x, chunk, terms): cuda.grad_logits(*a, raw=raw, out=out), k)
                    live = cuda.grad_logits(x, chunk, terms, raw=raw, out=out)
                check("gradient", out, own, exact, case.scale)
                assert torch.equal(x, before)
                expected = torch.zeros(case.C, dtype=torch.bool)
                expected[case.owner[(case.y >= 0) & (coefs != 0)]] = True
                assert torch.equal(live.bool(), expected | (entropy_coefs != 0) | (lse_coefs != 0))


@pytest.mark.parametrize("name", [name for name, spec in SPECS.items() if spec.scope == "token"])
def test_every_spec_gives_the_numbers_of_the_cpu_kernels(library, monkeypatch, name):
    """policy.h as CPU code and inside the CUDA kernel, on and off policy, by value and by gradient."""
    spec, case = SPECS[name], Case(8, 257, "everything", "csr", seed=5)
    for old in (True, False):
        theirs = case.x.clone()
        tokens = Tokens(case.advantages, case.old if old else None, case.ref, case.weights)
        expected, live_expected = cpu.fused_policy(theirs, case.chunk, spec, tokens, STATS + POLICY, out=theirs)
        theirs[live_expected == 0] = 0
        with running(library, monkeypatch):
            out = torch.full_like(case.x, float("nan"))
            outputs, live = case.fused(spec, out, old=old)
        assert torch.equal(live, live_expected)
        for term in STATS + POLICY:
            torch.testing.assert_close(
                outputs[term], expected[term], rtol=2e-5, atol=4e-6, msg=lambda m, t=term: f"{t}: {m}"
            )
        torch.testing.assert_close(out, theirs, rtol=2e-5, atol=4e-6)
        assert torch.equal(outputs["clipped"], expected["clipped"])


@pytest.mark.parametrize("launch", LAUNCHES)
def test_results_repeat_bitwise_in_every_order_of_warps_and_lanes(library, monkeypatch, launch):
    case, found = Case(5, 4099, "everything", "csr", seed=9), []
    with running(library, monkeypatch) as choose, monkeypatch.context() as patch:
        launches(patch, **LAUNCHES[launch])
        for order in (*ORDERS, 0):
            choose(order)
            out = padded(case.C, case.V, torch.bfloat16, 3, 1)
            outputs, live = case.fused(SPEC, out)
            found.append(
                [out.contiguous().view(torch.int16), live, *(outputs[k].view(torch.int32) for k in sorted(outputs))]
            )
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


def test_what_is_not_finite_shows_where_the_cpu_kernels_show_it(library, monkeypatch):
    inf, nan = float("inf"), float("nan")
    x = torch.randn(6, 70)
    x[0, 3], x[1, :] = -inf, -inf
    x[2, 69], x[3, 5], x[4, :], x[4, 7] = nan, inf, -inf, 1.0
    case = Case(6, 70, "plain", "one")
    case.y = torch.tensor([4, 5, 6, 7, 7, 8])
    with running(library, monkeypatch):
        for launch in LAUNCHES.values():
            with monkeypatch.context() as patch:
                launches(patch, **launch)
                theirs, out = x.clone(), torch.empty(6, 70)
                tokens = Tokens(case.advantages)
                names = STATS + POLICY
                expected, _ = cpu.fused_policy(theirs, case.chunk, PolicySpec(), tokens, names, out=theirs)
                outputs, _ = cuda.fused_policy(x.clone(), case.chunk, PolicySpec(), tokens, names, out=out)
            for name in ("logprobs", "lse", "entropy", "loss"):
                torch.testing.assert_close(outputs[name], expected[name], equal_nan=True)
            rows = [0, 4, 5]  # the others are NaN, or undefined
            torch.testing.assert_close(out[rows], theirs[rows], rtol=1e-5, atol=1e-6)
            assert out[2].isnan().all()
            assert theirs[2].isnan().all()


def test_rows_begin_beyond_two_to_the_31(library, monkeypatch):
    """Two rows so far apart that 32-bit offsets wrap; only the pages that are touched exist."""
    case, far = Case(2, 33, "plain", "one"), 2**31 + 5

    def sparse(dtype: torch.dtype) -> Tensor:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
        memory = mmap.mmap(-1, (far + 64) * dtype.itemsize, flags=flags)
        return torch.frombuffer(memory, dtype=dtype).as_strided((2, 33), (far, 1))

    x, out, near = sparse(torch.float32), sparse(torch.bfloat16), torch.empty(2, 33, dtype=torch.bfloat16)
    x[:] = case.x
    with running(library, monkeypatch):
        outputs, _ = case.fused(SPEC, out, x)
        expected, _ = case.fused(SPEC, near)
    assert torch.equal(out, near)
    assert all(torch.equal(outputs[name], expected[name]) for name in expected)


def test_a_sure_row_has_an_exactly_zero_gradient(library, monkeypatch):
    case = Case(1, 40, "plain", "one")
    case.x = torch.zeros(1, 40)
    case.x[0, 11], case.y, out = 200.0, torch.tensor([11]), torch.full((1, 40), float("nan"))
    case.advantages = torch.tensor([0.37])
    with running(library, monkeypatch):
        cuda.fused_policy(case.x, case.chunk, PolicySpec(), Tokens(case.advantages), ("loss",), out=out)
    assert (out == 0).all()


def test_a_target_outside_the_vocabulary_gives_nan(library, monkeypatch):
    case, out = Case(1, 40, "plain", "one"), torch.zeros(1, 40)
    case.y = torch.tensor([40])
    with running(library, monkeypatch):
        outputs, _ = case.fused(PolicySpec(), out)
    assert outputs["logprobs"].isnan().all()
    assert out.isnan().all()


def test_statistics_without_a_gradient(library, monkeypatch):
    case = Case(5, 1001, "everything", "csr")
    with running(library, monkeypatch):
        outputs, _ = case.fused(SPEC, None)
        check_statistics(case, outputs)
        empty = Case(0, 1001, "plain", "one")
        assert empty.fused(SPEC, torch.empty(0, 1001))[0]["loss"].shape == (0,)
