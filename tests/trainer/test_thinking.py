"""What is thinking, what is said, what is read as the answer; settings of a task that change it; checks without a verdict."""

from __future__ import annotations

import dataclasses
import json

import pytest
from scripted_engine import END, ScriptedEngine, WordTask, say

from drift import store
from drift.config import EvalConfig, ModelConfig, RolloutConfig
from drift.jobs.evaluate import evaluate
from drift.model.policy import load_policy
from drift.rollouts.environments import Step, ToolEnvironment
from drift.rollouts.failures import CheckError, Failures
from drift.rollouts.rollout import collect, play
from drift.tasks import Failed, Framing, parse_answer, spoken
from drift.tasks.parsing import strict
from drift.types import Problem

SETTINGS = RolloutConfig(n=1, turns=3, max_new_tokens=40)


@pytest.fixture(scope="module")
def policy():
    return load_policy(ModelConfig(hidden_size=32))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a", "a"),
        ("<think>t</think>a", "a"),
        ("<think>t</think>a<think>u</think>b", "ab"),
        ("t</think>a", "a"),  # the template has opened it
        ("<think>t<think>u</think>a", "a"),
        ("<think>t", None),
        ("a<think>t", None),
        ("t</think>a<think>u", None),
        ("<think>t</think>", ""),
        ("", ""),
    ],
)
def test_thinking_is_not_said_and_what_never_closes_says_nothing(text, said):
    assert spoken(text) == said


@pytest.mark.parametrize(
    ("text", "lenient", "published"),
    [
        ("<think>t</think><answer>4</answer>", "4", "4"),
        ("<think>t</think>\n <answer> 4 </answer> so", "4", "4"),
        ("<answer>4</answer>", "4", None),
        ("<think>t</think> so <answer>4</answer>", "4", None),
        ("<think>t</think><answer>4</answer><answer>5</answer>", "5", "4"),
        ("<think><answer>4</answer></think><answer>5</answer>", "5", "5"),
        ("<think><answer>4</answer></think> done", None, None),
        ("<think><answer>4</answer>", None, None),
        ("<answer>4</answer><think>t", None, None),
        ("t</think><answer>4</answer>", "4", None),
        ("<think>t</think><answer>4||5</answer>", "4||5", "4"),
        ("<think>t</think><answer> || 5</answer>", "|| 5", "5"),
        ("<think>t</think><answer> </answer>", None, None),
        ("<think>t</think><answer>4", None, None),
        ("<answer>1<answer>2</answer>", "2", None),
    ],
)
def test_parsers(text, lenient, published):
    assert parse_answer(text) == lenient
    assert strict(text) == published


def test_parsers_read_another_tag():
    assert parse_answer("<solution>7</solution>", "solution") == "7"
    assert strict("<think></think><solution>7</solution>", "solution") == "7"


def played(policy, lines, settings=SETTINGS, environment=None, about="", **frame):
    task = WordTask(len(lines))
    task.framing = Framing(**frame)
    engine = ScriptedEngine(policy, {f"q{i}{about}": line for i, line in enumerate(lines)})
    jobs = [(problem, 0) for problem in task.made]
    return play(policy, engine, task, jobs, settings, seed=[0], environment=environment and environment(task))


def test_an_answer_inside_thinking_that_never_closes_is_none(policy):
    cut, ended, nested = played(
        policy,
        [
            ["<think>is it <answer>a0</answer>…"] * 3,
            ["<think>is it <answer>a1</answer>?"] * 3,
            ["<think><answer>a2</think>a2</answer>"] * 3,
        ],
    )
    for episode in (cut, ended, nested):
        assert episode.answers == [None] * 3
        assert episode.row(-0.1)["format_penalty"] == pytest.approx(-0.3)
        assert episode.row(-0.1)["t_star"] is None


def test_a_tool_call_inside_thinking_never_runs(policy):
    settings = SETTINGS.model_copy(update={"tool": "calculator"})
    lines = [["<think>is it <tool_call>1+1</tool_call>" + "…" * cut] * 12 for cut in (0, 1)]
    for episode in played(policy, lines, settings, lambda task: ToolEnvironment(task, 3, about="."), "\n\n."):
        assert episode.tool_calls == 0
        assert episode.answers == [None] * 3


def test_a_cut_turns_answer_counts_or_not_by_a_setting(policy):
    lines = [[say("a0") + " and so on…", say("a0")]]
    [counted] = played(policy, lines)
    [dropped] = played(policy, lines, cut_answers="drop")
    assert (counted.solved_at, counted.answers) == (1, ["a0"])
    assert (dropped.solved_at, dropped.answers) == (2, [None, "a0"])


def test_thinking_that_the_template_opened_is_thinking(policy):
    opening = policy.tokenizer.chat_template
    policy.tokenizer.chat_template = opening.replace("assistant\n' }}", "assistant\n<think>\n' }}")
    try:
        if policy.tokenizer.chat_template == opening:
            policy.tokenizer.chat_template = opening + "{% if add_generation_prompt %}<think>\n{% endif %}"
        open_, closed = played(policy, [[say("a0")] * 3, ["so</think>" + say("a1")]])
    finally:
        policy.tokenizer.chat_template = opening
    assert open_.answers == [None] * 3
    assert closed.solved_at == 1


def test_a_prefill_begins_every_turn_as_prompt(policy):
    lines = [["so</think>" + say("b"), "so</think>" + say("a0")]]
    [episode] = played(policy, lines, prefill="<think>", parser="strict")
    assert episode.answers == ["b", "a0"]
    assert [m["content"] for m in episode.messages if m["role"] == "assistant"] == [
        "<think>" + line for line in lines[0]
    ]
    row = episode.row(-0.1)
    sampled = policy.tokenizer.decode([i for i, on in zip(row["token_ids"], row["loss_mask"]) if on])
    assert sampled == "".join(line + END for line in lines[0])  # without the prefill
    assert policy.tokenizer.decode(row["token_ids"]).count("<think>so</think>") == 2


def test_the_strict_parser_of_a_task_is_used(policy):
    [episode] = played(policy, [[say("a0"), "<think>t</think>" + say("a0")]], parser="strict")
    assert episode.answers == [None, "a0"]


class Broken(WordTask):
    def verify_many(self, pairs):
        return [Failed("Traceback: the checker is dead") if problem.id in self.dead else True for problem, _ in pairs]


@pytest.mark.parametrize("stage", ["rollouts", "evaluation"])
def test_a_checker_that_always_fails_ends_the_stage_with_its_traceback(policy, tmp_path, stage):
    task = Broken(2)
    task.dead = {"p0", "p1"}
    engine = ScriptedEngine(policy, {"q0": [say("a0")] * 3, "q1": [say("a1")] * 3})
    stages = {
        "rollouts": lambda: collect(policy, engine, task, task.made, SETTINGS, tmp_path / "r.jsonl", 0),
        "evaluation": lambda: evaluate(policy, engine, task, task.made, EvalConfig(turns=3)),
    }
    with pytest.raises(CheckError, match=r"all 2 checks of a batch failed(.|\n)*the checker is dead"):
        stages[stage]()


def test_a_few_failed_checks_are_counted_in_rows_metrics_and_evaluations(policy, tmp_path):
    class Track:
        lines, logged = [], []

        def __getattr__(self, name):
            from drift.track import Track as Real

            return getattr(Real(None, progress=False), name)

        def say(self, line):
            self.lines.append(line)

        def log(self, step, **values):
            self.logged.append(values)

    task, track = Broken(3), Track()
    task.dead, task.framing = {"p1"}, Framing(max_failed=0.5)
    engine = ScriptedEngine(policy, {f"q{i}": [say(f"a{i}")] * 3 for i in range(3)})
    settings = SETTINGS.model_copy(update={"turns": 1})
    collect(policy, engine, task, task.made, settings, tmp_path / "r.jsonl", 0, track)
    rows = store.read(tmp_path / "r.jsonl")
    assert [row.get("failed_checks", 0) for row in rows] == [0, 1, 0]
    assert track.logged[0]["rollout/failed_checks"] == 1
    assert "1 of 3 checks have no verdict; they count as wrong" in track.lines[-1]
    assert evaluate(policy, engine, task, task.made, EvalConfig(turns=1)).to_json()["failed_checks"] == 1


def test_more_than_a_share_of_failed_checks_ends_a_stage():
    failures = Failures(0.05)
    failures.add(["", ""] * 60)
    failures.add(["dead", ""] * 6)  # 6 of 132
    with pytest.raises(CheckError, match=r"8 of 136 checks failed, and task\.max_failed=0\.05(.|\n)*dead"):
        failures.add(["dead", ""] * 2)


def test_one_dead_problem_alone_in_a_batch_ends_nothing():
    failures = Failures(0.05)
    failures.add([""] * 60)
    failures.add(["dead"])
    assert (failures.failed, failures.checks) == (1, 61)


def test_an_environment_that_raises_ends_the_stage_with_its_traceback(policy):
    class Faulty:
        def __init__(self, task):
            pass

        def reset(self, problem):
            return [{"role": "user", "content": problem.prompt}]

        def step(self, episodes):
            raise ZeroDivisionError("in my environment")

    with pytest.raises(CheckError, match=r"Faulty\.step failed on a batch of 1 episodes(.|\n)*in my environment"):
        played(policy, [[say("a0")]], environment=Faulty)


def test_a_tool_that_raises_is_counted(policy):
    def tool(text):
        raise OSError("no such tool")

    environment = ToolEnvironment(WordTask(1), 2, tool=tool)
    [episode] = played(policy, [["<tool_call>1</tool_call>", say("a0")]], environment=None)
    episode.messages = [
        *environment.reset(episode.problem),
        {"role": "assistant", "content": "<tool_call>1</tool_call>"},
    ]
    [step] = environment.step([episode])
    assert step.messages == [{"role": "tool", "content": "Error: the tool failed."}]
    assert "no such tool" in step.failed
    assert dataclasses.replace(step, failed="") == Step(step.messages, tool_calls=1, tool_errors=1)


def test_rows_about_a_corrected_answer_are_sampled_again(policy, tmp_path):
    class Words(WordTask):
        def __init__(self, answers):
            super().__init__(0)
            self.made = [Problem(f"text{i}-{answer}", f"q{i}", answer) for i, answer in enumerate(answers)]

    lines = {"q0": [say("a0"), say("a9"), say("a9")], "q1": [say("a1")]}
    path, whole = tmp_path / "r.jsonl", tmp_path / "whole.jsonl"
    before, after = Words(["a0", "a1"]), Words(["a9", "a1"])
    collect(policy, ScriptedEngine(policy, lines), before, before.made, SETTINGS, path, 0)
    assert [row["t_star"] for row in store.read(path)] == [1, 1]
    assert collect(policy, ScriptedEngine(policy, lines), after, after.made, SETTINGS, path, 0) == 1
    collect(policy, ScriptedEngine(policy, lines), after, after.made, SETTINGS, whole, 0)
    key = lambda row: row["prompt_id"]  # noqa: E731
    assert sorted(store.read(path), key=key) == sorted(store.read(whole), key=key)
    assert {row["prompt_id"]: row["t_star"] for row in store.read(path)} == {"text0-a9": 2, "text1-a1": 1}
    assert all(json.loads(line) for line in path.read_text().splitlines())
