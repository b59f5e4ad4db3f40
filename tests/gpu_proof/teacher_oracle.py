"""What the kernels of distillation should say, in float64 by torch and autograd; and pairs of rows to ask them about.

Formulas are written out here once more: nothing comes from `drift_kernels.divergences`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from row_oracle import Rows, make_rows
from torch import Tensor

from drift_kernels.calls import HeadOptions

TEACHER = HeadOptions(temperature=1.4, softcap=6.0, logit_scale=0.8)
TEACHER_PAD = 5


@dataclass
class Pair:
    """C student rows and n teacher rows, and what the gradient of a loss of them is made of."""

    student: Rows
    teacher: Rows
    taught: Tensor | None  # [C] int64, which of n each row's is; −1: none
    weights: Tensor  # [C], of the divergence
    coefs: dict[str, Tensor]  # of other terms [C]: logprobs, entropy, lse; may be empty

    @property
    def index(self) -> Tensor:
        """`taught`, all in order where it is None."""
        return torch.arange(self.student.x.shape[0]) if self.taught is None else self.taught

    @property
    def its(self) -> Tensor:
        """Which student row each of the teacher's n is for [n]."""
        return torch.tensor([int((self.index == j).nonzero()) for j in range(self.teacher.x.shape[0])])


def make_pair(
    C: int, V: int, *, some: bool = True, others: bool = True, size: float = 2.0, seed: int = 0, **head
) -> Pair:
    """Random rows; with `some` every third row has no teacher and the teacher's order is another. One weight is 0."""
    g = torch.Generator().manual_seed(seed + 100)
    student = make_rows(C, V, seed=seed, size=size, **head)
    named = [i for i in range(C) if i % 3 != 2] if some else list(range(C))
    order = torch.randperm(len(named), generator=g) if some else torch.arange(C)
    taught = torch.full((C,), -1).index_copy_(0, torch.tensor(named), order) if some else None
    teacher = make_rows(
        len(named), V, head=TEACHER, bias="bias" in head, per_row="per_row" in head, size=size, seed=seed + 50,
        pad=TEACHER_PAD,
    )  # fmt: skip
    weights = torch.rand(C, generator=g) + 0.1
    weights[min(3, C - 1)] = 0
    coefs = {name: torch.randn(C, generator=g) for name in ("logprobs", "entropy", "lse")} if others else {}
    return Pair(student, teacher, taught, weights, coefs)


def logits(rows: Rows, x: Tensor) -> Tensor:
    """Logits [C, V] of products x in x's dtype."""
    chunk, head = rows.chunk, rows.chunk.head
    z = x if chunk.bias is None else x + chunk.bias.to(x.dtype)
    z = z * head.logit_scale
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    return z / head.temperature if chunk.inv_temperature is None else z * chunk.inv_temperature.to(x.dtype)[:, None]


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Σ p·(log p − log q), where nothing of p adds nothing."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q).masked_fill(p == 0, 0.0), 0.0).sum(-1)


def jsd(log_s: Tensor, log_t: Tensor, alpha: float) -> Tensor:
    """Of log-probs [..., n]: KL(t‖s) at 0, KL(s‖t) at 1, (1 − α)·KL(s‖M) + α·KL(t‖M) between, M = (1 − α)·s + α·t."""
    if alpha == 0:
        return kl(log_t, log_s)
    if alpha == 1:
        return kl(log_s, log_t)
    floor = -1e4  # stands for probability 0, and has a difference to itself
    log_s, log_t = log_s.clamp(min=floor), log_t.clamp(min=floor)
    log_m = torch.logaddexp(log_s + math.log1p(-alpha), log_t + math.log(alpha))
    return (1 - alpha) * kl(log_s, log_m) + alpha * kl(log_t, log_m)


def other_terms(pair: Pair, z: Tensor) -> Tensor:
    """Σ coefs·(log-prob of the target, entropy, log-sum-exp) of logits z (0-d)."""
    log_p, lse = z.log_softmax(-1), z.logsumexp(-1)
    targets, total = pair.student.chunk.targets, z.new_zeros(())
    if pair.coefs:
        logprobs = log_p.gather(1, targets.clamp(min=0)[:, None])[:, 0]
        values = {"logprobs": torch.where(targets >= 0, logprobs, 0.0), "lse": lse}
        values["entropy"] = -(log_p.exp() * log_p).sum(-1)
        total = sum((pair.coefs[name].to(z.dtype) * value).sum() for name, value in values.items())
    return total


def distilled(pair: Pair, alpha: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Divergences [n], and d(Σ weights·divergence + other terms)/d(product) [C, V]."""
    x = pair.student.x.detach().to(dtype, copy=True).requires_grad_()
    z, y = logits(pair.student, x), logits(pair.teacher, pair.teacher.x.to(dtype))
    values = jsd(z.log_softmax(-1)[pair.its], y.log_softmax(-1), alpha)
    weights = pair.weights.to(dtype)[pair.its]
    loss = torch.where(weights != 0, weights * values, 0.0).sum() + other_terms(pair, z)
    return values.detach(), torch.autograd.grad(loss, x)[0]


def bucketed(
    pair: Pair, ids: Tensor, dlogprobs: Tensor, drest: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of ids [n, k] and of the rest [n], and d(Σ dlogprobs·logp + Σ drest·rest + other terms)/d(product) [C, V]."""
    x = pair.student.x.detach().to(dtype, copy=True).requires_grad_()
    z = logits(pair.student, x)
    log_p = z.log_softmax(-1)[pair.its]
    logprobs = log_p.gather(1, ids)
    rest = log_p.scatter(1, ids, -torch.inf).logsumexp(-1)
    loss = (dlogprobs.to(dtype) * logprobs).sum() + other_terms(pair, z)
    if drest is not None:
        loss = loss + torch.where(drest != 0, drest.to(dtype) * rest, 0.0).sum()
    return logprobs.detach(), rest.detach(), torch.autograd.grad(loss, x)[0]


def without_a_target(pair: Pair, row: int) -> Pair:
    """The same where `row` has nothing that trains it but its teacher."""
    coefs = {name: values.index_fill(0, torch.tensor([row]), 0.0) for name, values in pair.coefs.items()}
    return replace(pair, coefs=coefs)
