import io
import json
import sys
import types

import numpy as np
import pytest
import torch
from rich.console import Console

from drift import track as track_module
from drift.track import MissingSink, Track


def rows(folder):
    def refuse(name):
        raise AssertionError(f"not strict JSON: {name}")

    return [json.loads(line, parse_constant=refuse) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def silent(**kw):
    return Console(file=io.StringIO(), soft_wrap=True, **kw)


def test_values_of_every_kind_are_strict_json(tmp_path):
    with Track(tmp_path, console=silent()) as track:
        track.log(
            3,
            loss=torch.tensor(1.5),
            n=np.int64(7),
            bad=float("nan"),
            worse=torch.tensor(float("inf")),
            curve=np.array([1.0, -np.inf]),
            name="uniform",
            flag=True,
            **{"perf/tokens_per_second": 12.0},
        )
    (row,) = rows(tmp_path)
    assert row.pop("time") > 1.6e9
    assert row == {
        "step": 3,
        "loss": 1.5,
        "n": 7,
        "bad": None,
        "worse": None,
        "curve": [1.0, None],
        "name": "uniform",
        "flag": True,
        "perf/tokens_per_second": 12.0,
    }


def test_lines_are_on_disk_before_close_and_a_second_track_appends(tmp_path):
    first = Track(tmp_path, console=silent())
    first.log(1, loss=1.0)
    assert len(rows(tmp_path)) == 1
    second = Track(tmp_path, console=silent())
    second.log(2, loss=0.5)
    assert [r["step"] for r in rows(tmp_path)] == [1, 2]
    first.close()
    second.close()


def test_a_torn_last_line_is_cut_and_reported(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    console = silent()
    with Track(tmp_path, console=console) as track:
        track.log(2, loss=1.0)
    assert [r["step"] for r in rows(tmp_path)] == [1, 2]
    assert "torn" in console.file.getvalue()


def test_no_folder_records_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Track(None, progress=False) as track:
        track.log(1, loss=1.0)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_sink_names_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r"'tensorbored'.*tensorboard, wandb, trackio"):
        Track(tmp_path, sinks=["tensorbored"])


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard"])
def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None)
    with pytest.raises(MissingSink, match=f"pip install {name}"):
        Track(tmp_path, sinks=[name])


def test_tensorboard_writes_the_finite_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Track(tmp_path, sinks=["tensorboard"], console=silent()) as track:
        track.log(1, loss=2.0, bad=float("nan"), name="x")
        track.log(2, loss=1.0)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 2.0), (2, 1.0)]


class FakeRun:
    def __init__(self, **settings):
        self.settings, self.logged, self.finished = settings, [], False

    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("*", "step")

    def log(self, metrics, step=None):
        self.logged.append((metrics, step))

    def finish(self):
        self.finished = True


def test_wandb_resumes_its_run_and_lets_steps_go_back(tmp_path, monkeypatch):
    runs = []

    def init(**settings):
        runs.append(FakeRun(**settings))
        return runs[-1]

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for _ in range(2):
        with Track(tmp_path / "sums", sinks=["wandb"], console=silent()) as track:
            track.log(5, loss=1.0)
            track.log(1, loss=2.0, bad=float("inf"))
    assert runs[0].logged == [({"loss": 1.0, "step": 5}, None), ({"loss": 2.0, "step": 1}, None)]
    assert runs[0].settings["id"] == runs[1].settings["id"]
    assert runs[0].settings["name"] == "sums"
    assert runs[0].finished


def test_trackio_gets_steps(tmp_path, monkeypatch):
    run = FakeRun()
    monkeypatch.setitem(sys.modules, "trackio", types.SimpleNamespace(init=lambda **_: run))
    with Track(tmp_path, sinks=["trackio"], console=silent()) as track:
        track.log(4, loss=1.0)
    assert run.logged == [({"loss": 1.0}, 4)]
    assert run.finished


def test_lines_come_every_ten_seconds_where_there_is_no_terminal(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(track_module.time, "monotonic", lambda: now[0])
    console = silent(force_terminal=False)
    track = Track(None, console=console)
    with track.progress("rollouts", total=60) as bar:
        for _ in range(60):
            now[0] += 1.0
            bar.advance(1, solved=0.25)
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 7
    assert lines[0] == "rollouts 10/60 · 1/s · 0:50 left · solved 0.25"
    assert lines[-1] == "rollouts 60/60 · took 1:00 · solved 0.25"


def test_an_interrupted_stage_says_so():
    console = silent(force_terminal=False)

    def interrupted():
        with Track(None, console=console).progress("rollouts", total=4) as bar:
            bar.advance()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert console.file.getvalue().startswith("rollouts 1/4 · stopped after 0:00")


def test_bars_on_a_terminal_nest_and_show_brackets_as_text():
    console = silent(force_terminal=True, width=120)
    with Track(None, console=console) as track:
        with track.progress("arm [red]drift", total=2) as outer, track.progress("steps", total=3) as inner:
            inner.advance(3, loss=1.25)
            outer.advance(2)
            track.say("a [bold]message")
            assert len(track._bars.tasks) == 2
        assert not track._bars.tasks
    shown = console.file.getvalue()
    assert "arm [red]drift 2/2 · took" in shown
    assert "a [bold]message" in shown
    assert "━" in shown


def test_progress_off_is_quiet_but_say_is_heard():
    console = silent(force_terminal=False)
    track = Track(None, progress=False, console=console)
    with track.progress("rollouts", total=1) as bar:
        bar.advance()
    track.say("done")
    assert console.file.getvalue() == "done\n"
