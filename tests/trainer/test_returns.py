"""Returns and weights against numbers worked out by hand and against the formulas written the plain way."""

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from drift.config import WeightsConfig
from drift.returns import (
    advantages,
    effective_sample_size,
    importance_weights,
    offpolicy_correction,
    trajectory_return,
    weigh,
    weigh_for_training,
)


def row(rewards, answers=(), penalty=0.0, prompt="p", t_star=None):
    return {
        "prompt_id": prompt,
        "turn_rewards": rewards,
        "answer_norms": list(answers),
        "format_penalty": penalty,
        "t_star": t_star,
    }


@pytest.mark.parametrize(
    ("given_row", "gamma", "repetition", "expected"),
    [
        (row({"t1": 1.0}, ["4"]), 0.9, 0.5, 1.0),
        (row({"t1": 0.0, "t2": 0.0, "t3": 1.0}, ["1", "2", "4"]), 0.9, 0.5, 0.81),
        (row({"t3": 1.0}, ["4"]), 0.9, 0.5, 0.81),  # the number is the key's
        (row({"t3": 1.0, "t1": 0.5}, ["4"]), 0.5, 0.5, 0.75),
        (row({"t1": 0.0, "t2": 1.0, "t3": None, "t4": 0.0, "t5": 0.0}, ["3", "4"]), 0.9, 0.5, 0.9),  # padded
        (row({"t1": 0.0, "t2": 0.0}, ["3", "3"]), 0.9, 0.5, -0.25),
        (row({"t1": 0.0, "t2": 0.0}, [" Ab c", "aB\tC\n"]), 0.9, 0.5, -0.25),  # one answer, normalised
        (row({"t1": 0.0, "t2": 0.0, "t3": 0.0}, ["3", "", " "]), 0.9, 0.6, -0.4),  # empty ones are repetitions
        (row({"t1": 0.0}, [""]), 0.9, 0.5, -0.5),
        (row({"t1": 0.0}, []), 0.9, 0.5, 0.0),  # nothing parsed: no repetition term
        (row({"t1": 0.0, "t2": 0.0}, ["3"], -0.1), 0.9, 0.5, -0.1),
        (row({"t1": 0.0, "t2": 1.0}, ["3", "4"]), 0.0, 0.5, 0.0),
        (row({"t1": 1.0}, ["4"]), 0.0, 0.5, 1.0),
        ({"turn_rewards": {"t1": 1.0}}, 0.9, 0.5, 1.0),
        ({"turn_rewards": {"t1": 1.0}, "trajectory_penalty": -0.2}, 0.9, 0.5, 0.8),
        ({"turn_rewards": {"t1": 1.0}, "trajectory_penalty": -0.2, "format_penalty": -0.1}, 0.9, 0.5, 0.9),
    ],
)
def test_return(given_row, gamma, repetition, expected):
    assert trajectory_return(given_row, gamma, repetition) == pytest.approx(expected, abs=1e-12)


def test_return_defaults_are_the_published_ones():
    assert trajectory_return(row({"t2": 1.0}, ["3", "3"])) == pytest.approx(0.9 - 0.25)


@pytest.mark.parametrize("key", ["t0", "2", "turn2", "t", "t-1", "t01", "T1"])
def test_return_refuses_other_keys(key):
    with pytest.raises(ValueError, match="should be t1, t2"):
        trajectory_return(row({key: 1.0}))


def test_an_empty_entry_would_change_weights_twelvefold():
    """Why `answer_norms` has no entry for an unparsable turn: 0.25 of return is exp(2.5) of weight at β = 0.1."""
    without, with_empty = row({"t2": 1.0}, ["4"]), row({"t2": 1.0}, ["", "4"])
    weights = importance_weights([trajectory_return(without), trajectory_return(with_empty)], 0.1)
    assert weights[0] / weights[1] == pytest.approx(math.exp(2.5), rel=1e-9)


returns_lists = st.lists(st.floats(-5, 5), min_size=1, max_size=32)


@given(returns_lists, st.floats(0.05, 10))
def test_weights_are_a_scaled_softmax(returns, beta):
    weights = importance_weights(returns, beta)
    best = max(returns)
    total = sum(math.exp((value - best) / beta) for value in returns)
    for value, weight in zip(returns, weights):
        assert weight == pytest.approx(len(returns) * math.exp((value - best) / beta) / total, rel=1e-9, abs=1e-12)
    assert math.fsum(weights) == pytest.approx(len(returns), rel=1e-9)


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=8), st.floats(1e-308, 1e308))
@example([0.0, 1e308, -1e308], 5e-324)
@example([1e308, -1e308], 1e308)
def test_weights_stay_finite(returns, beta):
    weights = importance_weights(returns, beta)
    assert all(math.isfinite(weight) and 0 <= weight <= len(returns) * (1 + 1e-9) for weight in weights)
    assert math.fsum(weights) == pytest.approx(len(returns), rel=1e-9)


def test_small_beta_takes_the_best_alone():
    assert importance_weights([0.0, 1.0, 0.5, 1.0], 1e-3) == pytest.approx([0.0, 2.0, 0.0, 2.0])
    for beta in (1e-300, 1e-3, 0.0125, 0.01149, 0.011):  # a weight is 0, or one that float32 holds
        weights = importance_weights([1.0, *(n / 50 for n in range(50))], beta)
        assert all(weight == 0 or weight >= float(np.finfo(np.float32).tiny) for weight in weights)
        assert weights[0] > 0


@pytest.mark.parametrize("beta", [0.0, -0.1, math.nan])
def test_beta_should_be_positive(beta):
    with pytest.raises(ValueError, match=r"beta is .* greater than 0"):
        importance_weights([1.0], beta)


def test_returns_should_be_finite():
    with pytest.raises(ValueError, match="should be finite"):
        importance_weights([1.0, math.nan])
    assert importance_weights([]) == []


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([1, 1, 1, 1], 4.0),
        ([0, 3, 0], 1.0),
        ([1, 2], 9 / 5),
        ([], 0.0),
        ([0, 0], 0.0),
        ([1e300, 1e300], 2.0),
        ([1e-300], 1.0),
    ],
)
def test_effective_sample_size(weights, expected):
    assert effective_sample_size(weights) == pytest.approx(expected)


ROWS = [
    row({"t1": 1.0}, ["4"], prompt="a", t_star=1),
    row({"t1": 0.0, "t2": 0.0}, ["3", "3"], prompt="b"),
    row({"t1": 0.0, "t2": 1.0}, ["3", "4"], prompt="a", t_star=2),
    row({"t1": 0.0, "t2": 0.0}, ["3", "5"], prompt="b"),
    row({"t1": 0.0, "t2": 0.0}, ["3"], -0.1, prompt="a"),
]


def test_weigh_groups_by_prompt_and_keeps_order():
    weights, stats = weigh(ROWS, WeightsConfig())
    a, b = importance_weights([1.0, 0.9, -0.1], 0.1), importance_weights([-0.25, 0.0], 0.1)
    assert weights == pytest.approx([a[0], b[0], a[1], b[1], a[2]])
    assert stats["ess_mean"] == pytest.approx((effective_sample_size(a) / 3 + effective_sample_size(b) / 2) / 2)
    assert stats["ess_overall"] == pytest.approx(effective_sample_size([*a, *b]) / 5)
    assert stats["unsolved_share"] == 0.5
    assert (stats["skipped_rows"], stats["dropped_rows"], stats["dropped_weight_share"]) == (0, 0, 0.0)


def test_weigh_uses_all_of_its_settings():
    weights, _ = weigh(ROWS[:3:2], WeightsConfig(beta=1.0, gamma=0.5, repetition=0.0))
    assert weights == pytest.approx(importance_weights([1.0, 0.5], 1.0))
    weights, _ = weigh([ROWS[1], ROWS[3]], WeightsConfig(beta=1.0, repetition=2.0))
    assert weights == pytest.approx(importance_weights([-1.0, 0.0], 1.0))


def test_weigh_skips_unsolved_groups_on_request():
    weights, stats = weigh(ROWS, WeightsConfig(skip_unsolved_groups=True))
    plain, _ = weigh(ROWS, WeightsConfig())
    assert weights == [plain[0], 0.0, plain[2], 0.0, plain[4]]
    assert (stats["unsolved_share"], stats["skipped_rows"], stats["dropped_rows"]) == (0.5, 2, 0)
    assert stats["ess_overall"] == pytest.approx(effective_sample_size([plain[0], plain[2], plain[4]]) / 3)
    weights, stats = weigh([ROWS[1]], WeightsConfig(skip_unsolved_groups=True))
    assert (weights, stats["ess_mean"], stats["unsolved_share"]) == ([0.0], 0.0, 1.0)


def test_a_training_leaves_out_the_rows_of_skipped_groups():
    plain, stats = weigh(ROWS, WeightsConfig())
    assert weigh_for_training(ROWS, WeightsConfig()) == (plain, stats)
    skipping = WeightsConfig(skip_unsolved_groups=True)
    weights, stats = weigh_for_training(ROWS, skipping)
    assert weights == [plain[0], None, plain[2], None, plain[4]]
    assert stats == weigh(ROWS, skipping)[1]
    with pytest.raises(ValueError, match=r"none of 2 rows to train on.*skip_unsolved_groups=false"):
        weigh_for_training([ROWS[1], ROWS[3]], skipping)


def test_min_weight_is_counted_and_leaves_weights_as_they_are():
    plain, before = weigh(ROWS, WeightsConfig())
    weights, stats = weigh(ROWS, WeightsConfig(min_weight=0.5))
    assert weights == plain  # the packer drops them; denominators count them
    dropped = [weight for weight in plain if weight < 0.5]
    assert 0 < len(dropped) == stats["dropped_rows"] < len(ROWS)
    assert stats["dropped_weight_share"] == pytest.approx(sum(dropped) / len(ROWS))
    assert {**stats, "dropped_rows": 0, "dropped_weight_share": 0.0} == before
    _, at_the_edge = weigh(ROWS, WeightsConfig(min_weight=min(plain)))
    assert at_the_edge["dropped_rows"] == 0


def test_weigh_refuses_nothing():
    with pytest.raises(ValueError, match="rows is empty"):
        weigh([], WeightsConfig())


def test_offpolicy_correction_multiplies_the_weights():
    log_ratios, stats = offpolicy_correction([-3.0, -2.0, -10.0], [-3.5, -2.0, -1.0], clip=2.0)
    assert log_ratios == [0.5, 0.0, -2.0]
    assert stats == {"offpolicy_log_ratio": pytest.approx(-8.5 / 3), "offpolicy_clipped_share": pytest.approx(1 / 3)}
    rows = [ROWS[0], ROWS[2], ROWS[4]]
    weights, _ = weigh(rows, WeightsConfig(), log_ratios)
    plain, _ = weigh(rows, WeightsConfig())
    raw = [weight * math.exp(ratio) for weight, ratio in zip(plain, log_ratios)]
    assert weights == pytest.approx([3 * value / sum(raw) for value in raw])
    with pytest.raises(ValueError, match="clip is 0"):
        offpolicy_correction([], [], clip=0)
    with pytest.raises(ValueError, match="1 ref_logprobs for 2"):
        offpolicy_correction([0.0], [0.0, 0.0], clip=1.0)


def test_returns_that_are_equal_in_real_numbers_have_no_advantage():
    """-0.1·3 and -0.3, 0.1 + 0.2 and 0.3, terms that cancel: a group of them has no spread, whatever the last bits say."""
    for group in ([-0.1 * 3, -0.3], [0.1 + 0.2, 0.3, 0.3], [0.3 - 0.1 * 3, 0.0], [1e6 * 0.1 * 3, 1e6 * 0.3 + 1e-10]):
        assert len({*group}) > 1
        for scale in (True, False):
            assert advantages(group, scale) == [0.0] * len(group)
        assert importance_weights(group, 1e-16) == pytest.approx([1.0] * len(group))
    assert advantages([0.1 + 0.2, 0.3, 1.0], False)[0] == advantages([0.1 + 0.2, 0.3, 1.0], False)[1]


def test_small_differences_between_returns_count():
    assert advantages([0.0, 1e-9], True) == pytest.approx([-1.0, 1.0])
    assert advantages([1.0, 1.0 + 1e-9], True) == pytest.approx([-1.0, 1.0])
    assert advantages([], True) == []
    assert advantages([0.7], True) == [0.0]
