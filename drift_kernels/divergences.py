"""Divergences of two distributions given by their log-probs, in plain torch, and the per-token data that goes with them.

Over a top k they are what distillation is computed by: a loss of a few log-probs a row, whose derivatives autograd gives.
Over a whole vocabulary they are the oracle for `csrc/cpu/distill.cpp`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from drift_kernels.formulas import bounded

# A log-prob that stands for probability 0: far below what adds to a sum, and finite, so that no inf − inf comes up.
NOTHING = -1e4
# What a teacher's stored log-probs leave to all other tokens, at least: sums of fp32 probabilities are not known better.
LEAST_REST = 2.0**-24


@dataclass(frozen=True)
class TeacherTensors:
    """What there is of a teacher, one row for each of the student's T: a head, or log-probs of some tokens, or of one."""

    hidden: Tensor | None = None  # [T, D']
    weight: Tensor | None = None  # [V, D']
    bias: Tensor | None = None  # [V]
    lora_a: Tensor | None = None  # [r, D']
    lora_b: Tensor | None = None  # [V, r]
    temperature: Tensor | None = None  # [T]
    ids: Tensor | None = None  # [T, k] int64
    logprobs: Tensor | None = None  # [T, k] of the ids
    rest: Tensor | None = None  # [T] of all other tokens; None = 1 − Σp
    sampled: Tensor | None = None  # [T] of the target

    def flat(self) -> tuple[Tensor | None, ...]:
        """In the order of the fields."""
        head = (self.hidden, self.weight, self.bias, self.lora_a, self.lora_b, self.temperature)
        return (*head, self.ids, self.logprobs, self.rest, self.sampled)


@dataclass(frozen=True)
class DistillTokens:
    """Per-token data of a distillation [N] in the compute dtype; None if not given."""

    weights: Tensor | None = None  # of the divergence; None = 1
    taught: Tensor | None = None  # bool, True for rows with a teacher; None = all rows
    continues: Tensor | None = None  # bool, whether the row before belongs to the same turn
    rebellious: Tensor | None = None  # w of the bonus; None = 0
    mean_difference: Tensor | None = None  # 0-d, of the step before
    mean_entropy: Tensor | None = None  # 0-d, likewise

    def flat(self) -> tuple[Tensor | None, ...]:
        """In the order of the fields."""
        lists = (self.weights, self.taught, self.continues, self.rebellious)
        return (*lists, self.mean_difference, self.mean_entropy)

    def pick(self, index: Tensor | slice) -> DistillTokens:
        """The tokens at `index`; the means stay."""
        lists = (self.weights, self.taught, self.continues, self.rebellious)
        picked = DistillTokens(*(None if v is None else v[index] for v in lists))
        return replace(picked, mean_difference=self.mean_difference, mean_entropy=self.mean_entropy)


def _expected(p: Tensor, log_ratio: Tensor) -> Tensor:
    """Σ p·log_ratio over the last dimension, where 0·∞ is 0."""
    return (p * log_ratio.masked_fill(p == 0, 0.0)).sum(-1)


def divergence(student: Tensor, teacher: Tensor, alpha: float) -> Tensor:
    """`DistillSpec`'s divergence of log-probs [..., n] over the last dimension; differentiable in `student`."""
    s, t = student.exp(), teacher.exp()
    if alpha == 0:
        return _expected(t, teacher - student)
    if alpha == 1:
        return _expected(s, student - teacher)
    student, teacher = student.masked_fill(s == 0, NOTHING), teacher.masked_fill(t == 0, NOTHING)
    mixture = torch.logaddexp(student + math.log1p(-alpha), teacher + math.log(alpha))
    return (1 - alpha) * _expected(s, student - mixture) + alpha * _expected(t, teacher - mixture)


def buckets(logprobs: Tensor, rest: Tensor | None) -> Tensor:
    """The distribution [n, k + 1] of k tokens and the rest; without a rest [n, k], renormalised."""
    if rest is None:
        return logprobs - logprobs.logsumexp(-1, keepdim=True)
    return torch.cat((logprobs, rest[:, None]), -1)


def stored_rest(logprobs: Tensor, vocabulary: int) -> Tensor:
    """log(1 − Σp) [n] of a teacher's log-probs [n, k]; −∞ where they are all there are."""
    if logprobs.shape[-1] == vocabulary:
        return torch.full_like(logprobs[..., 0], -math.inf)
    rest = -torch.expm1(logprobs.logsumexp(-1))
    return rest.clamp(min=LEAST_REST).log()


def importance(logprobs: Tensor, old: Tensor, largest: float) -> Tensor:
    """min(exp(logp − old), largest) [N]; no gradient."""
    return bounded(logprobs.detach() - old).exp().clamp(max=largest)


def sampled(logprobs: Tensor, teacher: Tensor) -> Tensor:
    """sg(logp − teacher's logp)·logp [N]: its gradient is, over samples, that of KL(student‖teacher)."""
    return (logprobs - teacher).detach() * logprobs
