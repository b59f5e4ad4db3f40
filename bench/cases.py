"""What is measured: shapes, which rows train, and the loss on top of log-probs in plain torch.

Every contender gets the same `Problem`. Those that give log-probs have `Problem.loss` put on top; the reference and the
gate use the same few lines in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from drift_kernels.testing import off_the_edges

CLIP = 0.2
IGNORED = -100
BUILD_ROWS = 256  # rows of logits at a time while a problem is built
TAUGHT = ("jsd", "jsd-top")  # losses with a teacher
TOP_K = 100  # tokens that a teacher of "jsd-top" knows of each row


@dataclass(frozen=True)
class Case:
    """One row of the benchmark: T = segments x length hidden rows of width D, vocabulary V."""

    name: str
    # "mean": −log p; "weighted": Σ w·(−log p) / Σ w; "clip": PPO's clipped ratio; "score": log p itself, no gradient; "jsd":
    # the Jensen–Shannon divergence from a teacher's head; "jsd-top": from a teacher's likeliest tokens and the rest as one
    loss: str
    segments: int
    length: int
    V: int
    dtype: torch.dtype = torch.float32
    D: int = 896
    mask: str = "none"  # "turns": the end of each of a segment's four turns is trained; "prompt": all but its start
    share: float = 1.0  # of each segment, its end, that is trained, where mask is "share"
    noise: float = 0.0  # standard deviation of log π_old − log π
    group: int = 0  # segments that share a prompt; two groups in five have equal rewards, hence advantage 0

    @property
    def T(self) -> int:
        """Hidden rows."""
        return self.segments * self.length

    @property
    def units(self) -> float:
        """GEMM work of a row, done once each: 2 for logits, 4 for the gradients, 2 for a teacher's logits."""
        return {"score": 2.0, "jsd": 8.0}.get(self.loss, 6.0)

    def shrunk(self, length: int = 16, V: int = 515, D: int = 32) -> Case:
        """The same case at a size that takes milliseconds, its numbers of segments and groups kept."""
        return replace(self, length=length, V=V, D=D)


_DENSE = Case("dense", "mean", 8, 128, 151_936)
_TURNS = Case("turns", "weighted", 8, 128, 65_536, mask="turns")
_PPO = replace(_TURNS, name="ppo", loss="clip", noise=0.3)
_GRPO = Case("grpo", "clip", 40, 32, 65_536, mask="prompt", noise=0.085, group=8)
_HALF = {"dtype": torch.bfloat16, "length": 64, "V": 32_768}

CASES = {
    case.name: case
    for case in (
        _DENSE,
        _TURNS,
        _PPO,
        _GRPO,
        replace(_DENSE, name="dense-bf16", **_HALF),
        replace(_TURNS, name="turns-bf16", **_HALF),
        replace(_PPO, name="ppo-bf16", **_HALF),
    )
}


# What one number does to time and memory, the others held: curves for bench.sweeps, by what is varied.
_CURVE = Case("curve", "mean", 8, 64, 32_768, D=256)
CURVES = {
    "T": [replace(_CURVE, name=f"T={8 * n}", length=n, V=8_192) for n in (32, 128, 512, 2_048, 8_192)],
    "V": [replace(_CURVE, name=f"V={V}", V=V) for V in (8_192, 32_768, 65_536, 151_936, 262_144)],
    "active": [
        replace(_CURVE, name=f"active={percent}", length=256, mask="share", share=percent / 100)
        for percent in (1, 3, 10, 30, 60, 100)
    ],
}
WORKSPACE_CASE = replace(_DENSE, name="workspace", V=65_536)
CURVES["workspace"] = [WORKSPACE_CASE]


@dataclass(frozen=True)
class Shares:
    """Parts of the T rows, for counting FLOPs."""

    trained: float  # not masked: what a caller can drop by indexing
    read: float  # a: those of them whose loss is not 0 whatever the log-prob (weight, advantage)
    live: float  # a′: those of them that are not clipped


@dataclass(frozen=True)
class Problem:
    """A case's tensors. `hidden` and `weight` are leaves that require grad; the values are exact in the case's dtype."""

    case: Case
    hidden: Tensor  # [T, D]
    weight: Tensor  # [V, D]
    targets: Tensor  # [T] int64, −100 where not trained
    token_weights: Tensor | None  # [T] fp32, for "weighted"
    advantages: Tensor | None  # [S] fp32, for "clip"
    old: Tensor | None  # [T] fp32, for "clip": 0 where not trained
    cu_seqlens: Tensor  # [S + 1] int32
    # "jsd": hidden [T, D], weight [V, D]; "jsd-top": ids, log-probs [T, k]
    teacher: tuple[Tensor, Tensor] | None = None

    @property
    def trained(self) -> Tensor:
        """Indices of the rows that are not masked."""
        return (self.targets != IGNORED).nonzero().squeeze(1)

    @property
    def filled(self) -> Tensor:
        """Targets [T] with 0 for the masked ones, for functions that know no ignore_index."""
        return self.targets.clamp(min=0)

    @property
    def token_advantages(self) -> Tensor:
        """Advantages [T]."""
        assert self.advantages is not None
        return self.advantages.repeat_interleave(self.case.length)

    def token_losses(self, logprobs: Tensor, rows: Tensor | None = None) -> Tensor:
        """Each token's share of the loss, normalised; of the rows in `rows`, or of all T (masked ones give 0)."""
        if self.case.loss == "score":
            return logprobs
        mask = (self.targets != IGNORED).to(logprobs.dtype)
        factor = mask if self.token_weights is None else mask * self.token_weights
        per_row = [factor / factor.sum()]
        if self.case.loss == "clip":
            assert self.old is not None
            per_row += [self.token_advantages.to(logprobs.dtype), self.old.to(logprobs.dtype)]
        factor, *policy = per_row if rows is None else [values[rows] for values in per_row]
        if not policy:
            return -logprobs * factor
        advantages, old = policy
        ratio = (logprobs - old).exp()
        return -torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages) * factor

    def loss(self, logprobs: Tensor, rows: Tensor | None = None) -> Tensor:
        """The case's loss from log-probs of `rows`, or of all T; of "score", the log-probs."""
        terms = self.token_losses(logprobs, rows)
        return terms if self.case.loss == "score" else terms.sum()

    def divergences(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Each row's share of the divergence from the teacher [n], by the student's logits [n, V]; in their type."""
        assert self.teacher is not None
        first, second = self.teacher[0][rows], self.teacher[1]
        student = logits.log_softmax(-1)
        if self.case.loss == "jsd-top":
            found = student.gather(1, first), second[rows].to(logits.dtype)
            student, teacher = (torch.cat((p, torch.log1p(-p.exp().sum(-1, keepdim=True))), -1) for p in found)
        elif logits.dtype == torch.float64:
            teacher = (first.double() @ second.double().t()).log_softmax(-1)
        else:  # rounded as the student's are
            teacher = (first @ second.t()).to(logits.dtype).log_softmax(-1)
        mixture = torch.logaddexp(student, teacher) - math.log(2)
        terms = student.exp() * (student - mixture) + teacher.exp() * (teacher - mixture)
        return terms.sum(-1) / (2 * self.case.T)

    def shares(self) -> Shares:
        """Counted from the inputs; which rows are clipped by the noise that made `old`."""
        trained = self.trained
        read = live = trained
        if self.case.loss == "score":
            live = trained[:0]
        if self.case.loss == "clip":
            logprobs = log_probs(self.hidden, self.weight, self.targets, trained).requires_grad_()
            (slope,) = torch.autograd.grad(self.loss(logprobs, trained), logprobs)
            read, live = trained[self.token_advantages[trained] != 0], trained[slope != 0]
        return Shares(*(len(rows) / self.case.T for rows in (trained, read, live)))


def log_probs(hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor) -> Tensor:
    """Log-probs of the targets of `rows` in fp32, without gradient, a few rows at a time."""
    with torch.no_grad():
        wide, parts = weight.float(), []
        for some in rows.split(BUILD_ROWS):
            logits = hidden[some].float() @ wide.t()
            parts.append(logits.gather(1, targets[some, None]).squeeze(1) - logits.logsumexp(1))
    return torch.cat(parts)


def eager_loss(problem: Problem, rows: Tensor | None = None) -> Tensor:
    """The loss as one writes it in torch, all logits at once: of the rows in `rows` alone, or of all T."""
    hidden, targets = problem.hidden, problem.filled
    if rows is not None:
        hidden, targets = hidden[rows], targets[rows]
    logits = (hidden @ problem.weight.t()).float()
    if problem.teacher is not None:
        every = torch.arange(len(logits), device=logits.device) if rows is None else rows
        return problem.divergences(logits, every).sum()
    return problem.loss(logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1), rows)


def make(case: Case, seed: int = 0, device: torch.device | str = "cpu") -> Problem:
    """The case's problem on `device`, where its numbers are drawn; the same values on every call."""
    g = torch.Generator(device).manual_seed(seed)
    here: Any = {"generator": g, "device": device}
    hidden = torch.randn(case.T, case.D, **here).to(case.dtype).requires_grad_()
    weight = torch.randn(case.V, case.D, **here).mul_(case.D**-0.5).to(case.dtype).requires_grad_()
    targets = torch.randint(0, case.V, (case.segments, case.length), **here)
    if case.mask == "prompt":
        targets[:, : case.length // 4] = IGNORED
    elif case.mask == "share":
        targets[:, : case.length - max(1, round(case.share * case.length))] = IGNORED
    elif case.mask == "turns":
        turn = case.length // 4
        answers = turn * (0.2 + 0.2 * torch.rand(case.segments, 4, 1, **here))  # 20–40 % of each turn
        within = torch.arange(turn, device=device).expand(case.segments, 4, turn)
        targets[(within < turn - answers.round()).flatten(1)] = IGNORED
    targets = targets.flatten()
    ends = torch.arange(0, case.T + 1, case.length, dtype=torch.int32, device=device)
    weights = advantages = old = None
    if case.loss == "weighted":
        weights = (0.2 + torch.rand(case.segments, **here)).repeat_interleave(case.length)
    elif case.loss == "clip":
        advantages = torch.randn(case.segments, **here)
        if case.group:
            groups = torch.arange(case.segments, device=device) // case.group
            advantages[groups % 5 < 2] = 0
        trained = (targets != IGNORED).nonzero().squeeze(1)
        own = log_probs(hidden, weight, targets, trained)
        noisy = own + case.noise * torch.randn(len(trained), **here)
        margin = 1e-3 if case.dtype == torch.float32 else 2e-2
        old = torch.zeros(case.T, device=device)
        old[trained] = off_the_edges(noisy, own, (1 - CLIP, 1 + CLIP), margin)
    return Problem(case, hidden, weight, targets, weights, advantages, old, ends, _teacher(case, here))


def _teacher(case: Case, here: Any) -> tuple[Tensor, Tensor] | None:
    if case.loss not in TAUGHT:
        return None
    hidden = torch.randn(case.T, case.D, **here).to(case.dtype)
    weight = torch.randn(case.V, case.D, **here).mul_(case.D**-0.5).to(case.dtype)
    if case.loss == "jsd":
        return hidden, weight
    wide, parts = weight.float(), []
    for some in hidden.split(BUILD_ROWS):
        parts.append((some.float() @ wide.t()).log_softmax(-1).topk(TOP_K))
    return torch.cat([top.indices for top in parts]), torch.cat([top.values for top in parts])
