"""What the row kernels should say, in float64 by torch and autograd; and rows to ask them about.

`own` is the same in fp32, whose error is what a kernel may double.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from drift_kernels import reference
from drift_kernels.backends.contract import Chunk
from drift_kernels.calls import HeadOptions
from drift_kernels.formulas import Tokens
from drift_kernels.spec import PolicySpec

NAN = float("nan")
# Columns behind the vocabulary, NaN: what a missing mask reads. Strides differ, so that none can stand for another.
PAD = 13
OUT_PAD = 21


@dataclass
class Rows:
    """C rows of products with their entries, all fp32."""

    x: Tensor  # [C, V], a view of wider rows
    chunk: Chunk
    entries: dict[str, Tensor | None]  # advantages, old, ref, weights [M]
    owner: Tensor  # [M], the row of each entry

    def out(self, dtype: torch.dtype) -> Tensor:
        """A buffer [C, V] for gradients, NaN before and behind each row."""
        return padded(*self.x.shape, dtype, OUT_PAD)


def padded(C: int, V: int, dtype: torch.dtype, pad: int = PAD) -> Tensor:
    """[C, V] inside a wider tensor of NaN."""
    return torch.full((C + 2, V + pad), NAN, dtype=dtype)[1:-1, :V]


def outside_is_untouched(view: Tensor) -> bool:
    """Whether `padded`'s NaN are all still there."""
    assert view._base is not None
    whole = view._base.clone()
    whole[1:-1, : view.shape[1]] = 0
    return int(whole.isnan().sum()) == whole.numel() - view.numel()


def make_rows(
    C: int, V: int, *, head: HeadOptions = HeadOptions(), bias: bool = False, per_row: bool = False,
    several: bool = False, size: float = 2.0, seed: int = 0, pad: int = PAD,
) -> Rows:  # fmt: skip
    """Random rows. Some targets are masked, some weights and advantages 0; `several` gives rows 0 to 40 targets each."""
    g = torch.Generator().manual_seed(seed)
    x = padded(C, V, torch.float32, pad)
    x.copy_(torch.randn(C, V, generator=g) * size)
    counts = torch.tensor([1] * C) if not several else torch.tensor([[2, 0, 40, 1, 17][i % 5] for i in range(C)])
    owner = torch.repeat_interleave(torch.arange(C), counts)
    M = len(owner)
    targets = torch.randint(0, V, (M,), generator=g)
    if M > 1:
        targets[1::5] = -1
    if several:
        targets[2:6] = targets[2]  # the same target more than once
    row_ptr = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]) if several else None
    chunk = Chunk(
        targets,
        row_ptr,
        torch.rand(C, generator=g) + 0.5 if per_row else None,
        torch.randn(V, generator=g) * 0.1 if bias else None,
        head,
    )
    rows = Rows(x, chunk, {}, owner)
    logp = exact(rows, torch.float64).statistics["logprobs"]
    old = logp + 0.4 * torch.randn(M, generator=g)
    for edge in (0.5, 0.8, 1.2, 1.28, 1.4, 1.5):  # where fp32 cannot decide
        old = torch.where(((logp - old).exp() - edge).abs() < 2e-3, old - 8e-3, old)
    advantages, weights = torch.randn(M, generator=g), torch.rand(M, generator=g) + 0.1
    if M > 3:
        advantages[2::7], weights[3::6] = 0, 0
    ref = logp + 0.3 * torch.randn(M, generator=g)
    rows.entries = {"advantages": advantages, "old": old.float(), "ref": ref.float(), "weights": weights}
    return rows


@dataclass
class Exact:
    """Of `exact`."""

    x: Tensor  # [C, V], requires grad
    statistics: dict[str, Tensor]  # [M], all of them, differentiable


def exact(rows: Rows, dtype: torch.dtype) -> Exact:
    """Statistics of every entry by plain torch in `dtype`."""
    x = rows.x.detach().to(dtype, copy=True).requires_grad_()
    chunk, head = rows.chunk, rows.chunk.head
    inverse = None if chunk.inv_temperature is None else chunk.inv_temperature.to(dtype)
    temperature = None if inverse is None else 1 / inverse
    z = x if chunk.bias is None else x + chunk.bias.to(dtype)
    z = z * head.logit_scale
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    z = z / (head.temperature if temperature is None else temperature[:, None])
    return Exact(x, reference.statistics(z, chunk.targets, rows.owner, chunk.targets >= 0))


def policy(rows: Rows, spec: PolicySpec, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """Per-entry outputs of a policy loss, and d(Σ loss)/d(product) [C, V]."""
    e, chunk = exact(rows, dtype), rows.chunk
    mask = chunk.targets >= 0
    data = {name: None if v is None else v.to(dtype) for name, v in rows.entries.items()}
    terms = reference.policy(e.statistics, mask, Tokens(**data), spec)
    gradient = torch.autograd.grad(terms["loss"].sum(), e.x, allow_unused=True)[0]
    found = {name: value.detach() for name, value in (e.statistics | terms).items()}
    return found, torch.zeros_like(e.x) if gradient is None else gradient


def linear(
    rows: Rows, coefs: Tensor | None, entropy_coefs: Tensor | None, lse_coefs: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """d(Σ coefs·logp + Σ entropy_coefs·H + Σ lse_coefs·lse)/d(product) [C, V]."""
    C = rows.x.shape[0]
    one_each = replace(
        rows, chunk=replace(rows.chunk, targets=torch.zeros(C, dtype=torch.int64)), owner=torch.arange(C)
    )
    per_row, e = exact(one_each, dtype), exact(rows, dtype)
    total = torch.zeros((), dtype=dtype)
    gradient = torch.zeros_like(e.x)
    if coefs is not None:
        total = (e.statistics["logprobs"] * coefs.to(dtype)).sum()
        gradient = torch.autograd.grad(total, e.x)[0]
    for name, values in (("entropy", entropy_coefs), ("lse", lse_coefs)):
        if values is not None:
            total = (per_row.statistics[name] * values.to(dtype)).sum()
            gradient = gradient + torch.autograd.grad(total, per_row.x, retain_graph=True)[0]
    return gradient


def per_entry(rows: Rows, values: Tensor, name: str, row_outputs) -> Tensor:
    """A kernel's output per entry, and 0 where the target is masked, as the oracle has it."""
    values = values[rows.owner] if name in row_outputs else values
    return torch.where(rows.chunk.targets >= 0, values, 0.0)
