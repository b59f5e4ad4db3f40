"""The success buffer against a brute-force model that keeps everything in one list and sorts it each time."""

import doctest
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drift import buffer
from drift.buffer import BufferConfig, Entry, SuccessBuffer


class BruteForce:
    """One flat list of [arrival of the problem, arrival, problem, text, score, step]."""

    def __init__(self, config):
        self.config, self.rows, self.clock = config, [], 0

    def key(self, row):
        score, step = row[4], row[5]
        return (step, score) if self.config.prefer_recent else (score, step)

    def of(self, problem):
        return sorted((r for r in self.rows if r[2] == problem), key=lambda r: (*(-k for k in self.key(r)), r[1]))

    def add(self, problem, text, score, step):
        self.clock += 1
        if self.config.min_score is not None and score < self.config.min_score:
            return False
        came = next((r[0] for r in self.rows if r[2] == problem), self.clock)
        for row in self.of(problem):
            if row[3] == text:
                if not (score > row[4] or step > row[5]):
                    return False
                self.rows.remove(row)
        new = [came, self.clock, problem, text, score, step]
        self.rows.append(new)
        for row in self.of(problem)[self.config.entries :]:
            self.rows.remove(row)
        names = {r[2] for r in self.rows}
        if len(names) > self.config.problems:
            worst = min(names, key=lambda name: (self.key(self.of(name)[0]), -self.of(name)[0][0]))
            self.rows = [r for r in self.rows if r[2] != worst]
        return new in self.rows

    def shown(self, problem, k, exclude):
        return [(r[3], r[4], r[5]) for r in self.of(problem) if r[3] != exclude][:k]


offers = st.lists(
    st.tuples(
        st.sampled_from("abcdef"),
        st.sampled_from(["u", "v", "w", "x"]),
        st.sampled_from([0, 1, 1, 2]),
        st.integers(0, 4),
    ),
    max_size=40,
)


@settings(max_examples=300, deadline=None)
@given(offers, st.integers(1, 4), st.integers(1, 3), st.booleans(), st.sampled_from([None, 1.0]), st.integers(0, 40))
def test_buffer_is_the_brute_force_one(offers, problems, entries, recent, low, restart):
    """Ties, duplicates, eviction, and a restart through JSON somewhere on the way."""
    config = BufferConfig(problems=problems, entries=entries, prefer_recent=recent, min_score=low)
    ours, model = SuccessBuffer(config), BruteForce(config)
    for number, (problem, text, score, step) in enumerate(offers):
        if number == restart:
            state = json.loads(json.dumps(ours.state_dict()))
            assert state == ours.state_dict()
            ours = SuccessBuffer(config)
            ours.load_state_dict(state)
        assert ours.add(problem, text, score, step) == model.add(problem, text, score, step)
        for name in "abcdef":
            for exclude in (None, "v"):
                got = ours.demonstrations(name, 2, exclude)
                assert [(e.text, e.score, e.step) for e in got] == model.shown(name, 2, exclude)
    assert len(ours) == len({row[2] for row in model.rows}) == ours.metrics()["problems"]
    assert ours.metrics()["entries"] == len(model.rows)


def test_defaults_are_the_published_ones():
    config = BufferConfig()
    assert (config.problems, config.entries, config.prefer_recent, config.min_score) == (50_000, 4, False, None)


def test_the_heap_stays_small_however_often_best_entries_change():
    full = SuccessBuffer(BufferConfig(problems=10))
    for step in range(20_000):
        full.add(f"p{step % 10}", "same", 1.0, step)
    assert len(full._heap) <= 2 * 10 + 1024 + 1
    assert full.add("new", "t", 2.0, 0)
    assert len(full) == 10
    assert full.demonstrations("p0", 1) == []  # the oldest best entry of equal scores


def test_a_problem_whose_best_entry_got_worse_is_evicted_by_what_it_is_now():
    full = SuccessBuffer(BufferConfig(problems=2))
    full.add("a", "t", 9.0, 0)
    full.add("b", "t", 5.0, 0)
    full.add("a", "t", 1.0, 1)  # newer, so it replaces
    full.add("c", "t", 3.0, 0)
    assert [full.demonstrations(name, 1) != [] for name in "abc"] == [False, True, True]


def test_derivations_of_one_answer_are_entries_of_their_own():
    made = SuccessBuffer(BufferConfig())
    texts = [f"<think>{number}</think>15" for number in range(4)]
    assert made.add_batch([("p", Entry(text, 1.0, 0)) for text in texts]) == [True] * 4
    assert [entry.text for entry in made.demonstrations("p", 4)] == texts
    assert [entry.text for entry in made.demonstrations("p", 4, exclude=texts[1])] == [texts[0], *texts[2:]]
    assert not made.add("p", texts[2], 1.0, 0)  # the same raw text, no better and no newer
    assert made.add("p", texts[2], 1.0, 1)
    assert [entry.step for entry in made.demonstrations("p", 4)] == [1, 0, 0, 0]
    assert not made.add("q", " ", 1.0, 0)


def test_entries_keep_their_entropy_and_are_served_by_it_when_asked():
    made = SuccessBuffer(BufferConfig())
    for text, entropy in (("a", 0.5), ("b", None), ("c", 0.75)):
        made.add("p", text, 1.0, 0, entropy)
    again = SuccessBuffer(BufferConfig())
    again.load_state_dict(json.loads(json.dumps(made.state_dict())))
    for one in (made, again):
        assert [entry.text for entry in one.demonstrations("p", 3)] == ["a", "b", "c"]
        assert [entry.text for entry in one.demonstrations("p", 3, by_entropy=True)] == ["c", "a", "b"]


def test_problems_leave_once_a_batch():
    """One that is worst in the middle of a batch, and not at its end, stays."""
    made = SuccessBuffer(BufferConfig(problems=2))
    made.add("a", "t", 1.0, 0)
    batch = [("b", Entry("t", 2.0, 0)), ("c", Entry("t", 3.0, 0)), ("a", Entry("u", 4.0, 0))]
    assert made.add_batch(batch) == [False, True, True]
    assert [len(made.demonstrations(name, 4)) for name in "abc"] == [2, 0, 1]
    assert made.metrics()["evicted"] == 1


def test_served_from_the_start_on():
    late = SuccessBuffer(BufferConfig(start_step=5, start_epoch=1))
    late.add("p", "t", 1.0, 0)
    assert late.demonstrations("p", 1, step=4, epoch=1) == []
    assert late.demonstrations("p", 1, step=5, epoch=0) == []
    assert len(late.demonstrations("p", 1, step=5, epoch=1)) == 1
    with pytest.raises(ValueError, match=r"step is missing: the buffer serves from start_step 5 on; give step="):
        late.demonstrations("p", 1)
    with pytest.raises(ValueError, match=r"epoch is missing"):
        late.demonstrations("p", 1, step=7)


def test_what_is_counted():
    made = SuccessBuffer(BufferConfig(problems=1))
    made.add("p", "t", 1.0, 0)
    made.add("p", "t", 1.0, 0)
    made.add("q", "t", 2.0, 0)
    made.demonstrations("p", 1)
    made.demonstrations("q", 1)
    expected = {
        "problems": 1,
        "entries": 1,
        "fill": 1.0,
        "added": 2,
        "refused": 1,
        "evicted": 1,
        "asked": 2,
        "served": 1,
    }
    assert made.metrics() == expected
    again = SuccessBuffer(BufferConfig(problems=1))
    again.load_state_dict(made.state_dict())
    assert again.metrics() == expected


def test_a_smaller_buffer_takes_the_best_of_a_larger_one():
    large, small = SuccessBuffer(BufferConfig()), SuccessBuffer(BufferConfig(problems=2, entries=1))
    for i in range(5):
        large.add(f"p{i}", "t", float(i), 0)
        large.add(f"p{i}", "u", float(i) + 0.5, 0)
    small.load_state_dict(large.state_dict())
    assert [[e.text for e in small.demonstrations(f"p{i}", 4)] for i in range(5)] == [[], [], [], ["u"], ["u"]]


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_a_score_that_orders_nothing_is_refused(score):
    with pytest.raises(ValueError, match=f"score is {score} for problem 'p'; it must be finite"):
        SuccessBuffer(BufferConfig()).add("p", "t", score, 0)


def test_the_example_runs():
    assert doctest.testmod(buffer) == doctest.TestResults(failed=0, attempted=4)
