"""Commands on several ranks under a real torchrun, over gloo, and the processes of its ranks."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def start(ranks, *command, cwd=None):
    """torchrun with `command` (a file, or -m MODULE, and arguments) on so many ranks; stderr is the pipe to read."""
    paths = ":".join(str(ROOT / folder) for folder in (".", "tests/support", "tests/trainer"))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*launch, *map(str, command)], env=environment, cwd=cwd, start_new_session=True, **pipes)


def finish(process, timeout=120):
    """(exit status, all that the launcher and the ranks said). One that does not end in time is killed, and fails the test."""
    try:
        said, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        raise AssertionError(f"not done after {timeout} s:\n{said[-3000:]}") from None
    return process.returncode, said


def run(ranks, *command, cwd=None, timeout=200):
    """What the ranks said; they have to end well."""
    status, said = finish(start(ranks, *command, cwd=cwd), timeout)
    assert status == 0, said[-4000:]
    return said


def pid_of(process, rank):
    """The process of a rank, once it is there."""
    for _ in range(600):
        for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            if f"RANK={rank}".encode() in environment:
                return int(child)
        time.sleep(0.05)
    raise AssertionError(f"rank {rank} did not start")


def wait_for(found, process, timeout=90):
    """Returns once `found()` is true; fails when the process ends before."""
    end = time.monotonic() + timeout
    while not found():
        assert process.poll() is None, finish(process)[1][-3000:]
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def sentences(said):
    """What drift complained of, one sentence a rank; not the line that says what is run."""
    return re.findall(r"^drift: (?!run )(.*)$", said, re.MULTILINE)
