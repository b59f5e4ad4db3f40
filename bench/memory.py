"""Peak extra memory of one contender, in a process of its own: `python -m bench.memory CONTENDER CASE…` prints JSON lines.

Extra is how far the high-water mark rises over what was resident before the step; the gradients are part of it. The mark
is reset before each case, and freed memory is given back (`ENVIRONMENT`, `empty_cache`), so one case does not pay for the next.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench import verify
from bench.cases import CASES, CURVES, Case, make
from bench.peers import CONTENDERS, drift
from drift_kernels import empty_cache

# Blocks from 64 KiB on are mapped, and so unmapped when freed; glibc would otherwise raise that bound up to 32 MiB.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536"}
ROOT = Path(__file__).parent.parent
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def available() -> str | None:
    """None, or why memory cannot be measured here."""
    return None if sys.platform == "linux" and os.access(RESET, os.W_OK) else "needs Linux's /proc/self/clear_refs"


def high_water() -> int:
    """This process's peak resident memory since the last reset, in bytes."""
    found = re.search(r"VmHWM:\s+(\d+)", STATUS.read_text())
    assert found is not None
    return int(found[1]) * 1024


def peak_extra(contender: str, name: str, smoke: bool = False) -> int:
    """Bytes by which one step raises the high-water mark of this process. "drift@64" is drift with a workspace of 64 MiB."""
    case = known_cases()[name]
    contender, _, mib = contender.partition("@")
    tiny = case.shrunk()
    problem = make(tiny if smoke else case)
    loss = drift(int(mib) << 20) if mib else CONTENDERS[contender].load()
    verify.step(make(tiny), loss)  # libraries and threads are up, code is compiled
    empty_cache()
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    RESET.write_text("5")
    before = high_water()
    verify.step(problem, loss)
    return high_water() - before


def known_cases() -> dict[str, Case]:
    """Everything that can be named here."""
    return CASES | {case.name: case for curve in CURVES.values() for case in curve}


def measure(contender: str, cases: Sequence[str], smoke: bool = False) -> Iterator[tuple[str, int]]:
    """(case, bytes) as a fresh process reports them; stops early where it dies."""
    command = [sys.executable, "-m", "bench.memory", contender, *cases, *(["--smoke"] if smoke else [])]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT, env=os.environ | ENVIRONMENT
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                found = json.loads(line)
                yield found["case"], found["bytes"]


def main(arguments: Sequence[str]) -> None:
    """Of each case named, in the given order."""
    contender, *cases = (word for word in arguments if word != "--smoke")
    warnings.simplefilter("ignore")
    for case in cases:
        print(json.dumps({"case": case, "bytes": peak_extra(contender, case, "--smoke" in arguments)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
