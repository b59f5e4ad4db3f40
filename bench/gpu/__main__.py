"""`python -m bench.gpu`: tests, benchmark, launch choices, in this order and one after another; the report grows with them.

It goes on whatever fails, and ends with status 1 where a test failed or one of our backends has no time. Left out: the
build (the Makefile's), and any judgement of a ratio.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.gpu import machine as machines
from bench.gpu import measure, tune
from bench.gpu.peers import PACKAGES, contenders
from bench.gpu.report import markdown
from bench.gpu.supervise import ROOT, TUNING, supervise, work
from bench.report import RESULTS, versions

REHEARSAL = "DRIFT_GPU_REHEARSAL"  # tests/gpu/conftest.py: CPU backends in the places of the GPU's
PROCESSES = 8  # of pytest: most of the tests' time is the compiling of kernels


def say(text: str) -> None:
    """A line on the terminal, with the time."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", file=sys.stderr, flush=True)


def run_tests(dry: bool, seconds: float) -> dict[str, Any]:
    """tests/gpu in a process of its own: {"summary", "failed": names with the first line of why, "status"}."""
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider"]
    if dry:
        command += ["-k", "everything or bitwise or counts"]
    elif find_spec("xdist"):
        command += ["-n", str(min(PROCESSES, os.cpu_count() or 1))]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tests.xml"
        environment = os.environ | ({REHEARSAL: "1"} if dry else {})
        try:
            done = subprocess.run(
                [*command, f"--junitxml={path}"],
                cwd=ROOT,
                env=environment,
                stdout=2,
                timeout=seconds,  # stderr
            )
        except subprocess.TimeoutExpired:
            return {"summary": f"not done within {seconds:.0f} s", "failed": [], "status": -1}
        if not path.exists():
            return {"summary": f"pytest ended with status {done.returncode}", "failed": [], "status": done.returncode}
        return _summary(ElementTree.parse(path).getroot(), done.returncode)


def _summary(tree: ElementTree.Element, status: int) -> dict[str, Any]:
    cases, failed, skipped = list(tree.iter("testcase")), [], {}
    for case in cases:
        for trouble in (*case.findall("failure"), *case.findall("error")):
            why = (trouble.get("message") or "").splitlines() or [""]
            failed.append(f"{case.get('name')}: {why[0][:200]}")
        for skip in case.findall("skipped"):
            why = skip.get("message") or ""
            skipped[why] = skipped.get(why, 0) + 1
    passed = len(cases) - len(failed) - sum(skipped.values())
    text = f"{passed} passed, {len(failed)} failed, {sum(skipped.values())} skipped"
    reasons = "; ".join(f"{count} × {why}" for why, count in skipped.items())
    return {"summary": f"{text} ({reasons})" if reasons else text, "failed": failed, "status": status}


def save(results: dict[str, Any], stem: Path) -> None:
    """Writes both forms; after each step, so that a run cut short leaves what it had."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_name(stem.name + ".json").write_text(json.dumps(results, indent=1) + "\n")
    stem.with_name(stem.name + ".md").write_text(markdown(results))


def whole(results: dict[str, Any]) -> bool:
    """Whether the tests passed and each of our backends that is there has a time in every case."""
    ours = [
        entry["status"] in ("ok", "unavailable")
        for case in results["cases"]
        for entry in case.get("contenders", [{"name": "drift-", "status": "nothing"}])
        if entry["name"].startswith("drift-")
    ]
    return results["tests"]["status"] == 0 and all(ours)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description="Tests, benchmark and tuning on a GPU.")
    parser.add_argument("--dry-run", action="store_true", help="rehearse on a CPU: tiny sizes, a clock that only ticks")
    parser.add_argument(
        "--out", type=Path, help="folder for the report (default bench/results; a new one for a dry run)"
    )
    parser.add_argument("--seconds", type=float, default=560.0, help="for all of it (default 560)")
    parser.add_argument("--rounds", type=int, default=7, help="of timing (default 7)")
    parser.add_argument("--no-tests", action="store_true", help="leave out the tests")
    parser.add_argument("--cases", nargs="+", choices=measure.CASES, default=list(measure.CASES), metavar="CASE")
    parser.add_argument("--contenders", nargs="+", default=[], metavar="NAME", help="default: everyone")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 if `whole`."""
    args = _arguments(argv)
    machine = machines.stand_in() if args.dry_run else machines.gpu()
    if args.worker is not None:
        return work(machine, json.loads(args.worker), lambda said: print("\n" + json.dumps(said), flush=True))
    known = [contender.name for contender in contenders(machine.backends)]
    if unknown := set(args.contenders) - set(known):
        raise SystemExit(f"no contender is called {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    until = time.monotonic() + args.seconds
    stem = (args.out or (Path(tempfile.mkdtemp(prefix="drift-gpu-")) if args.dry_run else RESULTS)) / machine.file
    results: dict[str, Any] = {
        "device": machine.name,
        "date": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
        "machine": machine.facts,
        "versions": versions(PACKAGES),
        "dry_run": machine.dry,
        "tests": {"summary": "not run", "failed": [], "status": 0 if args.no_tests else -1},
        "cases": [],
        "tuning": None,
    }
    save(results, stem)
    if not args.no_tests:
        results["tests"] = run_tests(machine.dry, args.seconds / 2)
        save(results, stem)
    order = {"tasks": [*args.cases, TUNING], "skip": {}, "rounds": args.rounds, "only": args.contenders}
    worker = [sys.executable, "-m", "bench.gpu", *(["--dry-run"] if machine.dry else []), "--worker"]
    found = supervise(order, worker, until - time.monotonic(), say)
    results["tuning"] = found.pop(TUNING)
    results["cases"] = [found[name] for name in args.cases]
    save(results, stem)
    if results["tuning"].get("file"):
        tune.save(results["tuning"], stem.with_name(stem.name + ".tuning.json"))
    print(markdown(results))
    print(f"{stem}.md · {stem}.json")
    return 0 if whole(results) else 1


if __name__ == "__main__":
    sys.exit(main())
