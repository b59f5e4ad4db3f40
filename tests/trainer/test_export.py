"""`drift export`: transformers loads it and gives the logits of what was trained, bit for bit; what it refuses."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from drift import cli, files
from drift.config import LoRAConfig, ModelConfig, dump, parse
from drift.model.policy import load_policy

SMALL = {"hidden_size": 32, "layers": 2, "heads": 2}
IDS = torch.arange(3, 19)[None]


def changed(policy):
    with torch.no_grad():
        for index, parameter in enumerate(p for p in policy.model.parameters() if p.requires_grad):
            parameter.add_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)).to(parameter) / 20
            )
    return policy


def run_of(folder, policy, **model):
    """A run's folder around the policy that it trained, with files beside it that are no part of the model."""
    config = parse({"name": "run", "output_dir": str(folder), "seeds": [3, 4], "model": {**SMALL, **model}})
    run = folder / "run"
    policy.save(run / "seed-3" / "drift")
    (run / "config.yaml").write_text(dump(config))
    (run / "seed-3" / "drift" / "rollouts.jsonl").write_text("{}\n")
    return run


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def read(folder, like, loader=AutoModelForCausalLM):
    return loader.from_pretrained(folder, attn_implementation=like.causal_lm.config._attn_implementation)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shard_size", [[], ["--shard-size", "40KB"]])
def test_a_whole_model_has_the_logits_that_were_trained(dtype, shard_size, tmp_path, capsys):
    policy = changed(load_policy(ModelConfig(**SMALL, dtype=dtype), seed=1))
    run = run_of(tmp_path, policy, dtype=dtype)
    assert cli.main(["export", str(run), *shard_size]) == 0
    out = run / "export"
    assert capsys.readouterr().out == f"{out}\n"
    loaded = read(out, policy)
    assert loaded.dtype == policy.causal_lm.dtype
    assert torch.equal(logits(loaded), logits(policy.model))
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("12 + 3")["input_ids"] == policy.tokenizer("12 + 3")["input_ids"]
    assert tokenizer.chat_template == policy.tokenizer.chat_template
    weights = list(out.glob("*.safetensors"))
    assert (len(weights) > 1) == bool(shard_size)
    assert files.damage(out) is None
    assert not (out / "rollouts.jsonl").exists()


@pytest.fixture
def adapted(tmp_path):
    """(policy with adapters, folder of its run)."""
    base = tmp_path / "base"
    changed(load_policy(ModelConfig(**SMALL), seed=1)).save(base)
    policy = changed(load_policy(ModelConfig(path=str(base), lora=LoRAConfig(rank=2, alpha=4.0)), seed=2))
    return policy, run_of(tmp_path, policy, path=str(base), lora={"rank": 2, "alpha": 4.0})


def test_adapters_alone_have_the_logits_that_were_trained(adapted, tmp_path):
    policy, run = adapted
    assert cli.main(["export", str(run), "--out", str(tmp_path / "out")]) == 0
    model = PeftModel.from_pretrained(read(tmp_path / "base", policy), tmp_path / "out")
    assert torch.equal(logits(model), logits(policy.model))
    assert not list((tmp_path / "out").glob("model*"))


def test_merged_adapters_have_the_logits_of_merged_weights(adapted, tmp_path):
    policy, run = adapted
    assert cli.main(["export", str(run), "--merge-lora", "--out", str(tmp_path / "out")]) == 0
    assert not list((tmp_path / "out").glob("adapter*"))
    loaded, before = read(tmp_path / "out", policy), logits(policy.model)
    assert torch.equal(logits(loaded), logits(policy.model.merge_and_unload()))
    torch.testing.assert_close(logits(loaded), before, rtol=1e-4, atol=1e-4)
    assert not torch.equal(before, logits(read(tmp_path / "base", policy)))


def test_one_trained_models_folder_is_a_run_too(tmp_path):
    policy = load_policy(ModelConfig(**SMALL), seed=1)
    policy.save(tmp_path / "trained")
    assert cli.main(["export", str(tmp_path / "trained"), "--out", str(tmp_path / "out")]) == 0
    assert torch.equal(logits(read(tmp_path / "out", policy)), logits(policy.model))


def test_what_cannot_be_exported_is_refused(tmp_path, capsys):
    def refused(*arguments):
        assert cli.main(["export", *map(str, arguments)]) == 1
        return capsys.readouterr().err

    assert "is not a folder" in refused(tmp_path / "nobody")
    (tmp_path / "empty").mkdir()
    assert "it holds no model" in refused(tmp_path / "empty")
    (tmp_path / "half" / "checkpoints" / "checkpoint-4").mkdir(parents=True)
    assert "its training is not finished (there is " in refused(tmp_path / "half")
    run = run_of(tmp_path, load_policy(ModelConfig(**SMALL), seed=1))
    assert "--merge-lora: " in refused(run, "--merge-lora")
    assert "is there already" in refused(run, "--out", tmp_path / "half")
    (run / "seed-3" / "drift" / "model.safetensors").write_bytes(b"short")
    assert "is damaged: model.safetensors has 5 bytes" in refused(run)
    (run / "seed-3" / "drift" / files.MANIFEST).unlink()
    assert "is not finished" in refused(run)
    assert not (run / "export").exists()


def test_adapters_of_a_model_that_is_kept_nowhere_cannot_be_merged(tmp_path, capsys):
    policy = load_policy(ModelConfig(**SMALL, lora=LoRAConfig(rank=2, alpha=4.0)), seed=1)
    run = run_of(tmp_path, policy, lora={"rank": 2, "alpha": 4.0})
    named = json.loads((run / "seed-3/drift/adapter_config.json").read_text())["base_model_name_or_path"]
    assert not named
    assert cli.main(["export", str(run), "--merge-lora"]) == 1
    assert "does not say which base" in capsys.readouterr().err
