"""`make gpu` rehearsed on a CPU: every line of it that is not CUDA itself, and what happens when something goes wrong."""

import json
import sys
import time
from dataclasses import replace

import pytest
import torch

from bench import roofline
from bench.cases import eager_loss
from bench.gpu import __main__ as gpu
from bench.gpu import machine, measure, peers, supervise, tune
from bench.peers import Contender
from drift_kernels.backends import cuda

NAMED = ["drift-triton", "drift-cuda", "eager", "eager-picked", "torch", "trl", "quack", "apple-cce", "liger-jsd"]
WORKER = """
import json, os, sys, time
order = json.loads(sys.argv[1])
for task in order["tasks"]:
    for step in ("good", "dies", "hangs"):
        if step in order["skip"].get(task, {}):
            continue
        print(json.dumps({"task": task, "step": step, "reason": ""}), flush=True)
        print("what a peer prints", flush=True)
        if (task, step) == ("first", "dies"):
            os.abort()
        if (task, step) == ("second", "hangs"):
            time.sleep(60)
        if task == "broken":
            print(json.dumps({"task": task, "step": "float64", "reason": "no memory"}), flush=True)
            sys.exit(3)
    print(json.dumps({"task": task, "result": {"skipped": order["skip"].get(task, {})}}), flush=True)
"""


def test_a_dry_run_writes_every_section(tmp_path, capsys):
    status = gpu.main(["--dry-run", "--rounds", "2", "--out", str(tmp_path), "--contenders", *NAMED])
    assert status == 0
    found = json.loads((tmp_path / "stand-in.json").read_text())
    assert found["dry_run"] is True
    assert found["tests"]["status"] == 0
    assert "0 failed" in found["tests"]["summary"]
    assert [case["name"] for case in found["cases"]] == list(measure.CASES)
    for case in found["cases"]:
        entries = {entry["name"]: entry for entry in case["contenders"]}
        there = {contender.name for contender in peers.contenders({}, measure.CASES[case["name"]])}
        assert set(entries) == set(NAMED) & there | {"drift-triton", "drift-cuda"}
        for name in {"drift-triton", "drift-cuda", "eager", "torch"} & set(entries):
            entry = entries[name]
            assert entry["status"] == "ok", entry
            assert len(entry["times"]) == 2
            assert min(entry[key] for key in ("seconds", "tflops", "peak_bytes", "over_gemms", "units")) > 0
        for name in {"eager-picked", "quack", "apple-cce", "liger-jsd"} & set(entries):
            assert entries[name]["status"] == "ok" or entries[name]["reason"]
        assert case["gemms"]["seconds"] > 0
        assert case["predicted"].keys() == {"triton", "cuda"}
    tried = found["tuning"]["tried"]
    kernels = {(line["role"], kernel) for line in tried for kernel in line["kernels"]}
    both = {*tune.ROW_KERNELS, *tune.BUCKET_KERNELS, "fused_distill"}
    assert kernels == {("triton", "score"), *((role, kernel) for role in ("triton", "cuda") for kernel in both)}
    assert all(line["seconds"] for line in tried)
    assert json.loads((tmp_path / "stand-in.tuning.json").read_text()) == found["tuning"]["file"] != {}
    text = (tmp_path / "stand-in.md").read_text()
    assert text in capsys.readouterr().out
    heads = ["# stand-in", "## Tests", "## Benchmark", *(f"### {name}" for name in measure.CASES), "## Launch choices"]
    assert [line for line in text.splitlines() if line.startswith("#")] == heads
    assert "no number here was measured" in text


def test_without_a_gpu_it_says_so_and_names_the_rehearsal(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"no CUDA device.*--dry-run"):
        gpu.main([])
    with pytest.raises(SystemExit, match="no contender is called nobody; there are drift-triton"):
        gpu.main(["--dry-run", "--contenders", "nobody"])


def test_what_kills_the_worker_is_left_out_and_the_rest_goes_on(tmp_path, monkeypatch):
    script, heard = tmp_path / "worker.py", []
    script.write_text(WORKER)
    monkeypatch.setattr(supervise, "SILENCE", 1.0)
    order = {"tasks": ["first", "broken", "second", "third"], "skip": {}}
    found = supervise.supervise(order, [sys.executable, str(script)], 60.0, heard.append)
    assert found["first"]["skipped"].keys() == {"dies"}
    assert found["second"]["skipped"].keys() == {"hangs"}
    assert found["third"] == {"skipped": {}}
    assert found["broken"] == {"name": "broken", "reason": "float64: no memory"}
    assert any("first: dies: the process ended with status -6" in line for line in heard)
    late = supervise.supervise({"tasks": ["third"], "skip": {}}, [sys.executable, str(script)], 0.0, heard.append)
    assert late["third"]["reason"] == "left out: the time was over"


def _case(monkeypatch, machine, loss, name="drift-triton", skip=(), case="ppo-32768x2048x151936"):
    contender = Contender(name, name, "torch", lambda case, shares: 6.0, lambda: loss)
    monkeypatch.setattr(measure, "contenders", lambda roles, case: [contender])
    case = measure.CASES[case].shrunk()
    found = measure.run_case(case, machine, dict(skip), 2, lambda step, reason: None, ())
    return found["contenders"][0]


def test_nothing_wrong_is_timed(monkeypatch):
    here = machine.stand_in()
    assert _case(monkeypatch, here, eager_loss)["status"] == "ok"
    wrong = _case(monkeypatch, here, lambda p: eager_loss(p) * 1.2)
    assert wrong["status"] == "failed"
    assert wrong["reason"].startswith("wrong: ")
    assert wrong["times"] == {}
    skipped = _case(monkeypatch, here, eager_loss, skip={"drift-triton": "died before"})
    assert (skipped["status"], skipped["reason"]) == ("failed", "died before")


@pytest.mark.parametrize("name", ["score-8192x4096x151936", "jsd-4096x4096x128256", "jsd-top-4096x4096x128256"])
def test_scores_and_divergences_are_judged_too(name, monkeypatch):
    here = machine.stand_in()
    right = _case(monkeypatch, here, eager_loss, case=name)
    assert (right["status"], right["units"]) == ("ok", 2.0 if name.startswith("score") else 6.0)

    def off(p):
        return eager_loss(p) + 0.2 if name.startswith("score") else eager_loss(p) * 1.2

    assert _case(monkeypatch, here, off, case=name)["reason"].startswith("wrong: loss: ")


def test_a_divergence_is_not_another_one(monkeypatch):
    """KL(student‖teacher), whose loss is shifted to the right value: the gradients give it away."""

    def reverse(p):
        hidden, weight = p.teacher
        student, teacher = ((h @ w.t()).float().log_softmax(-1) for h, w in ((p.hidden, p.weight), (hidden, weight)))
        out = (student.exp() * (student - teacher)).sum() / p.case.T
        return out + (eager_loss(p) - out).detach()

    found = _case(monkeypatch, machine.stand_in(), reverse, case="jsd-4096x4096x128256")
    assert found["reason"].startswith("wrong: dhidden: ")


def test_tuning_ends_in_time():
    found = tune.try_all(machine.stand_in(), {}, lambda step, reason: None, time.time() + 1.0)
    assert (found["file"], found["tried"]) == ({}, [])
    assert found["reasons"]["triton score"] == "left out: the time was over"


def test_an_error_costs_a_line_and_a_broken_device_the_process(monkeypatch):
    def crash(problem):
        raise RuntimeError("CUDA error: an illegal memory access")

    here = machine.stand_in()
    assert _case(monkeypatch, here, crash)["reason"] == "RuntimeError: CUDA error: an illegal memory access"
    with pytest.raises(measure.BrokenError, match="illegal memory access"):
        _case(monkeypatch, replace(here, healthy=lambda: False), crash)
    said = []
    monkeypatch.setattr(tune, "_try", lambda *args: {"seconds": None, "reason": "illegal"})
    status = supervise.work(
        replace(here, healthy=lambda: False), {"tasks": ["tuning"], "skip": {}, "until": time.time() + 60}, said.append
    )
    assert status == 3
    assert said[-1]["reason"] == "illegal"


def test_an_error_in_the_rounds_costs_a_line(monkeypatch):
    calls = []

    def tires(problem):
        calls.append(problem)
        if len(calls) > 3:
            raise RuntimeError("out of memory")
        return eager_loss(problem)

    found = _case(monkeypatch, machine.stand_in(), tires)
    assert (found["status"], found["reason"], found["seconds"]) == ("failed", "RuntimeError: out of memory", None)


def test_every_launch_choice_is_one_that_the_backends_take(monkeypatch):
    launch = pytest.importorskip("drift_kernels.backends.triton.launch", reason="needs triton")
    for group in tune.GROUPS:
        for numbers in group.candidates:
            with tune.launched_with(group.setting(numbers)):
                if group.role == "cuda":
                    pair = cuda.PAIR in group.kernels
                    assert vars(cuda.choose(tune.VOCABULARY, True, 232_448, True, pair)) == numbers
                for kernel in group.kernels if group.role == "triton" else ():
                    rule = launch.row_rule(tune.VOCABULARY)
                    assert vars(launch.overridden(kernel, rule)) == vars(rule) | numbers
                    if kernel == "score":
                        tiles = (numbers["rows"] + numbers["block"]) * numbers["depth"] * numbers["stages"]
                        assert 2 * tiles <= 232_448
                        wide, few = torch.empty(4096, 64, device="meta"), torch.empty(64, 64, device="meta")
                        assert vars(launch.score_launch(wide, "half", True, True)) == numbers
                        for hidden, kind in ((wide, "tf32"), (wide, "ieee"), (few, "half")):
                            rule = launch.score_rule(len(hidden), kind, (9, 0), True, True)
                            assert launch.score_launch(hidden, kind, True, True) == rule
    assert cuda.choose(tune.VOCABULARY, True, 232_448, True).threads == 512


def test_a_launch_choice_with_other_results_is_not_timed(monkeypatch):
    rows, group = tune.Rows(machine.stand_in(), "cuda"), tune.GROUPS[-1]
    kernels, run = [], rows.run

    def off(kernel):
        kernels.append(kernel)
        return run(kernel) * (1.1 if len(kernels) > 3 else 1.0)

    monkeypatch.setattr(rows, "run", off)
    found = tune._try(rows, group, {"threads": 256}, machine.stand_in())
    assert found["seconds"] is None
    assert found["reason"].startswith("wrong: row_stats differs by ")


def test_a_gpus_peaks_are_found_by_its_name():
    assert roofline.peaks_of("NVIDIA H100 80GB HBM3") == roofline.H100
    assert roofline.peaks_of("NVIDIA H100 PCIe") == roofline.KNOWN["H100 PCIe"]
    assert roofline.peaks_of("NVIDIA A100-SXM4-80GB") == roofline.KNOWN["A100 80GB"]
    assert roofline.peaks_of("an abacus") is None


def test_both_bounds_of_a_training_step():
    stages = [roofline.Stage("products", 73e10, 85e9), roofline.Stage("bytes", 0, 17e9)]
    low, high = roofline.bounds(stages, roofline.Peaks(1e12, 1e11))
    assert low == pytest.approx(1.0 + 0.2)  # 1 s of products against 1 s of bytes, then 0.2 s of bytes
    assert high == pytest.approx(1.0 + 1.0 + 0.2)


def test_the_roofline_knows_one_flush():
    """The default workspace with 40 GB free spares the fp32 dweight's traffic: written once, never read back."""
    T, D, V = roofline.SHAPES[0]
    least, share = (roofline.training(T, D, V, w)[3].bytes for w in (1 << 30, roofline.workspace_share(roofline.FREE)))
    assert least - share == 3 * 8 * V * D
    table = roofline.bounds_table()
    assert all(f"{t:,} × {d:,} × {v:,}" in table for t, d, v in roofline.SHAPES)
    assert all(name in table for name in ("H100", "H200", "B200", "Triton", "CUDA"))
