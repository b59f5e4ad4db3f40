"""Installing and starting up: which compilers are asked, what is imported for --help, and what comes with the package."""

import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
from setuptools import Distribution
from setuptools.errors import CompileError

import drift_kernels as dk
from drift import cli, shipped
from drift_kernels import backends

ROOT = Path(__file__).parent.parent


def setup_script(monkeypatch, **environment: str) -> dict:
    """setup.py's names, and under "arguments" what it calls setup() with."""
    monkeypatch.chdir(ROOT)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with mock.patch("setuptools.setup") as called:
        names = runpy.run_path("setup.py")
    return {**names, "arguments": called.call_args.kwargs}


@pytest.fixture
def toolkit(tmp_path):
    """A folder with bin/nvcc, a script made of the given lines."""

    def write(lines: str) -> str:
        (tmp_path / "bin").mkdir()
        compiler = tmp_path / "bin" / "nvcc"
        compiler.write_text(f"#!/bin/sh\n{lines}\n")
        compiler.chmod(0o755)
        return str(tmp_path)

    return write


def test_without_a_compiler_nothing_is_compiled_and_nothing_fails(monkeypatch, capfd):
    monkeypatch.setenv("DRIFT_SKIP_CUDA_BUILD", "1")
    script = setup_script(monkeypatch, CXX="no-such-compiler")
    assert script["arguments"]["ext_modules"] == []
    assert "computes in plain torch" in capfd.readouterr().err
    assert len(setup_script(monkeypatch, CXX=sys.executable)["arguments"]["ext_modules"]) == 2


def test_an_old_nvcc_compiles_for_the_default_gpus_that_it_knows(monkeypatch, toolkit):
    home = toolkit("echo compute_75; echo compute_80; echo compute_90")
    script = setup_script(monkeypatch, CUDA_HOME=home, DRIFT_SKIP_CUDA_BUILD="1")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert script["chosen_gpus"](script["NVCC"]) == [("80", False), ("90", True)]
    assert script["gencode"]([("90", True)])[-1] == "-gencode=arch=compute_90,code=compute_90"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "12.0")
    assert script["chosen_gpus"](script["NVCC"]) == [("120", False)]


@pytest.mark.parametrize("force", ["0", "1"])
def test_an_nvcc_that_fails_ends_the_install_only_if_cuda_is_forced(monkeypatch, toolkit, tmp_path, force, capfd):
    home = toolkit('[ "$1" = --list-gpu-arch ] && echo compute_80 && exit 0; exit 3')
    monkeypatch.setattr("os.path.exists", lambda path, exists=os.path.exists: "nvidia" in str(path) or exists(path))
    script = setup_script(monkeypatch, CUDA_HOME=home, DRIFT_SKIP_CPU_BUILD="1", FORCE_CUDA=force)
    [cuda] = script["arguments"]["ext_modules"]
    assert cuda.name == "drift_kernels._cuda"
    command = script["BuildExtensions"](Distribution({"ext_modules": [cuda]}))
    command.build_lib, command.build_temp = str(tmp_path / "lib"), str(tmp_path / "temp")
    command.ensure_finalized()
    if force == "1":
        with pytest.raises(CompileError, match="the CUDA library was not built"):
            command.run()
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            command.run()
    assert not (tmp_path / "lib/drift_kernels/_cuda.so").exists()


def test_help_imports_neither_torch_nor_the_trainers_packages_and_idle_threads_sleep():
    code = "import os, sys; from drift import cli; cli._parser().format_help(); "
    code += "bad = {'torch', 'pydantic', 'rich', 'yaml', 'matplotlib'} & set(sys.modules); assert not bad, bad; "
    code += "print(os.environ.get('OMP_WAIT_POLICY'), os.environ.get('GOMP_SPINCOUNT'))"
    for chosen, shown in (
        ({}, "passive None"),
        ({"GOMP_SPINCOUNT": "9"}, "None 9"),
        ({"OMP_WAIT_POLICY": "active"}, "active None"),
    ):
        environment = {
            k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
        }
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment | chosen, check=False
        )
        assert done.stdout.strip() == shown, done.stderr


def test_doctor_runs_if_torch_is_all_that_is_installed():
    code = "import sys; sys.modules.update(dict.fromkeys(('rich', 'pydantic', 'yaml', 'transformers', 'matplotlib'))); "
    code += "from drift import cli; sys.exit(cli.main(['doctor']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "reference" in done.stdout


def test_a_run_without_the_trainers_packages_names_the_extra(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "drift.config", None)
    monkeypatch.setattr(cli, "TRAINER_PACKAGES", ("drift",))
    assert cli.main(["run", "quickstart"]) == 1
    assert "[train]" in capsys.readouterr().err


def test_auto_computes_in_plain_torch_without_the_extension_and_says_so_once(monkeypatch):
    monkeypatch.setitem(backends.REASONS, "cpu", lambda: "it is not there")
    backends._warned_without_extension.cache_clear()
    hidden, weight, targets = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2])
    with pytest.warns(UserWarning, match="computes in plain torch") as caught:
        values = [dk.weighted_cross_entropy(hidden, weight, targets).loss for _ in range(2)]
    assert len(caught) == 1
    torch.testing.assert_close(values[0], torch.nn.functional.cross_entropy(hidden @ weight.T, targets))
    with pytest.raises(RuntimeError, match="it is not there"):
        dk.weighted_cross_entropy(hidden, weight, targets, config=dk.KernelConfig(backend="cpu"))


def test_init_copies_the_shipped_configs_and_examples_and_overwrites_nothing(tmp_path, capsys):
    assert cli.main(["init", str(tmp_path)]) == 0
    assert (tmp_path / "configs/quickstart.yaml").read_text() == (ROOT / "configs/quickstart.yaml").read_text()
    assert {path.name for path in (tmp_path / "examples").iterdir()} == {
        p.name for p in (ROOT / "examples").glob("*.py")
    }
    (tmp_path / "configs/quickstart.yaml").write_text("mine")
    (tmp_path / "configs/study.yaml").unlink()
    assert cli.main(["init", str(tmp_path)]) == 1
    assert "not overwritten" in capsys.readouterr().err
    assert (tmp_path / "configs/quickstart.yaml").read_text() == "mine"
    assert not (tmp_path / "configs/study.yaml").exists()


def test_shipped_configs_go_by_their_names_and_a_file_of_that_name_comes_first(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.load_config("quickstart", []).name == "quickstart"
    assert set(shipped.configs()) >= {"quickstart", "online", "study"}
    Path("quickstart").write_text("name: own")
    assert cli.load_config("quickstart", []).name == "own"
    assert cli.main(["run", "quickstrat"]) == 2
    assert "shipped configs are" in capsys.readouterr().err
