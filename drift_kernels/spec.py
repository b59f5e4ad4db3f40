"""What a loss is and how it runs, as frozen values: no torch here, so that they hash, compare and travel as text.

Left out on purpose: a registry of user-defined objectives. A loss that is not here is a function for `pointwise_loss`.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

OBJECTIVES = (
    "clip",
    "cispo",
    "sapo",
    "reinforce",
    "dppo_tv",
    "dppo_kl",
    "dro",
    "gmpo",
    "vespo",
    "clip_cov",
    "kl_cov",
)
DIVERGENCES = ("dppo_tv", "dppo_kl")
COVARIANCES = ("clip_cov", "kl_cov")
NOT_LINEAR = (
    "dro",
    *COVARIANCES,
)  # in the advantage: a penalty stands beside it, or its value decides what is selected
RATIOS = ("token", "sequence", "sequence_token")
AGGREGATIONS = ("token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "token_sum")
KL_ESTIMATORS = ("k1", "k2", "k3", "abs", "k1+", "k3+", "abs+")
CORRECTIONS = (None, "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")

HUGE = 1e30  # fits float32

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
    "clip_cov": {"objective": "clip_cov"},
    "kl_cov": {"objective": "kl_cov"},
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


def _numbers(name: str, values: Any, size: int) -> tuple[float, ...]:
    if not isinstance(values, (tuple, list)) or len(values) != size:
        raise ValueError(f"{name}={values!r} must be {size} numbers")
    return tuple(_number(name, v) for v in values)


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
               "gmpo": −Ā·exp(mean of the log-ratios, each kept from going beyond −clip_low, clip_high in the direction of A)
               per sequence, Ā the mean advantage (arXiv 2507.20673)
               "vespo": −sg(φ(w))·A·logp, φ(w) = e^λ·w^k·e^(−λw), w the sequence's product of ratios, (k, λ) by the sign of A
               "clip_cov": "clip" without the tokens picked at random among those not clipped whose covariance of logp and A
               lies within cov_bounds; "kl_cov": −r·A, and + cov_kl_coef·|logp − old| for the tokens of largest covariance;
               cov_share of all tokens each, at least one (arXiv 2505.22617)
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
    kl_unbiased: bool = False
    off_policy_threshold: float | None = None
    dro_beta: float | None = None
    vespo_weights: tuple[float, float, float, float] = (2.0, 3.0, 3.0, 2.0)  # k, λ for A ≥ 0; k, λ for A < 0
    cov_share: float = 2e-4
    cov_bounds: tuple[float, float] = (1.0, 5.0)
    cov_kl_coef: float = 1.0

    def __post_init__(self) -> None:
        for name in ("clip_high", "kl_coef", "entropy_coef", "z_loss_coef", "cov_share", "cov_kl_coef"):
            object.__setattr__(self, name, _number(name, getattr(self, name)))
        for name in ("clip_low", "dual_clip", "delta", "off_policy_threshold", "dro_beta"):
            object.__setattr__(self, name, _number(name, getattr(self, name), optional=True))
        for name, size in (("sapo_temperatures", 2), ("correction_bounds", 2), ("cov_bounds", 2), ("vespo_weights", 4)):
            object.__setattr__(self, name, _numbers(name, getattr(self, name), size))
        _one_of("objective", self.objective, OBJECTIVES)
        _one_of("ratio", self.ratio, RATIOS)
        _one_of("kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        _one_of("aggregation", self.aggregation, AGGREGATIONS)
        _one_of("correction", self.correction, CORRECTIONS)
        self._check_numbers()
        self._check_combinations()

    def _check_numbers(self) -> None:
        below_one = self.objective not in (*DIVERGENCES, "gmpo")  # a distance from 1 there, of logs or divergences here
        if self.clip_low is not None and not 0 <= self.clip_low <= (1 if below_one else HUGE):
            raise ValueError(f"clip_low={self.clip_low} must lie in [0, 1], or be None for no lower bound")
        if self.clip_high < 0:
            raise ValueError(f"clip_high={self.clip_high} must be at least 0; it is the distance above 1")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"dual_clip={self.dual_clip} must exceed 1 (3 is usual), or be None")
        floor = 0.0 if self.objective in DIVERGENCES else 1 + self.clip_high  # clip_high bounds no ratio there
        if self.delta is not None and self.delta <= floor:
            of = "" if self.objective in DIVERGENCES else "1 + clip_high = "
            raise ValueError(f"delta={self.delta} must exceed {of}{floor}, or be None")
        if min(self.sapo_temperatures) <= 0:
            raise ValueError(f"sapo_temperatures={self.sapo_temperatures} must both be positive")
        low, high = self.correction_bounds
        if not 0 <= low < high:
            raise ValueError(f"correction_bounds={self.correction_bounds} must be (low, high) with 0 ≤ low < high")
        if self.dro_beta is not None and self.dro_beta <= 0:
            raise ValueError(f"dro_beta={self.dro_beta} must be positive")
        if min(self.vespo_weights) <= 0:
            raise ValueError(f"vespo_weights={self.vespo_weights} must be positive: (k, λ) for A ≥ 0, (k, λ) for A < 0")
        if not 0 < self.cov_share <= 1:
            raise ValueError(f"cov_share={self.cov_share} must lie in (0, 1]; it is a share of the call's tokens")
        if not self.cov_bounds[0] < self.cov_bounds[1]:
            raise ValueError(f"cov_bounds={self.cov_bounds} must be (low, high) with low < high")

    def _check_combinations(self) -> None:
        objective = self.objective
        if objective != "clip" and self.dual_clip is not None:
            raise ValueError(f"dual_clip belongs to objective='clip', not to {objective!r}")
        if objective not in ("clip", *DIVERGENCES) and self.delta is not None:
            raise ValueError(f"delta belongs to objective='clip', 'dppo_tv' and 'dppo_kl', not to {objective!r}")
        if objective == "dro" and self.dro_beta is None:
            raise ValueError(
                "objective='dro' needs dro_beta, the strength of its quadratic penalty: there is no usual one"
            )
        if objective == "gmpo" and self.ratio != "sequence":
            raise ValueError(f"objective='gmpo' has one ratio a sequence: pass ratio='sequence', not {self.ratio!r}")
        if objective in ("vespo", "reinforce", "dro", *DIVERGENCES, *COVARIANCES) and self.ratio != "token":
            raise ValueError(f"ratio={self.ratio!r} does not go with objective={objective!r}: pass ratio='token'")
        if objective in NOT_LINEAR and self.correction and (self.kl_coef or self.entropy_coef or self.z_loss_coef):
            raise ValueError(
                f"correction={self.correction!r} weighs the whole loss of objective={objective!r}, and kl_coef, entropy_coef "
                "and z_loss_coef are not to be weighed: set them to 0 here, and add their terms by a second call"
            )
        if objective == "gmpo" and self.correction and self.correction.startswith("token"):
            raise ValueError(
                f"correction={self.correction!r} has no meaning for one ratio a sequence; use a sequence form"
            )

    @property
    def scope(self) -> str:
        """What a token's loss reads besides the token itself: "token" nothing, "sequence" its sequence, "batch" the call."""
        if self.objective in COVARIANCES:
            return "batch"
        whole = self.ratio != "token" or self.objective in ("gmpo", "vespo") or self.off_policy_threshold is not None
        return "sequence" if whole else "token"

    @classmethod
    def preset(cls, name: str, **changes: Any) -> PolicySpec:
        """The loss published under `name`, with `changes` on top; ValueError lists the names."""
        _one_of("preset", name, tuple(PRESETS))
        return cls(**{**PRESETS[name], **changes})


@dataclass(frozen=True)
class DistillSpec:
    """One divergence of a student s from a teacher t, per token over the vocabulary.

    alpha   0: KL(t‖s). 1: KL(s‖t). Between, with M = (1 − alpha)·s + alpha·t: (1 − alpha)·KL(s‖M) + alpha·KL(t‖M), the
            generalised Jensen–Shannon divergence (arXiv 2306.13649). 0 and 1 are cases of their own, not its limits: those
            are 0, alpha·KL(t‖s) being what it approaches for a small alpha
    top_k   None: over the whole vocabulary. k: over the k tokens that the student finds likeliest, or over those of a
            `TeacherTopK` (None then means all that it holds)
    tail    with a top k: all other tokens count as one more, of probability 1 − Σp; False: they are left out, and both
            distributions are renormalised over the k
    importance_clip  c: times min(exp(logp − old), c) of the token, through which no gradient flows
    """

    alpha: float = 0.5
    top_k: int | None = None
    tail: bool = True
    importance_clip: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "alpha", _number("alpha", self.alpha))
        object.__setattr__(self, "importance_clip", _number("importance_clip", self.importance_clip, optional=True))
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha} must lie in [0, 1]: 0 is KL(teacher‖student), 1 KL(student‖teacher)")
        if self.top_k is not None and (isinstance(self.top_k, bool) or not isinstance(self.top_k, int)):
            raise TypeError(f"top_k={self.top_k!r} must be a whole number, or None for the whole vocabulary")
        if self.top_k is not None and self.top_k < (1 if self.tail else 2):
            raise ValueError(
                f"top_k={self.top_k} must be at least 1, and 2 with tail=False: one token alone is certain"
            )
        if self.importance_clip is not None and self.importance_clip <= 0:
            raise ValueError(f"importance_clip={self.importance_clip} must be positive (2 is usual), or None")


@dataclass(frozen=True)
class ExplorationSpec:
    """Token weights that `self_distill_loss` makes from entropies and log-probs on its way; no gradient flows through them.

    With H the entropy of a row and C = max(H of the row before − H, 0) inside one turn, 0 at its first row:
    difference  d = |C of the student − C of the teacher|
    rhythm      1 + (m − 1)·(1 − exp(−d/d̄)), m = rhythm_maximum, d̄ the last step's mean of d, at least 1e-3; multiplies the
                divergence with `weigh_divergence`. The method (arXiv 2606.30345) publishes how a gate comes from such a
                weight, not the weight: this form is a reading of it
    gate        floor + (1 − floor)·((rhythm − 1)/(m − 1))^power; with gate=False it is 1
    rebellious  1 + w·(bonus − 1)·gate on the policy's token loss; bonus = exp(gamma·max(logp − teacher's logp − margin, 0)),
                at most bonus_maximum, w the `rebellious_weights`
    entropy_warmup  the divergence times H of the student / the last step's mean of it, so that uncertain tokens learn more

    The mean of a step that was not there (None) leaves its weight at 1, and the gate at its floor.
    """

    rhythm_maximum: float = 2.0
    weigh_divergence: bool = True
    gate: bool = True
    gate_floor: float = 0.0
    gate_power: float = 1.0
    margin: float = 0.2
    gamma: float = 1.0
    bonus_maximum: float = 2.0
    entropy_warmup: bool = False

    def __post_init__(self) -> None:
        for name in ("rhythm_maximum", "gate_floor", "gate_power", "margin", "gamma", "bonus_maximum"):
            object.__setattr__(self, name, _number(name, getattr(self, name)))
        if self.rhythm_maximum <= 1:
            raise ValueError(
                f"rhythm_maximum={self.rhythm_maximum} must exceed 1; weigh_divergence=False takes no weight"
            )
        if not 0 <= self.gate_floor <= 1:
            raise ValueError(f"gate_floor={self.gate_floor} must lie in [0, 1]")
        for name, least in (("gate_power", 0.0), ("gamma", 0.0), ("bonus_maximum", 1.0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")


@dataclass(frozen=True)
class KernelConfig:
    """How an op runs; never what it computes.

    backend          "auto" picks by the device of `hidden`; asking for one that cannot run raises with its reason
    workspace_bytes  scratch for logits and what goes with them; None = 256 MiB on a CPU, 1 GiB on a GPU
    check_finite     raise on non-finite `old_logprobs`, `ref_logprobs`, advantages or weights of rows that count
    accumulate_into_grad  add dW, times this number, to the fp32 `weight.grad` in the forward: no [V, D] of its own. The number
                     is what backward will scale the loss by (1 for loss.backward()); backward raises where it is another
    """

    backend: str = "auto"
    workspace_bytes: int | None = None
    check_finite: bool = False
    accumulate_into_grad: float | None = None

    def __post_init__(self) -> None:
        _one_of("backend", self.backend, BACKENDS)
        if not isinstance(self.check_finite, bool):
            raise TypeError(f"check_finite={self.check_finite!r} must be True or False")
        if self.workspace_bytes is not None and not isinstance(self.workspace_bytes, int):
            raise TypeError(f"workspace_bytes={self.workspace_bytes!r} must be a whole number of bytes, or None")
        if self.workspace_bytes is not None and self.workspace_bytes <= 0:
            raise ValueError(f"workspace_bytes={self.workspace_bytes} must be positive, or None for the default")
        scale = _number("accumulate_into_grad", self.accumulate_into_grad, optional=True)
        object.__setattr__(self, "accumulate_into_grad", scale)


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
    need_lora_a: bool = False
    need_lora_b: bool = False
    lora_scale: float = 1.0
    accumulate_scale: float | None = None  # factor on what is added to a weight's gradient in place

    @property
    def needs(self) -> tuple[bool, bool, bool, bool, bool]:
        """Which gradients are wanted: of hidden, weight, bias, LoRA's A and B."""
        return self.need_hidden, self.need_weight, self.need_bias, self.need_lora_a, self.need_lora_b

    def __post_init__(self) -> None:
        if not isinstance(self.config, KernelConfig):
            raise TypeError(f"config={self.config!r} must be a KernelConfig, such as KernelConfig(backend='cpu')")

    @property
    def need_grad(self) -> bool:
        """Whether any gradient is wanted: without, an op costs one GEMM."""
        return any(self.needs)

    def encode(self) -> str:
        """As text, for an op's schema: a literal tuple (a JSON encoder would break a compiled graph)."""
        s, h, c = self.spec, self.head, self.config
        spec = (s.objective, s.ratio, s.clip_low, s.clip_high, s.dual_clip, s.delta, s.sapo_temperatures, s.kl_coef)
        spec += (s.kl_estimator, s.entropy_coef, s.z_loss_coef, s.aggregation, s.correction, s.correction_bounds)
        spec += (s.kl_unbiased, s.off_policy_threshold, s.dro_beta, s.vespo_weights)
        spec += (s.cov_share, s.cov_bounds, s.cov_kl_coef)
        head = (h.temperature, h.softcap, h.logit_scale, h.ignore_index)
        config = (c.backend, c.workspace_bytes, c.check_finite, c.accumulate_into_grad)
        return repr((spec, head, config, self.outputs, *self.needs, self.lora_scale, self.accumulate_scale))

    @staticmethod
    @lru_cache(maxsize=256)
    def decode(text: str) -> Call:
        """The inverse of `encode`."""
        spec, head, config, *rest = ast.literal_eval(text)
        return Call(PolicySpec(*spec), HeadOptions(*head), KernelConfig(*config), *rest)


@dataclass(frozen=True)
class DistillCall:
    """As `Call`, for ops with a teacher."""

    call: Call  # of the student; its spec is the policy's
    distill: DistillSpec
    teacher: HeadOptions
    teacher_lora_scale: float = 1.0
    exploration: ExplorationSpec | None = None
    policy: bool = False  # whether there is a policy term
    teach_all: bool = False  # an output reads the teacher on rows of weight 0 too

    def encode(self) -> str:
        """As text, for an op's schema."""
        d, t, e = self.distill, self.teacher, self.exploration
        distill = (d.alpha, d.top_k, d.tail, d.importance_clip)
        teacher = (t.temperature, t.softcap, t.logit_scale, t.ignore_index)
        exploration = None
        if e is not None:
            exploration = (e.rhythm_maximum, e.weigh_divergence, e.gate, e.gate_floor, e.gate_power)
            exploration += (e.margin, e.gamma, e.bonus_maximum, e.entropy_warmup)
        rest = (self.teacher_lora_scale, exploration, self.policy, self.teach_all)
        return repr((self.call.encode(), distill, teacher, *rest))

    @staticmethod
    @lru_cache(maxsize=256)
    def decode(text: str) -> DistillCall:
        """The inverse of `encode`."""
        call, distill, teacher, scale, exploration, policy, teach_all = ast.literal_eval(text)
        explored = None if exploration is None else ExplorationSpec(*exploration)
        student, spec, head = Call.decode(call), DistillSpec(*distill), HeadOptions(*teacher)
        return DistillCall(student, spec, head, scale, explored, policy, teach_all)
