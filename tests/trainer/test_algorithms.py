"""The table names only what there is."""

import doctest
import typing

import drift_kernels
from drift.config import algorithms
from drift.config.algorithms import ALGORITHMS
from drift.config.online import RouterConfig, TeacherConfig
from drift.routing import DifficultyRouter


def test_every_part_is_one_there_is():
    teachers = typing.get_args(TeacherConfig.model_fields["weights"].annotation)
    for name, algorithm in ALGORITHMS.items():
        if algorithm.policy is not None:
            drift_kernels.PolicySpec.preset(algorithm.policy)
        if algorithm.routing is not None:
            RouterConfig(mode=algorithm.routing)
        assert algorithm.teacher in (None, *teachers), name
        assert (algorithm.data == "online") == (algorithm.routing is not None), name


def test_a_teacher_is_there_where_the_routing_can_use_one():
    for name, algorithm in ALGORITHMS.items():
        if algorithm.routing is not None:
            router = DifficultyRouter(RouterConfig(mode=algorithm.routing))
            routes = router.update(["p"] * 3, [False] * 3, [True] * 3, 0)
            assert (float(routes.distill[0]) > 0) == (algorithm.teacher is not None), name


def test_the_example_runs():
    assert doctest.testmod(algorithms) == doctest.TestResults(failed=0, attempted=3)
