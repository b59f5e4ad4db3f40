"""Real servers, from an environment of their own (`make test-vllm`; VLLM names its folder), and the tiny policy.

vLLM's attention on a CPU knows heads of 32 channels but not of 24, so the tiny model has a hidden size of 128 here.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
ENVIRONMENT = Path(os.environ.get("VLLM", ROOT / ".venv-vllm")).absolute()
PATIENCE = 240.0  # seconds for a server to start
sys.path.insert(0, str(ROOT / "tests" / "support"))

from drift.config import ModelConfig  # noqa: E402
from drift.engines.vllm import server_command  # noqa: E402
from drift.model.policy import load_policy  # noqa: E402

MODEL = ModelConfig(hidden_size=128)


class Server:
    """A process that serves a model; killed with all its children when it is left."""

    def __init__(self, command: str, url: str, log: Path) -> None:
        self.command, self.url, self.log = command, url, log
        self.start()

    def start(self) -> None:
        quiet = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "CUDA_VISIBLE_DEVICES": ""}
        quiet["OMP_NUM_THREADS"] = "1"  # threads that wait for each other crawl on a busy machine
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                shell=True,
                env=os.environ | quiet,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def kill(self) -> None:
        """As a crash would: no goodbyes."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def ready(self) -> Server:
        """Waits until it answers."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return self
            except OSError:
                time.sleep(0.5)
        raise RuntimeError(f"no answer at {self.url}; the end of its log:\n{self.log.read_text()[-3000:]}")


def free_url() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A folder with a tiny model whose weights are nobody's."""
    folder = tmp_path_factory.mktemp("base")
    load_policy(MODEL, seed=7).save(folder)
    return folder


@pytest.fixture(scope="session")
def started(base, tmp_path_factory):
    """All servers, starting at once: `server`, one that lacks what it should have, and one that is not vLLM."""
    python, logs = str(ENVIRONMENT / "bin" / "python"), tmp_path_factory.mktemp("logs")
    urls = {name: free_url() for name in ("server", "unfit", "transformers")}
    good = server_command(base, url=urls["server"], cpu=True, lora_rank=4, python=python)
    unfit = server_command(base, url=urls["unfit"], cpu=True, python=python).replace(
        "--logprobs-mode processed_logprobs", ""
    )
    port = urls["transformers"].rpartition(":")[2]
    other = f"{ENVIRONMENT}/bin/transformers serve --host 127.0.0.1 --port {port} {base}"
    commands = {"server": good, "unfit": unfit, "transformers": other}
    servers = {name: Server(command, urls[name], logs / f"{name}.log") for name, command in commands.items()}
    yield servers
    for server in servers.values():
        server.kill()


@pytest.fixture(scope="session")
def server(started):
    return started["server"].ready()
