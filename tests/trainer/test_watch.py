"""pass@k against enumeration, and when a training is said to look collapsed."""

import doctest
import itertools
import json
import math

import pytest

from drift.online import watch
from drift.online.watch import SIGNS, Watch, WatchConfig, pass_at, pass_at_k


@pytest.mark.parametrize(("n", "c"), [(1, 0), (1, 1), (4, 0), (4, 1), (5, 2), (6, 5), (6, 6)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n, c):
    samples = [True] * c + [False] * (n - c)
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(samples, k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_pass_at_k_of_what_cannot_be(n, c, k):
    with pytest.raises(ValueError, match=f"n={n}, c={c}, k={k}"):
        pass_at_k(n, c, k)


def test_groups_are_averaged_and_the_smallest_says_how_far():
    ids = ["a"] * 6 + ["b"] * 6
    right = [True, True, False, False, False, False] + [False] * 6
    found = pass_at(ids, right)
    assert list(found) == [1, 2, 4, 6]
    assert found[1] == pytest.approx(1 / 6)
    assert found[2] == pytest.approx((1 - (4 * 3) / (6 * 5)) / 2)
    assert found[6] == pytest.approx(0.5)
    assert list(pass_at([*ids, "c", "c"], [*right, False, True])) == [1, 2]
    assert list(pass_at(["a"] * 8, [True] * 8)) == [1, 2, 4, 8]
    assert pass_at([], []) == {}


def steps(watching, entropy, repeat, solved, count=1, kl=None):
    """`count` equal steps of ten samples; what was said."""
    ids, right = [f"p{i // 2}" for i in range(10)], [i < round(10 * solved) for i in range(10)]
    said = []
    for _ in range(count):
        said += watching.update(entropy=entropy, repeat_rate=repeat, problem_ids=ids, correct=right, reference_kl=kl)
    return said


def test_each_sign_is_said_when_it_begins_and_only_then():
    made = Watch(WatchConfig(window=3, entropy_below=0.5, repeat_above=0.4, solved_below=0.5))
    assert steps(made, 1.0, 0.1, 0.8, count=3) == []
    assert steps(made, 0.1, 0.1, 0.8, count=1) == []  # the window's mean is 0.7
    [said] = steps(made, 0.1, 0.1, 0.8, count=2)
    assert said == "entropy has fallen to 40% of its start, 0.4 nats from 1"
    assert made.metrics()["low_entropy"] == 1
    assert steps(made, 0.1, 0.1, 0.8) == []
    assert made.metrics()["low_entropy"] == 1
    steps(made, 1.0, 0.1, 0.8, count=3)
    assert made.metrics()["low_entropy"] == 0
    [said] = steps(made, 1.0, 0.9, 0.8, count=3)
    assert said == "63% of the answers repeat an earlier one of their trajectory"
    steps(made, 1.0, 0.0, 0.8, count=3)
    [said] = steps(made, 1.0, 0.0, 0.1, count=3)
    assert said == "solved has fallen to 33.3% from 80.0% at its best"
    steps(made, 1.0, 0.0, 0.8, count=3)
    assert len(steps(made, 0.0, 1.0, 0.0, count=9)) == 3
    assert {name: made.metrics()[name] for name in SIGNS} == dict.fromkeys(SIGNS, 1.0)


def test_entropy_is_held_against_the_first_step_even_where_it_falls_at_once():
    made = Watch(WatchConfig(window=3, entropy_below=0.5))
    steps(made, 1.0, 0.0, 0.5)
    [said] = steps(made, 0.2, 0.0, 0.5, count=2)
    assert said == "entropy has fallen to 47% of its start, 0.467 nats from 1"


def test_a_step_that_is_not_finite_is_no_start():
    made = Watch(WatchConfig(window=2, entropy_below=0.5))
    assert steps(made, math.nan, 0.0, 0.5, count=2) == []
    steps(made, 1.0, 0.0, 0.5, count=2)
    [said] = steps(made, 0.1, 0.0, 0.5, count=2)
    assert said.startswith("entropy has fallen to 10% of its start")


def test_nothing_is_said_before_the_window_is_full_nor_of_what_was_never_there():
    made = Watch(WatchConfig(window=4))
    assert steps(made, 0.0, 1.0, 0.0, count=3) == []
    assert "high_repeat" in made.metrics()
    assert len(steps(made, 0.0, 1.0, 0.0)) == 1  # no entropy to fall from, none solved at the best


def test_the_kl_is_logged_where_it_was_estimated():
    made = Watch(WatchConfig())
    steps(made, 1.0, 0.0, 0.5, kl=0.25)
    assert made.metrics()["reference_kl"] == 0.25
    steps(made, 1.0, 0.0, 0.5)
    assert "reference_kl" not in made.metrics()
    assert made.metrics()["pass_at_1"] == pytest.approx(0.5)


def test_a_resumed_watch_goes_on():
    config = WatchConfig(window=3)
    for cut in range(1, 12):
        whole, half = Watch(config), Watch(config)
        story = [(1.0, 0.1, 0.8)] * 4 + [(0.05, 0.9, 0.1)] * 4 + [(1.0, 0.1, 0.8)] * 4
        expected = [steps(whole, *one) for one in story]
        found = [steps(half, *one) for one in story[:cut]]
        again = Watch(config)
        again.load_state_dict(json.loads(json.dumps(half.state_dict())))
        found += [steps(again, *one) for one in story[cut:]]
        assert found == expected
        assert again.metrics() == whole.metrics()


def test_the_docstring_runs():
    assert doctest.testmod(watch).failed == 0
