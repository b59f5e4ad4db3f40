"""pytest-benchmark over small problems: `pytest bench --benchmark-only`. Groups are cases; `bench.report` does real sizes."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from bench import verify
from bench.cases import CASES, Problem, make
from bench.measure import OURS
from bench.peers import CONTENDERS

pytest.importorskip("pytest_benchmark", reason="pip install -e .[bench]")
pytestmark = pytest.mark.filterwarnings("default")  # other projects' deprecations are no result

NAMES = [name for name, contender in CONTENDERS.items() if not contender.once]


@cache
def judged(case: str) -> tuple[Problem, verify.Result, verify.Result]:
    """A problem an eighth of the report's or less, with what torch and float64 make of it."""
    problem = make(replace(CASES[case], length=CASES[case].length // 4, V=8192, D=512))
    return problem, verify.own(problem), verify.exact(problem)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES)
def test_forward_and_backward(benchmark, case, name):
    contender = CONTENDERS[name]
    if reason := contender.refuses(CASES[case]):
        pytest.skip(reason)
    try:
        loss = contender.load()
    except ImportError as error:
        pytest.skip(f"not installed: {error}")
    problem, plain, truth = judged(case)
    slack = verify.HALF_SLACK if "bf16" in case and name != OURS else 1.0
    outcome = verify.result(problem, verify.step(problem, loss))
    passed, why = verify.check(outcome, plain, truth, problem.case.dtype, slack)
    assert passed, why  # nothing wrong is timed
    benchmark.group = case
    benchmark.extra_info["units"] = contender.units(problem.case, problem.shares())
    benchmark.pedantic(verify.step, args=(problem, loss), rounds=3)
