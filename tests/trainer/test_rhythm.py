"""Gate, bonus and rhythm weight, element by element in plain Python floats."""

import doctest
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drift import rhythm
from drift.rhythm import StepMean, difference, entropy_weight, rebellious_weight, rhythm_gate, rhythm_weight

entropies = st.floats(0, 6, width=32)
logprobs = st.floats(-20, 0, width=32)


@st.composite
def packs(draw):
    """Turns of random lengths with gaps between some of them; (student H, teacher H, mask, turn ids)."""
    mask, turns = [], []
    for number in range(draw(st.integers(0, 4))):
        gap, length = draw(st.integers(0, 2)), draw(st.integers(1, 5))
        mask += [False] * gap + [True] * length
        turns += [-1] * gap + [number] * length
    knocked = draw(st.integers(0, 2 ** len(mask) - 1)) if draw(st.booleans()) else 0  # not taught, inside their turns
    mask = [inside and not knocked >> t & 1 for t, inside in enumerate(mask)]
    mask, turns = [*mask, False], [*turns, -1]
    lists = st.lists(entropies, min_size=len(mask), max_size=len(mask))
    return draw(lists), draw(lists), mask, turns


def by_hand(student, teacher, mask, turns):
    found = []
    for t in range(len(mask)):
        inside = t > 0 and mask[t] and mask[t - 1] and turns[t] == turns[t - 1]
        collapse = [max(h[t - 1] - h[t], 0.0) if inside else 0.0 for h in (student, teacher)]
        found.append(abs(collapse[0] - collapse[1]))
    return found


@settings(max_examples=150, deadline=None)
@given(packs(), st.floats(0, 3), st.floats(1.5, 4))
def test_rhythm_weight(pack, mean, maximum):
    d = by_hand(*pack)
    tensors = [torch.tensor(values) for values in pack]
    expected = [1 + (maximum - 1) * (1 - math.exp(-x / max(mean, 1e-3))) for x in d]
    torch.testing.assert_close(difference(*tensors), torch.tensor(d), rtol=1e-5, atol=2e-6)
    weight = rhythm_weight(*tensors, mean, maximum)
    # a difference of 1e-6 nats is rounding, and a mean of 1e-3 makes it a thousandth
    torch.testing.assert_close(weight, torch.tensor(expected), rtol=1e-4, atol=4e-3 * maximum)
    assert torch.equal(weight, rhythm_weight(*tensors, torch.tensor(mean), maximum))
    assert all(weight[t] == 1 for t in range(len(d)) if not pack[2][t])


def test_rhythm_weight_where_it_is_exact():
    student, teacher = torch.tensor([3.0, 1.0, 1.5, 0.5, 2.0]), torch.tensor([3.0, 2.5, 0.5, 0.0, 0.0])
    mask, turns = torch.ones(5, dtype=torch.bool), torch.tensor([0, 0, 0, 1, 1])
    #            first  2 v .5  0 v 2  first of turn 1  0 v 0
    expected = [0.0, 1.5, 2.0, 0.0, 0.0]
    assert difference(student, teacher, mask, turns).tolist() == expected
    weight = rhythm_weight(student, teacher, mask, turns, 0.5, 3.0)
    assert weight.tolist() == pytest.approx([1 + 2 * (1 - math.exp(-d / 0.5)) for d in expected])
    two = [torch.stack([values, values]) for values in (student, teacher, mask, turns)]
    assert torch.equal(rhythm_weight(*two, 0.5, 3.0), torch.stack([weight, weight]))


def test_without_a_step_before_no_gate_opens():
    student, teacher = torch.tensor([3.0, 0.0]), torch.tensor([3.0, 3.0])
    mask, turns = torch.ones(2, dtype=torch.bool), torch.zeros(2)
    assert rhythm_weight(student, teacher, mask, turns, StepMean().value).tolist() == [1.0, 1.0]
    tiny = rhythm_weight(torch.tensor([1e-5, 0.0]), torch.zeros(2), mask, turns, 0.0)
    assert float(tiny[1]) == pytest.approx(1 + 1e-2, rel=1e-3)  # noise against a mean of at least 1e-3


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.floats(0.5, 4, width=32), min_size=1, max_size=6),
    st.floats(1.1, 4),
    st.floats(0, 1),
    st.floats(0.25, 4),
    st.integers(0, 63),
)
def test_gate(weights, maximum, floor, power, bits):
    mask = [bool(bits >> i & 1) for i in range(len(weights))]
    expected = []
    for weight, inside in zip(weights, mask):
        g = min(max((weight - 1) / (maximum - 1), 0), 1) ** power
        expected.append((floor + (1 - floor) * g) if inside else 0.0)
    gate = rhythm_gate(torch.tensor(weights), maximum, floor, power, torch.tensor(mask))
    torch.testing.assert_close(gate, torch.tensor(expected), rtol=1e-4, atol=1e-3)  # a power below 1 is steep at 0
    everywhere = rhythm_gate(torch.tensor(weights), maximum, floor, power)
    assert torch.equal(torch.where(torch.tensor(mask), everywhere, 0.0), gate)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(logprobs, logprobs, st.floats(0, 1), st.floats(0, 1), st.booleans()), min_size=1, max_size=6),
    st.floats(0, 1),
    st.floats(0, 3),
    st.floats(1, 5),
)
def test_bonus(tokens, margin, gamma, maximum):
    expected, plain = [], []
    for student, teacher, sample, gate, inside in tokens:
        delta = max(student - teacher - margin, 0.0)
        bonus = min(max(math.exp(gamma * delta), 1.0), maximum)
        expected.append(1 + sample * (bonus - 1) * gate if inside else 1.0)
        plain.append(1 + sample * (bonus - 1))
    student, teacher, sample, gate, mask = (torch.tensor(values) for values in zip(*tokens))
    weight = rebellious_weight(student, teacher, sample, gate, margin, gamma, maximum, mask)
    torch.testing.assert_close(weight, torch.tensor(expected), rtol=1e-4, atol=1e-4)
    ungated = rebellious_weight(student, teacher, sample, margin=margin, gamma=gamma, maximum=maximum)
    torch.testing.assert_close(ungated, torch.tensor(plain), rtol=1e-4, atol=1e-4)


def test_defaults_are_the_published_ones():
    student, teacher, one = torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([-1.1, -1.7, -9.0]), torch.ones(3)
    assert rebellious_weight(student, teacher, one).tolist() == pytest.approx([1.0, math.exp(0.5), 2.0])
    assert rhythm_gate(torch.tensor([1.0, 1.25, 2.0])).tolist() == [0.0, 0.25, 1.0]


def test_no_gradient_and_float32_whatever_comes_in():
    student = torch.tensor([-1.0, -0.5], requires_grad=True)
    weight = rebellious_weight(student, torch.tensor([-3.0, -4.0]), torch.ones(2))
    assert not weight.requires_grad
    half = torch.tensor([2.0, 0.5], dtype=torch.bfloat16)
    mask, turns = torch.ones(2, dtype=torch.bool), torch.zeros(2)
    assert rhythm_weight(half, half, mask, turns, 0.1).dtype == torch.float32
    assert rhythm_gate(half).dtype == rebellious_weight(half, half, torch.ones(2)).dtype == torch.float32
    far = rebellious_weight(torch.tensor([0.0]), torch.tensor([-math.inf]), torch.ones(1))
    assert far.tolist() == [2.0]
    with pytest.raises(ValueError, match=r"maximum is 1\.0; it should be greater than 1"):
        rhythm_gate(half, maximum=1.0)


def test_entropy_weight():
    entropy, mask = torch.tensor([0.5, 1.0, 4.0]), torch.tensor([True, True, False])
    assert entropy_weight(entropy, 2.0, mask).tolist() == [0.25, 0.5, 0.0]
    assert entropy_weight(entropy, 0.0).tolist() == pytest.approx([500.0, 1000.0, 4000.0])
    assert entropy_weight(entropy, None, mask).tolist() == [1.0, 1.0, 0.0]


def test_mean_over_the_previous_step():
    mean = StepMean()
    assert (mean.value, mean.metrics()) == (None, {})
    mean.add(torch.tensor([1.0, 5.0, math.nan]), torch.tensor([True, True, False]))
    mean.add(torch.tensor([9.0]), torch.tensor([True]))
    assert mean.value is None  # of this step nothing is known yet
    mean.advance()
    assert mean.value == 5.0
    mean.add(torch.tensor([1.0]), torch.tensor([True]))
    mean.advance(reduce=lambda total, count: [total + 8.0, count + 2.0])  # another rank had two tokens
    assert mean.value == 3.0
    mean.advance()
    assert mean.value == 3.0  # no tokens: as before
    for bad in (math.nan, math.inf):  # the step is skipped, and must not spoil the next one
        mean.add(torch.tensor([bad, 1.0]), torch.tensor([True, True]))
        mean.advance()
        assert mean.value == 3.0
    again = StepMean()
    again.load_state_dict(mean.state_dict())
    assert again.metrics() == {"mean": 3.0}
    again.add(torch.zeros(4), torch.ones(4, dtype=torch.bool))
    again.advance()
    assert again.value == 1e-3


def test_the_example_runs():
    assert doctest.testmod(rhythm) == doctest.TestResults(failed=0, attempted=10)
