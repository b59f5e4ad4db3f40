"""The divergence of a student from a teacher, and the token weights made from both, as frozen values."""

from __future__ import annotations

from dataclasses import dataclass

from drift_kernels.checks import number


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
        object.__setattr__(self, "alpha", number("alpha", self.alpha))
        object.__setattr__(self, "importance_clip", number("importance_clip", self.importance_clip, optional=True))
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
            object.__setattr__(self, name, number(name, getattr(self, name)))
        if self.rhythm_maximum <= 1:
            raise ValueError(
                f"rhythm_maximum={self.rhythm_maximum} must exceed 1; weigh_divergence=False takes no weight"
            )
        if not 0 <= self.gate_floor <= 1:
            raise ValueError(f"gate_floor={self.gate_floor} must lie in [0, 1]")
        for name, least in (("gate_power", 0.0), ("gamma", 0.0), ("bonus_maximum", 1.0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
