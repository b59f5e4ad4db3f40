"""The router against its published definition, written out again over each problem's whole history."""

import doctest
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from drift import routing
from drift.config.online import ROUTES
from drift.routing import DifficultyRouter, RouterConfig


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


class Published:
    """Counts are summed anew from all that was ever seen, each outcome faded by the steps since: no running state."""

    def __init__(self, every=0, start=0):
        self.seen, self.every, self.start = [], every, start  # (problem, step, correct)

    def period(self, step):
        return max(step + 1 - self.start, 0) // self.every if self.every else 0

    def batch(self, problems, correct, taught, step, binary=True):
        latest = max((at for _, at, _ in self.seen), default=step)
        if self.period(step) > self.period(latest):
            self.seen = []
        for problem, right in zip(problems, correct):
            known = [at for name, at, _ in self.seen if name == problem]
            self.seen.append((problem, max([step, *known]), right))
        rows = []
        for problem, right, teacher in zip(problems, correct, taught):
            mine = [(at, r) for name, at, r in self.seen if name == problem]
            now = max(at for at, _ in mine)
            success = sum(0.85 ** (now - at) for at, r in mine if r)
            failure = sum(0.85 ** (now - at) for at, r in mine if not r)
            n = success + failure
            c = n / (n + 8)
            p = c * (success + 1) / (success + failure + 2) + (1 - c) * 0.5
            hard, easy = sigmoid((0.3 - p) / 0.08), sigmoid((p - 0.7) / 0.08)
            medium = (1 - hard) * (1 - easy)
            total = hard + easy + medium
            hard, easy, medium = hard / total, easy / total, medium / total
            distill = teacher * (not right) * (0.35 * easy + 0 * medium + 1.0 * hard)
            if not binary:
                distill += teacher * right * 0.7 * hard
            policy = right * (0.05 * easy + 1.0 * medium + 0.3 * hard) if teacher else 1
            rows.append((distill, policy, teacher * right * medium, p))
        return rows


samples = st.lists(st.tuples(st.sampled_from("abc"), st.booleans(), st.booleans()), min_size=1, max_size=8)
histories = st.lists(st.tuples(st.integers(-2, 9), samples), min_size=1, max_size=12)


def columns(routes):
    return torch.stack([routes.distill, routes.policy, routes.rebellious, routes.pass_rate], 1)


@settings(max_examples=150, deadline=None)
@given(histories, st.booleans(), st.sampled_from([0, 1, 4]), st.integers(0, 6))
def test_routes_are_the_published_ones(history, binary, every, start):
    """Over gaps, steps that go back, resets, and a state that went through JSON on the way."""
    router = DifficultyRouter(RouterConfig(binary_routing=binary, reset_every=every), transition_end=start)
    published, step = Published(every, start), 5
    for gap, batch in history:
        step = max(step + gap, 0)
        problems, correct, taught = zip(*batch)
        routes = router.update(problems, correct, taught, step)
        expected = torch.tensor(published.batch(problems, correct, taught, step, binary), dtype=torch.float32)
        torch.testing.assert_close(columns(routes), expected, rtol=1e-5, atol=1e-7)
        state = json.loads(json.dumps(router.state_dict()))
        assert state == router.state_dict()
        router = DifficultyRouter(router.config, transition_end=start)
        router.load_state_dict(state)


def test_routes_are_fp32_one_a_sample():
    routes = DifficultyRouter(RouterConfig()).update(["a", "b"], [True, False], [True, True], 0)
    assert columns(routes).shape == (2, 4)
    assert all(t.dtype == torch.float32 for t in (routes.distill, routes.policy, routes.rebellious, routes.pass_rate))
    empty = DifficultyRouter(RouterConfig()).update([], [], [], 0)
    assert columns(empty).shape == (0, 4)


@pytest.mark.parametrize("mode", ["sdpo", "grpo", "srpo"])
def test_baselines(mode):
    """By correctness and teacher alone, exactly, whatever the problem's difficulty."""
    router = DifficultyRouter(RouterConfig(mode=mode))
    for step in range(12):  # "easy" grows easy and "hard" hard
        problems = ["easy", "hard", "mid", "mid"] * 2
        correct = [True, False, True, False] * 2
        taught = [True] * 4 + [False] * 4
        routes = router.update(problems, correct, taught, step)
        for i, (right, teacher) in enumerate(zip(correct, taught)):
            distill, policy = {
                "sdpo": (float(teacher), 0.0),
                "grpo": (0.0, 1.0),
                "srpo": (float(teacher and not right), float(right or not teacher)),
            }[mode]
            assert (routes.distill[i], routes.policy[i], routes.rebellious[i]) == (distill, policy, 0.0)
    assert routes.pass_rate[0] > 0.7 > 0.3 > routes.pass_rate[1]


def test_a_mode_is_a_table_and_does_not_take_other_numbers():
    assert set(ROUTES) == {"drift", "sdpo", "grpo", "srpo"}
    assert RouterConfig(mode="drift", policy_untaught=0.5).policy_untaught == 0.5
    assert RouterConfig(**RouterConfig(mode="sdpo").model_dump(mode="json")) == RouterConfig(mode="sdpo")
    with pytest.raises(ValidationError, match=r"policy_untaught 1\.0 contradicts mode sdpo, which sets it to 0\.0"):
        RouterConfig(mode="sdpo", policy_untaught=1.0)
    with pytest.raises(ValidationError, match=r"hard_below 0\.7 should be below easy_above 0\.7"):
        RouterConfig(hard_below=0.7)


def test_rebellious_terms_of_easy_and_hard_problems_can_be_enabled():
    router = DifficultyRouter(RouterConfig(rebellious=(0.5, 1.0, 0.25)))
    routes = router.update(["a"], [True], [True], 0)
    easy, medium, hard = routing.gates(float(routes.pass_rate[0]), router.config)
    assert float(routes.rebellious[0]) == pytest.approx(0.5 * easy + medium + 0.25 * hard, rel=1e-6)


def test_gates_of_sharp_temperatures_stay_finite():
    assert routing.gates(1.0, RouterConfig(temperature=1e-6)) == (1.0, 0.0, 0.0)
    assert routing.gates(0.0, RouterConfig(temperature=1e-6)) == (0.0, 0.0, 1.0)
    assert routing.gates(0.5, RouterConfig(temperature=1e-6)) == (0.0, 1.0, 0.0)


def test_lengths_that_differ_are_refused():
    with pytest.raises(ValueError, match="problem_ids has 2 items, correct 1 and has_teacher 2"):
        DifficultyRouter(RouterConfig()).update(["a", "b"], [True], [True, False], 0)


def test_metrics_say_what_was_routed():
    router = DifficultyRouter(RouterConfig(reset_every=5))
    routes = router.update(["a", "a", "b", "b"], [True, False, False, False], [True, True, True, False], 3)
    measured = router.metrics()
    assert (measured["problems"], measured["teacher"], measured["correct"]) == (2, 0.75, 0.25)
    assert measured["policy_weight"] == pytest.approx(float(routes.policy.mean()))
    assert (measured["policy_share"], measured["distill_share"], measured["rebellious_share"]) == (0.5, 0.5, 0.25)
    assert measured["easy"] + measured["medium"] + measured["hard"] == pytest.approx(1.0)
    assert measured["right_taught"] == 1.0
    assert {name for name in measured if name.startswith("right_policy")} == {"right_policy_medium"}
    assert measured["right_policy_medium"] == float(routes.policy[0]) < 1
    router.update(["b"], [True], [True], 4)  # the fifth step, as they are counted from 1
    assert (router.metrics()["problems"], router.metrics()["resets"]) == (1, 1)


def test_the_example_runs():
    assert doctest.testmod(routing) == doctest.TestResults(failed=0, attempted=5)
