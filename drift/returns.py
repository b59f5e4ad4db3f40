"""From a rollout row to its return, and from a prompt's returns to importance weights (arXiv 2605.31455; A2, A3).

Plain floats: a group is a handful of numbers. Left out: any dependence on tokens or models; see `drift.packing`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from drift.config import WeightsConfig

SMALLEST = -87.0  # exp of it is the least that float32 holds in full precision
RESIDUE = 1e-12  # of the largest return: what rounding leaves of a sum of a few hundred terms, at most
LEAST_STEP = 1e-15  # between returns near 0, whose terms of size 1 have cancelled
_TURN = re.compile(r"t([1-9][0-9]*)")


def turn_number(key: str) -> int:
    """The number in a turn key: 3 for "t3". Raises ValueError for anything else."""
    match = _TURN.fullmatch(key)
    if match is None:
        raise ValueError(f"turn key {key!r} should be t1, t2, …")
    return int(match[1])


def trajectory_return(row: dict[str, Any], gamma: float = 0.9, repetition: float = 0.5) -> float:
    """R = Σ_t γ^(t-1)·r_t + format penalty - λ·(1 - unique answers / parsed answers), of one rollout row (A2).

    t comes from the key, so "t3" is turn 3 even where "t2" is absent; a turn padded with null counts for nothing.
    `answer_norms` holds one string per parsed answer. Unique answers are the distinct non-empty ones after stripping,
    lower-casing and dropping white space; the last term is 0 where the list is empty or missing. Older files say
    `trajectory_penalty` for `format_penalty`. gamma is γ, repetition is λ.
    """
    rewards = ((turn_number(key), reward) for key, reward in row["turn_rewards"].items())
    total = math.fsum(gamma ** (turn - 1) * reward for turn, reward in rewards if reward is not None)
    total += row["format_penalty"] if "format_penalty" in row else row.get("trajectory_penalty", 0.0)
    answers = row.get("answer_norms")
    if answers:
        unique = {"".join(answer.lower().split()) for answer in answers} - {""}
        total -= repetition * (1 - len(unique) / len(answers))
    return total


def importance_weights(returns: Sequence[float], beta: float = 0.1) -> list[float]:
    """w_i = exp((R_i - max R)/β) / mean_j exp((R_j - max R)/β) over one prompt's group (A3); their mean is 1.

    Finite for any β > 0, however small; what float32 would not hold is 0. Raises ValueError for β <= 0 and for returns
    that are not finite.
    """
    if not beta > 0:
        raise ValueError(f"beta is {beta}; it should be greater than 0 (0.1 is the published setting)")
    if not all(map(math.isfinite, returns)):
        raise ValueError(f"returns {list(returns)} should be finite")
    if not returns:
        return []
    returns = without_residue(returns)
    best = max(returns)
    scores = [math.exp(power) if (power := (value - best) / beta) > SMALLEST else 0.0 for value in returns]
    mean = math.fsum(scores) / len(scores) + 1e-12
    return [score / mean for score in scores]


def without_residue(returns: Sequence[float]) -> list[float]:
    """The returns, with those that differ by rounding alone made equal.

    Returns that are equal in real numbers are sums of the same terms in another order, or of terms such as -0.1·3 and
    -0.3: they differ by a few units in the last place of the largest. Neighbours within RESIDUE of the largest size in
    the group, or within LEAST_STEP, get the value of the smallest of them.
    """
    order = sorted(range(len(returns)), key=returns.__getitem__)
    within = max(RESIDUE * max((abs(value) for value in returns), default=0.0), LEAST_STEP)
    result = list(returns)
    for before, here in pairwise(order):
        if returns[here] - returns[before] <= within:
            result[here] = result[before]
    return result


def advantages(returns: Sequence[float], scale: bool) -> list[float]:
    """A = R − mean R over a group, divided by its standard deviation if `scale`; 0 if all are equal (B7).

    Returns that differ by rounding alone are equal (`without_residue`).
    """
    returns = without_residue(returns)
    if not returns or max(returns) == min(returns):
        return [0.0] * len(returns)
    mean = math.fsum(returns) / len(returns)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in returns) / len(returns))
    return [(value - mean) / (spread if scale else 1.0) for value in returns]


def effective_sample_size(weights: Sequence[float]) -> float:
    """(Σw)²/Σw²: from 1, where one weight is all there is, to len(weights), where all are equal; 0 for no weight."""
    largest = max(weights, default=0.0)
    if largest == 0:
        return 0.0
    scaled = [weight / largest for weight in weights]
    return math.fsum(scaled) ** 2 / math.fsum(weight * weight for weight in scaled)


def offpolicy_correction(
    ref_logprobs: Sequence[float], sampler_logprobs: Sequence[float], clip: float
) -> tuple[list[float], dict[str, float]]:
    """log π_ref - log μ per trajectory, clipped to ±clip, for rows that another policy μ sampled; for `weigh`.

    Both inputs hold, per trajectory, the sum of log-probs over all its sampled tokens. Also returns what to log: the
    mean before clipping and the share that was clipped. Raises ValueError for clip <= 0 and for unequal lengths.
    """
    if not clip > 0:
        raise ValueError(f"clip is {clip}; it should be greater than 0")
    if len(ref_logprobs) != len(sampler_logprobs):
        raise ValueError(f"{len(ref_logprobs)} ref_logprobs for {len(sampler_logprobs)} sampler_logprobs")
    ratios = [ref - sampler for ref, sampler in zip(ref_logprobs, sampler_logprobs)]
    count = max(len(ratios), 1)
    stats = {
        "offpolicy_log_ratio": math.fsum(ratios) / count,
        "offpolicy_clipped_share": sum(abs(ratio) > clip for ratio in ratios) / count,
    }
    return [min(max(ratio, -clip), clip) for ratio in ratios], stats


def weigh(
    rows: Sequence[dict[str, Any]], config: WeightsConfig, log_ratios: Sequence[float] | None = None
) -> tuple[list[float], dict[str, float]]:
    """Importance weights of rollout rows, aligned with them, and what to log about them (A3).

    Rows with the same `prompt_id` form a group, in whatever order they come. log_ratios, from `offpolicy_correction`,
    multiply the weights by exp(log_ratio) before they are normalised. With `skip_unsolved_groups`, groups without any
    `t_star` get weight 0. Weights below `min_weight` are given as they are, so that they count in denominators: the
    packer leaves them out (`drift.packing.pack`), and what that leaves out is said here.

    Stats: ess_mean, the mean over groups of effective sample size over group size; ess_overall, the same of all rows
    together (both before min_weight, skipped groups apart); unsolved_share, of groups without a success;
    skipped_rows; dropped_rows and dropped_weight_share, what min_weight leaves out. Raises ValueError for no rows.
    """
    if not rows:
        raise ValueError("rows is empty; there should be at least one trajectory to weigh")
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(row["prompt_id"], []).append(index)

    weights = [0.0] * len(rows)
    unsolved = 0
    kept: list[float] = []
    shares: list[float] = []
    for indices in groups.values():
        solved = any(rows[index]["t_star"] is not None for index in indices)
        unsolved += not solved
        if not solved and config.skip_unsolved_groups:
            continue
        returns = [trajectory_return(rows[index], config.gamma, config.repetition) for index in indices]
        if log_ratios is not None:
            returns = [value + config.beta * log_ratios[index] for value, index in zip(returns, indices)]
        group = importance_weights(returns, config.beta)
        for index, weight in zip(indices, group):
            weights[index] = weight
        shares.append(effective_sample_size(group) / len(group))
        kept += group

    dropped = [weight for weight in kept if weight < config.min_weight]
    stats = {
        "ess_mean": math.fsum(shares) / max(len(shares), 1),
        "ess_overall": effective_sample_size(kept) / max(len(kept), 1),
        "unsolved_share": unsolved / len(groups),
        "skipped_rows": len(rows) - len(kept),
        "dropped_rows": len(dropped),
        "dropped_weight_share": math.fsum(dropped) / (math.fsum(kept) or 1.0),
    }
    return weights, stats


def weigh_for_training(
    rows: Sequence[dict[str, Any]], config: WeightsConfig, log_ratios: Sequence[float] | None = None
) -> tuple[list[float | None], dict[str, float]]:
    """`weigh`, with None in place of the rows of skipped groups: those are left out of steps and denominators too.

    Raises ValueError for no rows, and where every group is skipped.
    """
    weights, stats = weigh(rows, config, log_ratios)
    if not config.skip_unsolved_groups:
        return list(weights), stats
    solved = {row["prompt_id"] for row in rows if row["t_star"] is not None}
    if not solved:
        raise ValueError(
            f"skip_unsolved_groups leaves none of {len(rows)} rows to train on, since no group has a right answer; set "
            "weights.skip_unsolved_groups=false, or take easier problems, a stronger model or a larger rollout.n"
        )
    return [weight if row["prompt_id"] in solved else None for row, weight in zip(rows, weights)], stats
