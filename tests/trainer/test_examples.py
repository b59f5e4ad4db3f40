"""Every script in examples/ runs, and does what it says; so do the lines in the README."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_policy import SHAPE, VOCAB, causal_lm
from transformers.models.qwen2 import Qwen2Config

from drift import store
from drift.config import ModelConfig
from drift.model.policy import load_policy
from drift.types import Trajectory, Turn

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def test_drop_in_learns(capsys):
    losses = runpy.run_path(str(EXAMPLES / "drop_in.py"))["main"](steps=15)
    assert losses[-1] < 0.8 * losses[0]
    assert "loss" in capsys.readouterr().out


def test_the_notebook_runs_and_prints_as_shown(capsys):
    """Cell by cell in one namespace; the numbers that are stored in it may differ in their last digits."""
    cells, values = json.loads((EXAMPLES / "grpo_step.ipynb").read_text(encoding="utf-8"))["cells"], {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), values)
            shown = "".join(line for part in cell["outputs"] for line in part["text"])
            assert len(capsys.readouterr().out.splitlines()) == len(shown.splitlines())
    total, count = values["out"].metrics["ppo_kl"]
    assert total / count > 0.05  # ten updates away from the sampler


def test_the_slurm_script_is_one_that_bash_can_read():
    script = EXAMPLES / "slurm.sh"
    subprocess.run(["bash", "-n", script], check=True)
    named = re.findall(r"^  (--[\w-]+) ", script.read_text(), re.MULTILINE)
    torchrun = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--help"], capture_output=True, text=True
    ).stdout
    assert len(named) == 5
    assert all(option in torchrun for option in named)


def test_own_rollouts_are_read_weighed_packed_and_trained(tmp_path, capsys):
    main = runpy.run_path(str(EXAMPLES / "own_rollouts.py"))["main"]
    losses = main(str(tmp_path), steps=6)
    assert len(losses) == 6
    assert losses[-1] < 0.5 * losses[0]
    rows = store.read(tmp_path / "rollouts.jsonl")
    assert len(rows) == 16
    assert "16 rows, effective sample size 82%" in capsys.readouterr().out  # (1 + 1/e)² / 2(1 + 1/e²)

    model, other = str(tmp_path / "model"), tmp_path / "other"
    assert load_policy(ModelConfig(path=model)).hash() != load_policy(ModelConfig()).hash()
    again = main(str(other), str(tmp_path / "rollouts.jsonl"), model, steps=1)
    assert again[0] < losses[0]
    assert not (other / "rollouts.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "words"), [("own_scorer", "0 of 144 answers could not be read"), ("own_environment", "of 64 trajectories")]
)
def test_a_reward_function_and_an_environment_by_import_path(tmp_path, monkeypatch, capfd, name, words):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr("sys.argv", [name])
    assert runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](tmp_path) == 0
    assert words in capfd.readouterr().err
    name = name.replace("_", "-")
    rows = store.read(tmp_path / "runs" / name / "rollouts.jsonl")
    rewards = {reward for row in rows for reward in row["turn_rewards"].values()}
    assert any(0 < reward < 1 for reward in rewards)


def test_the_readme_trains_packed_sequences_as_if_each_were_alone():
    [code] = re.findall(r"```python\n(.*?)```", (EXAMPLES.parent / "README.md").read_text(), re.DOTALL)
    lengths, g = [5, 9, 3], torch.Generator().manual_seed(0)
    model = causal_lm(Qwen2Config(**SHAPE, initializer_range=0.2), "sdpa")
    ids = torch.randint(3, VOCAB, (17,), generator=g)
    sampled = torch.tensor([0, 0, 1, 1, 1, 0, 1, 1, 0, 0, 1, 1, 1, 1, 0, 0, 1]).bool()
    advantages, sampler_logprobs = torch.tensor([1.0, -0.5, 2.0]), -2.5 + torch.rand(17, generator=g)

    expected = torch.zeros(())
    for part, of, old, advantage in zip(*(t.split(lengths) for t in (ids, sampled, sampler_logprobs)), advantages):
        logp = model(part[None, :-1]).logits[0].log_softmax(-1).gather(1, part[1:, None])[:, 0]
        ratio = (logp - old[1:]).exp()
        loss = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
        expected = expected + loss[of[1:]].sum() / 10
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    names = {"model": model, "input_ids": ids[None], "sampled": sampled, "advantages": advantages}
    names["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
    names |= {
        "cu_seqlens": torch.tensor([0, 5, 14, 17]),
        "sampler_logprobs": sampler_logprobs,
        "global_token_count": 10,
    }
    exec(code, names)
    torch.testing.assert_close(names["out"].loss, expected)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=1e-6)


def test_the_packing_page_trains_on_prefix_trees_as_if_each_trajectory_were_alone():
    [code] = re.findall(r"```python\n(.*?)```", (EXAMPLES.parent / "docs/packing.md").read_text(), re.DOTALL)
    begin = [3, 4, 5, 6, 7]
    rows = [[*begin, 8, 9, 10], [*begin, 8, 9, 11, 12], [*begin, 13], [*begin, 8, 9, 10]]
    trajectories = [Trajectory("p", ids, [Turn(5, len(ids))], weight=1.0 + i, index=i) for i, ids in enumerate(rows)]
    shape = Qwen2Config(**SHAPE, initializer_range=0.2)
    seen, expected = [], causal_lm(shape, "sdpa")
    loss = torch.zeros(())
    for one in trajectories:
        logp = expected(torch.tensor([one.token_ids[:-1]])).logits[0].log_softmax(-1)
        said = logp[4:].gather(1, torch.tensor(one.token_ids[5:])[:, None])
        loss = loss - one.weight * said.mean() / 4
    loss.backward()

    class Watch(torch.optim.AdamW):
        def step(self):
            seen.extend(p.grad.clone() for group in self.param_groups for p in group["params"])

    real, torch.optim.AdamW = torch.optim.AdamW, Watch
    try:
        torch.manual_seed(0)
        names = {"config": shape, "trajectories": trajectories}
        exec(code, names)
    finally:
        torch.optim.AdamW = real
    assert len(names["batch"].input_ids) == 11
    torch.testing.assert_close(names["loss"].detach(), loss.detach())
    for found, p in zip(seen, expected.parameters(), strict=True):
        torch.testing.assert_close(found, p.grad, rtol=1e-4, atol=1e-6)
