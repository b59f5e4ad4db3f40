"""The multi-turn loop, the rows it writes, and what is left after an interruption."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from scripted_engine import END, ScriptedEngine, WordTask, say

import drift_kernels as dk
from drift import store
from drift.config import ModelConfig, RolloutConfig
from drift.engines.hf import HFEngine
from drift.model import chat
from drift.model.policy import load_policy
from drift.packing import pack
from drift.returns import trajectory_return
from drift.rollouts.feedback import FEEDBACK, Feedback, is_bare
from drift.rollouts.resume import forget_corrected
from drift.rollouts.rollout import collect, play
from drift.tasks.base import problem_id
from drift.track import Track
from drift.types import Problem

DROPS_THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last and '</think>' in m.content %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SETTINGS = RolloutConfig(n=1, turns=3, max_new_tokens=8)


@pytest.fixture(scope="module")
def policy():
    return load_policy(ModelConfig(hidden_size=16, layers=1, heads=2), seed=2)


def scripted(policy, lines, settings=SETTINGS, count=1):
    engine, task = ScriptedEngine(policy, lines), WordTask(count)
    episodes = play(policy, engine, task, [(p, 0) for p in task.problems("train")], settings, seed=[7])
    return engine, [store.validate(episode.row(settings.format_penalty)) for episode in episodes]


def test_rows_hold_what_was_said_and_what_it_is_worth(policy):
    lines = {
        "q0": ["no idea", say("A 1"), say("a0")],  # unparsable, wrong, right
        "q1": [say("a1")],
        "q2": [say("x"), say("X "), say("y")],
    }
    _, rows = scripted(policy, lines, count=3)
    late, first, never = rows
    assert [m["content"] for m in late["messages"]] == ["q0", "no idea", FEEDBACK, say("A 1"), FEEDBACK, say("a0")]
    assert late["verifier"] == {"t1": 0, "t2": 0, "t3": 1}
    assert late["turn_rewards"] == {"t1": 0.0, "t2": 0.0, "t3": 1.0}
    assert (late["t_star"], late["format_penalty"], late["answer_norms"]) == (3, -0.1, ["a1", "a0"])
    assert trajectory_return(late) == pytest.approx(0.81 - 0.1)
    assert (first["t_star"], first["format_penalty"], len(first["messages"])) == (1, 0.0, 2)
    assert str(first["format_penalty"]) == "0.0"  # no -0.0 in files
    assert (never["t_star"], never["answer_norms"]) == (None, ["x", "x", "y"])
    assert never["messages"][-1]["role"] == "assistant"
    assert trajectory_return(never) == pytest.approx(-0.5 / 3)


def test_tokens_are_those_sampled_and_masks_cover_them_alone(policy):
    _, [row] = scripted(policy, {"q0": ["<think>hm</think>" + say("b") + "…", say("c"), say("a0")]})
    shown = [policy.tokenizer.decode(i) for i in row["token_ids"]]
    sampled = "".join(token for token, on in zip(shown, row["loss_mask"]) if on)
    assert sampled == "<think>hm</think>" + say("b") + say("c") + END + say("a0") + END  # the cut turn's end is not
    assert row["token_ids"] == chat.render(policy.tokenizer, row["messages"])[:-1]  # all but the last line break
    assert [shown[i] for i in row["turn_starts"]] == ["<think>", "<answer>", "<answer>"]
    for value, on in zip(row["logprobs"], row["loss_mask"]):
        assert (value < 0) == bool(on)
    start = row["turn_starts"][1]
    assert row["logprobs"][start : start + 3] == [-0.25, -0.5, -0.75]


def test_history_keep_and_template(policy):
    """A template that drops old thinking: keep goes on from what was sampled, template makes one sample a turn of it."""
    thinking = load_policy(ModelConfig(hidden_size=16, layers=1, heads=2), seed=2)
    thinking.tokenizer.chat_template = DROPS_THINKING
    lines = {"q0": ["<think>hm</think>" + say("b"), "<think>so</think>" + say("a0")]}
    _, [kept] = scripted(thinking, lines)
    assert "hm" in thinking.tokenizer.decode(kept["token_ids"])
    assert "earlier_turns" not in kept
    engine, [row] = scripted(thinking, lines, SETTINGS.model_copy(update={"history": "template"}))
    assert row["messages"] == kept["messages"]
    [earlier] = row["earlier_turns"]
    for sample, said in ((earlier, lines["q0"][0]), (row, lines["q0"][1])):
        [start] = sample["turn_starts"]
        assert sum(sample["loss_mask"]) == len(sample["token_ids"]) - start
        assert thinking.tokenizer.decode(sample["token_ids"][start:]) == said + END
    assert engine.prompts[1][0] == row["token_ids"][: row["turn_starts"][0]]
    assert "hm" not in thinking.tokenizer.decode(row["token_ids"])
    both = chat.to_trajectories(thinking, row, index=0, weight=0.5, turns="assistant")
    assert [t.token_ids for t in both] == [earlier["token_ids"], row["token_ids"]]
    assert [t.token_ids for t in chat.to_trajectories(thinking, row, index=0)] == [row["token_ids"]]


def test_full_feedback_says_reward_turn_attempts_format_and_length_and_repeats_no_problem(policy):
    settings = SETTINGS.model_copy(update={"feedback": "full"})
    _, [row] = scripted(policy, {"q0": [say("b"), "no tag", say("a0")]}, settings)
    first, second = row["messages"][2]["content"], row["messages"][4]["content"]
    assert first.splitlines() == [
        "Reward: 0", "", "Turn 2:", f"State: {FEEDBACK}",
        "You have 2 attempts left. Always output: <think> … </think> <answer> … </answer>, and nothing else.",
        f"Maximum length: {SETTINGS.max_new_tokens} tokens.",
    ]  # fmt: skip
    assert "You have 1 attempt left." in second
    assert "q0" not in second  # the problem comes back after an unreadable first turn alone
    assert is_bare(first)
    assert is_bare(second)


def test_full_feedback_repeats_the_problem_after_an_unreadable_first_turn(policy):
    _, [row] = scripted(policy, {"q0": ["no tag", say("a0")]}, SETTINGS.model_copy(update={"feedback": "full"}))
    assert "q0" in row["messages"][2]["content"]
    assert is_bare(row["messages"][2]["content"])
    assert not is_bare(Feedback()(WordTask().made[1], 1) + " 14 is even.")


def test_engine_gets_the_settings_and_a_seed_of_its_own_each_turn(policy):
    settings = SETTINGS.model_copy(update={"temperature": 0.7, "top_p": 0.9})
    engine, _ = scripted(policy, {"q0": [say("b"), say("c"), say("d")]}, settings)
    assert len({seed for call in engine.calls for seed in call.pop("seed")}) == 3
    assert engine.calls == [{"max_new_tokens": 8, "temperature": 0.7, "top_p": 0.9}] * 3


class Guessing(WordTask):
    """A random model never says "a0": right is whatever has more than two tokens, so that turns differ."""

    def verify(self, problem, answer):
        return len(answer) % 2 == 0


class Stops(HFEngine):
    """Is interrupted at the given call."""

    def __init__(self, policy, at):
        super().__init__(policy)
        self.left = at

    def generate(self, *args, **settings):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().generate(*args, **settings)


@pytest.fixture
def guessing(policy, monkeypatch):
    monkeypatch.setattr("drift.rollouts.rollout.parse_answer", lambda text, tag: text if len(text) % 3 else None)
    return Guessing(6)


COLLECTED = RolloutConfig(n=4, turns=3, max_new_tokens=5, batch_size=8)


def test_an_interrupted_collection_ends_with_the_same_file(policy, guessing, tmp_path):
    problems = guessing.problems("train")
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    assert collect(policy, HFEngine(policy), guessing, problems, COLLECTED, whole, 3) == 24
    with pytest.raises(KeyboardInterrupt):
        collect(policy, Stops(policy, 5), guessing, problems, COLLECTED, parts, 3)
    kept = parts.read_bytes()
    assert 0 < kept.count(b"\n") < 24
    torn = kept[: -len(kept.splitlines()[-1]) // 2]  # and the last write was torn
    parts.write_bytes(torn)
    lines = torn.count(b"\n")
    assert collect(policy, HFEngine(policy), guessing, problems, COLLECTED, parts, 3) == 24 - lines
    assert parts.read_bytes() == whole.read_bytes()
    assert collect(policy, Stops(policy, 0), guessing, problems, COLLECTED, parts, 3) == 0
    assert collect(policy, HFEngine(policy), guessing, problems, COLLECTED, tmp_path / "other.jsonl", 4) == 24
    assert (tmp_path / "other.jsonl").read_bytes() != whole.read_bytes()


def test_rows_say_who_sampled_them_and_another_policy_is_refused(policy, guessing, tmp_path):
    path = tmp_path / "r.jsonl"
    collect(policy, HFEngine(policy), guessing, guessing.problems("train")[:2], COLLECTED, path, 3)
    row = store.read(path)[0]
    assert (row["policy_hash"], row["temperature"], row["top_p"]) == (policy.hash(), 1.0, 1.0)
    other = load_policy(ModelConfig(hidden_size=16, layers=1, heads=2), seed=5)
    with pytest.raises(store.StoreError, match="not by the reference"):
        collect(other, HFEngine(other), guessing, guessing.problems("train"), COLLECTED, path, 3)


@pytest.mark.parametrize("history", ["keep", "template"])
def test_recorded_log_probs_are_those_that_training_computes(policy, guessing, history, tmp_path):
    """Every sampled token of every turn, over packed sequences, to float32 rounding."""
    config = COLLECTED.model_copy(update={"history": history})
    collect(policy, HFEngine(policy), guessing, guessing.problems("train")[:3], config, tmp_path / "r.jsonl", 3)
    rows = store.read(tmp_path / "r.jsonl")
    assert max(len(row["verifier"]) for row in rows) == 3
    trajectories = [
        t for i, row in enumerate(rows) for t in chat.to_trajectories(policy, row, index=i, turns="assistant")
    ]
    compared = 0
    for batch in pack(trajectories, 512, turns="assistant"):
        with torch.no_grad():
            ours = dk.linear_logprob(policy.hidden(batch), policy.head().weight, batch.targets).logprobs
        torch.testing.assert_close(ours[batch.active], batch.rollout_logprobs[batch.active], rtol=1e-4, atol=1e-4)
        compared += len(batch.active)
    assert compared == sum(sum(t["loss_mask"]) for row in rows for t in [row, *row.get("earlier_turns", [])])


def test_each_chunk_is_measured(policy, guessing, tmp_path):
    with Track(tmp_path, progress=False) as track:
        problems = guessing.problems("train")
        collect(
            policy, HFEngine(policy), guessing, problems, COLLECTED, tmp_path / "r.jsonl", 3, track, prefix="seed-3"
        )
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rows = store.read(tmp_path / "r.jsonl")
    solved = sum(row["t_star"] is not None for row in rows) / len(rows)
    assert sum(line["seed-3/solved"] for line in logged) / len(logged) == pytest.approx(solved)
    assert [line["step"] for line in logged] == [1, 2, 3]


def test_problems_are_told_apart_by_id(policy, tmp_path):
    """Two problems that ask alike are two groups."""
    task = WordTask(2)
    task.made[1] = replace(task.made[0], id="other")
    engine = ScriptedEngine(policy, {"q0": [say("a0")]})
    collect(policy, engine, task, task.problems("train"), SETTINGS, tmp_path / "r.jsonl", 0)
    assert [(row["prompt_id"], row["traj_idx"]) for row in store.read(tmp_path / "r.jsonl")] == [
        ("p0", 0),
        ("other", 0),
    ]


def test_rows_checked_against_an_answer_that_has_changed_are_taken_off_the_file(tmp_path):
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    row = {"messages": said, "verifier": {"t1": 1}, "turn_rewards": {"t1": 1.0}, "format_penalty": 0.0, "t_star": 1}
    before = [problem_id(text, answer) for text, answer in (("a", "1"), ("b", "2"), ("no longer asked", "3"))]
    path = tmp_path / "rollouts.jsonl"
    path.write_text("".join(json.dumps({**row, "prompt_id": name}) + "\n" for name in (*before, before[1])))
    now = [Problem(problem_id(text, answer), text, answer) for text, answer in (("a", "1"), ("b", "20"))]
    assert forget_corrected(path, now) == 2
    assert [one["prompt_id"] for one in store.read(path)] == [before[0], before[2]]
    kept = path.stat().st_mtime_ns
    assert forget_corrected(path, now) == 0
    assert path.stat().st_mtime_ns == kept
