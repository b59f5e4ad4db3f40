"""`drift report A B`, and what the page says about runs that learnt nothing or do not route."""

import shutil
from pathlib import Path

import pytest
import yaml
from fake_online_run import make_online_run
from fake_run import make_run

from drift import cli, report
from drift.report import online, online_files, plots
from drift.report.page import _about, _nothing_learnt
from drift.report.records import read


@pytest.fixture
def pair(tmp_path, monkeypatch):
    """Two folders of the same run; no page is drawn."""
    monkeypatch.setattr(report, "write", lambda folder: f"{folder}/report.html")
    first = make_run(tmp_path / "first", prompts=2)
    shutil.copytree(first, tmp_path / "second")
    return str(first), str(tmp_path / "second")


def test_two_runs_are_compared_by_results_and_differing_settings(pair, capsys):
    config = Path(pair[1]) / "config.yaml"
    raw = yaml.safe_load(config.read_text())
    raw["train"] = raw.get("train", {}) | {"grad_clip": 0.125}
    config.write_text(yaml.safe_dump(raw))
    assert cli.main(["report", *pair]) == 0
    shown = capsys.readouterr().out
    assert shown.count("report.html") == 2
    assert shown.count("success_only") == 2
    assert "train.grad_clip" in shown
    assert "0.125" in shown
    assert "rollout.n" not in shown
    assert cli.main(["report", pair[0], "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_runs_of_equal_settings_show_no_settings(pair, capsys):
    assert cli.main(["report", *pair]) == 0
    assert "settings that differ" not in capsys.readouterr().out


@pytest.mark.parametrize(("algorithm", "routes"), [("grpo", False), ("srpo", False), ("drift", True)])
def test_only_an_algorithm_that_routes_by_difficulty_shows_the_routers_difficulty(algorithm, routes, tmp_path):
    folder = make_online_run(tmp_path / "run", algorithm=algorithm, seeds=1, stored=False)
    records = read(folder, rollouts=False)
    page = online.learning(records, online_files.read(records))
    assert "Learning, step by step" in page
    assert ("How hard the router finds them" in page) == routes


def test_a_run_whose_gradient_was_always_zero_says_that_nothing_was_learnt(tmp_path):
    records = read(make_run(tmp_path / "run", prompts=2), rollouts=False)
    assert _nothing_learnt(records) == ""
    records.curves["grad_norm"]["seed-0/grpo"] = [(1, 0.0), (2, 0.0)]
    said = _nothing_learnt(records)
    assert "Nothing was learnt: the gradient was 0 in every step" in said
    assert "<li>seed-0/grpo: 2 steps</li>" in said


def test_curves_that_are_zero_throughout_say_so():
    assert "0 in every step" in plots.lines("Repeat rate", {"repeats": ("red", [[(1, 0.0), (2, 0.0)]])}, shares=True)
    assert "0 in every step" not in plots.lines(
        "Repeat rate", {"repeats": ("red", [[(1, 0.0), (2, 0.1)]])}, shares=True
    )


def test_losses_of_arms_are_said_not_to_be_comparable():
    curves = {f"seed-0/{arm}": [(1, 1.0)] for arm in ("uniform", "success_only", "drift")}
    assert "cannot be compared" in _about("loss", curves)
    assert "lie on each other" in _about("ess", curves)
    assert _about("lr", curves) == _about("loss", {"seed-0/drift": [(1, 1.0)]}) == ""
