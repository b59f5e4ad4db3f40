"""Secrets come from the environment alone and stay there; no model folder's own code is run."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from fake_vllm_server import StandIn
from killed_runs import config_file
from peft import LoraConfig, get_peft_model
from tiny_policy import LORA, SHAPE, causal_lm
from transformers.models.qwen2 import Qwen2Config

import drift
from drift import cli
from drift.config import ModelConfig, load
from drift.model import tiny
from drift.model.policy import load_policy
from drift.scoring.sandbox import _environment

KEY = "sk-not-for-anybody-else"
SOURCES = sorted(Path(drift.__file__).parent.rglob("*.py"))
REMOTE = ("AutoTokenizer", "AutoModelForCausalLM", "AutoConfig", "PeftModel", "AutoModel", "AutoProcessor")


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_key_reaches_the_server_and_no_file_and_no_message(tmp_path, monkeypatch, capfd):
    pytest.importorskip("httpcore2")
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    engine = {"kind": "vllm", "url": "http://127.0.0.1:1", "wait": 1.0, "retries": 1, "timeout": 20.0}
    online = {"algorithm": "drift", "steps": 2, "prompts": 2, "curriculum": {"warmup_steps": 1}}
    blank = load(config_file(tmp_path, "online", engine=engine, online=online), [])
    served = load_policy(blank.model, seed=1).model
    served.set_attn_implementation("sdpa")
    with StandIn(served) as server:
        file = config_file(tmp_path, "online", engine={**engine, "url": server.url}, online=online)
        assert cli.main(["run", str(file)]) == 0
        assert server.keys
        assert set(server.keys) == {f"Bearer {KEY}"}
        server.lacks.add("ids")  # an error that shows what was asked
        assert cli.main(["run", str(file), "name=refused"]) == 1
    assert cli.main(["run", str(file), "name=nobody"]) == 1
    told = capfd.readouterr()
    assert "it lacks what training needs" in told.err
    assert KEY not in told.out + told.err
    files = everything(tmp_path)
    assert {"online/config.yaml", "online/metrics.jsonl", "online/report.html"} <= files.keys()
    assert [name for name, content in files.items() if KEY.encode() in content] == []


def test_the_processes_that_score_model_text_get_no_secret(monkeypatch):
    for name in ("VLLM_API_KEY", "WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, KEY)
    assert KEY not in json.dumps(_environment())


def test_an_address_with_a_password_is_refused_before_anything_is_written(tmp_path, capfd):
    file = config_file(tmp_path, "online")
    assert cli.main(["run", str(file), f"engine.url=http://me:{KEY}@host:8000"]) == 2
    assert KEY not in "".join(capfd.readouterr())
    assert not (tmp_path / "online").exists()
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "engine": {"url": f"http://me:{KEY}@host:8000"}}))
    assert cli.main(["run", str(file)]) == 2
    said = "".join(capfd.readouterr())
    assert "VLLM_API_KEY" in said
    assert KEY not in said


def test_adapters_of_a_folder_with_code_of_its_own_are_refused_without_a_question(tmp_path, monkeypatch):
    base, adapters = tmp_path / "base", tmp_path / "adapters"
    tiny.build_tokenizer().save_pretrained(base)
    auto = {"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.Odd"}
    (base / "config.json").write_text(json.dumps({"model_type": "odd", "auto_map": auto}))
    (base / "odd.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    model = get_peft_model(causal_lm(Qwen2Config(**SHAPE), "sdpa"), LoraConfig(**LORA))
    model.save_pretrained(adapters)
    tiny.build_tokenizer().save_pretrained(adapters)
    settings = json.loads((adapters / "adapter_config.json").read_text())
    (adapters / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": str(base)}))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on stdin"))
    with pytest.raises(ValueError, match=r"the model at .* cannot be read"):
        load_policy(ModelConfig(path=str(adapters)))
    assert not (tmp_path / "ran").exists()


def loads(source: str) -> list[tuple[int, str, bool]]:
    """(line, class, whether trust_remote_code=False is passed) of each call that may run a model folder's code."""
    tree, found = ast.parse(source), []
    closed = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
        for key, value in zip(node.value.keys, node.value.values)
        if isinstance(key, ast.Constant) and key.value == "trust_remote_code" and ast.unparse(value) == "False"
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "from_pretrained":
            owner = ast.unparse(node.func.value)
            passed = {word.arg or ast.unparse(word.value): ast.unparse(word.value) for word in node.keywords}
            found.append(
                (node.lineno, owner, passed.get("trust_remote_code") == "False" or bool(closed & passed.keys()))
            )
    return found


def test_every_load_of_a_model_folder_says_that_its_code_is_not_run():
    calls = [(path.name, *call) for path in SOURCES for call in loads(path.read_text(encoding="utf-8"))]
    assert {"AutoTokenizer", "AutoModelForCausalLM", "PeftModel", "AutoConfig"} <= {owner for _, _, owner, _ in calls}
    assert [call for call in calls if call[2] in REMOTE and not call[3]] == []
    assert loads("AutoTokenizer.from_pretrained(path)") == [(1, "AutoTokenizer", False)]
