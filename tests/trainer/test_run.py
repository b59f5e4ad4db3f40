"""The whole job on a tiny task: its files, its resumption after a kill, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from scripted_engine import quarters

from drift import store
from drift.config import ConfigError, dump, load, parse
from drift.jobs import run as module
from drift.jobs import stages
from drift.jobs.folder import RunError, claim
from drift.jobs.run import run, steps_of
from drift.model.policy import load_policy
from drift.returns import weigh
from drift.tasks import TaskError

ARMS = ("base", "uniform", "success_only", "drift")


def changed(config, **sections):
    values = {
        name: getattr(config, name).model_copy(update=new) if isinstance(new, dict) else new
        for name, new in sections.items()
    }
    return config.model_copy(update=values)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(config, folder, summary) of a run that was let through."""
    config = quarters(tmp_path_factory.mktemp("whole"))
    return config, Path(config.output_dir) / config.name, run(config)


def test_summary_and_files(whole):
    config, folder, summary = whole
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert set(summary["results"]) == set(ARMS)
    for arm in ARMS:
        of_arm = summary["results"][arm]
        for number, seed in enumerate(config.seeds):
            solved = json.loads((folder / f"seed-{seed}" / f"eval-{arm}.json").read_text())["solved_at"]
            assert len(solved) == config.task.eval_problems
            by_turn = [sum(0 < at <= turn for at in solved) / len(solved) for turn in (1, 2, 3)]
            assert of_arm["by_turn"][number] == by_turn
            assert (of_arm["single"][number], of_arm["multi_at_3"][number]) == (by_turn[0], by_turn[2])
    first, second = (summary["results"]["base"]["by_turn"][i] for i in (0, 1))
    assert first == second  # one base for all seeds
    ahead = summary["paired"]["drift - uniform"]["multi_at_3"]
    differences = [d - u for d, u in zip(*(summary["results"][arm]["multi_at_3"] for arm in ("drift", "uniform")))]
    assert ahead["mean"] == pytest.approx(sum(differences) / 2)
    assert ahead["stderr"] == pytest.approx(abs(differences[0] - differences[1]) / 2)
    assert {"warm_start", "rollouts", "train", "evaluate", "total"} == set(summary["seconds"])
    assert (folder / "report.html").stat().st_size > 1000


def test_every_arm_is_compared_with_the_base(whole):
    config, folder, _ = whole
    logged = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        logged |= json.loads(line)
    for seed in config.seeds:
        found = [
            [logged[f"seed-{seed}/{arm}/watch/{name}"] for name in ("base_kl", "entropy", "base_entropy")]
            for arm in config.arms
        ]
        assert all(value > 0 for values in found for value in values)
        assert len({values[2] for values in found}) == 1  # one base, on the same trajectories
        assert len({values[0] for values in found}) == len(config.arms)


def test_seeds_sample_differently_and_from_the_base(whole):
    config, folder, summary = whole
    base = load_policy(config.model.model_copy(update={"path": str(folder / "base")}))
    files = [folder / "rollouts.jsonl", folder / "seed-1" / "rollouts.jsonl"]
    rows = [store.read(file) for file in files]
    for number, sampled in enumerate(rows):
        assert len(sampled) == config.task.train_problems * config.rollout.n
        assert store.check_policy(sampled, base.hash()) == 0
        assert summary["ess"][number] == pytest.approx(weigh(sampled, config.weights)[1]["ess_overall"])
    assert rows[0] != rows[1]


def test_arms_take_the_same_number_of_steps_and_end_apart(whole):
    config, folder, _ = whole
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = {
        (seed, arm): max(line["step"] for line in logged if f"seed-{seed}/{arm}/loss" in line)
        for seed in config.seeds
        for arm in ARMS[1:]
    }
    assert set(steps.values()) == {steps_of(48, config.train.epochs, config.train.batch_size)} == {3}
    models = [folder / "base", *(folder / f"seed-{seed}" / arm for seed in config.seeds for arm in ARMS[1:])]
    hashes = {load_policy(config.model.model_copy(update={"path": str(model)})).hash() for model in models}
    assert len(hashes) == 7
    assert not list(folder.rglob("checkpoint-*"))


def test_a_second_run_is_done_and_says_so(whole, capfd, monkeypatch):
    config, folder, summary = whole
    monkeypatch.setattr(module, "prepare", lambda _: pytest.fail("something was run again"))
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    assert run(config) == summary
    assert before == {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    assert "is done: seeds 0, 1, arms" in capfd.readouterr().err


def test_other_settings_are_refused_by_name(whole):
    config, _, _ = whole
    with pytest.raises(ConfigError, match=r"train\.lr was 0\.001 and is 0\.002.*name=…"):
        run(changed(config, train={"lr": 2e-3}))
    with pytest.raises(ConfigError, match=r"seeds began with 0 and now with 1"):
        run(changed(config, seeds=[1, 0]))


def test_a_base_that_was_evaluated_otherwise_and_broken_files_are_named(whole, tmp_path):
    config, folder, _ = whole
    copy = tmp_path / "digits"
    shutil.copytree(folder, copy)
    for name in ("config.yaml", "summary.json"):
        (copy / name).unlink()
    again = changed(config, output_dir=str(tmp_path))
    with pytest.raises(
        RunError, match=r"base/eval\.json was made with eval\.samples=0 and not 2; set that back, or .*rm "
    ):
        run(changed(again, eval={"samples": 2}))
    (copy / "config.yaml").unlink()
    kept = (copy / "seed-1" / "eval-drift.json").read_text()
    for broken, said in (
        (json.dumps({**json.loads(kept), "by_turn": [0.5]}), "was made with eval.turns=1 and not 3"),
        (kept[:20], "is not JSON"),
        ("[]", "holds no evaluation"),
    ):
        (copy / "seed-1" / "eval-drift.json").write_text(broken)
        with pytest.raises(RunError, match=rf"seed-1/eval-drift\.json {said}"):
            run(again)
    (copy / "seed-1" / "eval-drift.json").write_text(kept)
    (copy / "seconds.json").write_text("{")
    with pytest.raises(RunError, match=r"seconds\.json is not JSON.*remove it"):
        run(again)
    (copy / "seconds.json").unlink()
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        content = (copy / "base" / name).read_bytes()
        (copy / "base" / name).write_bytes(content[: len(content) // 2])
        with pytest.raises((ValueError, OSError), match=r"digits/base"):
            run(again)
        (copy / "base" / name).write_bytes(content)
    (copy / "config.yaml").write_text("name: digits\ntrain: {lr:")
    with pytest.raises(ConfigError, match=r"digits/config\.yaml, which an earlier run wrote, cannot be read: .*name=…"):
        run(again)


def test_a_run_that_never_began_may_be_mended(tmp_path):
    config = quarters(tmp_path)
    with pytest.raises(TaskError, match=r"task\.eval_problems=9999: .*ask for fewer"):
        run(changed(config, task={"eval_problems": 9999}))
    assert {path.name for path in (tmp_path / "runs" / "digits").iterdir()} == {".lock"}
    claim(tmp_path / "runs" / "digits", config)
    assert load(tmp_path / "runs" / "digits" / "config.yaml") == config


def test_more_seeds_and_fewer_arms_go_on_from_what_is_there(tmp_path):
    config = changed(quarters(tmp_path), seeds=[0])
    first = run(config)
    folder = Path(config.output_dir) / config.name
    kept = (folder / "seed-0" / "eval-drift.json").stat().st_mtime_ns
    second = run(changed(config, seeds=[0, 1], arms=["drift"]))
    assert (folder / "seed-0" / "eval-drift.json").stat().st_mtime_ns == kept
    assert set(second["results"]) == {"base", "drift"}
    assert second["results"]["drift"]["by_turn"][0] == first["results"]["drift"]["by_turn"][0]
    assert first["paired"]["drift - base"]["single"]["stderr"] is None  # one seed has no spread
    assert second["seconds"]["total"] > first["seconds"]["total"]


def test_killed_in_the_middle_of_sampling_it_ends_as_if_it_had_not_been(whole, tmp_path):
    config, folder, summary = whole
    again = changed(config, output_dir=str(tmp_path))
    (tmp_path / "digits.yaml").write_text(dump(again))
    environment = {**os.environ, "PYTHONPATH": str(Path(module.__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-m", "drift.cli", "run", str(tmp_path / "digits.yaml")],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    rollouts = tmp_path / "digits" / "rollouts.jsonl"
    deadline = time.monotonic() + 240
    while not (rollouts.exists() and rollouts.stat().st_size):
        assert process.poll() is None, "the run ended before it sampled"
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = rollouts.read_bytes()
    assert 0 < kept.count(b"\n") < 48
    resumed = run(again)
    assert rollouts.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    assert rollouts.read_bytes() == (folder / "rollouts.jsonl").read_bytes()
    assert resumed["results"] == summary["results"]


def test_interrupted_in_training_and_evaluation(whole, tmp_path, monkeypatch):
    """A checkpoint in the middle of an arm, and a trained arm that was not evaluated yet."""
    config, _, summary = whole
    again = changed(config, output_dir=str(tmp_path), train={"save_every": 1})
    evaluate, calls = stages.evaluate, []

    def stops(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:  # the first arm's, after the base's
            raise KeyboardInterrupt
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(stages, "evaluate", stops)
    with pytest.raises(KeyboardInterrupt):
        run(again)
    assert list((tmp_path / "digits" / "seed-0" / "uniform").rglob("checkpoint-3"))
    monkeypatch.setattr(stages, "evaluate", evaluate)
    assert run(again)["results"] == summary["results"]


def test_a_corrected_answer_of_an_evaluation_problem_is_verified_again(whole, tmp_path, capfd):
    """Between interruption and resumption: the base and the arm that was done are evaluated anew, and not trained."""
    config, folder, summary = whole
    copy, problems = tmp_path / "digits", Path(config.task.path)
    shutil.copytree(folder, copy)
    for name in ("summary.json", "seed-1/eval-drift.json"):
        (copy / name).unlink()
    rows = [json.loads(line) for line in problems.read_text().splitlines()]
    corrected = [row if row["split"] != "eval" else {**row, "answer": "none"} for row in rows]
    other = tmp_path / "digits.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in corrected))
    (copy / "config.yaml").write_text((copy / "config.yaml").read_text().replace(str(problems), str(other)))
    trained = (copy / "seed-0" / "drift" / "model.safetensors").stat().st_mtime_ns
    done = run(changed(config, output_dir=str(tmp_path), task={"path": str(other)}))
    assert max(max(done["results"][arm]["multi_at_3"]) for arm in ARMS) == 0
    assert min(max(summary["results"][arm]["multi_at_3"]) for arm in ARMS) > 0
    assert (copy / "seed-0" / "drift" / "model.safetensors").stat().st_mtime_ns == trained
    said = capfd.readouterr().err
    assert (
        said.count("30 of 30 evaluation problems have another question or answer") == 6
    )  # the base, 5 arms that were done


def test_arms_that_were_done_before_a_training_answer_changed_are_named(whole, tmp_path, capfd):
    """They are not trained again, which is said with the remedy."""
    config, folder, _ = whole
    copy, problems = tmp_path / "digits", Path(config.task.path)
    shutil.copytree(folder, copy)
    for name in ("summary.json", "seed-1/eval-drift.json"):
        (copy / name).unlink()
    rows = [json.loads(line) for line in problems.read_text().splitlines()]
    corrected = [row if row["split"] != "train" else {**row, "answer": "none"} for row in rows]
    other = tmp_path / "digits.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in corrected))
    (copy / "config.yaml").write_text((copy / "config.yaml").read_text().replace(str(problems), str(other)))
    again = changed(config, output_dir=str(tmp_path), task={"path": str(other)}, arms=["uniform", "drift"])
    run(again)
    said = " ".join(capfd.readouterr().err.split())
    done = "trajectories checked against answers that have changed, and will not be trained again; remove"
    assert said.count(done) == 2
    assert "seed-0: WARNING: uniform, drift trained on" in said
    assert "seed-1: WARNING: uniform trained on" in said


def test_arms_start_from_the_base_and_rounds_from_the_round_before(tmp_path, monkeypatch):
    config = changed(quarters(tmp_path), seeds=[0], arms=["uniform", "drift"], train={"rounds": 2})
    sampled, started, collect, train = [], [], stages.collect, module.train

    def spy_collect(policy, engine, task, problems, settings, path, *rest):
        sampled.append((policy.hash(), path.relative_to(tmp_path / "runs" / "digits").as_posix()))
        return collect(policy, engine, task, problems, settings, path, *rest)

    def spy_train(policy, *args, **kwargs):
        started.append(policy.hash())
        return train(policy, *args, **kwargs)

    monkeypatch.setattr(stages, "collect", spy_collect)
    monkeypatch.setattr(module, "train", spy_train)
    run(config)
    base = load_policy(config.model.model_copy(update={"path": str(tmp_path / "runs" / "digits" / "base")})).hash()
    later = [f"seed-0/{arm}/rollouts-1.jsonl" for arm in config.arms]
    assert [place for _, place in sampled] == ["rollouts.jsonl", *later]
    for (who, place), arm in zip(sampled[1:], config.arms):  # kept, though the arm's checkpoints go
        rows = store.read(tmp_path / "runs" / "digits" / place)
        assert len(rows) == config.task.train_problems * config.rollout.n
        assert store.check_policy(rows, who) == 0
        assert not list((tmp_path / "runs" / "digits" / "seed-0" / arm).glob("round-*"))
    assert [who == base for who in started] == [True, False, True, False]
    assert [who for who, _ in sampled] == [base, started[1], started[3]]


def test_a_given_model_is_not_warm_started_and_is_told_the_format(whole, tmp_path):
    config, folder, _ = whole
    given = changed(config, name="given", seeds=[0], arms=["uniform"], output_dir=str(tmp_path))
    told = parse({"name": "x", "model": {"path": "a"}}).task.format_rule  # by default; null is nothing
    assert parse({"name": "x", "model": {"path": "a"}, "task": {"format_rule": None}}).task.format_rule is None
    assert parse({"name": "x"}).task.format_rule is None
    model = {"path": str(folder / "base")}
    given = changed(given, model=model, warm_start={"enabled": False}, task={"format_rule": told})
    summary = run(given)
    rows = store.read(tmp_path / "given" / "rollouts.jsonl")
    asked = {row["messages"][0]["content"] for row in rows}
    assert all("<answer> and </answer>" in text for text in asked)
    assert not (tmp_path / "given" / "base" / "warm_start.json").exists()
    assert set(summary["results"]) == {"base", "uniform"}


def test_no_success_at_all_is_said(tmp_path):
    config = changed(quarters(tmp_path), seeds=[0], warm_start={"enabled": False}, arms=["success_only"])
    with pytest.raises(RunError, match="no trajectory has a right answer"):
        run(config)
