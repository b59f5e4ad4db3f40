"""Online trainings whose template renders earlier turns anew, and whose environment opens with turns of its own."""

import math

import pytest
from scripted_engine import ScriptedEngine, WordTask, say
from test_online import config

from drift import store
from drift.model.policy import load_policy
from drift.online import loop as online
from drift.online.samples import read
from drift.rollouts.environments import VerifyEnvironment
from drift.rollouts.feedback import FEEDBACK
from drift.track import Track

DROPS_THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last and '</think>' in m.content %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THOUGHTS = {"q0": ["<think>hm</think>" + say("x"), say("y")], "q1": ["<think>so</think>" + say("x"), say("a1")]}


class Guessing(WordTask):
    """Right is every second answer of those that are given at once."""

    def verify_many(self, pairs):
        return [number % 2 == 0 for number, _ in enumerate(pairs)]


@pytest.mark.parametrize("algorithm", ["dapo", "drift"])
def test_a_template_that_changes_nothing_trains_the_same(tmp_path, algorithm):
    """One sample a turn and one a trajectory: the same losses, token for token, where both see the same ids before."""
    logged = {"keep": [], "template": []}
    for history, rows in logged.items():
        rollout = {"n": 3, "turns": 3, "history": history}
        made = config(
            tmp_path, algorithm, rollout=rollout, online={"steps": 3, "prompts": 2}, weights={"gamma": 0.1, "beta": 0.1}
        )
        policy, task = load_policy(made.model, seed=0), Guessing(2)
        engine = ScriptedEngine(policy, {f"q{n}": [say("x"), say("y"), say("z")] for n in range(2)})

        class Keeps(Track):
            def log(self, step, rows=rows, **metrics):
                rows.append(metrics)

        track, path = Keeps(None, progress=False), tmp_path / f"{algorithm}-{history}.jsonl"
        problems = task.problems("train")
        online.train_online(policy, engine, task, problems, made, seed=0, track=track, rollouts=path)
        assert any("earlier_turns" in row for row in store.read(path)) == (history == "template")
    for kept, rendered in zip(*logged.values()):
        assert kept.keys() == rendered.keys()
        # a sample a turn repeats all turns before it
        saved = {"online/tokens_shared", "online/attention_shared"}
        assert all(rendered[name] > kept[name] for name in saved)
        own = saved | {"online/seconds_sampling", "online/step_time", "online/step_cpu_time"}
        for name in kept.keys() - own:
            assert rendered[name] == pytest.approx(kept[name], rel=2e-3, abs=1e-6), name
    assert max(row["online/grad_norm"] for row in logged["keep"]) > 1e-3


def test_each_turn_as_the_template_renders_it(tmp_path):
    """A template that drops old thinking; the teacher sees the same history, with the lesson in front."""
    made = config(tmp_path, rollout={"n": 2, "turns": 2, "history": "template"}, online={"prompts": 2, "steps": 1})
    policy = load_policy(made.model, seed=0)
    policy.tokenizer.chat_template = DROPS_THINKING
    task = WordTask(2)
    loop = online._Loop(policy, ScriptedEngine(policy, THOUGHTS), task, task.problems("train"), made, 0)
    loop.guide.buffer.add("p0", say("a0"), 1.0, 0)
    samples = loop._sample(0)
    loop.guide.route(samples, 0)
    decode = policy.tokenizer.decode
    assert [part.trajectory.index for sample in samples for part in sample.parts] == list(range(8))
    for sample in samples:
        first, last = sample.parts
        assert (first.distill, first.policy, first.pass_rate) == (last.distill, last.policy, last.pass_rate)
        assert "</think>" in decode(first.trajectory.token_ids)
        assert "</think>" not in decode(last.trajectory.token_ids)
        if sample.problem_id == "p0":
            for part in sample.parts:
                before, after = decode(part.trajectory.token_ids), decode(part.taught.token_ids)
                assert after.count(say("a0")) == before.count(say("a0")) + 1
                assert after.endswith(before.split("q0", 1)[1])
    assert sum(part.tokens for sample in samples for part in sample.parts) == sum(
        sum(part["loss_mask"]) for s in samples for part in (s.row, *s.row["earlier_turns"])
    )
    assert math.isfinite(loop.step(0)["loss"])


@pytest.mark.parametrize("history", ["keep", "template"])
def test_an_environment_that_opens_with_examples(tmp_path, history):
    """Their assistant turns are nobody's samples, and their questions no feedback."""

    class Shows(VerifyEnvironment):
        def reset(self, problem):
            shown = [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]
            return [{"role": "system", "content": "s"}, *shown, {"role": "user", "content": problem.prompt}]

    made = config(tmp_path, rollout={"n": 2, "turns": 2, "history": history}, online={"prompts": 2, "steps": 1})
    policy, task = load_policy(made.model, seed=0), WordTask(2)
    lines = {"b": [None, say("no"), say("never")]}  # the engine counts the example as a turn
    loop = online._Loop(policy, ScriptedEngine(policy, lines), task, task.problems("train"), made, 0, Shows(task, 2))
    loop.guide.buffer.add("p0", say("a0"), 1.0, 0)
    samples = loop._sample(0)
    assert {sample.feedback for sample in samples} == {FEEDBACK}
    loop.guide.route(samples, 0)
    for sample in samples:
        assert [part.messages[-1]["content"] for part in sample.parts] == {
            "keep": [say("never")],
            "template": [say("no"), say("never")],
        }[history]
        assert (sample.taught is not None) == (sample.problem_id == "p0")
    assert math.isfinite(loop.step(0)["loss"])
    if history == "template":
        row = samples[0].row
        single = {**row, **row["earlier_turns"][0], "messages": row["messages"][:5], "earlier_turns": []}
        assert read(policy, single, made.weights).feedback is None  # which the question is not
