"""The gate before any timing: loss and gradients of the very problem that is timed, against float64.

Compared are the loss, all of dhidden and a sample of dweight's rows: every target's, and every `STRIDE`th of the others;
of a case that scores, its log-probs.
(All of dweight in float64 would cost more than the benchmark itself; an error in a GEMM does not choose its rows.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.cases import IGNORED, Problem, eager_loss
from drift_kernels.testing import within_budget

STRIDE = 16
ROWS = 128  # float64 logits at a time
# For peers in bf16: some hand log-probs over in bf16, or add chunks up in it, which eager code in one piece does not.
HALF_SLACK = 2.0
SCORE_SCALE = 1.0  # by how much logits differ: a log-prob that is off by its own size is off by everything


@dataclass(frozen=True)
class Result:
    """What is compared: the loss, its gradients, and for the loss's error budget the size of what it sums up."""

    loss: Tensor  # 0-d; log-probs [T] of a case that scores
    hidden: Tensor  # [T, D]; empty, as `weight` is, if there are no gradients
    weight: Tensor  # [n, D], the sampled rows
    scale: float = 0.0  # Σ |token losses|; SCORE_SCALE of log-probs


def sampled_rows(problem: Problem) -> Tensor:
    """Rows of dweight that are compared."""
    V = problem.case.V
    named = problem.targets[problem.targets != IGNORED]
    return torch.cat([named, torch.arange(0, V, STRIDE, device=named.device), named.new_tensor([V - 1])]).unique()


def step(problem: Problem, loss: Callable[[Problem], Tensor]) -> Tensor:
    """One forward and backward; gradients are left on the problem's leaves. Of a case that scores, forward alone."""
    problem.hidden.grad = problem.weight.grad = None
    if problem.case.loss == "score":
        with torch.no_grad():
            return loss(problem)
    out = loss(problem)
    out.backward()
    return out.detach()


def result(problem: Problem, loss: Tensor) -> Result:
    """The outcome of the last `step`."""
    if problem.case.loss == "score":
        nothing = problem.hidden.detach()[:0]
        return Result(loss, nothing, nothing)
    hidden, weight = problem.hidden.grad, problem.weight.grad
    if hidden is None or weight is None:
        raise RuntimeError(f"no gradient for {'hidden' if hidden is None else 'weight'}")
    return Result(loss, hidden.clone(), weight[sampled_rows(problem)])


def exact(problem: Problem) -> Result:
    """The float64 outcome."""
    if problem.case.loss == "score":
        return _exact_scores(problem)
    weight, sample = problem.weight.detach().double(), sampled_rows(problem)
    loss, scale = weight.new_zeros(()), 0.0
    dhidden = weight.new_zeros(problem.hidden.shape)
    dweight = weight.new_zeros((len(sample), weight.shape[1]))
    for rows in problem.trained.split(ROWS):
        hidden = problem.hidden.detach()[rows].double()
        terms, dlogits = (_by_targets if problem.teacher is None else _by_teacher)(problem, hidden @ weight.t(), rows)
        loss += terms.sum()
        scale += float(terms.abs().sum())
        dhidden[rows] = dlogits @ weight
        dweight += dlogits[:, sample].t() @ hidden
    return Result(loss, dhidden, dweight, scale)


def _by_targets(problem: Problem, logits: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Token losses of `rows` and d(logits), written out by hand over them: coefficient · (onehot(target) − p)."""
    targets, lse = problem.targets[rows, None], logits.logsumexp(1, keepdim=True)
    logprobs = (logits.gather(1, targets) - lse).squeeze(1).requires_grad_()
    terms = problem.token_losses(logprobs, rows)
    (coefficients,) = torch.autograd.grad(terms.sum(), logprobs)
    dlogits = logits.sub_(lse).exp_().mul_(-coefficients[:, None])
    return terms.detach(), dlogits.scatter_add_(1, targets, coefficients[:, None])


def _by_teacher(problem: Problem, logits: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Divergences of `rows` and d(logits), by autograd."""
    terms = problem.divergences(logits.requires_grad_(), rows)
    return terms.detach(), torch.autograd.grad(terms.sum(), logits)[0]


def _exact_scores(problem: Problem) -> Result:
    weight, parts = problem.weight.detach().double(), []
    for rows in problem.trained.split(ROWS):
        logits = problem.hidden.detach()[rows].double() @ weight.t()
        parts.append(logits.log_softmax(1).gather(1, problem.targets[rows, None]).squeeze(1))
    nothing = weight[:0]
    return Result(torch.cat(parts), nothing, nothing, SCORE_SCALE)


def own(problem: Problem) -> Result:
    """What plain torch makes of it in the case's dtype: the yardstick of the error budget."""
    return result(problem, step(problem, lambda p: eager_loss(p, p.trained)))


def check(found: Result, plain: Result, truth: Result, dtype: torch.dtype, slack: float = 1.0) -> tuple[bool, str]:
    """Whether loss and gradients lie within `slack` times the budget; and what is wrong, or the errors."""
    lines, passed = [], True
    for name in ("loss", "hidden", "weight"):
        actual, torchs, want = (getattr(r, name) for r in (found, plain, truth))
        if actual.shape != want.shape:
            return False, f"{name} has shape {tuple(actual.shape)}, not {tuple(want.shape)}"
        eased = want + (actual.double() - want) / slack
        ok, line = within_budget(eased, torchs, want, dtype, truth.scale if name == "loss" else None)
        passed &= ok
        if not ok:
            lines.append(f"{name if name == 'loss' else 'd' + name}: {line}")
    return passed, "; ".join(lines)


def sane(plain: Result, truth: Result) -> bool:
    """Whether the yardstick is one: plain torch within 5 % of float64 (bf16 comes to about 1 %)."""
    for name in ("loss", "hidden", "weight"):
        torchs, want = getattr(plain, name).double(), getattr(truth, name)
        if not want.numel():
            continue
        scale = truth.scale if name == "loss" else float(want.abs().max())
        if not float((torchs - want).abs().max()) <= 0.05 * scale:
            return False
    return True
