"""multi@k: what is counted, and that it is greedy and goes through the loop that rollouts use."""

from __future__ import annotations

import pytest
from scripted_engine import ScriptedEngine, WordTask, say

from drift.config import EvalConfig, ModelConfig
from drift.engines.hf import HFEngine
from drift.jobs.evaluate import average, evaluate, lines
from drift.model.policy import load_policy
from drift.rollouts.feedback import FEEDBACK, Feedback

LINES = {
    "q0": [say("a0")],
    "q1": [say("x"), "nothing", say("a1")],
    "q2": [say("x")] * 3,
    "q3": [say("x"), say("a3")],
}


@pytest.fixture(scope="module")
def policy():
    return load_policy(ModelConfig(hidden_size=16, layers=1, heads=2), seed=2)


@pytest.mark.parametrize("batch_size", [512, 3])
def test_shares_by_turn(policy, batch_size):
    task, engine = WordTask(4), ScriptedEngine(policy, LINES)
    done = evaluate(policy, engine, task, task.problems("eval"), EvalConfig(turns=3, batch_size=batch_size))
    assert done.solved_at == [1, 3, 0, 2]
    assert done.by_turn == [0.25, 0.5, 0.75]
    assert done.corrected == [1 / 3, 1 / 2]  # of the three, then two, that were left
    assert (done.multi_at_k, done.single) == (0.75, 0.25)
    assert done.examples[1]["messages"][2] == {"role": "user", "content": FEEDBACK}
    assert done.examples[1]["t_star"] == 3
    assert {call["temperature"] for call in engine.calls} == {0.0}
    saved = done.to_json()
    assert saved["multi_at_3"] == 0.75
    assert saved["solved_at"] == [1, 3, 0, 2]


def test_turns_and_feedback_are_those_asked_for(policy):
    task, engine = WordTask(4), ScriptedEngine(policy, LINES)
    done = evaluate(policy, engine, task, task.problems("eval"), EvalConfig(turns=2, feedback="full", max_new_tokens=9))
    assert done.solved_at == [1, 0, 0, 2]
    assert done.examples[3]["messages"][2]["content"] == Feedback("full", 2, 9)(task.made[3], 1)


def test_samples_of_one_turn(policy):
    task, engine = WordTask(4), ScriptedEngine(policy, LINES)
    done = evaluate(policy, engine, task, task.problems("eval"), EvalConfig(turns=3, samples=5, batch_size=6))
    assert (done.solved_at, done.right) == ([1, 3, 0, 2], [5, 0, 0, 0])  # each sample says its first line
    sampled = [call for call in engine.calls if call["temperature"] == 1.0]
    assert (
        len({tuple(call["seed"]) for call in sampled}) == len(sampled) == 4
    )  # 20 samples in batches of 6, each its own draw
    assert {call["top_p"] for call in sampled} == {1.0}
    saved = done.to_json()
    assert (saved["mean_at_5"], saved["pass_at_5"]) == (0.25, 0.25)
    assert "mean_at_0" not in evaluate(policy, engine, task, task.problems("eval"), EvalConfig(turns=3)).to_json()


def test_samples_have_a_temperature_and_a_cut_of_their_own(policy):
    task, engine = WordTask(4), ScriptedEngine(policy, LINES)
    settings = EvalConfig(turns=2, samples=2, temperature=0.6, top_p=0.95)
    saved = evaluate(policy, engine, task, task.problems("eval"), settings).to_json()
    assert {(call["temperature"], call["top_p"]) for call in engine.calls} == {(0.0, 1.0), (0.6, 0.95)}
    assert (saved["temperature"], saved["top_p"], saved["corrected"]) == (0.6, 0.95, [1 / 3])


def test_a_turn_with_nothing_left_has_no_correction_rate(policy):
    task, engine = WordTask(1), ScriptedEngine(policy, LINES)
    assert evaluate(policy, engine, task, task.problems("eval"), EvalConfig(turns=2)).corrected == [None]


def test_greedy_repeats(policy):
    task = WordTask(4)
    config = EvalConfig(turns=2, max_new_tokens=4)
    one, two = (evaluate(policy, HFEngine(policy), task, task.problems("eval"), config) for _ in range(2))
    assert one == two


def test_nothing_to_evaluate(policy):
    with pytest.raises(ValueError, match="problems is empty"):
        evaluate(policy, HFEngine(policy), WordTask(), [], EvalConfig())


def test_several_sets_are_averaged_whatever_their_sizes(policy):
    task, config = WordTask(4), EvalConfig(turns=3, samples=2)
    problems = task.problems("eval")
    parts = {
        name: evaluate(policy, ScriptedEngine(policy, LINES), task, some, config)
        for name, some in (("all", problems), ("easy", problems[:1]))
    }
    done = average(parts)
    assert done.by_turn == [(0.25 + 1) / 2, (0.5 + 1) / 2, (0.75 + 1) / 2]
    assert done.corrected == [1 / 3, 1 / 2]  # nothing is left to correct in the easy set
    assert done.solved_at == [1, 3, 0, 2, 1]
    saved = done.to_json()
    assert saved["mean_at_2"] == (saved["sets"]["all"]["mean_at_2"] + saved["sets"]["easy"]["mean_at_2"]) / 2
    shown = lines(done)
    assert [line.partition(":")[0] for line in shown] == ["all", "easy", "average"]
    assert "corrected in turn 2…3: 33.3% 50.0% of 4 problems" in shown[0]
    assert "multi@3 87.5%" in shown[2]
    assert lines(parts["all"])[0].startswith("multi@3 75.0%, single turn 25.0%")
