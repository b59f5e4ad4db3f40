"""Phases and weights of the curriculum."""

import doctest
import json

import pytest
from pydantic import ValidationError

from drift.online import curriculum
from drift.online.curriculum import Curriculum, CurriculumConfig, Phase, PlateauConfig


def test_phases():
    made = Curriculum(CurriculumConfig(warmup_steps=3, transition_steps=4, weigh_by_entropy=True))
    assert made.transition_end == 7
    assert [made.at(step).name for step in range(9)] == ["warmup"] * 3 + ["transition"] * 4 + ["both"] * 2
    assert [made.at(step).routing for step in range(9)] == [0, 0, 0, 0, 0.25, 0.5, 0.75, 1, 1]
    assert [made.at(step).weigh_by_entropy for step in range(9)] == [True] * 3 + [False] * 6
    assert not Curriculum(CurriculumConfig()).at(0).weigh_by_entropy  # ours, so it is off


def test_warmup_is_plain_distillation_and_routing_fades_in():
    routed = {"distill": 0.25, "policy": 0.5, "rebellious": 1.0}
    assert Phase("warmup", 0.0).weights(True, **routed) == (1.0, 0.0, 0.0)
    assert Phase("warmup", 0.0).weights(False, 0.0, 1.0, 0.0) == (0.0, 0.0, 0.0)
    assert Phase("transition", 0.5).weights(True, **routed) == (0.625, 0.25, 0.5)
    assert Phase("both", 1.0).weights(True, **routed) == (0.25, 0.5, 1.0)


def test_none_at_all():
    made = Curriculum(CurriculumConfig(warmup_steps=0, transition_steps=0))
    assert made.at(0) == Phase("both", 1.0)
    with pytest.raises(ValueError, match="step is -1; steps must count from 0"):
        made.at(-1)


def run(made, rates, start=0):
    """The phase at each step, with those rates observed."""
    names = []
    for step, rate in enumerate(rates, start):
        names.append(made.at(step).name)
        made.observe(rate)
    return names


RISING = [0.1, 0.2, 0.3, 0.4]


def test_warmup_ends_at_a_plateau_or_at_its_last_step():
    config = CurriculumConfig(warmup_steps=9, transition_steps=1, plateau=PlateauConfig(window=2, least_gain=0.05))
    made = Curriculum(config)
    # windows end at steps 3 (gain 0.2), 4 (0.15), 5 (0.05) and 6 (0.0)
    assert run(made, [*RISING, 0.4, 0.4, 0.4, 0.4, 0.4]) == ["warmup"] * 7 + ["transition", "both"]
    assert made.transition_end == 8
    never = Curriculum(config)
    assert run(never, [number / 10 for number in range(11)]) == ["warmup"] * 9 + ["transition", "both"]
    with pytest.raises(ValidationError, match=r"warmup_steps 4 must exceed twice plateau\.window 2"):
        CurriculumConfig(warmup_steps=4, plateau=PlateauConfig(window=2))


def test_a_plateau_is_found_at_the_same_step_after_a_restart():
    config = CurriculumConfig(warmup_steps=9, transition_steps=1, plateau=PlateauConfig(window=2, least_gain=0.05))
    made = Curriculum(config)
    run(made, RISING)
    for stop in ([0.4, 0.4, 0.4, 0.4], []):
        again = Curriculum(config)
        again.load_state_dict(json.loads(json.dumps(made.state_dict())))
        assert again.metrics() == made.metrics()
        assert run(again, stop, start=4) == ["warmup", "warmup", "warmup", "transition"][: len(stop)]


def test_state():
    made = Curriculum(CurriculumConfig(warmup_steps=1, transition_steps=2))
    assert made.metrics() == {"phase": 0, "routing": 0.0}
    made.at(2)
    again = Curriculum(made.config)
    again.load_state_dict(made.state_dict())
    assert again.metrics() == {"phase": 1, "routing": 0.5}
    again.at(3)
    assert again.metrics()["phase"] == 2


def test_the_example_runs():
    assert doctest.testmod(curriculum) == doctest.TestResults(failed=0, attempted=4)
