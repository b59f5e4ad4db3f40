"""What a loss is and how it runs, as frozen values: no torch here, so that they hash, compare and travel as text.

Left out on purpose: a registry of user-defined objectives. A loss that is not here is a function for `pointwise_loss`.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

OBJECTIVES = ("clip", "cispo", "sapo", "reinforce")
AGGREGATIONS = ("token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "token_sum")
KL_ESTIMATORS = ("k1", "k2", "k3", "abs", "k1+", "k3+")
CORRECTIONS = (None, "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")

HUGE = 1e30  # fits float32

# Published names. Each is the general loss with other numbers.
PRESETS: dict[str, dict[str, Any]] = {
    "ppo": {},
    "grpo": {"aggregation": "sequence_mean_token_mean"},
    "bnpo": {"aggregation": "token_mean"},
    "dapo": {"clip_high": 0.28, "aggregation": "token_mean"},
    "dr_grpo": {"aggregation": "token_sum"},  # pass normalizer = sequences x maximum completion length
    "cispo": {"objective": "cispo"},
    "sapo": {"objective": "sapo"},
    "reinforce": {"objective": "reinforce"},
    "gpg": {"objective": "reinforce"},
}


def _one_of(name: str, value: object, allowed: tuple) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not known; it is one of {', '.join(map(repr, allowed))}")


def _number(name: str, value: Any, optional: bool = False) -> Any:
    """`value` as a plain float, so that specs hash and travel as text; an infinite bound as a very large one."""
    if value is None and optional:
        return None
    if value is None or isinstance(value, (str, bytes)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name}={value!r} must be a number")
    number = float(value)
    if number != number:
        raise ValueError(f"{name} is NaN; it must be a number")
    return max(min(number, HUGE), -HUGE)


@dataclass(frozen=True)
class PolicySpec:
    """One policy loss. r = exp(logp − old), log-ratio clamped to ±20; A is the advantage.

    objective  "clip": −min(min(r, delta)·A, clip(r, 1 − clip_low, 1 + clip_high)·A), and for A < 0 at most −dual_clip·A
               (PPO, arXiv 1707.06347; dual clip, arXiv 1912.09729; two-sided delta, arXiv 2505.07291)
               "cispo": −sg(clip(r))·A·logp (arXiv 2506.13585; clip_low=None leaves the lower side open)
               "sapo": −(4/τ)·σ(τ(r − 1))·A, τ by the sign of A (arXiv 2511.20347)
               "reinforce": −A·logp
    kl_coef    times the estimator of KL(policy‖reference), added per token; d = logp − ref.
               "k1": d; "k2": d²/2; "k3": exp(−d) + d − 1; "abs": |d|; a trailing "+": that value, the gradient of k2
    entropy_coef  times the token's entropy, subtracted (with its gradient)
    z_loss_coef   times lse², added (lse of the logits after temperature)
    correction    weight exp(old − rollout) between trainer and sampler on the objective (not on KL or entropy):
                  truncated to correction_bounds, or masked outside them, per token or per sequence (product over it)
    aggregation   how token losses become one number; the denominator is `normalizer` where the caller gives it
    """

    objective: str = "clip"
    ratio: str = "token"
    clip_low: float | None = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    delta: float | None = None
    sapo_temperatures: tuple[float, float] = (1.0, 1.05)  # A > 0, A ≤ 0
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    entropy_coef: float = 0.0
    z_loss_coef: float = 0.0
    aggregation: str = "token_mean"
    correction: str | None = None
    correction_bounds: tuple[float, float] = (0.0, 2.0)

    def __post_init__(self) -> None:
        for name in ("clip_low", "clip_high", "dual_clip", "delta", "kl_coef", "entropy_coef", "z_loss_coef"):
            optional = name in ("clip_low", "dual_clip", "delta")
            object.__setattr__(self, name, _number(name, getattr(self, name), optional))
        for name in ("sapo_temperatures", "correction_bounds"):
            pair = getattr(self, name)
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise ValueError(f"{name}={pair!r} must be two numbers")
            object.__setattr__(self, name, tuple(_number(name, v) for v in pair))
        _one_of("objective", self.objective, OBJECTIVES)
        _one_of("ratio", self.ratio, ("token",))
        _one_of("kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        _one_of("aggregation", self.aggregation, AGGREGATIONS)
        _one_of("correction", self.correction, CORRECTIONS)
        if self.clip_low is not None and not 0 <= self.clip_low <= 1:
            raise ValueError(f"clip_low={self.clip_low} must lie in [0, 1], or be None for no lower bound")
        if self.clip_high < 0:
            raise ValueError(f"clip_high={self.clip_high} must be at least 0; it is the distance above 1")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"dual_clip={self.dual_clip} must exceed 1 (3 is usual), or be None")
        if self.delta is not None and self.delta <= 1 + self.clip_high:
            raise ValueError(f"delta={self.delta} must exceed 1 + clip_high = {1 + self.clip_high}, or be None")
        if self.objective != "clip" and (self.dual_clip is not None or self.delta is not None):
            raise ValueError(f"dual_clip and delta belong to objective='clip', not to {self.objective!r}")
        if min(self.sapo_temperatures) <= 0:
            raise ValueError(f"sapo_temperatures={self.sapo_temperatures} must both be positive")
        low, high = self.correction_bounds
        if not 0 <= low < high:
            raise ValueError(f"correction_bounds={self.correction_bounds} must be (low, high) with 0 ≤ low < high")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> PolicySpec:
        """The loss published under `name`, with `changes` on top; ValueError lists the names."""
        _one_of("preset", name, tuple(PRESETS))
        return cls(**{**PRESETS[name], **changes})


@dataclass(frozen=True)
class KernelConfig:
    """How an op runs; never what it computes.

    backend          "auto" picks by the device of `hidden`; asking for one that cannot run raises with its reason
    workspace_bytes  scratch for logits and what goes with them; None = 256 MiB on a CPU, 1 GiB on a GPU
    check_finite     raise on non-finite `old_logprobs`, `ref_logprobs`, advantages or weights of rows that count
    """

    backend: str = "auto"
    workspace_bytes: int | None = None
    check_finite: bool = False

    def __post_init__(self) -> None:
        _one_of("backend", self.backend, BACKENDS)
        if self.workspace_bytes is not None and not isinstance(self.workspace_bytes, int):
            raise TypeError(f"workspace_bytes={self.workspace_bytes!r} must be a whole number of bytes, or None")
        if self.workspace_bytes is not None and self.workspace_bytes <= 0:
            raise ValueError(f"workspace_bytes={self.workspace_bytes} must be positive, or None for the default")


@dataclass(frozen=True)
class HeadOptions:
    """From a product h·Wᵀ to a logit: z = softcap(logit_scale·(h·Wᵀ + b)) / temperature, softcap(u) = c·tanh(u/c)."""

    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0
    ignore_index: int = -100

    def __post_init__(self) -> None:
        for name in ("temperature", "logit_scale", "softcap"):
            object.__setattr__(self, name, _number(name, getattr(self, name), optional=name == "softcap"))
        if isinstance(self.ignore_index, bool) or not hasattr(self.ignore_index, "__index__"):
            raise TypeError(f"ignore_index={self.ignore_index!r} must be an integer")
        object.__setattr__(self, "ignore_index", int(self.ignore_index))
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be positive; score greedy samples with 1.0")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap={self.softcap} must be positive, or None")

    @property
    def plain(self) -> bool:
        """Whether a logit is the product itself, but for a bias or a temperature per row."""
        return self.temperature == 1.0 and self.softcap is None and self.logit_scale == 1.0


@dataclass(frozen=True)
class Call:
    """All that a registered op needs besides tensors; `encode` makes it a schema's string."""

    spec: PolicySpec = PolicySpec()
    head: HeadOptions = HeadOptions()
    config: KernelConfig = KernelConfig()
    outputs: tuple[str, ...] = ()
    need_hidden: bool = False
    need_weight: bool = False
    need_bias: bool = False

    @property
    def need_grad(self) -> bool:
        """Whether any gradient is wanted: without, an op costs one GEMM."""
        return self.need_hidden or self.need_weight or self.need_bias

    def encode(self) -> str:
        """As text, for an op's schema: a literal tuple (a JSON encoder would break a compiled graph)."""
        s, h, c = self.spec, self.head, self.config
        spec = (s.objective, s.ratio, s.clip_low, s.clip_high, s.dual_clip, s.delta, s.sapo_temperatures, s.kl_coef)
        spec += (s.kl_estimator, s.entropy_coef, s.z_loss_coef, s.aggregation, s.correction, s.correction_bounds)
        head = (h.temperature, h.softcap, h.logit_scale, h.ignore_index)
        config = (c.backend, c.workspace_bytes, c.check_finite)
        return repr((spec, head, config, self.outputs, self.need_hidden, self.need_weight, self.need_bias))

    @staticmethod
    @lru_cache(maxsize=256)
    def decode(text: str) -> Call:
        """The inverse of `encode`."""
        spec, head, config, *rest = ast.literal_eval(text)
        return Call(PolicySpec(*spec), HeadOptions(*head), KernelConfig(*config), *rest)
