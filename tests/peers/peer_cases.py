"""What a peer and ours get: padded [B, L] batches for the peer, the same tokens padded and packed for us.

A peer is a function of log-probs [B, L]; here they come from plain torch, from the hidden states and the head that ours gets,
so that its own gradients reach both. A comparison is of the loss and of its gradients by hidden and weight, in fp64 and,
within an error budget, in fp32. Discontinuities (clip edges, bounds, thresholds) are decided alike only away from them:
`settle` moves a batch off them.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field

import loose
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

import drift_kernels as dk
from drift_kernels.testing import within_budget

D, V = 5, 23
MARGIN = 2e-3
NAMES = ("loss", "d/d hidden", "d/d weight")
bounded = settings(
    derandomize=True, max_examples=25, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
brief = settings(bounded, max_examples=12)  # where each of many names has a test of its own


@dataclass
class Batch:
    """float64 values that fp32 holds exactly; [B, L] but where noted. Positions from `lengths` on are padding."""

    hidden: Tensor  # [B, L, D]
    weight: Tensor  # [V, D]
    targets: Tensor  # int64
    mask: Tensor  # bool, what is trained: at least one token a sequence
    lengths: Tensor  # [B] int64
    advantages: Tensor  # [B], or [B, L]
    old: Tensor
    ref: Tensor
    rollout: Tensor
    workspace: int | None = None  # ours', in bytes

    @property
    def logp(self) -> Tensor:
        return logprobs(self.hidden, self.weight, self.targets)[0]

    def to(self, dtype: torch.dtype) -> Batch:
        """The same numbers, hidden and weight as leaves that require grad."""
        made = {name: value.to(dtype) if is_float(value) else value for name, value in vars(self).items()}
        made["hidden"], made["weight"] = (made[n].clone().requires_grad_() for n in ("hidden", "weight"))
        return Batch(**made)


def is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs of the targets and entropies, by eager torch."""
    logs = torch.log_softmax(hidden @ weight.T, -1)
    return logs.gather(-1, targets[..., None]).squeeze(-1), -(logs.exp() * logs).sum(-1)


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    return (values * mask).sum(dim, keepdim=dim is not None) / mask.sum(dim, keepdim=dim is not None)


def make_batch(
    seed: int, B: int, L: int, per_token: bool, *, chunks: int = 1, holes: float = 0.2, zeros: bool = False
) -> Batch:
    """Random lengths and tool-like holes; policies differ by noise a token and a shift a sequence."""
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    hidden, weight = rand(B, L, D).float().double(), rand(V, D).float().double()
    targets = torch.randint(0, V, (B, L), generator=g)
    lengths = torch.randint(1, L + 1, (B,), generator=g)
    inside = torch.arange(L) < lengths[:, None]
    mask = inside & (torch.rand(B, L, generator=g) > holes)
    mask[torch.arange(B), lengths - 1] = True
    logp = logprobs(hidden, weight, targets)[0]
    near = lambda: (logp + 0.25 * rand(B, L) + 0.1 * rand(B, 1)).float().double()  # noqa: E731
    advantages = (rand(B, L) if per_token else rand(B)).float().double()
    if zeros:
        advantages[torch.rand(advantages.shape, generator=g) < 0.3] = 0
    workspace = None if chunks == 1 else max(1, B * L // chunks) * (V + D) * 8
    return Batch(hidden, weight, targets, mask, lengths, advantages, near(), near(), near(), workspace)


@st.composite
def batches(draw: st.DrawFn, per_token: bool | None = None) -> Batch:
    per_token = draw(st.booleans()) if per_token is None else per_token
    shape = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    chunks, zeros = draw(st.sampled_from([1, 3])), draw(st.sampled_from([False, False, True]))
    return make_batch(draw(st.integers(0, 10**6)), *shape, per_token, chunks=chunks, zeros=zeros)


def settle(batch: Batch, name: str, *edges: tuple[Callable[[Batch], Tensor], tuple[float | None, ...]]) -> Batch:
    """`batch` with its `name` log-probs moved until no fn(batch) [B, L] or [B, 1] is within a share of one of its edges."""
    for _ in range(50):
        near = torch.zeros_like(batch.mask)
        for fn, places in edges:
            for edge in places:
                if edge is not None:
                    near |= (fn(batch) - edge).abs() < MARGIN * (abs(edge) or 1.0)
        if not near.any():
            return batch
        moved = getattr(batch, name) - 3.7 * MARGIN * near
        batch = Batch(**{**vars(batch), name: moved.float().double()})
    raise AssertionError(f"{name} could not be moved off {[places for _, places in edges]}")


def ratio(batch: Batch) -> Tensor:
    return (batch.logp - batch.old).exp()


def sequence_ratio(batch: Batch) -> Tensor:
    return masked_mean(batch.logp - batch.old, batch.mask, -1).exp()


def compared(function: Callable, expression: str) -> set[str]:
    """The texts that a peer's `function` compares `expression` with: the options it knows."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Compare) and ast.unparse(node.left) == expression]
    values = [c.value for node in found for c in ast.walk(node) if isinstance(c, ast.Constant)]
    return {value for value in values if isinstance(value, str)}


def of_level(level: str) -> Callable[[Batch], Tensor]:
    return ratio if level == "token" else sequence_ratio


def importance(mode: str) -> Callable[[Batch], Tensor]:
    """What a rollout correction truncates or masks."""

    def value(batch: Batch) -> Tensor:
        delta = (batch.old - batch.rollout) * batch.mask
        return (delta if mode.startswith("token") else delta.sum(-1, keepdim=True)).exp()

    return value


@dataclass
class Result:
    """A loss and its gradients, by the padded shape, and what was logged."""

    loss: Tensor
    hidden: Tensor
    weight: Tensor
    metrics: dict[str, float] = field(default_factory=dict)

    def flat(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.loss, self.hidden, self.weight


def ours(batch: Batch, spec: dk.PolicySpec, dtype: torch.dtype, packed: bool, **given) -> Result:
    """`policy_loss` by the real driver. `given` are the names of [B, L] log-probs to pass, and further keywords."""
    x = batch.to(dtype)
    inside = torch.arange(x.mask.shape[1]) < x.lengths[:, None]
    pick = (lambda t: t[inside]) if packed else lambda t: t
    targets = pick(torch.where(x.mask, x.targets, -100))
    per_token = {f"{n}_logprobs": pick(getattr(x, n)) for n in ("old", "ref", "rollout") if given.pop(n, False)}
    per_token |= {n: pick(given.pop(n).to(dtype)) for n in ("token_weights",) if n in given}
    if packed:
        per_token["cu_seqlens"] = torch.cat([torch.zeros(1, dtype=torch.int64), x.lengths.cumsum(0)])
    advantages = x.advantages if x.advantages.dim() == 1 else pick(x.advantages)
    config = dk.KernelConfig(backend=given.pop("backend", "cpu"), workspace_bytes=batch.workspace)
    out = loose.policy_loss(
        pick(x.hidden), x.weight, targets, advantages, spec=spec, config=config, **per_token, **given
    )
    dhidden, dweight = torch.autograd.grad(out.loss, (x.hidden, x.weight))
    metrics = {name: float(total) / max(float(count), 1) for name, (total, count) in out.metrics.items()}
    return Result(out.loss.detach(), dhidden, dweight, metrics)


def gradients(loss: Tensor, batch: Batch, metrics: dict[str, float] | None = None) -> Result:
    """A peer's loss with its gradients; `batch` is the one that `to` made."""
    found = torch.autograd.grad(loss, (batch.hidden, batch.weight), allow_unused=True)
    dhidden, dweight = (torch.zeros_like(x) if g is None else g for g, x in zip(found, (batch.hidden, batch.weight)))
    return Result(loss.detach(), dhidden, dweight, metrics or {})


def assert_agree(
    double: Result, single: Result, exact: Result, own: Result, logits: float, rtol: float = 1e-10, where: str = ""
) -> None:
    """Ours in fp64 and fp32 against the peer's, of which the first is exact; `logits` is the largest of them."""
    for name, a, b, c, d in zip(NAMES, double.flat(), exact.flat(), single.flat(), own.flat()):
        scale = max(1.0, float(b.abs().max()))
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * scale, msg=lambda m, n=name: f"{n}: {m}")
        ok, line = within_budget(c, d, b, torch.float32, scale=scale * max(1.0, logits))
        assert ok, f"{name} in fp32{where}: {line}"


def assert_same(
    batch: Batch,
    peer: Callable[[Batch], Result],
    spec: dk.PolicySpec,
    rtol: float = 1e-10,
    metrics: dict[str, str] | None = None,
    outputs: tuple[str, ...] = (),
    **given,
) -> None:
    """Ours is the peer's: value and gradients, padded and packed, fp64 and fp32; and metrics {ours: the peer's name}.

    `outputs` are asked for in the packed calls alone: what reads them keeps every row, and without them rows are dropped.
    """
    exact, own = peer(batch.to(torch.float64)), peer(batch.to(torch.float32))
    assert exact.loss.dtype == torch.float64
    logits = float((batch.hidden @ batch.weight.T).abs().max())
    for packed in (False, True):
        wanted = outputs if packed else ()
        double, single = (ours(batch, spec, t, packed, outputs=wanted, **given) for t in (torch.float64, torch.float32))
        assert_agree(double, single, exact, own, logits, rtol, f", packed={packed}")
        for mine, theirs in (metrics or {}).items():
            if packed or mine.startswith("clip_ratio"):
                a, b = double.metrics[mine], exact.metrics[theirs]
                assert abs(a - b) <= max(rtol, 1e-6) * max(1.0, abs(b)), (mine, a, b)


def assert_differs(batch: Batch, peer: Callable[[Batch], Result], spec: dk.PolicySpec, **given) -> tuple[float, float]:
    """(ours, the peer's) loss in fp64, seen to differ."""
    found, wanted = ours(batch, spec, torch.float64, False, **given).loss, peer(batch.to(torch.float64)).loss
    assert not torch.allclose(found, wanted, rtol=1e-6, atol=0), (found, wanted)
    return float(found), float(wanted)
