"""Pairs of rows for the kernels of distillation, and what those should say: the divergences' formulas by torch and autograd.

In float64 they are the truth; in fp32 their error is what a kernel may double.
"""

from __future__ import annotations

import torch
from torch import Tensor

from drift_kernels.backends.contract import Chunk
from drift_kernels.calls import HeadOptions

HEADS = {  # student's, teacher's
    "plain": ({}, {}),
    "temperature": ({"temperature": 0.7}, {"temperature": "row"}),
    "everything": (
        {"temperature": "row", "bias": True, "softcap": 3.0, "logit_scale": 1.3},
        {"temperature": 1.7, "bias": True, "softcap": 5.0, "logit_scale": 0.8},
    ),
    "reversed": ({"logit_scale": -1.0}, {}),
}


class Side:
    """Products [rows, V] of one model with its head."""

    def __init__(self, g: torch.Generator, rows: int, V: int, options: dict):
        options = dict(options)
        self.x = 3 * torch.randn(rows, V, generator=g)
        self.bias = torch.randn(V, generator=g) if options.pop("bias", False) else None
        self.inverse = None
        if options.get("temperature") == "row":
            options.pop("temperature")
            self.inverse = 0.5 + torch.rand(rows, generator=g)
        self.head = HeadOptions(**options)
        self.targets = torch.randint(0, V, (rows,), generator=g)
        self.targets[::5], self.targets[1::7] = V - 1, 0

    @property
    def chunk(self) -> Chunk:
        return Chunk(self.targets, None, self.inverse, self.bias, self.head)

    def logits(self, x: Tensor) -> Tensor:
        """softcap(scale·(x + b)) / temperature in x's dtype."""
        u = self.head.logit_scale * (x if self.bias is None else x + self.bias.to(x.dtype))
        if self.head.softcap:
            u = self.head.softcap * torch.tanh(u / self.head.softcap)
        return u / self.head.temperature if self.inverse is None else u * self.inverse.to(x.dtype)[:, None]

    def log_p(self, x: Tensor) -> Tensor:
        return torch.log_softmax(self.logits(x), -1)

    def lse(self) -> Tensor:
        """[rows] fp32, as `row_stats` gives it."""
        return torch.logsumexp(self.logits(self.x.double()), -1).float()


class Pair:
    """C student rows, n of them with a teacher's; what other terms of the loss ask of each. Row 1 is asked for nothing by
    them, and in row 2 the divergence weighs 0."""

    def __init__(self, rows: int, V: int, head: str = "plain", *, some: bool = True, seed: int = 0):
        self.g = g = torch.Generator().manual_seed(seed)
        self.C, self.V = rows, V
        where = [i for i in range(rows) if not some or i % 4 != 3]
        order = torch.randperm(len(where), generator=g) if some else torch.arange(len(where))
        self.taught = None
        if some:
            self.taught = torch.full((rows,), -1)
            self.taught[where] = order
        self.where = torch.tensor(where)[order.argsort()]  # the student's row of each teacher's
        self.student = Side(g, rows, V, HEADS[head][0])
        self.teacher = Side(g, len(where), V, HEADS[head][1])
        self.student.targets[4::6] = -100
        self.weights = torch.rand(rows, generator=g) + 0.1
        self.coefs, self.entropy_coefs, self.lse_coefs = torch.randn(3, rows, generator=g)
        for values in (self.coefs, self.entropy_coefs, self.lse_coefs):
            values[1] = 0
        if rows > 2:
            self.weights[2] = 0
        if rows > 3:  # without a teacher, and asked for nothing
            self.coefs[3] = self.entropy_coefs[3] = self.lse_coefs[3] = 0

    def others(self) -> tuple[Tensor, ...]:
        """lse, and the coefficients with the entropies, as gradients take them."""
        log_p = self.student.log_p(self.student.x.double())
        entropy = -(log_p.exp() * log_p).sum(-1).float()
        return self.student.lse(), self.coefs, self.entropy_coefs, entropy, self.lse_coefs

    def divergences(self, x: Tensor, alpha: float) -> Tensor:
        """[n] of student products x [C, V]."""
        log_s = self.student.log_p(x)[self.where]
        log_t = self.teacher.log_p(self.teacher.x.to(x.dtype))
        s, t = log_s.exp(), log_t.exp()
        if alpha == 0:
            return (t * (log_t - log_s)).sum(-1)
        if alpha == 1:
            return (s * (log_s - log_t)).sum(-1)
        mixture = ((1 - alpha) * s + alpha * t).log()
        return (1 - alpha) * (s * (log_s - mixture)).sum(-1) + alpha * (t * (log_t - mixture)).sum(-1)

    def other_losses(self, x: Tensor) -> Tensor:
        """Σ of all but what comes of the teacher."""
        log_p, y = self.student.log_p(x), self.student.targets
        logp = torch.where(y >= 0, log_p.gather(1, y.clamp(min=0)[:, None])[:, 0], 0.0)
        entropy, lse = -(log_p.exp() * log_p).sum(-1), torch.logsumexp(self.student.logits(x), -1)
        terms = ((self.coefs, logp), (self.entropy_coefs, entropy), (self.lse_coefs, lse))
        return sum((c.to(x.dtype) * value).sum() for c, value in terms)  # pyright: ignore[reportReturnType]

    def loss(self, x: Tensor, alpha: float) -> Tensor:
        weighted = self.weights[self.where].to(x.dtype) * self.divergences(x, alpha)
        return weighted.sum() + self.other_losses(x)

    def bucket_logprobs(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probs of ids [n, k], and of all other tokens together [n]."""
        log_p = self.student.log_p(x)[self.where]
        others = torch.ones_like(log_p, dtype=torch.bool).scatter(1, ids, False)
        return log_p.gather(1, ids), log_p.masked_fill(~others, -torch.inf).logsumexp(-1)

    def live(self, divergence: Tensor) -> Tensor:
        """[C] bool from whether each of the teacher's n rows asks for a gradient."""
        y = self.student.targets
        asked = ((self.coefs != 0) & (y >= 0)) | (self.entropy_coefs != 0) | (self.lse_coefs != 0)
        return asked.index_copy(0, self.where, asked[self.where] | divergence)

    @property
    def scale(self) -> float:
        """What gradients are added up from and may cancel: coefficients times logits."""
        logits = self.student.logits(self.student.x.double()).abs().max()
        return (2 + float(self.coefs.abs().max() + self.entropy_coefs.abs().max())) * max(1.0, float(logits))
