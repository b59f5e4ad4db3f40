"""The benchmark's own machinery at a size of milliseconds: its report's structure, and who is refused a time."""

import json
import subprocess
import sys

import pytest
import torch

from bench import memory, report, steps, sweeps
from bench.cases import CASES, Problem, eager_loss, log_probs, make
from bench.measure import run_case
from bench.peers import CONTENDERS, Contender
from drift_kernels import _cpu
from drift_kernels.backends import cpu

OFFLINE = ["drift", "eager", "eager-picked", "torch", "torch-512"]


class _Lie(torch.autograd.Function):
    """A loss that is right with a gradient that is not."""

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.01


def _contender(name, loss, load=None):
    return Contender(name, name, "torch", lambda case, shares: 6.0, load or (lambda: loss))


def _missing():
    raise ModuleNotFoundError("No module named 'nobody'", name="nobody")


def _crash(problem: Problem):
    raise RuntimeError("out of luck")


def test_smoke_report_has_every_case_and_contender(tmp_path, capsys):
    report.main(["--smoke", "--no-memory", "--rounds", "2", "--out", str(tmp_path), "--contenders", *OFFLINE])
    found = json.loads((tmp_path / "smoke.json").read_text())
    assert {"date", "machine", "versions", "rounds", "cases"} <= set(found)
    assert {"cpu", "isa", "threads"} <= set(found["machine"])
    assert found["versions"]["torch"] == torch.__version__
    assert [case["name"] for case in found["cases"]] == list(CASES)
    for case in found["cases"]:
        assert [entry["name"] for entry in case["contenders"]] == OFFLINE
        assert len(case["limits"]) == (2 if case["dtype"] == "bfloat16" else 1)
        for entry in case["contenders"]:
            if entry["name"] == "eager-picked" and case["name"].startswith("dense"):
                assert (entry["status"], entry["seconds"]) == ("refused", None)
            else:
                assert entry["status"] == "ok", (case["name"], entry)
                assert entry["seconds"] == min(entry["times"][number] for number in ("1", "2")) > 0
                assert len(entry["over_limits"]) == len(case["limits"])
        assert case["fastest_peer"] in OFFLINE[1:]
        assert case["speedup"] > 0
    table = (tmp_path / "smoke.md").read_text()
    assert all(f"### {name}\n" in table for name in CASES)
    assert "drift" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["dense", "turns", "ppo", "grpo"])
def test_a_wrong_contender_gets_no_time(name):
    contenders = [
        CONTENDERS["drift"],
        _contender("off", lambda p: eager_loss(p) * 1.001),
        _contender("lies", lambda p: _Lie.apply(eager_loss(p))),
        _contender("nan", lambda p: eager_loss(p) * float("nan")),
        _contender("half", lambda p: eager_loss(p, p.trained[::2])),
        _contender("crashes", _crash),
        _contender("absent", None, _missing),
        _contender("right", eager_loss),
    ]
    entries = {entry["name"]: entry for entry in run_case(CASES[name].shrunk(), contenders, 2)["contenders"]}
    for wrong in ("off", "lies", "nan", "half"):
        assert entries[wrong]["status"] == "failed", wrong
        assert entries[wrong]["reason"].startswith("wrong: "), wrong
        assert entries[wrong]["seconds"] is None
        assert entries[wrong]["times"] == {}
    assert entries["crashes"]["reason"] == "RuntimeError: out of luck"
    assert (entries["absent"]["status"], entries["absent"]["seconds"]) == ("unavailable", None)
    assert "not installed" in entries["absent"]["reason"]
    assert entries["right"]["status"] == entries["drift"]["status"] == "ok"


@pytest.mark.parametrize(
    ("name", "trained", "clipped"),
    [("dense", (1, 1), (0, 0)), ("turns", (0.27, 0.33), (0, 0)), ("ppo", (0.27, 0.33), (0.2, 0.3))],
)
def test_cases_train_and_clip_the_shares_they_are_named_for(name, trained, clipped):
    shares = make(CASES[name].shrunk(length=128)).shares()
    assert trained[0] <= shares.trained <= trained[1]
    assert clipped[0] <= 1 - shares.live / shares.read <= clipped[1]


def test_grpo_has_flat_groups_prompts_and_few_clipped():
    shares = make(CASES["grpo"].shrunk(length=32)).shares()
    assert shares.trained == 0.75
    assert shares.read == pytest.approx(0.75 * 0.6)
    assert 0 < 1 - shares.live / shares.read < 0.03


def test_log_probs_agree_with_log_softmax():
    problem = make(CASES["dense"].shrunk())
    want = (problem.hidden @ problem.weight.t()).log_softmax(1)[torch.arange(problem.case.T), problem.targets]
    torch.testing.assert_close(log_probs(problem.hidden, problem.weight, problem.targets, problem.trained), want)


@pytest.mark.skipif(memory.available() is not None, reason=str(memory.available()))
def test_memory_is_measured_in_a_process_of_its_own():
    found = dict(memory.measure("drift@64", ["turns", "T=1024"], smoke=True))
    assert set(found) == {"turns", "T=1024"}
    assert all(0 <= peak < 64 << 20 for peak in found.values())


def test_sweeps_have_every_curve_and_a_picture(tmp_path, capsys):
    found = sweeps.main(["--smoke", "--no-memory", "--out", str(tmp_path)])
    assert list(found["curves"]) == ["T", "V", "active", "workspace"]
    for name, points in found["curves"].items():
        assert len(points) >= 5
        assert all(point["over"]["drift"] > 0 for point in points), name
    assert json.loads((tmp_path / "sweeps-smoke.json").read_text())["curves"].keys() == found["curves"].keys()
    assert "<svg" in (tmp_path / "sweeps-smoke.svg").read_text()
    assert "| active rows, % |" in capsys.readouterr().out


@pytest.mark.skipif("avx2" not in _cpu.isas(), reason="needs a CPU with AVX2")
def test_held_to_avx2_everything_is(tmp_path):
    """In a process of its own, since libraries read what they may use as they load."""
    asked = ["--smoke", "--isa", "avx2", "--cases", "turns-bf16", "--contenders", "torch", "--out", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "bench.report", *asked], check=True, capture_output=True)
    found = json.loads((tmp_path / "smoke-avx2.json").read_text())
    assert (found["isa"], found["machine"]["torch_isa"], found["memory"]) == ("avx2", "AVX2", "not asked for")
    assert [entry["status"] for entry in found["cases"][0]["contenders"]] == ["ok", "ok"]


def test_no_bf16_products_where_instructions_are_limited():
    has, limits = cpu.has_bf16_gemm(), _cpu.isas()
    try:
        for name in limits:
            _cpu.limit_isa(name)
            assert cpu.has_bf16_gemm() == (has and name == "avx512")
    finally:
        _cpu.limit_isa(None)


NEEDS = {"trainer": "accelerate", "sft": "trl", "grpo": "trl"}


@pytest.mark.filterwarnings("default")  # trainers warn about themselves
@pytest.mark.parametrize("name", steps.CASES)
def test_a_whole_step_is_the_same_with_and_without(name):
    pytest.importorskip(NEEDS[name])
    plain, *others = (steps.run(name, way, 1, steps.SMALL) for way in steps.CASES[name].ways)
    assert len(plain[0]["seconds"]) == 1
    assert len(plain[0]["losses"]) == 2
    assert plain[1]["lm_head.weight"].abs().max() > 0
    for other in others:
        assert steps.differences(other, plain) == ""


def _ran(losses=(2.0, 1.9), scale=1.0, seconds=(3.0, 1.0, 2.0)):
    numbers = {"seconds": list(seconds), "losses": list(losses), "added": 5 << 20, "peak": 7 << 20}
    return numbers, {"w": scale * torch.arange(4.0)}


def _measure(**ways):
    """The sft case, its processes made up: by way, what each gives in turn, or the error it dies of."""

    def runner(case, way, steps, shape, sizes):
        found = ways.get(way.strip("()"), _ran())
        if isinstance(found, Exception):
            raise found
        return found

    found = steps.measure("sft", steps.SMALL, 2, 3, True, lambda text: None, runner)
    return found, {entry["name"]: entry for entry in found["entries"]}


def test_steps_are_medians_and_ratios_of_processes():
    found, entries = _measure(DriftSFTTrainer=_ran(seconds=(0.5, 0.5, 9.0)))
    assert entries["DriftSFTTrainer"]["times"] == {0: 0.5, 1: 0.5}
    assert entries["without"]["seconds"] == 2.0
    assert entries["DriftSFTTrainer"]["faster"] == 4.0
    assert (entries["enable()"]["added_bytes"], entries["enable()"]["peak_bytes"]) == (5 << 20, 7 << 20)
    where = {"cpu": "c", "isa": [], "torch_isa": "t", "threads": 1, "python": "3"}
    table = steps.markdown({"machine": where, "date": "d", "versions": {"trl": None}, "cases": [found]})
    assert "| without | 2.000 | – | 5 | 7 |" in table
    assert "| DriftSFTTrainer | 0.500 | 4.00 | 5 | 7 |" in table


@pytest.mark.parametrize(
    ("found", "status", "reason"),
    [
        (_ran(losses=(2.0, 1.8)), "failed", "wrong: losses differ"),
        (_ran(losses=(2.0,)), "failed", "wrong: 1 losses, not 2"),
        (_ran(losses=(2.0, float("nan"))), "failed", "wrong: losses differ: nan"),
        (_ran(scale=1.001), "failed", "wrong: the gradient of w differs by"),
        ((_ran()[0], {}), "failed", "wrong: gradients of ['w'] on one side only"),
        (RuntimeError("out of luck"), "failed", "out of luck"),
        (RuntimeError("ModuleNotFoundError: No module named 'trl'"), "unavailable", "No module named 'trl'"),
    ],
)
def test_a_trainer_that_differs_gets_no_numbers(found, status, reason):
    _, entries = _measure(enable=found)
    entry = entries["enable()"]
    assert entry["status"] == status
    assert reason in entry["reason"]
    assert (entry["seconds"], entry["peak_bytes"], entry["times"]) == (None, None, {})
    assert entries["DriftSFTTrainer"]["status"] == "ok"


def test_without_the_trainer_itself_nothing_is_timed():
    _, entries = _measure(without=RuntimeError("out of luck"))
    assert entries["without"]["reason"] == "out of luck"
    assert "nothing without to compare with" in entries["DriftSFTTrainer"]["reason"]
