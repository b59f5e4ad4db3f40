"""The curriculum (arXiv 2606.30345; B8): plain self-distillation while the buffer fills, then routing is faded in.

Stage 1, the warm-up, is SDPO: every sample with a teacher is distilled with weight 1, right ones too, and nothing else is
trained. In the transition each weight w of a sample goes linearly from SDPO's to the router's,
(1 − routing)·w_SDPO + routing·w_router; stage 2 is the router alone.

    >>> from drift.online.curriculum import Curriculum, CurriculumConfig
    >>> curriculum = Curriculum(CurriculumConfig(warmup_steps=2, transition_steps=4))
    >>> [(phase.name, phase.routing) for phase in map(curriculum.at, (0, 2, 4, 6))]
    [('warmup', 0.0), ('transition', 0.0), ('transition', 0.5), ('both', 1.0)]
    >>> curriculum.at(3).weights(has_teacher=True, distill=0.0, policy=1.0, rebellious=0.8)
    (0.75, 0.25, 0.2)

The warm-up ends at a step, or before it at a plateau of the pass rate (`observe`). The number of steps of each phase, the
rule for a plateau and the linear transition are ours: the public text names them and gives no numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from drift.config.online import CurriculumConfig, PlateauConfig

__all__ = ["Curriculum", "CurriculumConfig", "Phase", "PlateauConfig"]


@dataclass(frozen=True, slots=True)
class Phase:
    """The state of the curriculum at one step."""

    name: Literal["warmup", "transition", "both"]
    routing: float  # share of the router's weights in [0, 1]; the rest is SDPO's
    weigh_by_entropy: bool = False  # the divergence of a token counts in proportion to the student's entropy

    def weights(
        self, has_teacher: bool, distill: float, policy: float, rebellious: float
    ) -> tuple[float, float, float]:
        """(distill, policy, rebellious) of a sample, from the router's weights."""
        plain = (1 - self.routing) * has_teacher
        return plain + self.routing * distill, self.routing * policy, self.routing * rebellious


class Curriculum:
    """Phases by step. `observe` each step's pass rate, so that a plateau can end the warm-up; only then is there a state."""

    def __init__(self, config: CurriculumConfig) -> None:
        self.config, self.step = config, 0
        self.warmup = config.warmup_steps  # steps of warm-up; fewer after a plateau
        self._rates: list[float] = []  # pass rates of the warm-up, until its end

    @property
    def transition_end(self) -> int:
        """The first step that is routed alone; `DifficultyRouter` counts its resets from here. May come down in warm-up."""
        return self.warmup + self.config.transition_steps

    def observe(self, solved: float) -> None:
        """The share of solved trajectories of the step that ends. At a plateau the next step is the transition's first."""
        plateau = self.config.plateau
        if plateau is None or self.step >= self.warmup:
            return
        self._rates = [*self._rates, solved][-2 * plateau.window :]
        if len(self._rates) < 2 * plateau.window:
            return
        before, after = (math.fsum(part) / plateau.window for part in _halves(self._rates))
        if after - before < plateau.least_gain:
            self.warmup = self.step + 1

    def at(self, step: int) -> Phase:
        """The phase of `step`, counted from 0. Raises ValueError for a step below 0."""
        if step < 0:
            raise ValueError(f"step is {step}; steps must count from 0")
        self.step = step
        if step < self.warmup:
            return Phase("warmup", 0.0, self.config.weigh_by_entropy)
        if step < self.transition_end:
            return Phase("transition", (step - self.warmup) / self.config.transition_steps)
        return Phase("both", 1.0)

    def metrics(self) -> dict[str, float]:
        """phase (0 warm-up, 1 transition, 2 both) and routing, at the last step asked about."""
        phase = self.at(self.step)
        return {"phase": ("warmup", "transition", "both").index(phase.name), "routing": phase.routing}

    def state_dict(self) -> dict[str, Any]:
        """The last step asked about, the length of the warm-up, and the pass rates seen in it."""
        return {"step": self.step, "warmup": self.warmup, "rates": list(self._rates)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up the state that `state_dict` gave."""
        self.step, self.warmup, self._rates = state["step"], state["warmup"], list(state["rates"])


def _halves(values: list[float]) -> tuple[list[float], list[float]]:
    return values[: len(values) // 2], values[len(values) // 2 :]
