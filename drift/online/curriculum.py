"""The curriculum (arXiv 2606.30345; B8): distillation alone while the buffer fills, then the policy branch fades in.

    >>> from drift.online.curriculum import Curriculum, CurriculumConfig
    >>> curriculum = Curriculum(CurriculumConfig(warmup_steps=2, transition_steps=4))
    >>> [(phase.name, phase.policy) for phase in map(curriculum.at, (0, 2, 4, 6))]
    [('warmup', 0.0), ('transition', 0.0), ('transition', 0.5), ('both', 1.0)]
    >>> loss = curriculum.at(3).policy * 1.5 + curriculum.at(3).distill * 0.5

How many steps each phase has is ours (the published lengths are not known to us), and so is what "entropy-driven" means
in the warm-up: `drift.rhythm.entropy_weight`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from drift.config.online import CurriculumConfig

__all__ = ["Curriculum", "CurriculumConfig", "Phase"]


@dataclass(frozen=True, slots=True)
class Phase:
    """What holds at one step."""

    name: Literal["warmup", "transition", "both"]
    policy: float  # factor of the policy branch, in [0, 1]
    distill: float  # factor of the distillation branch
    entropy_driven: bool  # tokens of the distillation branch are weighted by the student's entropy


class Curriculum:
    """The phase follows from the step alone; what is remembered is the last step asked about, for the log."""

    def __init__(self, config: CurriculumConfig) -> None:
        self.config, self.step = config, 0

    @property
    def transition_end(self) -> int:
        """The first step at which both branches count in full; `DifficultyRouter` counts its resets from here."""
        return self.config.warmup_steps + self.config.transition_steps

    def at(self, step: int) -> Phase:
        """The phase of `step`, counted from 0. Raises ValueError for a step below 0."""
        if step < 0:
            raise ValueError(f"step is {step}; steps count from 0")
        self.step = step
        if step < self.config.warmup_steps:
            return Phase("warmup", 0.0, 1.0, self.config.entropy_driven)
        if step < self.transition_end:
            risen = (step - self.config.warmup_steps) / self.config.transition_steps
            return Phase("transition", risen, 1.0, False)
        return Phase("both", 1.0, 1.0, False)

    def metrics(self) -> dict[str, float]:
        """phase (0 warm-up, 1 transition, 2 both) and the factors at the last step asked about."""
        phase = self.at(self.step)
        number = ("warmup", "transition", "both").index(phase.name)
        return {"phase": number, "policy": phase.policy, "distill": phase.distill}

    def state_dict(self) -> dict[str, Any]:
        """The last step asked about."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what `state_dict` gave."""
        self.step = state["step"]
