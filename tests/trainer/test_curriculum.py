"""Phases and weights of the curriculum."""

import doctest

import pytest

from drift.online import curriculum
from drift.online.curriculum import Curriculum, CurriculumConfig, Phase


def test_phases():
    made = Curriculum(CurriculumConfig(warmup_steps=3, transition_steps=4))
    assert made.transition_end == 7
    assert [made.at(step).name for step in range(9)] == ["warmup"] * 3 + ["transition"] * 4 + ["both"] * 2
    assert [made.at(step).policy for step in range(9)] == [0, 0, 0, 0, 0.25, 0.5, 0.75, 1, 1]
    assert all(made.at(step).distill == 1 for step in range(9))
    assert [made.at(step).entropy_driven for step in range(9)] == [True] * 3 + [False] * 6


def test_none_at_all():
    made = Curriculum(CurriculumConfig(warmup_steps=0, transition_steps=0))
    assert made.at(0) == Phase("both", 1.0, 1.0, False)
    assert not Curriculum(CurriculumConfig(entropy_driven=False)).at(0).entropy_driven
    with pytest.raises(ValueError, match="step is -1; steps count from 0"):
        made.at(-1)


def test_state():
    made = Curriculum(CurriculumConfig(warmup_steps=1, transition_steps=2))
    assert made.metrics() == {"phase": 0, "policy": 0.0, "distill": 1.0}
    made.at(2)
    again = Curriculum(made.config)
    again.load_state_dict(made.state_dict())
    assert again.metrics() == {"phase": 1, "policy": 0.5, "distill": 1.0}
    again.at(3)
    assert again.metrics()["phase"] == 2


def test_the_example_runs():
    assert doctest.testmod(curriculum) == doctest.TestResults(failed=0, attempted=4)
