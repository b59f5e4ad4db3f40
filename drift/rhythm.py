"""Rhythm-gated exploration (arXiv 2606.30345; B2, B3): where student and teacher settle on different tokens, token by token.

The gate and the rebellious bonus are the published ones. **The rhythm weight is our own reading**: the paper describes
anchors, tokens at which the entropies of student and teacher collapse differently, but not the weight made of them. The
entropy-driven weight of the warm-up (B8) is ours too. Both divide by a mean over the *previous* step, so that one pass
over the tokens is enough and noise alone opens no gate: `StepMean` keeps it.

    >>> import torch
    >>> from drift.rhythm import StepMean, difference, rebellious_weight, rhythm_gate, rhythm_weight
    >>> student, teacher = torch.tensor([2.0, 0.5, 0.4, 1.0]), torch.tensor([2.0, 1.9, 0.1, 1.0])
    >>> mask, turns, mean = torch.tensor([True, True, True, False]), torch.tensor([0, 0, 0, -1]), StepMean()
    >>> mean.add(difference(student, teacher, mask, turns), mask)
    >>> mean.advance()
    >>> gate = rhythm_gate(rhythm_weight(student, teacher, mask, turns, mean.value), response_mask=mask)
    >>> [round(g, 3) for g in gate.tolist()]
    [0.0, 0.742, 0.807, 0.0]
    >>> logprobs = torch.tensor([-0.1, -0.1, -1.0, 0.0]), torch.tensor([-3.0, -3.0, -1.1, -9.0])
    >>> [round(w, 3) for w in rebellious_weight(*logprobs, torch.ones(4), gate, response_mask=mask).tolist()]
    [1.0, 1.742, 1.0, 1.0]

Tensors here are [T], a pack, or [B, L]; time is the last dimension. Everything is float32 and without gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

FLOOR = 1e-3  # nats: below it a mean is noise


@torch.no_grad()
def difference(student_entropy: Tensor, teacher_entropy: Tensor, response_mask: Tensor, turn_ids: Tensor) -> Tensor:
    """d_t = |C^student_t − C^teacher_t|, where C_t = max(H_{t−1} − H_t, 0) is a collapse inside one assistant turn.

    d is 0 outside response_mask and at the first token of a turn. response_mask: bool, tokens that were sampled and have
    a teacher. turn_ids: integers; two turns that touch have different ones (in a `PackedBatch` segments never touch).
    """
    collapses = (_collapse(entropy, response_mask, turn_ids) for entropy in (student_entropy, teacher_entropy))
    student, teacher = collapses
    return (student - teacher).abs()


def _collapse(entropy: Tensor, response_mask: Tensor, turn_ids: Tensor) -> Tensor:
    inside = response_mask[..., 1:] & response_mask[..., :-1] & (turn_ids[..., 1:] == turn_ids[..., :-1])
    fall = (entropy[..., :-1].float() - entropy[..., 1:].float()).clamp(min=0)
    return torch.nn.functional.pad(torch.where(inside, fall, 0.0), (1, 0))


@torch.no_grad()
def rhythm_weight(
    student_entropy: Tensor,
    teacher_entropy: Tensor,
    response_mask: Tensor,
    turn_ids: Tensor,
    mean_difference: Tensor | float | None,
    maximum: float = 2.0,
) -> Tensor:
    """rhythm_t = 1 + (maximum − 1)·(1 − exp(−d_t/d̄)), with `difference`'s d; in [1, maximum]. Our own reading of B2.

    mean_difference: d̄, of the step before (`StepMean.value`), taken to be at least 1e-3; None, if there was no step
    before, gives 1 everywhere. Other arguments as in `difference`; if there is no teacher the weight is 1.
    """
    d = difference(student_entropy, teacher_entropy, response_mask, turn_ids)
    if mean_difference is None:
        return torch.ones_like(d)
    mean = torch.as_tensor(mean_difference, dtype=torch.float32, device=d.device).clamp(min=FLOOR)
    return 1 - (maximum - 1) * torch.expm1(-d / mean)


@torch.no_grad()
def rhythm_gate(
    rhythm: Tensor,
    maximum: float = 2.0,
    floor: float = 0.0,
    power: float = 1.0,
    response_mask: Tensor | None = None,
) -> Tensor:
    """floor + (1 − floor)·clamp((rhythm − 1)/(maximum − 1), 0, 1)^power; 0 outside response_mask. Published (B2).

    Raises ValueError if maximum does not exceed 1.
    """
    if not maximum > 1:
        raise ValueError(f"maximum is {maximum}; it should be greater than 1, the least rhythm weight")
    gate = floor + (1 - floor) * ((rhythm.float() - 1) / (maximum - 1)).clamp(0, 1) ** power
    return gate if response_mask is None else torch.where(response_mask, gate, 0.0)


@torch.no_grad()
def rebellious_weight(
    student_logprob: Tensor,
    teacher_logprob: Tensor,
    sample_weight: Tensor,
    gate: Tensor | None = None,
    margin: float = 0.2,
    gamma: float = 1.0,
    maximum: float = 2.0,
    response_mask: Tensor | None = None,
) -> Tensor:
    """1 + sample_weight·(bonus − 1)·gate, bonus = clamp(exp(gamma·max(logp_s − logp_t − margin, 0)), 1, maximum). Published (B3).

    It multiplies the policy loss of tokens that the student is surer of than the teacher. sample_weight:
    `Routes.rebellious`, spread over the tokens. gate: None, the ablation, is 1 everywhere. 1 outside response_mask.
    """
    surer = (student_logprob.float() - teacher_logprob.float() - margin).clamp(min=0)
    bonus = (gamma * surer).exp().clamp(1, maximum)
    weight = 1 + sample_weight * (bonus - 1) * (1.0 if gate is None else gate)
    return weight if response_mask is None else torch.where(response_mask, weight, 1.0)


@torch.no_grad()
def entropy_weight(
    student_entropy: Tensor, mean_entropy: Tensor | float | None, response_mask: Tensor | None = None
) -> Tensor:
    """H_t/H̄: in the warm-up, uncertain tokens weigh more (our own reading of B8); 0 outside response_mask.

    mean_entropy: H̄, the token mean of the step before (`StepMean.value`), at least 1e-3; None gives 1.
    """
    entropy = student_entropy.float()
    if mean_entropy is None:
        weight = torch.ones_like(entropy)
    else:
        weight = entropy / torch.as_tensor(mean_entropy, dtype=torch.float32, device=entropy.device).clamp(min=FLOOR)
    return weight if response_mask is None else torch.where(response_mask, weight, 0.0)


class StepMean:
    """The token mean of something over the previous step: `add` each pack, `advance` once a step.

    Sums stay on the tensors' device until `advance`, which reads them once.
    """

    def __init__(self, floor: float = FLOOR) -> None:
        self.floor = floor
        self.value: float | None = None  # of the last step that had tokens, at least `floor`; None before the first
        self._sums: Tensor | None = None

    @torch.no_grad()
    def add(self, values: Tensor, mask: Tensor) -> None:
        """Counts `values` where the bool `mask`, of the same shape, is set."""
        self.add_sum(torch.where(mask, values, 0.0).sum(dtype=torch.float64), mask.sum())

    @torch.no_grad()
    def add_sum(self, total: Tensor, count: Tensor) -> None:
        """Counts a sum (0-d) of `count` (0-d) values, as `drift_kernels` gives its metrics."""
        sums = torch.stack([total.double(), count.double()])
        self._sums = sums if self._sums is None else self._sums + sums

    def advance(self, reduce: Callable[..., list[float]] | None = None) -> None:
        """Ends a step. A step without tokens, or whose sum is not finite, leaves `value` as it was.

        reduce: (sum, count) → the same summed over ranks, such as `drift.training.distributed.sum_values`; every rank calls it.
        """
        total, count = [0.0, 0.0] if self._sums is None else self._sums.tolist()
        if reduce is not None:
            total, count = reduce(total, count)
        if count and math.isfinite(total):
            self.value = max(total / count, self.floor)
        self._sums = None

    def metrics(self) -> dict[str, float]:
        """{"mean": value}, nothing before the first step."""
        return {} if self.value is None else {"mean": self.value}

    def state_dict(self) -> dict[str, Any]:
        """Between two steps; a step that has begun is not kept."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what `state_dict` gave."""
        self.value, self._sums = state["value"], None
