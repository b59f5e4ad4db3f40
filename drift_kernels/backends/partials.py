"""Statistics of rows whose columns are spread out: over ranks that hold a share of the vocabulary each, or over programs.

Each part leaves for every row its maximum m, Σe, Σe·(z − m), Σe² and Σz, e = exp(z − m), and for every entry the target's
logit; `merge` makes of all parts what one pass over whole rows would have found. It adds in the order of the parts, so that
results repeat bitwise. Gathering the parts of several ranks is the caller's: [5, C] and [M] floats each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SUMS = 5  # m, Σe, Σe·(z − m), Σe², Σz


@dataclass(frozen=True)
class Partials:
    """Of P parts; a single part may leave out the first dimension."""

    sums: Tensor  # [P, 5, C] fp32
    at_target: Tensor  # [P, M] fp32, −inf where the target lies in another part


def sweeps(want: tuple[str, ...]) -> dict[str, bool]:
    """Which sums besides Σe the wanted statistics need."""
    return {"ENTROPY": "entropy" in want, "EXTRA": "mean_logits" in want or "log_sum_sq_probs" in want}


def stack(parts: list[Partials]) -> Partials:
    """Single parts as one, in their order."""
    return Partials(torch.stack([p.sums for p in parts]), torch.stack([p.at_target for p in parts]))


def lse_low(top: Tensor, log_sum: Tensor) -> Tensor:
    """What rounding takes from top + log_sum, 0 if the sum is not finite."""
    high = top + log_sum
    rounded = high - top  # the part of log_sum that arrived
    low = (top - (high - rounded)) + (log_sum - rounded)
    return torch.where(torch.isfinite(low), low, 0.0)


def merge(
    partials: Partials, targets: Tensor, row_ptr: Tensor | None, vocabulary: int, want: tuple[str, ...]
) -> dict[str, Tensor]:
    """The statistics in `want`, per row or per entry; `targets` [M] and `vocabulary` are of the whole rows."""
    m, s0, s1, s2, sz = partials.sums.unbind(1)
    top = m.max(0).values
    k = (m - top).exp()
    s0, s1, s2 = (k * s0).sum(0), (k * (s1 + (m - top) * s0)).sum(0), (k * k * s2).sum(0)
    log_s0 = s0.log()
    lse = top + log_s0
    low = lse_low(top, log_s0)
    of_rows = {
        "lse": lambda: lse,
        "lse_low": lambda: low,
        "entropy": lambda: log_s0 - s1 / s0,
        "mean_logits": lambda: sz.sum(0) / vocabulary,
        "log_sum_sq_probs": lambda: s2.log() - 2 * log_s0,
    }
    statistics = {name: make() for name, make in of_rows.items() if name in want}
    if row_ptr is not None:
        owner = torch.arange(len(lse), device=lse.device)
        owner = torch.repeat_interleave(owner, row_ptr.diff(), output_size=len(targets))
        lse, low, top = lse[owner], low[owner], top[owner]
    z = torch.where(targets < vocabulary, partials.at_target.max(0).values, float("nan"))
    if "logprobs" in want:
        lp = (z - lse) - low
        statistics["logprobs"] = torch.where((targets < 0) | (lp > 0), 0.0, lp)
    if "is_top1" in want:
        statistics["is_top1"] = ((targets >= 0) & (z >= top)).to(lse.dtype)
    return statistics
