"""What a plain install of the wheel can do with torch and numpy alone, from an empty folder: `make wheel` runs this.

Arguments: "compiled", or "plain" for a wheel that was built without a compiler.
"""

import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch

import drift_kernels as dk


def loss(**options) -> float:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator, requires_grad=True) for n in (8, 50))
    out = dk.weighted_cross_entropy(hidden, weight, torch.arange(8), **options)
    out.loss.backward()
    assert hidden.grad is not None
    assert hidden.grad.abs().sum() > 0
    return out.loss.item()


def drift(*arguments: str, folder: str) -> subprocess.CompletedProcess:
    command = [str(Path(sys.executable).parent / "drift"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)


def main(kind: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        automatic = loss()
    assert abs(automatic - loss(config=dk.KernelConfig(backend="reference"))) < 1e-5
    assert (dk.available_backends()["cpu"] is None) == (kind == "compiled"), dk.available_backends()
    assert [str(w.message)[:40] for w in caught] == (
        [] if kind == "compiled" else ["drift_kernels has no compiled extension "]
    )
    assert "transformers" not in sys.modules
    with tempfile.TemporaryDirectory() as folder:
        done = drift("doctor", folder=folder)
        assert done.returncode == 0, done.stderr
        assert "of the trainer: pip install" in done.stdout, "this environment should have torch and numpy alone"
        assert drift("init", folder=folder).returncode == 0
        assert (Path(folder) / "configs/quickstart.yaml").exists()
        assert (Path(folder) / "examples/drop_in.py").exists()
        again = drift("init", folder=folder)
        assert again.returncode == 1
        assert "exists, and is not overwritten" in again.stderr
        done = drift("run", "quickstart", folder=folder)
        assert done.returncode == 1
        assert "[train]" in done.stderr
    files = list(Path(dk.__file__).parent.glob("_cpu*.so"))
    size = sum(file.stat().st_size for file in files)
    print(f"{kind}: Python {sys.version.split()[0]}, torch {torch.__version__}, _cpu {size / 1e6:.1f} MB: works")


if __name__ == "__main__":
    main(*sys.argv[1:])
