"""The README and the documentation site: short, without dead links, true to the schema, and with examples that run."""

import re
import runpy
from pathlib import Path

import pytest
import torch
from tiny_policy import SHAPE, VOCAB, causal_lm
from transformers.models.qwen2 import Qwen2Config

import drift_kernels as dk
from drift.config.load import _known_paths
from drift.config.schema import Config, TrainConfig

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))


def test_the_readme_is_at_most_700_words():
    assert len((ROOT / "README.md").read_text().split()) <= 700


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES], ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        generated = target in ("api.md", "settings.md")
        assert "://" in target or generated or (page.parent / target).exists(), target


def test_every_page_is_in_the_sites_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in PAGES:
        assert f" {page.name}" in navigation, page.name


def test_the_settings_page_has_every_setting_with_its_default_and_comment():
    page = runpy.run_path(str(ROOT / "docs/_site/pages.py"))["settings_page"]()
    tables = {title: body for title, body in re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)}
    for path in _known_paths(Config):
        section, _, key = path.rpartition(".")
        assert f"`{key}`" in (tables[section] if section else tables.get("A", page)), path
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*)$", tables["train"], re.MULTILINE))
    assert set(rows) == set(TrainConfig.model_fields)
    assert "`5e-06`" in rows["lr"]
    assert "with online: 1e-5" in rows["lr"]


def test_the_api_page_names_every_public_op():
    page = runpy.run_path(str(ROOT / "docs/_site/pages.py"))["api_page"]()
    assert sorted(re.findall(r"^::: drift_kernels\.(\w+)$", page, re.MULTILINE)) == sorted(dk.__all__)


def test_the_grpo_example_of_the_kernels_page_is_a_whole_step():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/loop.md").read_text(), re.DOTALL)
    generator = torch.Generator().manual_seed(0)
    lengths, ids = [6, 5, 7, 6], torch.randint(3, VOCAB, (24,), generator=generator)
    model = causal_lm(Qwen2Config(**SHAPE, initializer_range=0.2), "sdpa")
    sampled = torch.cat([torch.arange(n) >= 2 for n in lengths])
    sampler = torch.zeros(24)
    for part, piece in zip(ids.split(lengths), sampler.split(lengths)):
        piece[1:] = model(part[None, :-1]).logits[0].log_softmax(-1).gather(1, part[1:, None])[:, 0].detach()
    names = {"model": model, "input_ids": ids, "sampled": sampled, "sampler_logprobs": sampler}
    names |= {"rewards": torch.tensor([1.0, 0.0, 1.0, 1.0]), "groups": torch.tensor([0, 0, 1, 1])}
    names |= {
        "cu_seqlens": torch.tensor([0, 6, 11, 18, 24]),
        "position_ids": torch.cat([torch.arange(n) for n in lengths]),
    }
    exec(blocks[1], names)
    torch.testing.assert_close(names["advantages"], torch.tensor([0.5, -0.5, 0.0, 0.0]) / (0.5**0.5 + 1e-4))
    total, count = names["out"].metrics["ratio"]
    assert abs(total / count - 1) < 1e-4
    assert model.lm_head.weight.grad.abs().sum() > 0
