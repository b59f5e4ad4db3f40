"""The warm start: demonstrations that correct themselves, and training that ends at the target and not elsewhere."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scripted_engine import quarters

from drift.config import ConfigError, parse
from drift.engines.hf import HFEngine
from drift.jobs import warm_start as module
from drift.jobs.warm_start import WarmStartError, demonstrations, warm_start
from drift.model.policy import load_policy
from drift.rollouts.environments import CALCULATOR
from drift.rollouts.feedback import FEEDBACK
from drift.tasks import TaskError, load_task, parse_answer
from drift.training.checkpoint import CheckpointError


@pytest.fixture
def parts(tmp_path):
    config = quarters(tmp_path)
    task = load_task(config.task)
    yield config, task, load_policy(config.model, seed=0)
    task.close()


def scripted_checks(monkeypatch, shares):
    """What the checks say, one a call; and the step at which each was made."""
    said, at = iter(shares), []
    monkeypatch.setattr(module._Check, "run", lambda self, step: at.append(step) or (next(said), 0.0))
    return at


def test_demonstrations_correct_themselves(parts):
    config, task, policy = parts
    problems = {problem.id: problem for problem in task.problems("warm")}
    made = [t for step in range(10) for t in demonstrations(policy, task, list(problems.values()), config, [0, step])]
    wrong = right = 0
    for trajectory in made:
        turns = [policy.tokenizer.decode(trajectory.token_ids[turn.start : turn.stop]) for turn in trajectory.turns]
        answers = [parse_answer(turn) for turn in turns]
        problem = problems[trajectory.problem_id]
        assert answers[-1] == problem.answer
        assert problem.answer not in answers[:-1]
        assert len(set(answers)) == len(answers) <= config.rollout.turns
        assert all(turn.endswith("<|im_end|>") for turn in turns)
        assert policy.tokenizer.decode(trajectory.token_ids).count(FEEDBACK) == len(turns) - 1
        wrong, right = wrong + len(turns) - 1, right + 1
    rate = config.warm_start.wrong_share
    expected = rate + rate**2  # wrong turns a dialogue of at most three
    assert wrong / right == pytest.approx(expected, abs=4 * np.sqrt(expected / right))


def test_wrong_answers_of_another_kind_come_from_other_problems(parts):
    config, task, policy = parts
    for problem in task.problems("warm"):
        problem.answer = f"word {problem.answer}"
    made = demonstrations(policy, task, task.problems("warm"), config, [0, 0])
    said = {
        parse_answer(policy.tokenizer.decode(t.token_ids[turn.start : turn.stop])) for t in made for turn in t.turns
    }
    assert said == {f"word {n}" for n in range(4)}


def test_some_dialogues_begin_with_the_solution(parts):
    """As a teacher's prompt shows it; wrong answers may follow, and only the right one is trained."""
    config, task, policy = parts
    problems = {problem.id: problem for problem in task.problems("warm")}
    taught = config.model_copy(update={"warm_start": config.warm_start.model_copy(update={"taught_share": 0.4})})
    made = [t for step in range(6) for t in demonstrations(policy, task, list(problems.values()), taught, [0, step])]
    shown = [(problems[t.problem_id], policy.tokenizer.decode(t.token_ids), t) for t in made]
    told = [(problem, text, t) for problem, text, t in shown if "Correct solution:" in text]
    for problem, text, trajectory in told:
        solution = f"<answer>{problem.answer}</answer>"
        assert text.count(solution) == 2
        assert f"{problem.prompt}\n\nCorrect solution:\n\n{solution}\n\nCorrectly solve" in text
        [turn] = trajectory.turns
        assert solution in policy.tokenizer.decode(trajectory.token_ids[turn.start : turn.stop])
    assert any("Incorrect" in text for _, text, _ in told)
    assert len(told) / len(made) == pytest.approx(0.4, abs=4 * np.sqrt(0.24 / len(made)))


def test_some_dialogues_call_the_tool(parts):
    config, task, policy = parts
    rollout = config.rollout.model_copy(update={"tool": "calculator"})
    warm = config.warm_start.model_copy(update={"tool_share": 0.5})
    config = config.model_copy(update={"rollout": rollout, "warm_start": warm})
    problems = task.problems("warm")
    with pytest.raises(TaskError, match=r"has no expression to show a tool with"):
        demonstrations(policy, task, problems, config, [0, 0])
    for problem in problems:
        problem.metadata["metadata"] = {"expression": f"{problem.answer} * 1"}
    shown = [t for step in range(5) for t in demonstrations(policy, task, problems, config, [0, step])]
    called = 0
    for trajectory in shown:
        text = policy.tokenizer.decode(trajectory.token_ids)
        assert text.count(CALCULATOR) == 1
        turns = [policy.tokenizer.decode(trajectory.token_ids[turn.start : turn.stop]) for turn in trajectory.turns]
        if "<tool_call>" in turns[0]:
            answer = parse_answer(turns[1])
            assert turns == [f"<tool_call>{answer} * 1</tool_call><|im_end|>", f"<answer>{answer}</answer><|im_end|>"]
            assert f"tool\n{answer}<|im_end|>" in text
            called += 1
    assert called / len(shown) == pytest.approx(0.5, abs=4 * 0.5 / len(shown) ** 0.5)
    with pytest.raises(ConfigError, match=r"rollout\.tool names none"):
        parse({"name": "q", "warm_start": {"tool_share": 0.5}})


def test_it_ends_at_the_target_and_is_not_run_again(parts, tmp_path):
    config, task, policy = parts
    done = warm_start(policy, HFEngine(policy), task, config, tmp_path / "base")
    assert config.warm_start.target_low <= done.solved <= config.warm_start.target_high
    assert all(check["solved"] < config.warm_start.target_low for check in done.checks[:-1])
    saved = load_policy(config.model.model_copy(update={"path": str(tmp_path / "base")}))
    assert saved.hash() == policy.hash()
    assert not list((tmp_path / "base").glob("checkpoint-*"))
    assert warm_start(policy, None, task, config, tmp_path / "base") == done


def test_no_demonstration_is_about_a_problem_of_the_check(parts):
    config, task, policy = parts
    check = module._Check(policy, HFEngine(policy), task, config)
    played = {problem.id for problem, _ in check._play.args[3]}
    assert len(played) == config.warm_start.check_problems
    shown = {problem.id for problem in check.others}
    later = {problem.id for split in ("train", "eval") for problem in task.problems(split)}
    assert not played & shown
    assert not (played | shown) & later


def test_an_interrupted_one_goes_on_to_the_same_weights(parts, tmp_path, monkeypatch):
    config, task, policy = parts
    scripted_checks(monkeypatch, [0.0, 0.1, 0.3])
    warm_start(policy, HFEngine(policy), task, config, tmp_path / "whole")
    scripted_checks(monkeypatch, [0.0])  # the second check is not lived to see
    again = load_policy(config.model, seed=0)
    with pytest.raises(StopIteration):
        warm_start(again, HFEngine(again), task, config, tmp_path / "parts")
    other = config.model_copy(update={"warm_start": config.warm_start.model_copy(update={"lr": 1e-3})})
    with pytest.raises(CheckpointError, match=r"'lr': 0\.005"):
        warm_start(again, HFEngine(again), task, other, tmp_path / "parts")
    at = scripted_checks(monkeypatch, [0.1, 0.3])
    fresh = load_policy(config.model, seed=0)
    done = warm_start(fresh, HFEngine(fresh), task, config, tmp_path / "parts")
    assert fresh.hash() == policy.hash()
    assert (at, done.steps) == ([20, 30], 30)


def test_past_the_target_it_goes_back_and_checks_more_often(parts, tmp_path, monkeypatch):
    config, task, policy = parts
    at = scripted_checks(monkeypatch, [0.0, 0.99, 0.1, 0.4])
    done = warm_start(policy, HFEngine(policy), task, config, tmp_path / "base")
    assert at == [10, 20, 15, 20]
    assert done.steps == 20
    straight = load_policy(config.model, seed=0)
    scripted_checks(monkeypatch, [0.0, 0.4])
    warm_start(straight, HFEngine(straight), task, config, tmp_path / "straight")
    assert straight.hash() == policy.hash()  # the steps that were taken back left no trace
    scripted_checks(monkeypatch, [0.99] * 4)
    with pytest.raises(WarmStartError, match=r"at step 1 .* jumps to 99%.*target_high"):
        warm_start(load_policy(config.model), None, task, config, tmp_path / "jump")


def test_a_target_out_of_reach_is_an_error(parts, tmp_path, monkeypatch):
    config, task, policy = parts
    short = config.model_copy(update={"warm_start": config.warm_start.model_copy(update={"max_steps": 15})})
    at = scripted_checks(monkeypatch, [0.0, 0.05])
    with pytest.raises(WarmStartError, match=r"max_steps=15 is reached with 5%.*target_low=20%"):
        warm_start(policy, HFEngine(policy), task, short, tmp_path / "base")
    assert at == [10, 15]
    assert not (tmp_path / "base" / "warm_start.json").exists()


def test_problems_for_the_check_alone_are_too_few(parts, tmp_path):
    config, task, policy = parts
    greedy = config.model_copy(update={"warm_start": config.warm_start.model_copy(update={"check_problems": 200})})
    with pytest.raises(TaskError, match=r"task\.warm_problems=200 leaves none"):
        warm_start(policy, HFEngine(policy), task, greedy, tmp_path / "base")


def test_the_record_reads_back(parts, tmp_path):
    config, task, policy = parts
    done = warm_start(policy, HFEngine(policy), task, config, tmp_path / "base")
    assert json.loads((tmp_path / "base" / "warm_start.json").read_text())["checks"] == done.checks
