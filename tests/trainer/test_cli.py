import io
import json
import re
import subprocess
import sys

import pytest
from fake_run import make_run
from rich.console import Console

from drift import cli
from drift.config import dump, parse
from drift.jobs import run
from drift.report.records import RecordsError, read
from drift.store import StoreError


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "quick.yaml"
    path.write_text(dump(parse({"name": "quick", "output_dir": str(tmp_path / "runs"), "seeds": [0, 1, 2]})))
    return path


def test_help_names_every_command():
    shown = subprocess.run(
        [sys.executable, "-m", "drift.cli", "--help"], capture_output=True, text=True, check=True
    ).stdout
    for command in ("run", "rollout", "train", "eval", "report", "study", "export", "doctor"):
        assert f"\n    {command} " in shown
    assert max(map(len, shown.splitlines())) <= 120


@pytest.mark.parametrize("command", ["run", "rollout", "train", "eval", "report", "study", "export", "doctor"])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert f"drift {command}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["runn", "x"], ["run"]])
def test_a_wrong_command_line_exits_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: drift" in capsys.readouterr().err


def test_alone_it_prints_help_and_an_unknown_command_gets_the_nearest(capsys):
    assert cli.main([]) == 0
    assert "usage: drift" in capsys.readouterr().out
    for wrong, said in (
        ("rnu", "did you mean `drift run`?"),
        ("confg", "did you mean `drift config`?"),
        ("zzz", "there are"),
    ):
        with pytest.raises(SystemExit):
            cli.main([wrong, "x"])
        assert f"no such command: {wrong}; {said}" in capsys.readouterr().err


def test_config_lists_every_setting_with_its_origin(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    file = tmp_path / "given.yaml"
    file.write_text("name: quick\nweights: {gamma: 0.8}\n")
    assert cli.main(["config", str(file), "train.lr=1e-4", "model.path=some/model"]) == 0
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()[1:] if line[1:2].strip()}
    assert rows["train.lr"][1:] == ["0.0001", "5e-06", "command", "line"]
    assert rows["weights.gamma"][1:] == ["0.8", "0.9", "file"]
    assert rows["weights.beta"][1:] == ["0.1", "0.1", "default"]
    assert rows["name"][1:] == ['"quick"', "(none)", "file"]
    assert rows["warm_start.enabled"][1:] == ["false", "true", "other", "settings"]


def test_doctor_of_a_config_shows_tokens_an_example_and_lengths(config_file, capsys):
    few = ["task.train_problems=2", "task.eval_problems=2", "rollout.max_new_tokens=8"]
    assert cli.main(["doctor", str(config_file), *few]) == 0
    said = capsys.readouterr().out
    for words in ("'<|im_end|>' (2); it is trained", "Please think again.<|im_end|>", "the longest conversation fits"):
        assert words in said
    assert cli.main(["doctor", str(config_file), *few, "train.turns=assistant", "train.max_length=50"]) == 1
    assert "train.max_length 50 is below the longest conversation" in " ".join(capsys.readouterr().out.split())


def test_data_lists_the_published_sets_and_names_the_nearest(capsys):
    assert cli.main(["data"]) == 0
    assert "math-500        HuggingFaceH4/MATH-500" in capsys.readouterr().out
    assert cli.main(["data", "math500"]) == 2
    assert "did you mean math-500?" in capsys.readouterr().err


def test_flags_in_place_of_settings_and_missing_files_get_a_hint(config_file, capsys):
    for arguments, said in (
        (["run", str(config_file), "--lr", "1"], "unrecognized arguments: --lr 1; settings are given as key=value"),
        (["run"], "the following arguments are required: CONFIG\n"),
    ):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 2
        assert said in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("drift ")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.lrr=1", "train.lrr: no such setting; did you mean train.lr?"),
        ("train.lr=fast", "train.lr: 'fast'"),
        ("faster", "should read section.key=value"),
    ],
)
def test_a_wrong_setting_exits_2_in_words(config_file, override, words, capsys):
    assert cli.main(["run", str(config_file), override]) == 2
    shown = capsys.readouterr().err
    assert words in shown
    assert "Traceback" not in shown


def test_a_config_that_is_not_there_exits_2(capsys):
    assert cli.main(["run", "nowhere.yaml"]) == 2
    assert "'nowhere.yaml' cannot be read: No such file" in capsys.readouterr().err


def test_run_ends_with_a_table_and_the_paths(config_file, monkeypatch, capsys):
    given = []
    monkeypatch.setattr(
        run, "run", lambda c: (given.append(c), make_run(config_file.parent / "runs" / c.name, prompts=2))
    )
    assert cli.main(["run", str(config_file), "train.lr=1e-3"]) == 0
    assert given[0].train.lr == 1e-3
    shown = capsys.readouterr().out
    assert "3 seeds" in shown
    for arm in ("base", "uniform", "success_only", "drift"):
        assert arm in shown
    assert "±" in shown
    assert f"{config_file.parent / 'runs' / 'quick' / 'summary.json'}" in shown
    assert "was done already" not in shown
    monkeypatch.setattr(run, "run", lambda _: None)
    assert cli.main(["run", str(config_file)]) == 0
    shown = capsys.readouterr().out
    assert "was done already" in shown
    assert "rm -r" in shown


def test_the_table_has_what_was_sampled(tmp_path):
    folder = make_run(tmp_path / "run", seeds=2, prompts=1)

    def shown():
        console = Console(width=100, file=io.StringIO())
        console.print(cli.results_table(read(folder)))
        return console.file.getvalue()

    assert "mean@" not in shown()
    summary = json.loads((folder / "summary.json").read_text())
    for arm, values in summary["results"].items():
        values |= {"mean_at_4": [0.25, 0.5] if arm == "drift" else [0.125, 0.125], "pass_at_4": [0.5, 0.75]}
    (folder / "summary.json").write_text(json.dumps(summary))
    heading, base, *_, drift = shown().splitlines()[1:]
    assert heading.split()[-6:] == ["single", "%", "mean@4", "%", "drift", "ahead"]
    assert "12.5" in base
    assert drift.split()[-1] == "37.5"
    assert cli.main(["report", str(folder)]) == 0
    assert "pass@4" in (folder / "report.html").read_text()
    summary["results"]["drift"]["mean_at_4"] = [0.5]
    (folder / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(RecordsError, match=r"results\.drift\.mean_at_4 should be 2 shares"):
        read(folder)


def test_ctrl_c_says_how_to_go_on(config_file, monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run", interrupted)
    assert cli.main(["run", str(config_file), "seeds=[0, 1]"]) == 130
    assert f"drift run {config_file} 'seeds=[0, 1]'" in capsys.readouterr().err


def test_our_errors_are_words_and_others_are_tracebacks(config_file, monkeypatch, capsys):
    def fails(error):
        def raises(_):
            raise error

        return raises

    monkeypatch.setattr(run, "run", fails(StoreError("rollouts.jsonl:3: prompt_id is missing")))
    assert cli.main(["run", str(config_file)]) == 1
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("drift: run quick: model embedded tiny model in float32, run folder ")
    assert last == "drift: rollouts.jsonl:3: prompt_id is missing"
    monkeypatch.setattr(run, "run", fails(KeyError("a bug")))
    with pytest.raises(KeyError, match="a bug"):
        cli.main(["run", str(config_file)])


SMALL = {
    "name": "small",
    "model": {"hidden_size": 32, "layers": 1, "heads": 2},
    "task": {
        "options": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
        "warm_problems": 8,
        "train_problems": 3,
        "eval_problems": 5,
    },
    "warm_start": {"enabled": False},
    "rollout": {"n": 4, "turns": 2, "max_new_tokens": 4},
    "train": {"batch_size": 4, "lr": 1e-3},
    "eval": {"turns": 2, "max_new_tokens": 4},
}


def test_the_stages_one_by_one(tmp_path, capsys):
    config = tmp_path / "small.yaml"
    config.write_text(dump(parse(SMALL | {"output_dir": str(tmp_path / "runs")})))
    rollouts, model = tmp_path / "sampled" / "rollouts.jsonl", tmp_path / "model"
    sample = ["rollout", str(config), "--out", str(rollouts), "track.progress=false"]
    assert cli.main(sample) == 0
    assert capsys.readouterr().out == f"12 new trajectories in {rollouts}\n"
    assert cli.main(sample) == 0
    assert capsys.readouterr().out == f"0 new trajectories in {rollouts}\n"
    fit = ["train", str(config), "--rollouts", str(rollouts), "--out", str(model)]
    assert cli.main([*fit, "track.progress=false"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("3 steps on ")
    assert f"from_pretrained('{model}')" in out
    metrics = [json.loads(line) for line in (model / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics if "train/loss" in row] == [1, 2, 3]
    assert "weights/ess_overall" in metrics[0]
    base, trained = ["eval", str(config)], ["eval", str(config), "--model", str(model)]
    for command in (base, trained):
        assert cli.main([*command, "track.progress=false"]) == 0
        assert re.fullmatch(
            r"multi@2 [\d.]+%, single turn [\d.]+%, corrected in turn 2: [\d.–%]+ of 5 problems\n",
            capsys.readouterr().out,
        )
    assert cli.main([*sample, "--model", str(model)]) == 1
    assert "not by the reference" in capsys.readouterr().err


def test_stages_refuse_what_is_not_there(tmp_path, capsys):
    config = tmp_path / "small.yaml"
    config.write_text(dump(parse(SMALL | {"output_dir": str(tmp_path / "runs")})))
    assert cli.main(["eval", str(config), "warm_start.enabled=true"]) == 2
    assert "the embedded model is not trained yet" in capsys.readouterr().err
    assert cli.main(["train", str(config), "--rollouts", str(tmp_path / "none"), "--out", str(tmp_path / "m")]) == 2
    assert "is not a file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["eval", str(config), "--modell", "x"])
    assert cli.main(["report", str(tmp_path), "train.lr=1"]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_report_writes_the_page(tmp_path, capsys):
    folder = make_run(tmp_path / "run", prompts=2)
    assert cli.main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    assert (folder / "report.html").exists()
    assert cli.main(["report", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path)]) == 2
    assert f"holds no run: there is no config.yaml; did you mean {folder}?" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()
    (folder / "summary.json").write_text('{"results": 3}')
    assert cli.main(["report", str(folder)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_doctor_reports_backends_packages_and_machine(capsys):
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for words in ("python", "torch", "CUDA", "CPU", "threads", "triton", "flash-attn", "transformers", "peft"):
        assert words in shown
    for backend in ("reference", "cpu", "drift_kernels._cpu", "drift._packing"):
        assert backend in shown


def test_doctor_gives_reasons(monkeypatch, capsys):
    from drift.jobs import doctor

    monkeypatch.setattr(doctor.drift_kernels, "available_backends", lambda: {"cpu": None, "cuda": "no [device] here"})
    monkeypatch.setattr(doctor, "PACKAGES", {"no-such-package": "pip install no-such-package"})
    monkeypatch.setattr(doctor, "EXTENSIONS", ("drift._nothing",))
    assert cli.main(["doctor"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "no [device] here" in shown
    assert "not installed; pip install no-such-package" in shown
    assert "drift._nothing does not import" in shown


def test_study_prints_intervals(config_file, monkeypatch, capsys):
    monkeypatch.setattr(run, "run", lambda c: make_run(config_file.parent / "runs" / c.name, prompts=2))
    assert cli.main(["study", str(config_file)]) == 0
    shown = capsys.readouterr().out
    assert "study.md" in shown
    assert "95 %" in shown
    assert cli.main(["study", str(config_file), "seeds=[1]"]) == 2
    assert "at least two" in capsys.readouterr().err
