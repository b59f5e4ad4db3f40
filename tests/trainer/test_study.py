import json

import numpy as np
import pytest
from fake_run import make_run
from rich.console import Console

from drift.config import load, parse
from drift.jobs import study as study_module
from drift.report.intervals import bootstrap, interval, mean_stderr, paired_difference


def test_paired_difference_is_the_textbook_one():
    ours, theirs = [0.60, 0.70, 0.65, 0.80], [0.50, 0.65, 0.60, 0.60]
    difference = paired_difference(ours, theirs)
    gaps = np.array(ours) - np.array(theirs)
    assert difference.mean == pytest.approx(gaps.mean())
    assert difference.stderr == pytest.approx(np.sqrt(((gaps - gaps.mean()) ** 2).sum() / 3 / 4))
    assert difference.beyond_twice == (gaps.mean() > 2 * difference.stderr)
    assert not paired_difference(theirs, ours).beyond_twice


def test_one_seed_has_no_error_and_none_is_refused():
    assert np.isnan(mean_stderr([0.5]).stderr)
    assert not mean_stderr([0.5]).beyond_twice
    with pytest.raises(ValueError, match="empty"):
        mean_stderr([])
    with pytest.raises(ValueError, match="2 seeds and theirs 1"):
        paired_difference([0.1, 0.2], [0.1])


def naive_bootstrap(table, replicates, seed):
    generator = np.random.default_rng(seed)
    seeds, problems = table.shape
    drawn = []
    for _ in range(replicates):
        rows = generator.integers(0, seeds, seeds)
        columns = generator.integers(0, problems, problems)
        drawn.append(table[np.ix_(rows, columns)].mean())
    return np.array(drawn)


def test_the_bootstrap_agrees_with_plain_resampling():
    generator = np.random.default_rng(3)
    hard = generator.random((1, 80)) + 0.2 * generator.random((6, 1))
    table = generator.random((6, 80)) < hard / 1.2
    drawn = bootstrap({"a": table}, replicates=4000)["a"]
    naive = naive_bootstrap(table, 4000, seed=9)
    assert drawn.mean() == pytest.approx(table.mean(), abs=0.003)
    assert drawn.std() == pytest.approx(naive.std(), rel=0.06)
    assert interval(drawn) == pytest.approx(interval(naive), abs=0.01)


def test_the_bootstrap_varies_over_seeds_and_over_problems():
    seeds_differ = np.repeat(np.array([[0], [1], [0], [1]]), 50, axis=1)
    problems_differ = np.repeat(np.array([[0, 1] * 25]), 4, axis=0)
    drawn_seeds = bootstrap({"a": seeds_differ}, 4000)["a"]
    drawn_problems = bootstrap({"a": problems_differ}, 4000)["a"]
    assert drawn_seeds.std() == pytest.approx(np.sqrt(0.25 / 4), rel=0.06)
    assert drawn_problems.std() == pytest.approx(np.sqrt(0.25 / 50), rel=0.06)


def test_an_interval_leaves_as_much_below_as_above():
    assert interval(np.arange(1001.0), level=0.9) == pytest.approx((50, 950))


def test_arms_share_their_draws_and_chunks_do_not_show(monkeypatch):
    table = np.random.default_rng(0).random((5, 40)) < 0.4
    drawn = bootstrap({"a": table, "b": ~table}, 500, seed=4)
    np.testing.assert_allclose(drawn["a"] + drawn["b"], 1.0)
    again = bootstrap({"a": table}, 500, seed=4)
    np.testing.assert_array_equal(again["a"], drawn["a"])
    assert not np.array_equal(bootstrap({"a": table}, 500, seed=5)["a"], drawn["a"])
    wide = np.ones((2, 3_000_000), dtype=bool)
    assert (bootstrap({"a": wide}, 3)["a"] == 1.0).all()


@pytest.mark.parametrize(
    "tables", [{"a": np.ones((2, 3)), "b": np.ones((2, 4))}, {"a": np.ones(3)}, {"a": np.ones((0, 3))}]
)
def test_the_bootstrap_refuses_other_shapes(tables):
    with pytest.raises(ValueError, match="seeds, problems"):
        bootstrap(tables, 10)


def test_a_study_of_a_folder(tmp_path):
    folder = make_run(tmp_path / "study", seeds=6, prompts=3)
    result = study_module.analyse(folder, replicates=2000)
    summary = json.loads((folder / "summary.json").read_text())["results"]
    for arm, measures in result["arms"].items():
        for name, key in (("multi_at_5", "multi_at_5"), ("single", "single")):
            values = measures[name]
            assert values["mean"] == pytest.approx(np.mean(summary[arm][key]))
            assert values["low"] < values["mean"] < values["high"]
    gaps = np.array(summary["drift"]["multi_at_5"]) - np.array(summary["uniform"]["multi_at_5"])
    ahead = result["differences"]["drift - uniform"]["multi_at_5"]
    stderr = gaps.std(ddof=1) / np.sqrt(6)
    assert (ahead["mean"], ahead["stderr"]) == pytest.approx((gaps.mean(), stderr))
    assert ahead["beyond_twice_stderr"] == (gaps.mean() > 2 * stderr)
    assert ahead["low"] < ahead["mean"] < ahead["high"]
    assert result["problems"] == 1000
    assert result["settings"]["beta"] == 0.1
    assert result["settings"]["ess"] == pytest.approx(0.225)
    assert json.loads((folder / "study.json").read_text()) == result
    assert (folder / "study.svg").read_text().startswith("<?xml")
    text = (folder / "study.md").read_text()
    assert f"| drift − uniform | {100 * gaps.mean():+.1f} ± {100 * stderr:.1f} | yes |" in text
    assert "6 seeds, 1000 held-out problems" in text
    before = (folder / "study.json").read_bytes()
    study_module.analyse(folder, replicates=2000)
    assert (folder / "study.json").read_bytes() == before


def test_a_study_is_shown_in_a_terminal_of_80_columns(tmp_path):
    result = study_module.analyse(make_run(tmp_path / "study", seeds=3, prompts=2), replicates=200)
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(study_module.table(result))
    shown = console.export_text()
    assert "…" not in shown.replace(" … ", " ")
    assert "drift" in shown


def test_a_study_needs_two_seeds(tmp_path):
    with pytest.raises(ValueError, match="at least two"):
        study_module.study(parse({"name": "x", "seeds": [3]}))
    with pytest.raises(ValueError, match="at least two"):
        study_module.analyse(make_run(tmp_path / "one", seeds=1, prompts=2))


def test_seeds_on_other_problems_are_refused(tmp_path):
    folder = make_run(tmp_path / "study", seeds=2, prompts=2)
    (folder / "seed-1" / "eval-drift.json").write_text(json.dumps({"solved_at": [1, 0, 2]}))
    with pytest.raises(ValueError, match=r"eval-drift.json.*\[3, 1000\]"):
        study_module.analyse(folder)


def test_the_study_runs_the_config_first(tmp_path, monkeypatch):
    config = parse({"name": "s", "output_dir": str(tmp_path), "seeds": [0, 1]})
    monkeypatch.setattr(study_module.run, "run", lambda given: make_run(tmp_path / given.name, seeds=2, prompts=2))
    assert study_module.study(config)["seeds"] == [0, 1]


def test_study_yaml_is_the_quickstart_over_ten_seeds():
    quick, study = (load(f"configs/{name}.yaml") for name in ("quickstart", "study"))
    assert study.seeds == list(range(10))
    assert study.model_copy(update={"name": quick.name, "seeds": quick.seeds}) == quick
