"""The study: that its variants are what they say, what its tables are computed from, and a small one from end to end."""

from __future__ import annotations

import json
import math

import pytest

from bench import study


def row(name, values, seconds=10.0):
    return {"name": name, "group": "methods", "results": {"multi_at_5": values}, "seconds": seconds}


def test_variants_differ_and_share_what_they_should(tmp_path):
    configs = {v.name: study.config_of(v, tmp_path, 5, smoke=False) for v in study.VARIANTS}
    assert len({study.slug(v.folder) for v in study.VARIANTS}) == len({v.folder for v in study.VARIANTS})
    assert (
        len({config.model_dump_json(exclude={"name"}) for config in configs.values()}) == len(configs) - 2
    )  # three arms
    one = configs["GRPO"]
    for variant in study.VARIANTS:
        config = configs[variant.name]
        assert (config.task, config.model, config.warm_start, config.eval) == (
            one.task,
            one.model,
            one.warm_start,
            one.eval,
        )
        assert config.seeds == list(range(5 if variant.group == "methods" else 3))
        assert variant.arm in config.trained
        online = config.online
        sampled = online.steps * online.prompts if online else config.task.train_problems
        assert sampled * config.rollout.n == (2048 if "quarter" in variant.name else 8192)  # the same budget
    assert configs["B without warm-up"].online.curriculum.warmup_steps == 0
    assert configs["GRPO"].online.curriculum.warmup_steps == 0


def test_a_verdict_is_paired_and_bounded_by_students_t():
    grpo, other = [0.50, 0.60, 0.55], [0.52, 0.61, 0.59]
    [_, found] = study.verdicts([row("GRPO", grpo), row("other", other, seconds=2.5)], "multi_at_5")
    gaps = [b - a for a, b in zip(grpo, other)]
    mean = sum(gaps) / 3
    stderr = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / 2 / 3)
    assert found["mean"] == pytest.approx(mean)
    assert found["low"] == pytest.approx(mean - 2.920 * stderr)
    assert found["not_inferior"]
    assert found["time"] == 0.25
    [_, worse] = study.verdicts([row("GRPO", grpo), row("other", [v - 0.05 for v in grpo])], "multi_at_5")
    assert not worse["not_inferior"]
    [_, fewer] = study.verdicts([row("GRPO", grpo), row("other", other[:2])], "multi_at_5")
    assert fewer["mean"] == pytest.approx(sum(gaps[:2]) / 2)


def test_tables_go_between_the_marks(tmp_path):
    file = tmp_path / "study.md"
    file.write_text(f"before\n{study.BEGIN}\nold\n{study.END}\nafter\n")
    study.splice(file, "new")
    assert file.read_text() == f"before\n{study.BEGIN}\n\nnew\n\n{study.END}\nafter\n"
    file.write_text("no marks")
    with pytest.raises(ValueError, match="has no <!-- methods"):
        study.splice(file, "new")


@pytest.mark.timeout(600)
def test_a_small_one_from_end_to_end_and_again(tmp_path, capsys):
    arguments = ["--smoke", "--jobs", "1", "--out", str(tmp_path / "out")]
    result = study.main(arguments)
    assert [variant["name"] for variant in result["variants"]] == list(study.SMOKE_VARIANTS)
    assert json.loads((tmp_path / "out" / "study.json").read_text()) == result
    by_name = {variant["name"]: variant for variant in result["variants"]}
    assert all(variant["generated_tokens"] > 0 for variant in by_name.values())
    assert by_name["A"]["generated_tokens"] == by_name["A, β = 0.1"]["generated_tokens"]  # the same trajectories
    assert by_name["A"]["trained_tokens"] < by_name["A"]["generated_tokens"]  # last turns
    assert (tmp_path / "out" / "A-beta-0.1.yaml").exists()  # each run has a config of its own, dots in its name or not
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("*/seed-0/eval-*.json")}
    assert study.main(arguments) == result
    assert {file: file.stat().st_mtime_ns for file in before} == before


def test_a_run_that_fails_shows_the_end_of_its_log(tmp_path):
    variant = next(v for v in study.VARIANTS if v.name == "GRPO")
    config = study.config_of(variant, tmp_path, 2, smoke=True)
    broken = config.model_copy(update={"task": config.task.model_copy(update={"name": "no_such_generator"})})
    with pytest.raises(RuntimeError, match=r"(?s)GRPO: the run ended with \d.*no_such_generator"):
        study.perform([variant], {"GRPO": broken}, tmp_path, 1)
