"""What a policy loss is, as frozen values: no torch here, so that they hash, compare and travel as text.

`OBJECTIVES` has a row for each objective. Code outside a loss's formula asks it, and never an objective by name.
Left out on purpose: a registry of user-defined objectives. A loss that is not here is a function for `pointwise_loss`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from drift_kernels.checks import number, numbers, one_of

RATIOS = ("token", "sequence", "sequence_token")
AGGREGATIONS = ("token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "token_sum")
KL_ESTIMATORS = ("k1", "k2", "k3", "abs", "k1+", "k3+", "abs+")
CORRECTIONS = (None, "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


@dataclass(frozen=True)
class Objective:
    """The facts about an objective that code outside its formula depends on.

    number          of the objective in `csrc/policy.h` and the Triton kernels; None: only formulas.py has it, since a token's
                    loss needs more than the token
    parameters      fields of `PolicySpec` that only this objective (or few others) reads; all others refuse them
    required        those of them without a usual value
    ratios          the values of `PolicySpec.ratio` that it takes
    scope           the tokens that a token's loss reads at ratio="token": "token" itself, "sequence" or "batch"
    bounds          the quantity that clip_low and clip_high bound: "ratio", "log_ratio" or "divergence"
    linear          it is proportional to the advantage, so that a correction may multiply the advantage
    vanishes        it is 0 when the advantage is 0, so that such a token is not computed
    mean_advantage  it reads the mean advantage of the sequence, not the token's own
    """

    number: int | None = None
    parameters: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    ratios: tuple[str, ...] = ("token",)
    scope: str = "token"
    bounds: str = "ratio"
    linear: bool = True
    vanishes: bool = True
    mean_advantage: bool = False


OBJECTIVES = {
    "clip": Objective(0, ("dual_clip", "delta"), ratios=RATIOS),
    "cispo": Objective(1, ratios=RATIOS),
    "sapo": Objective(2, ("sapo_temperatures",), ratios=RATIOS),
    "reinforce": Objective(3),
    "dppo_tv": Objective(4, ("delta",), bounds="divergence"),
    "dppo_kl": Objective(5, ("delta",), bounds="divergence"),
    "dro": Objective(6, ("dro_beta",), required=("dro_beta",), linear=False, vanishes=False),
    "gppo": Objective(7, ("gppo_weights",)),
    "gmpo": Objective(ratios=("sequence",), scope="sequence", bounds="log_ratio", mean_advantage=True),
    "vespo": Objective(None, ("vespo_weights",), scope="sequence"),
    "clip_cov": Objective(None, ("cov_share", "cov_bounds"), scope="batch", linear=False),
    "kl_cov": Objective(None, ("cov_share", "cov_kl_coef"), scope="batch", linear=False, vanishes=False),
}


_GSPO = {"clip_low": 3e-4, "clip_high": 4e-4}  # a mean of log-ratios moves far less than one of them

# Published names. Each is the general loss with other numbers.
PRESETS: dict[str, dict[str, Any]] = {
    "ppo": {},
    "dual_clip": {"dual_clip": 3.0},
    "two_sided": {"delta": 4.0},
    "grpo": {"aggregation": "sequence_mean_token_mean"},
    "bnpo": {"aggregation": "token_mean"},
    "dapo": {"clip_high": 0.28, "aggregation": "token_mean"},
    "dr_grpo": {"aggregation": "token_sum"},  # pass normalizer = sequences x maximum completion length
    "cispo": {"objective": "cispo"},
    "sapo": {"objective": "sapo", "aggregation": "sequence_mean_token_mean"},
    "reinforce": {"objective": "reinforce"},
    "gpg": {"objective": "reinforce"},
    "gspo": {**_GSPO, "ratio": "sequence", "aggregation": "sequence_mean_token_mean"},
    "gspo_token": {**_GSPO, "ratio": "sequence_token", "aggregation": "sequence_mean_token_mean"},
    "luspo": {**_GSPO, "ratio": "sequence", "aggregation": "sequence_mean_token_sum"},
    "gmpo": {
        "objective": "gmpo",
        "ratio": "sequence",
        "clip_low": 0.4,
        "clip_high": 0.4,
        "aggregation": "sequence_mean_token_mean",
    },
    "vespo": {"objective": "vespo"},
    "dppo_tv": {"objective": "dppo_tv", "delta": 20.0},
    "dppo_kl": {"objective": "dppo_kl", "delta": 20.0},
    "dro": {"objective": "dro"},  # pass dro_beta
    "gppo": {"objective": "gppo"},
    "ce_gppo": {"objective": "gppo", "gppo_weights": (0.75, 1.0)},
    "clip_cov": {"objective": "clip_cov"},
    "kl_cov": {"objective": "kl_cov"},
}


@dataclass(frozen=True)
class Numbers:
    """The check of a numeric field of `PolicySpec`, and its names in the kernels."""

    size: int  # of a tuple; 0: one number
    optional: bool  # whether it may be None
    rule: str  # the end of a complaint: "must be positive"
    holds: Callable[..., bool]  # of all its numbers
    kernels: tuple[str, ...]  # fields of `PolicyParams` in csrc/policy.h; (): one of the same name
    absent: float  # stands for None in the kernels

    def convert(self, name: str, value: Any) -> Any:
        """`value` as plain floats; TypeError or ValueError names the field, the value and the rule."""
        value = numbers(name, value, self.size) if self.size else number(name, value, self.optional)
        if value is not None and not self.holds(*(value if self.size else (value,))):
            raise ValueError(f"{name}={value} {self.rule}")
        return value


def _numeric(
    default: Any,
    rule: str = "",
    holds: Callable[..., bool] = lambda *values: True,
    *,
    optional: bool = False,
    kernels: tuple[str, ...] = (),
    absent: float = 0.0,
) -> Any:
    """A field of numbers, checked by `Numbers`."""
    size = len(default) if isinstance(default, tuple) else 0
    check = Numbers(size, optional or default is None, rule, holds, kernels, absent)
    return field(default=default, metadata={"numbers": check})


@dataclass(frozen=True)
class PolicySpec:
    """One policy loss. r = exp(logp − old), log-ratio clamped to ±20; A is the advantage; sg stops the gradient.

    objective  "clip": −min(min(r, delta)·A, clip(r, 1 − clip_low, 1 + clip_high)·A), and for A < 0 at most −dual_clip·A
               (PPO, arXiv 1707.06347; dual clip, arXiv 1912.09729; two-sided delta, arXiv 2505.07291)
               "cispo": −sg(clip(r))·A·logp (arXiv 2506.13585; clip_low=None leaves the lower side open)
               "sapo": −(4/τ)·σ(τ(r − 1))·A, τ by the sign of A (arXiv 2511.20347)
               "reinforce": −A·logp
               "dppo_tv", "dppo_kl": −sg(min(r, delta))·A·logp, 0 where the move the advantage asks for has gone further than
               clip_high (A > 0) or clip_low: p − p_old, or the KL of (p_old, 1 − p_old) from (p, 1 − p) (DPPO, Qi et al. 2026)
               "dro": −A·logp + dro_beta/2·(logp − old)² (arXiv 2405.19107)
               "gppo": "clip", but a token that it would clip keeps a bounded gradient: −w·bound·A·r/sg(r), w = gppo_weights
               (below, above) (GPPO, arXiv 2508.07629, w = 1; CE-GPPO, arXiv 2509.20712)
               "gmpo": −Ā·exp(mean of the log-ratios, each kept from going beyond −clip_low, clip_high in the direction of A)
               per sequence, Ā the mean advantage (arXiv 2507.20673)
               "vespo": −sg(φ(w))·A·logp, φ(w) = e^λ·w^k·e^(−λw), w the sequence's product of ratios, (k, λ) by the sign of A
               "clip_cov": "clip" without the tokens picked at random among those not clipped whose covariance of logp and A
               lies within cov_bounds; "kl_cov": −r·A, and + cov_kl_coef·|logp − old| for the tokens of largest covariance;
               cov_share of all tokens with a weight each, at least one (arXiv 2505.22617)
    ratio      "token"; "sequence": r = exp(mean of logp − old over the sequence), one for all its tokens (GSPO, arXiv
               2507.18071); "sequence_token": that value, with the gradient of the token's own logp (GSPO-token)
    kl_coef    times the estimator of KL(policy‖reference), added per token; d = logp − ref.
               "k1": d; "k2": d²/2; "k3": exp(−d) + d − 1 (+∞ in fp32 where d < −88); "abs": |d|; a trailing "+": that value,
               the gradient of k2.
               kl_unbiased multiplies the estimate by r, through which the gradient flows too (DeepSeek-V3.2)
    entropy_coef  times the token's entropy, subtracted (with its gradient)
    z_loss_coef   times lse², added (lse of the logits after temperature)
    correction    weight exp(old − rollout) between trainer and sampler on the objective (not on KL or entropy):
                  truncated to correction_bounds, or masked outside them, per token or per sequence (product over it);
                  "vespo" takes it into w instead
    off_policy_threshold  drops the objective of sequences with A < 0 whose mean of rollout − logp (old − logp where no
                  rollout_logprobs are given) exceeds it (DeepSeek-V3.2)
    aggregation   how token losses become one number; the denominator is `normalizer` where the caller gives it

    `scope` says which other tokens a token's loss reads. "clip_cov" and "kl_cov" select within one call: splitting a batch
    changes what they select.
    """

    objective: str = "clip"
    ratio: str = "token"
    clip_low: float | None = _numeric(0.2, optional=True)
    clip_high: float = _numeric(0.2, "must be at least 0; it is the distance above 1", lambda v: v >= 0)
    dual_clip: float | None = _numeric(None, "must exceed 1 (3 is usual), or be None", lambda v: v > 1)
    delta: float | None = _numeric(None, absent=math.inf)
    # A > 0, A ≤ 0
    sapo_temperatures: tuple[float, float] = _numeric(
        (1.0, 1.05), "must both be positive", lambda *v: min(v) > 0, kernels=("tau_pos", "tau_neg")
    )
    kl_coef: float = _numeric(0.0)
    kl_estimator: str = "k3"
    entropy_coef: float = _numeric(0.0)
    z_loss_coef: float = _numeric(0.0)
    aggregation: str = "token_mean"
    correction: str | None = None
    correction_bounds: tuple[float, float] = _numeric(
        (0.0, 2.0), "must be (low, high) with 0 ≤ low < high", lambda low, high: 0 <= low < high
    )
    kl_unbiased: bool = False
    off_policy_threshold: float | None = _numeric(None)
    dro_beta: float | None = _numeric(None, "must be positive", lambda v: v > 0)
    # below 1 − clip_low, above 1 + clip_high
    gppo_weights: tuple[float, float] = _numeric(
        (1.0, 1.0), "must both be at least 0", lambda *v: min(v) >= 0, kernels=("gppo_low", "gppo_high")
    )
    vespo_weights: tuple[float, float, float, float] = _numeric(
        (2.0, 3.0, 3.0, 2.0), "must be positive: (k, λ) for A ≥ 0, (k, λ) for A < 0", lambda *v: min(v) > 0
    )
    cov_share: float = _numeric(2e-4, "must lie in (0, 1]; it is a share of the call's tokens", lambda v: 0 < v <= 1)
    cov_bounds: tuple[float, float] = _numeric(
        (1.0, 5.0), "must be (low, high) with low < high", lambda low, high: low < high
    )
    cov_kl_coef: float = _numeric(1.0)

    def __post_init__(self) -> None:
        for name, check in NUMBERS.items():
            object.__setattr__(self, name, check.convert(name, getattr(self, name)))
        one_of("objective", self.objective, tuple(OBJECTIVES))
        one_of("ratio", self.ratio, RATIOS)
        one_of("kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        one_of("aggregation", self.aggregation, AGGREGATIONS)
        one_of("correction", self.correction, CORRECTIONS)
        self._check_clipping()
        self._check_objective()

    def _check_clipping(self) -> None:
        of_ratios = self.traits.bounds == "ratio"
        if self.clip_low is not None and (self.clip_low < 0 or (of_ratios and self.clip_low > 1)):
            raise ValueError(f"clip_low={self.clip_low} must lie in [0, 1], or be None for no lower bound")
        floor = 1 + self.clip_high if of_ratios else 0.0
        if self.delta is not None and self.delta <= floor:
            raise ValueError(
                f"delta={self.delta} must exceed {'1 + clip_high = ' if of_ratios else ''}{floor}, or be None"
            )

    def _check_objective(self) -> None:
        objective, traits = self.objective, self.traits
        for name, (default, owners) in PARAMETERS.items():
            if objective not in owners and getattr(self, name) != default:
                names = " and ".join(map(repr, owners))
                raise ValueError(f"{name} belongs to objective={names}, not to {objective!r}: leave it out")
        for name in traits.required:
            if getattr(self, name) is None:
                raise ValueError(f"objective={objective!r} needs {name}: there is no usual value")
        if self.ratio not in traits.ratios:
            allowed = " or ".join(f"ratio={ratio!r}" for ratio in traits.ratios)
            raise ValueError(f"ratio={self.ratio!r} does not go with objective={objective!r}: pass {allowed}")
        if not self.correction:
            return
        if not traits.linear and (self.kl_coef or self.entropy_coef or self.z_loss_coef):
            raise ValueError(
                f"correction={self.correction!r} weighs the whole loss of objective={objective!r}, and kl_coef, entropy_coef "
                "and z_loss_coef must not be weighed: set them to 0 here, and add their terms by a second call"
            )
        if traits.mean_advantage and self.correction.startswith("token"):
            raise ValueError(
                f"correction={self.correction!r} has no meaning for one ratio a sequence; use a sequence form"
            )

    @property
    def traits(self) -> Objective:
        """The row of the table for this objective."""
        return OBJECTIVES[self.objective]

    @property
    def scope(self) -> str:
        """Which tokens the loss of a token reads: "token" that token alone, "sequence" its sequence, "batch" the call."""
        if self.traits.scope != "token":
            return self.traits.scope
        return "sequence" if self.reads_sequences else "token"

    @property
    def reads_sequences(self) -> bool:
        """Whether the loss of a token reads all of its sequence, so that sequences must be known."""
        return self.traits.scope == "sequence" or self.ratio != "token" or self.off_policy_threshold is not None

    @property
    def vanishes(self) -> bool:
        """Whether a token of advantage 0 has neither loss nor gradient."""
        return self.traits.vanishes and not (self.kl_coef or self.entropy_coef or self.z_loss_coef)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> PolicySpec:
        """The loss published under `name`, with `changes` on top; ValueError lists the names."""
        one_of("preset", name, tuple(PRESETS))
        return cls(**{**PRESETS[name], **changes})


NUMBERS: dict[str, Numbers] = {f.name: f.metadata["numbers"] for f in fields(PolicySpec) if f.metadata}
# parameter → its default, the objectives that read it
PARAMETERS = {
    f.name: (f.default, owners)
    for f in fields(PolicySpec)
    if (owners := tuple(name for name, row in OBJECTIVES.items() if f.name in row.parameters))
}
