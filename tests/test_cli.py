import subprocess
import sys

import pytest
from made_up_run import make_run

from drift import cli, run
from drift.config import dump, parse


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "quick.yaml"
    path.write_text(dump(parse({"name": "quick", "output_dir": str(tmp_path / "runs"), "seeds": [0, 1, 2]})))
    return path


def test_help_names_every_command():
    shown = subprocess.run(
        [sys.executable, "-m", "drift.cli", "--help"], capture_output=True, text=True, check=True
    ).stdout
    for command in ("run", "rollout", "train", "eval", "report", "study", "doctor"):
        assert f"\n    {command} " in shown
    assert max(map(len, shown.splitlines())) <= 120


@pytest.mark.parametrize("command", ["run", "rollout", "train", "eval", "report", "study", "doctor"])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert f"drift {command}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["runn", "x"], [], ["run"]])
def test_a_wrong_command_line_exits_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: drift" in capsys.readouterr().err


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
    assert cli.main(["run", str(config_file)]) == 0
    shown = capsys.readouterr().out
    assert "was done already" in shown
    assert "rm -r" in shown


def test_ctrl_c_says_how_to_go_on(config_file, monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run", interrupted)
    assert cli.main(["run", str(config_file), "seeds=[0, 1]"]) == 130
    assert f"drift run {config_file} 'seeds=[0, 1]'" in capsys.readouterr().err


def test_report_writes_the_page(tmp_path, capsys):
    folder = make_run(tmp_path / "run", prompts=2)
    assert cli.main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    assert (folder / "report.html").exists()
    assert cli.main(["report", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_doctor_reports_backends_packages_and_machine(capsys):
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for words in ("python", "torch", "CUDA", "CPU", "threads", "triton", "flash-attn", "transformers", "peft"):
        assert words in shown
    for backend in ("reference", "cpu", "drift_kernels._cpu", "drift._packing"):
        assert backend in shown


def test_doctor_gives_reasons(monkeypatch, capsys):
    from drift import doctor

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
