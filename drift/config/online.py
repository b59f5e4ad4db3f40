"""The settings of the online method, section by section; those not marked as ours are published (arXiv 2606.30345).

`drift.config.Config.online` holds them in a run. Each component takes its own section, so that it can be used alone.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from drift.config.algorithms import ALGORITHMS
from drift.config.section import Count, Positive, Rate, Section, Share, Weight, preset

Gates = Annotated[tuple[Weight, Weight, Weight], Field(strict=False)]  # of an easy, a medium, a hard problem
ROUTES: dict[str, dict[str, Any]] = {  # the router's modes: one table with other numbers
    "drift": {},
    "sdpo": {
        "binary_routing": False,
        "distill_incorrect": (1.0, 1.0, 1.0),
        "distill_correct": (1.0, 1.0, 1.0),
        "policy_correct": (0.0, 0.0, 0.0),
        "policy_untaught": 0.0,
        "rebellious": (0.0, 0.0, 0.0),
    },
    "grpo": {
        "distill_incorrect": (0.0, 0.0, 0.0),
        "policy_correct": (1.0, 1.0, 1.0),
        "policy_incorrect": (1.0, 1.0, 1.0),
        "rebellious": (0.0, 0.0, 0.0),
    },
    "srpo": {
        "distill_incorrect": (1.0, 1.0, 1.0),
        "policy_correct": (1.0, 1.0, 1.0),
        "rebellious": (0.0, 0.0, 0.0),
    },
}


class RouterConfig(Section):
    """The weight of each branch for a sample, by the difficulty of its problem (B1)."""

    mode: Literal["drift", "sdpo", "grpo", "srpo"] = "drift"  # others fix the weights below by ROUTES
    decay: Share = 0.85  # of past successes and failures, a step
    confidence: Rate = 8.0  # attempts at which the pass rate is half believed
    hard_below: Share = 0.3  # pass rate, as is easy_above
    easy_above: Share = 0.7
    temperature: Rate = 0.08  # of both gates
    binary_routing: bool = True  # a correct sample is never distilled
    distill_incorrect: Gates = (0.35, 0.0, 1.0)
    distill_correct: Gates = (0.0, 0.0, 0.7)  # with binary_routing off
    policy_correct: Gates = (0.05, 1.0, 0.3)  # if there is a teacher
    policy_incorrect: Gates = (0.0, 0.0, 0.0)  # likewise
    policy_untaught: Weight = 1.0  # without a teacher, as in the public code; 0 is the public page's formula
    rebellious: Gates = (0.0, 1.0, 0.0)
    reset_every: Count = 0  # steps between two clearings of the history; 0 never

    @model_validator(mode="before")
    @classmethod
    def _resolve_mode(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        mode = data.get("mode", "drift")
        return preset(data, f"mode {mode}", ROUTES[mode]) if isinstance(mode, str) and mode in ROUTES else data

    @model_validator(mode="after")
    def _hard_below_easy(self) -> RouterConfig:
        if self.hard_below >= self.easy_above:
            raise ValueError(f"hard_below {self.hard_below} should be below easy_above {self.easy_above}")
        return self


class RhythmConfig(Section):
    """The gate on exploration, and the bonus for tokens on which student and teacher differ (B2, B3)."""

    gate: bool = True  # false is the ablation: no gate on the bonus
    weigh_divergence: bool = True  # the rhythm weight multiplies the distillation of a token (ours)
    maximum: Annotated[float, Field(gt=1)] = 2.0  # of the rhythm weight
    floor: Share = 0.0
    power: Rate = 1.0
    margin: Weight = 0.2  # nats by which the student has to be surer than the teacher
    bonus_gamma: Weight = 1.0
    bonus_maximum: Annotated[float, Field(ge=1)] = 2.0


class BufferConfig(Section):
    """The size of the success buffer, its order, and the start of its use (B4)."""

    problems: Positive = 50_000
    entries: Positive = 4  # a problem
    min_score: float | None = None
    prefer_recent: bool = False  # order by (step, score) instead of (score, step)
    start_step: Count = 0
    start_epoch: Count = 0


class PlateauConfig(Section):
    """When the pass rate has stopped rising, so that warm-up ends (ours)."""

    window: Positive = 5  # steps of a mean; the last window is compared with the one before
    least_gain: Weight = 0.01  # of the solved share; a smaller gain is a plateau


class CurriculumConfig(Section):
    """Warm-up by plain self-distillation, then routing is faded in (B8)."""

    warmup_steps: Count = 10  # with a plateau: at most (the number is ours)
    transition_steps: Count = 10  # over which routing is faded in, linearly (the number is ours)
    plateau: PlateauConfig | None = None  # ends warm-up before warmup_steps; null waits for the step
    weigh_by_entropy: bool = False  # in warm-up, a token's divergence times H over the last step's mean (ours)

    @model_validator(mode="after")
    def _room_for_a_plateau(self) -> CurriculumConfig:
        if self.plateau is not None and self.warmup_steps <= 2 * self.plateau.window:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} must exceed twice plateau.window {self.plateau.window}: two windows are "
                "compared within warm-up"
            )
        return self


def _off(value: Any) -> Any:
    """`off` without quotes is false in YAML 1.1."""
    return "off" if value is False else value


class TeacherConfig(Section):
    """The teacher's weights and its prompt (B5)."""

    weights: Literal["ema", "trust_region", "weight_mix", "frozen", "policy"] = "ema"  # weight_mix is ours
    rate: Annotated[float, Field(gt=0, le=1)] = 0.05  # of the EMA, a rollout step
    mix: Share = 0.05  # the policy's share: of the logits (trust_region) or of the weights (weight_mix)
    demonstrations: bool = True  # a successful sibling's final turn, else the buffer's
    choose: Literal["entropy", "best", "first"] = "entropy"  # which: of highest sequence entropy, of best score, any
    exclude_own: bool = True  # a sample never teaches itself; false is ours
    strip_thinking: bool = True  # of a demonstration, when it is shown; the text after </think> stays
    feedback: Annotated[Literal["off", "without_solution", "always"], BeforeValidator(_off)] = (
        "without_solution"  # when a failed attempt's feedback is shown, if it says more than that it failed
    )
    max_prompt_tokens: Positive = 10_240  # of the teacher's prompt; the beginning of a longer demonstration is cut


class DistillConfig(Section):
    """The divergence from the teacher (B6), and its weight relative to the policy loss (B7)."""

    alpha: Share = 0.5  # 0: KL(teacher‖student); 1: KL(student‖teacher)
    top_k: Positive | None = 100  # tokens of the student, and one bucket for the rest; null is the whole vocabulary
    importance_clip: Rate | None = 2.0
    weight: Weight = 1.0


class WatchConfig(Section):
    """Signs of a collapsed training, and the interval at which tokens are scored; all of it ours. It never stops a run."""

    every: Count = 1  # steps between two estimates of the KL to the reference; 0 makes none, and keeps no reference
    trajectories: Positive = 64  # of such a step, over all ranks, that are scored under both
    window: Positive = 5  # steps that are averaged before they are compared with a threshold
    entropy_below: Share = 0.2  # of the first step's entropy
    repeat_above: Share = 0.5  # of the answers
    solved_below: Share = 0.5  # of the best window's solved share
    examples: Count = 8  # steps, evenly spread, the last among them, whose tokens are stored with their values
    responses: Positive = 4  # of such a step


class OnlineConfig(Section):
    """The online method (B): every step samples, routes, teaches and trains."""

    algorithm: Literal["grpo", "dapo", "gspo", "sdpo", "srpo", "drift"] = "drift"  # sets router.mode; see ALGORITHMS
    steps: Positive = 100  # rollout batches, with one optimizer step each
    prompts: Positive = 32  # problems a step, each sampled rollout.n times
    ahead: Literal[0, 1] = 0  # steps that sampling is ahead of training; 1 samples the next batch meanwhile (ours)
    scale_advantages: bool = False  # divide by the group's standard deviation
    denominators: Literal["branch", "shared"] = "branch"  # each branch's own tokens; or all response tokens (ours)
    clip_low: Annotated[float, Field(gt=0, le=1)] | None = None  # of the policy's ratio; null is the algorithm's own
    clip_high: Rate | None = None  # likewise; 0.28 for dapo, sdpo, srpo and drift
    sampler_clip: Rate | None = 2.0  # of exp(logp − sampler's logp), on both losses; null corrects nothing
    router: RouterConfig = RouterConfig()
    rhythm: RhythmConfig = RhythmConfig()
    buffer: BufferConfig = BufferConfig()
    curriculum: CurriculumConfig = CurriculumConfig()
    teacher: TeacherConfig = TeacherConfig()
    distill: DistillConfig = DistillConfig()
    watch: WatchConfig = WatchConfig()

    @model_validator(mode="before")
    @classmethod
    def _resolve_algorithm(cls, data: Any) -> Any:
        algorithm = ALGORITHMS.get(data.get("algorithm", "drift")) if isinstance(data, dict) else None
        if algorithm is None:
            return data
        name = f"algorithm {data.get('algorithm', 'drift')}"
        sets: dict[str, dict[str, Any]] = {"router": {"mode": algorithm.routing}}
        if not algorithm.curriculum:
            sets["curriculum"] = {"warmup_steps": 0, "transition_steps": 0, "plateau": None}
        given = {key: data.get(key, {}) for key in sets}
        return data | {
            k: preset(given[k], name, sets[k], f"online.{k}.") if isinstance(given[k], dict) else given[k] for k in sets
        }
