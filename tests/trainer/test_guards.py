"""Steps that are not finite stop a training after a few in a row, or at its end; jumps and gaps are told of once they show."""

import json
import math

import pytest
import torch
from tiny_policy import Policy, config, some

from drift import cli
from drift.config import ModelConfig
from drift.model.policy import load_policy
from drift.track import Track
from drift.training import checkpoint, trainer
from drift.training.guards import LEAST, Guards, TrainingError, ratio_warnings
from drift.training.meter import StepResult


class Breaks(Policy):
    """Its hidden states are NaN in the steps of `broken`, which count from 1."""

    def __init__(self, broken):
        super().__init__()
        self.broken, self.step = broken, 0

    def hidden(self, batch):
        self.step += 1
        return super().hidden(batch) * (math.nan if self.step in self.broken else 1.0)


def train(policy, folder, **options):
    """One pack a step, 10 steps."""
    settings = config(batch_size=2, max_tokens=512, **options)
    with Track(folder, progress=False) as track:
        return trainer.train(policy, some(20), settings, seed=0, track=track, checkpoint_dir=folder / "checkpoints")


def test_a_training_stops_after_so_many_skipped_steps_in_a_row_with_a_checkpoint(tmp_path):
    policy = Breaks({2, 4, 5, 6})
    with pytest.raises(TrainingError, match=r"3 steps in a row were skipped, up to step 6.*checkpoint-6.*train\.lr"):
        train(policy, tmp_path, max_skipped=3)
    assert policy.step == 6
    assert checkpoint.found(tmp_path / "checkpoints")[0].name == "checkpoint-6"
    batches = sorted(path.name for path in (tmp_path / "skipped").iterdir())
    assert batches == [f"train-step-{step}.jsonl" for step in (2, 4, 5, 6)]
    head, *rows = map(json.loads, (tmp_path / "skipped" / batches[0]).read_text().splitlines())
    assert (head["step"], head["loss"], len(rows)) == (2, "nan", 2)
    assert all(row["token_ids"] and row["turns"] for row in rows)

    healthy = Policy()  # the same command, when the cause is gone
    stats = train(healthy, tmp_path, max_skipped=3)
    assert (stats.steps, stats.skipped, stats.skipped_in_a_row) == (10, 4, 0)
    assert all(bool(p.isfinite().all()) for p in healthy.model.parameters())


def test_skipped_steps_that_are_not_in_a_row_do_not_stop_it(tmp_path):
    stats = train(Breaks({1, 3, 5, 7, 9}), tmp_path, max_skipped=2)
    assert (stats.steps, stats.skipped) == (10, 5)


def test_a_training_whose_steps_were_all_skipped_fails(tmp_path):
    with pytest.raises(TrainingError, match="all 10 steps were skipped"):
        train(Breaks(range(99)), tmp_path, max_skipped=50)


def test_gradient_norms_that_jump_few_effective_samples_and_a_sampler_far_off_are_told_of():
    guards = Guards(10.0, 0.05, 1.0)
    for _ in range(LEAST):
        assert guards.warnings(StepResult(1.0, 2.0, False), 0.5, 0.01) == []
    [jump] = guards.warnings(StepResult(1.0, 20.1, False), 0.5)
    assert jump == "the gradient norm jumps to 20.1, from a median of 2"
    [few] = guards.warnings(StepResult(1.0, 2.0, False), 0.01)
    assert few.startswith("the effective sample size is 1.0% of the batch")
    assert guards.warnings(StepResult(1.0, 2.0, False), 0.01) == []  # said once
    for gap in (1.5, -1.5, math.nan):
        [off] = guards.warnings(StepResult(1.0, 2.0, False), sampler_kl=gap)
        assert "nats a token from the policy's" in off
    assert ratio_warnings(0.9, 1.0, clipped=0.5) == []
    off, clipped = ratio_warnings(1.1, 1.0, clipped=0.51)
    assert off.startswith("the sampler's log-probs are +1.1 nats a token")
    assert clipped.startswith("the importance ratios explode: 51% of the trajectories")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    policy = load_policy(ModelConfig(hidden_size=16, layers=1, heads=2))
    policy.save(folder)
    return policy, folder


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused_when_they_are_loaded(value, model, tmp_path):
    policy = load_policy(ModelConfig(hidden_size=16, layers=1, heads=2))
    with torch.no_grad():
        policy.model.model.layers[0].mlp.up_proj.weight[0, 0] = value
    policy.save(tmp_path / "m")
    with pytest.raises(ValueError, match=r"up_proj"):
        load_policy(ModelConfig(path=str(tmp_path / "m")))


def row(number, **changed):
    """A row of text alone."""
    said = [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": "a"}]
    there = {"prompt_id": f"p{number}", "messages": said, "verifier": {"t1": 1}, "turn_rewards": {"t1": 1.0}}
    return {**there, "format_penalty": 0.0, "t_star": 1, **changed}


def sampled(policy, number, text="a", **changed):
    """The same with token ids, which spell `text`, and log-probs."""
    ids = policy.tokenizer(f"<|im_start|>user\nq{number}<|im_end|>\n<|im_start|>assistant\n{text}<|im_end|>")[
        "input_ids"
    ]
    own = len(policy.tokenizer(f"{text}<|im_end|>")["input_ids"])
    mask = [0] * (len(ids) - own) + [1] * own
    parts = {
        "token_ids": ids,
        "loss_mask": mask,
        "logprobs": [-0.5 * on for on in mask],
        "turn_starts": [len(ids) - own],
    }
    return row(number, **{**parts, **changed})


def fit(folder, model, rows):
    """Exit status of `drift train` on these rows."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    settings = {"name": "t", "output_dir": str(folder), "train": {"batch_size": 2, "max_tokens": 64, "max_length": 64}}
    settings["rollout"] = {"max_new_tokens": 8}
    (folder / "c.yaml").write_text(json.dumps({**settings, "track": {"progress": False}}))
    files = ["--model", str(model), "--rollouts", str(folder / "rows.jsonl"), "--out", str(folder / "out")]
    return cli.main(["train", str(folder / "c.yaml"), *files])


def test_a_row_whose_ids_do_not_spell_its_message_is_refused_by_line(model, tmp_path, capsys):
    policy, folder = model
    assert fit(tmp_path, folder, [sampled(policy, 0), row(1), sampled(policy, 2, "b")]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "rows.jsonl:3: token_ids of assistant message 1 decode to 'b', and the message is 'a'" in said
    assert "Traceback" not in said
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_rows_with_and_without_log_probs_train_together(model, tmp_path):
    policy, folder = model
    bare = sampled(policy, 2)
    del bare["logprobs"]
    assert fit(tmp_path, folder, [sampled(policy, 0), row(1), bare, sampled(policy, 3)]) == 0
    steps = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [math.isfinite(step["train/loss"]) for step in steps if "train/loss" in step] == [True, True]


def test_a_command_whose_steps_were_all_skipped_does_not_say_that_it_is_done(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(trainer, "accumulate", lambda *_: torch.tensor(math.nan))
    assert fit(tmp_path, model[1], [row(number) for number in range(6)]) == 1
    heard = capsys.readouterr()
    assert "all 3 steps were skipped" in " ".join(heard.err.split())
    assert "the model is in" not in heard.out
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_log_prob_above_zero_is_refused_by_line(model, tmp_path, capsys):
    policy, folder = model
    positive = sampled(policy, 1)
    positive["logprobs"][-1] = 0.25
    assert fit(tmp_path, folder, [row(0), positive]) == 1
    assert "rows.jsonl:2: logprobs[" in " ".join(capsys.readouterr().err.split())
