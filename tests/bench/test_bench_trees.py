"""The benchmark of prefix trees at a size of milliseconds: its token counts, its gate, and its table."""

import json

import pytest
import torch

from bench import trees
from drift.packing import pack, tree

SMALL = trees.SMALL
COUNTS = {"template": (82, 400), "long": (85, 160), "short": (82, 112), "branches": (46, 112), "apart": (112, 112)}


@pytest.mark.parametrize("name", trees.CASES)
def test_a_group_of_sixteen_has_the_tokens_that_its_turns_and_prompts_count(name):
    rows = trees.group(trees.CASES[name], 16, SMALL)
    [shared], [flat] = (lay(rows, 10_000, turns="assistant") for lay in (tree, pack))
    assert (len(shared.input_ids) / SMALL.t, len(flat.input_ids) / SMALL.t) == COUNTS[name]
    assert len(shared.active) == len(flat.active) == 16 * 5 * 3 * SMALL.t // 4


@pytest.mark.parametrize("name", ["template", "branches"])
def test_every_way_has_the_same_gradient(name):
    runs = {way: trees.make(way, trees.CASES[name], 4, SMALL, trees.ROOM) for way in trees.WAYS}
    found = {way: run.gradient() for way, run in runs.items()}
    for way in trees.WAYS:
        assert trees.difference(found[way], found["unshared"]) == "", way
    assert runs["shared"].tokens < runs["unshared"].tokens <= runs["recipe"].tokens
    assert all(seconds > 0 for seconds in runs["recipe"].step().values())


def test_a_way_with_another_gradient_is_named():
    plain = {"a": torch.ones(3), "b": torch.ones(2)}
    assert "b differs by 1.0e-02" in trees.difference(plain | {"b": torch.tensor([1.0, 1.01])}, plain)
    assert "'b'" in trees.difference({"a": plain["a"]}, plain)


def test_the_table_has_a_line_for_every_case_and_size(tmp_path, capsys):
    which = ["--ways", "shared", "unshared", "--cases", "long", "apart", "--n", "2", "4"]
    found = trees.main(["--smoke", "--no-memory", "--rounds", "1", *which, "--out", str(tmp_path)])
    assert found["packing"]["tree"] > 1e6
    assert [(case["name"], case["n"]) for case in found["cases"]] == [(c, n) for c in ("long", "apart") for n in (2, 4)]
    assert json.loads((tmp_path / "trees-smoke.json").read_text())["cases"] == found["cases"]
    table = (tmp_path / "trees-smoke.md").read_text()
    assert "| nothing shared | 4 | 112 ÷ 112 = 1.00 |" in table
    assert table in capsys.readouterr().out
