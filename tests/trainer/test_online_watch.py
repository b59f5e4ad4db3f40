"""What an online training leaves to look at: its watch in the log and the checkpoint, and responses token by token."""

import json
import math

import pytest
import tiny_policy
import torch
from peft import LoraConfig
from scripted_engine import WordTask, quarters
from transformers.models.qwen2 import Qwen2Config

from drift import report, rhythm
from drift.config import parse
from drift.engines.hf import HFEngine
from drift.model.policy import load_policy
from drift.online import loop as online
from drift.rollouts import rollout
from drift.track import Track
from drift.training import checkpoint
from drift.training.trainer import has_dropout


@pytest.fixture(autouse=True)
def talkative(monkeypatch):
    """An untrained model never writes an answer's tags: half of what it says counts as one."""
    monkeypatch.setattr(rollout, "parse_answer", lambda said, tag: said.strip() or None)


class Keeps(Track):
    def __init__(self):
        super().__init__(None, progress=False)
        self.logged, self.said = {}, []

    def log(self, step, **metrics):
        self.logged[step] = {name.removeprefix("online/"): value for name, value in metrics.items()}

    def say(self, text):
        self.said.append(text)


def trained(folder, algorithm="drift", watch=None, checkpoint_dir=None, rare=2, **settings):
    settings |= {"algorithm": algorithm, "prompts": 4, "watch": watch or {}}
    made = quarters(folder, train={"lr": 3e-2, "save_every": 0})
    made = parse({**made.model_dump(mode="json"), "online": {"steps": 4, **settings}, "seeds": [0]})
    policy, task, track = load_policy(made.model, seed=0), WordTask(4), Keeps()
    task.verify = lambda problem, answer: len(answer) % rare == 0
    online.train_online(
        policy,
        HFEngine(policy),
        task,
        task.problems("train"),
        made,
        seed=3,
        track=track,
        checkpoint_dir=checkpoint_dir,
        examples_path=folder / "examples.jsonl",
    )
    file = folder / "examples.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return made, track, rows


NO_CURRICULUM = {"warmup_steps": 0, "transition_steps": 0}


def test_stored_values_are_those_of_the_formulas(tmp_path, monkeypatch):
    """The first step's log-probs from whole logits; gate and bonus of every step from `drift.rhythm`."""
    whole, batches = online.Branches.accumulate, []

    def accumulate(self, samples, *others):
        batches.append({sample.trajectory.index: sample for sample in samples})
        return whole(self, samples, *others)

    monkeypatch.setattr(online.Branches, "accumulate", accumulate)
    watch = {"examples": 4, "responses": 16}
    made, track, rows = trained(tmp_path, watch=watch, curriculum=NO_CURRICULUM, rare=7)
    assert {row["step"] for row in rows} == {1, 2, 3, 4}
    assert len(rows) == 4 * 16
    policy = load_policy(made.model, seed=0)
    for row in rows[:16]:
        sample = batches[0][row["index"]]
        ids, turns = sample.trajectory.token_ids, sample.trajectory.turns
        sampled = [any(turn.start <= i < turn.stop for turn in turns) for i in range(len(ids))]
        assert "".join(row["tokens"]) == policy.tokenizer.decode(ids)
        assert row["trained"] == list(map(int, sampled))
        assert (row["solved_at"], row["policy_weight"]) == (sample.solved_at, sample.policy)
        with torch.no_grad():
            logp = policy.model(input_ids=torch.tensor(ids)[None]).logits[0].double().log_softmax(-1)
        for i, on in enumerate(sampled):
            expected = (float(logp[i - 1, ids[i]]), float(-(logp[i - 1].exp() * logp[i - 1]).sum())) if on else (0, 0)
            assert (row["logprobs"][i], row["entropy"][i]) == pytest.approx(expected, abs=1e-4)
    taught = [row for row in rows if "gate" in row]
    assert 0 < len(taught) < len(rows)
    opened = boosted = 0
    for row in taught:
        mask = torch.tensor(row["trained"], dtype=torch.bool)
        turns = (mask & ~mask.roll(1)).cumsum(0)
        values = {
            name: torch.tensor(row[name]) for name in ("entropy", "teacher_entropy", "logprobs", "teacher_logprobs")
        }
        mean = track.logged[row["step"] - 1]["difference/mean"] if row["step"] > 1 else None
        wave = rhythm.rhythm_weight(values["entropy"], values["teacher_entropy"], mask, turns, mean)
        gate = rhythm.rhythm_gate(wave, response_mask=mask)
        weight = torch.full_like(gate, row["rebellious_weight"])
        bonus = rhythm.rebellious_weight(
            values["logprobs"], values["teacher_logprobs"], weight, gate, response_mask=mask
        )
        for name, expected in (("rhythm", wave), ("gate", gate), ("bonus", bonus)):
            torch.testing.assert_close(torch.tensor(row[name])[mask], expected[mask], rtol=0, atol=5e-3)
        opened, boosted = opened + int((gate > 0.1).sum()), boosted + int((bonus > 1.01).sum())
    assert opened > 10
    assert boosted > 0


def test_a_warm_up_without_a_right_answer_says_that_nothing_is_trained(tmp_path):
    words = "warmup_steps=10 steps; 0 leaves it out"
    for algorithm, rare, expected in (("drift", 999, True), ("drift", 2, False), ("grpo", 999, False)):
        folder = tmp_path / f"{algorithm}-{rare}"
        folder.mkdir()
        _, track, _ = trained(folder, algorithm, rare=rare)
        assert any(words in line for line in track.said) is expected
        assert (track.logged[1]["grad_norm"] == 0) == (rare == 999)


def test_a_training_without_a_teacher_stores_what_the_student_shows(tmp_path):
    _, _, rows = trained(tmp_path, "grpo", watch={"examples": 1, "responses": 3})
    assert [row["step"] for row in rows] == [4, 4, 4]
    assert all("entropy" in row and not {"gate", "teacher_logprobs", "divergence"} & row.keys() for row in rows)


def test_the_watch_is_in_the_log_and_says_what_looks_wrong(tmp_path):
    watch = {"every": 2, "window": 1, "solved_below": 1.0, "examples": 0}
    _, track, rows = trained(tmp_path, "grpo", watch=watch, rare=3)
    assert rows == []
    for step, row in track.logged.items():
        assert [row[f"watch/pass_at_{k}"] for k in (1, 2, 4)] == sorted(row[f"watch/pass_at_{k}"] for k in (1, 2, 4))
        assert row["watch/pass_at_1"] == pytest.approx(row["solved"])
        assert ("watch/reference_kl" in row) == (step in (1, 3))
    assert track.logged[1]["watch/reference_kl"] == 0  # before the first update
    assert track.logged[3]["watch/reference_kl"] > 1e-4
    solved = [row["solved"] for row in track.logged.values()]
    fallen = [i + 1 for i, value in enumerate(solved) if value < max(solved[: i + 1])]
    assert [step for step, row in track.logged.items() if row["watch/low_solved"]] == fallen != []
    said = [line for line in track.said if "solved has fallen" in line]
    assert said[0].startswith(f"online: step {fallen[0]}: solved has fallen to {solved[fallen[0] - 1]:.1%}")


@pytest.mark.parametrize("trajectories", [64, 5])
def test_the_steps_own_log_probs_give_the_same_kl(tmp_path, monkeypatch, trajectories):
    """As one more pass of the policy, which is made where dropout would change them."""
    found, passes = {}, {}
    for certain in (True, False):
        counted = []
        with monkeypatch.context() as patched:
            patched.setattr(online, "has_dropout", lambda model, certain=certain: not certain)
            kl = online.Reference.kl

            def counting(self, *arguments, kl=kl, counted=counted):
                hook = self.policy.causal_lm.base_model.register_forward_pre_hook(lambda *_: counted.append(1))
                try:
                    return kl(self, *arguments)
                finally:
                    hook.remove()

            patched.setattr(online.Reference, "kl", counting)
            watch = {"trajectories": trajectories, "examples": 0}
            _, track, _ = trained(tmp_path / str(certain), "grpo", watch=watch)
        found[certain] = [row["watch/reference_kl"] for row in track.logged.values()]
        passes[certain] = len(counted)
    assert found[True] == pytest.approx(found[False], rel=1e-3, abs=1e-9)
    assert min(found[True][1:]) > 1e-5
    assert passes[True] == passes[False] / 2


@pytest.mark.parametrize("rate", ["lora", "attention"])
def test_dropout_is_seen(rate):
    shape = Qwen2Config(**tiny_policy.SHAPE, attention_dropout=0.1 if rate == "attention" else 0.0)
    lora = {"r": 2, "target_modules": "all-linear"}
    assert has_dropout(
        tiny_policy.Policy(shape, lora=LoraConfig(**lora, lora_dropout=0.1 if rate == "lora" else 0.0)).model
    )
    assert not has_dropout(tiny_policy.Policy(Qwen2Config(**tiny_policy.SHAPE), lora=LoraConfig(**lora)).model)


def test_without_a_reference_no_copy_is_kept(tmp_path):
    _, track, _ = trained(tmp_path, "grpo", watch={"every": 0})
    assert not any("watch/reference_kl" in row for row in track.logged.values())
    assert all(math.isfinite(row["watch/pass_at_1"]) for row in track.logged.values())


def test_the_watch_is_in_the_checkpoint(tmp_path):
    trained(tmp_path, "grpo", checkpoint_dir=tmp_path / "inside")
    state = json.loads((checkpoint.latest(tmp_path / "inside") / "state.json").read_text())["stats"]["watch"]
    assert len(state["recent"]["entropy"]) == 4


def test_the_report_reads_what_a_training_stored(tmp_path):
    made, _, rows = trained(tmp_path / "seed-0" / "drift", watch={"examples": 2})
    (tmp_path / "config.yaml").write_text(json.dumps(made.model_dump(mode="json")))
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "seed-0/drift/reward": 1.0}\n{"step": 2, "seed-0/drift/reward": 1.0}\n'
    )
    page = report.write(tmp_path).read_text()
    assert "token by token" in page
    assert rows[-1]["prompt_id"] in page
