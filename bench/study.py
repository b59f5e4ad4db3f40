"""`python -m bench.study`: both methods, their ablations and what they are measured against, on the tiny model.

All variants start from one base, see the same problems and sample as many trajectories (8,192 a seed; the offline ones
before training, the online ones 256 a step; one of A's samples a quarter of that). Differences are paired by seed. Every
variant is a run of `drift` in OUT/VARIANT, so a study that was stopped goes on. Two run side by side, with one thread each.

Writes OUT/study.json, docs/study-methods.svg, and the tables between the marks in docs/study.md.
Left out: tuning. Learning rate, β and γ were chosen on the warm start's check problems; B's curriculum and the settings of
A's quarter on other seeds and on the train split's problems 256 to 1,199. Nothing here trains on or reports either.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from drift.config import Config, dump, load
from drift.jobs.folder import rollout_path
from drift.report import plots
from drift.report.intervals import mean_stderr, paired_difference

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- methods: written by python -m bench.study -->", "<!-- /methods -->"
FEW = 3  # seeds at most of an ablation or a sweep
MARGIN = 0.03  # of non-inferiority, a share of problems
T95 = (
    6.314,
    2.920,
    2.353,
    2.132,
    2.015,
    1.943,
    1.895,
    1.860,
    1.833,
)  # Student's t, one-sided 95 %, by degrees of freedom
OFFLINE = ("online=null", "rollout.n=32", "weights.beta=0.4", "train.batch_size=40", "train.schedule=constant")
SMOKE = (
    "arms=[drift]",  # nothing is solved after no training
    "task.train_problems=8",
    "task.eval_problems=12",
    "rollout.n=2",
    "rollout.turns=2",
    "warm_start.target_low=0.0",
    "warm_start.check_every=1",
    "warm_start.check_problems=8",
    "warm_start.target_high=1.0",
    "eval.samples=2",
    "eval.turns=2",
)
SMOKE_ONLINE = ("online.steps=2", "online.prompts=2")


@dataclass(frozen=True)
class Variant:
    """One line of the tables: an arm of a run of `configs/online.yaml` with overrides."""

    name: str
    group: str
    overrides: tuple[str, ...] = ()
    run: str = ""  # the run that it is an arm of, where several share one
    arm: str = "drift"
    reads: str = ""  # the run whose rollouts it trains on

    @property
    def folder(self) -> str:
        """Of its run."""
        return self.run or self.name


def online(name: str, group: str, *overrides: str, algorithm: str = "drift") -> Variant:
    """An online variant; only B has a curriculum."""
    plain = () if algorithm == "drift" else ("online.curriculum={}",)
    return Variant(name, group, (f"online.algorithm={algorithm}", *plain, *overrides), arm=algorithm)


def offline(name: str, *overrides: str) -> Variant:
    """Method A with other numbers, on the same trajectories."""
    return Variant(name, "offline", (*OFFLINE, "arms=[drift]", *overrides), reads="offline")


THREE = (*OFFLINE, "arms=[uniform,success_only,drift]")
QUARTER = (  # what A is worth in less time; what weighs next to nothing, and groups that nothing tells apart, cost none
    "rollout.n=8",
    "train.epochs=3",
    "train.lr=1.0e-3",
    "train.schedule=linear",
    "weights.beta=0.2",
    "weights.min_weight=0.1",
    "weights.skip_unsolved_groups=true",
)
NO_ROUTING = (
    "online.router.distill_incorrect=[1.0,1.0,1.0]",
    "online.router.policy_correct=[1.0,1.0,1.0]",
    "online.router.rebellious=[1.0,1.0,1.0]",
)
VARIANTS = (
    Variant("uniform SFT", "methods", THREE, "offline", "uniform"),
    Variant("success only", "methods", THREE, "offline", "success_only"),
    Variant("A", "methods", THREE, "offline"),
    Variant("A, a quarter sampled", "methods", (*OFFLINE, "arms=[drift]", *QUARTER)),
    online("GRPO", "methods", algorithm="grpo"),
    online("SDPO", "methods", algorithm="sdpo"),
    online("SRPO", "methods", algorithm="srpo"),
    online("B", "methods"),
    online("B without routing", "ablations", *NO_ROUTING),
    online("B without buffer", "ablations", "online.buffer.start_step=1000000"),
    online("B without warm-up", "ablations", "online.curriculum={warmup_steps: 0, transition_steps: 0}"),
    online("B without rhythm", "ablations", "online.rhythm.gate=false", "online.rhythm.weigh_divergence=false"),
    online("B, bands 0.1 and 0.9", "thresholds", "online.router.hard_below=0.1", "online.router.easy_above=0.9"),
    online("B, bands 0.2 and 0.8", "thresholds", "online.router.hard_below=0.2", "online.router.easy_above=0.8"),
    online("B, bands 0.4 and 0.6", "thresholds", "online.router.hard_below=0.4", "online.router.easy_above=0.6"),
    offline("A, β = 0.1", "weights.beta=0.1"),
    offline("A, β = 0.2", "weights.beta=0.2"),
    offline("A, β = 0.8", "weights.beta=0.8"),
    offline("A, γ = 0.5", "weights.gamma=0.5"),
    offline("A, γ = 0.7", "weights.gamma=0.7"),
    offline("A, γ = 1", "weights.gamma=1.0"),
)
SMOKE_VARIANTS = ("A", "GRPO", "B", "A, β = 0.1")


def config_of(variant: Variant, out: Path, count: int, smoke: bool) -> Config:
    """The run that a variant is part of; `count` seeds."""
    seeds = range(count if variant.group == "methods" else min(count, FEW))
    where = (f"name={slug(variant.folder)}", f"output_dir={out}", f"seeds={list(seeds)}", "track.progress=false")
    small = (*SMOKE, *(() if "online=null" in variant.overrides else SMOKE_ONLINE)) if smoke else ()
    return load(ROOT / "configs" / "online.yaml", [*variant.overrides, *small, *where])


def slug(name: str) -> str:
    """A folder's name."""
    plain = name.translate(str.maketrans({"β": "beta", "γ": "gamma", ",": None, "=": None, " ": "-"}))
    return plain.replace("--", "-")


# ---- running


def perform(variants: Sequence[Variant], configs: dict[str, Config], out: Path, jobs: int) -> None:
    """Runs what is missing, `jobs` at a time. The first run makes the base, which the others start with a copy of.

    configs: of each run, by folder.

    Raises RuntimeError with the end of its log where a run fails; those beside it finish first.
    """
    console, reads = Console(), {variant.folder: variant.reads for variant in variants}
    first, *rest = configs

    def one(name: str) -> None:
        folder = out / slug(name)
        if name != first:
            _share(out / slug(first), folder, reads[name])
        log, path = (out / f"{slug(name)}{kind}" for kind in (".log", ".yaml"))
        path.write_text(dump(configs[name]), encoding="utf-8")
        with log.open("w") as file:
            command = [sys.executable, "-m", "drift.cli", "run", str(path)]
            code = subprocess.run(
                command, stdout=file, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"}
            ).returncode
        if code:
            raise RuntimeError(f"{name}: the run ended with {code}; {log} ends with:\n{log.read_text()[-2000:]}")
        console.print(f"{name}: done", highlight=False)

    out.mkdir(parents=True, exist_ok=True)
    one(first)
    with ThreadPoolExecutor(jobs) as pool:
        for done in [pool.submit(one, name) for name in rest]:
            done.result()


def _share(source: Path, folder: Path, reads: str) -> None:
    """The base, and the trajectories of the run that is named, where the folder has none yet."""
    if not (folder / "base").exists():
        shutil.copytree(source / "base", folder / "base")
    if reads:
        for file in sorted(source.glob("**/rollouts.jsonl")):
            copy = folder / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if not copy.exists():
                shutil.copyfile(file, copy)


# ---- reading


def measure(variant: Variant, out: Path, config: Config) -> dict[str, Any]:
    """What a variant's run left: shares of problems by seed, tokens and CPU seconds, means over seeds."""
    folder, seeds = out / slug(variant.folder), config.seeds
    results = json.loads((folder / "summary.json").read_text())["results"]
    lines = _metrics(folder)
    prefixes = [f"seed-{seed}/{variant.arm}/" for seed in seeds]
    if config.online:
        batch = config.online.prompts * config.rollout.n
        generated = sum(_sum(lines, prefix + "response_tokens") * batch for prefix in prefixes)
        trained, sampling = generated, 0.0
    else:
        source = out / slug(variant.reads or variant.folder)
        files = [rollout_path(source, config, seed) for seed in seeds]
        generated = sum(map(_generated, files))
        trained = sum(_last(lines, prefix + "trained_tokens") for prefix in prefixes)
        theirs = lines if source == folder else _metrics(source)
        sampling = sum(_sum(theirs, f"seed-{seed}/rollout/step_cpu_time") for seed in seeds)
    training = sum(_sum(lines, prefix + "step_cpu_time") for prefix in prefixes)
    return {
        "name": variant.name,
        "group": variant.group,
        "results": {key: values for key, values in results[variant.arm].items() if key != "by_turn"},
        "base": {key: values for key, values in results["base"].items() if key != "by_turn"},
        "generated_tokens": generated / len(seeds),
        "trained_tokens": trained / len(seeds),
        "seconds": (sampling + training) / len(seeds),
    }


def _metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _sum(lines: Sequence[dict[str, Any]], key: str) -> float:
    return math.fsum(line[key] for line in lines if key in line)


def _last(lines: Sequence[dict[str, Any]], key: str) -> float:
    return next(line[key] for line in reversed(lines) if key in line)


def _generated(rollouts: Path) -> int:
    with rollouts.open() as lines:
        return sum(sum(json.loads(line)["loss_mask"]) for line in lines)


def verdicts(rows: Sequence[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """Each variant against GRPO, paired by seed: mean, standard error, one-sided 95 % lower bound by Student's t."""
    grpo, found = next(row for row in rows if row["name"] == "GRPO"), []
    for row in rows:
        values = row["results"][key]
        count = len(values)
        gap = paired_difference(values, grpo["results"][key][:count])
        low = gap.mean - (T95[count - 2] if count - 2 < len(T95) else 1.8) * gap.stderr
        found.append(
            {
                "name": row["name"],
                "mean": gap.mean,
                "stderr": gap.stderr,
                "low": low,
                "not_inferior": low > -MARGIN,
                "time": row["seconds"] / grpo["seconds"],
            }
        )
    return found


def analyse(rows: list[dict[str, Any]], config: Config) -> dict[str, Any]:
    """study.json: every variant, and how each stands to GRPO."""
    multi, mean = f"multi_at_{config.eval.turns}", f"mean_at_{config.eval.samples}"
    return {
        "seeds": config.seeds,
        "problems": config.task.eval_problems,
        "measures": [multi, mean, "single"],
        "base": {key: values[0] for key, values in rows[0]["base"].items()},
        "variants": rows,
        "against_grpo": {key: verdicts(rows, key) for key in (multi, mean)},
    }


def markdown(result: dict[str, Any]) -> str:
    """The tables."""
    multi, mean, single = result["measures"]
    names = [multi.replace("_at_", "@"), mean.replace("_at_", "@"), "single turn"]
    base = " | ".join(f"{100 * result['base'][key]:.1f}" for key in result["measures"])
    gaps = [f"{name} − GRPO's" for name in names[:2]]
    heads = ["variant", *names, *gaps, "k tokens sampled", "trained", "CPU s a seed", "of GRPO's"]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1), f"| base | {base} |" + " |" * 6]
    against = [{verdict["name"]: verdict for verdict in result["against_grpo"][key]} for key in (multi, mean)]
    group = "methods"
    for row in result["variants"]:
        if row["group"] != group:
            group = row["group"]
            lines.append(f"| *{TITLES[group]}* |" + " |" * 9)
        found = [verdicts[row["name"]] for verdicts in against]
        cells = [_mean(row["results"][key]) for key in (multi, mean, single)]
        cells += ["", ""] if row["name"] == "GRPO" else [_gap(verdict) for verdict in found]
        cells += [f"{row[key] / 1e3:.0f}" for key in ("generated_tokens", "trained_tokens")]
        lines.append(f"| {row['name']} | {' | '.join(cells)} | {row['seconds']:.0f} | {found[0]['time']:.2f} |")
    seeds = len(result["seeds"])
    lines += [
        "",
        f"Percent of {result['problems']} held-out problems: means ± standard errors over {seeds} seeds (below the methods "
        f"{min(FEW, seeds)}). Differences are paired by seed; ✓: not worse than GRPO by {100 * MARGIN:.0f} points, the one-sided "
        "95 % bound by Student's t over seeds lying above. CPU seconds of one thread: sampling and training, without evaluation.",
    ]
    return "\n".join(lines)


TITLES = {  # of groups
    "ablations": "B without a part",
    "thresholds": "B, other bands of the router (0.3 and 0.7)",
    "offline": "A, other β (0.4) and γ (0.9)",
}


def _mean(values: Sequence[float]) -> str:
    mean, stderr = mean_stderr(values)
    return f"{100 * mean:.1f} ± {100 * stderr:.1f}"


def _gap(verdict: dict[str, Any]) -> str:
    return f"{100 * verdict['mean']:+.1f} ± {100 * verdict['stderr']:.1f}{' ✓' if verdict['not_inferior'] else ''}"


def splice(file: Path, text: str) -> None:
    """Puts `text` between the marks of a document. Raises ValueError if they are missing."""
    before, begin, rest = file.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{file} has no {BEGIN} … {END} to write between")
    file.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")


COLOUR = {"A": "drift", "B": "drift", "uniform SFT": "uniform", "success only": "success_only"}  # as which arm


def draw(result: dict[str, Any], path: Path) -> None:
    """multi@k of every variant: the mean, and two standard errors over seeds to each side."""
    key = result["measures"][0]
    rows: list[tuple[str, str, float, float, float]] = [("base", "base", *[result["base"][key]] * 3)]
    for row in result["variants"]:
        values = row["results"][key]
        mean, stderr = mean_stderr(values)
        rows.append(
            (
                str(row["name"]),
                COLOUR.get(str(row["name"]), str(row["name"])),
                mean,
                mean - 2 * stderr,
                mean + 2 * stderr,
            )
        )
    title = f"{key.replace('_at_', '@')}, ± 2 standard errors over {len(result['seeds'])} seeds"
    plots.intervals(rows, title, "held-out problems solved").savefig(path, metadata={"Date": None})


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.study", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help=f"of the methods (default 5; others take {FEW} at most)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each (default 2)")
    parser.add_argument("--out", type=Path, help="runs' folder (default runs/methods; runs/methods-smoke with --smoke)")
    groups = list(dict.fromkeys(variant.group for variant in VARIANTS))
    parser.add_argument("--groups", nargs="+", choices=groups, default=groups, help="beside the methods (default: all)")
    parser.add_argument("--smoke", action="store_true", help="a few variants, a few steps; writes no docs")
    options = parser.parse_args(arguments)
    if options.seeds < 2 or options.jobs < 1:
        parser.error("--seeds takes at least 2, --jobs at least 1")
    out = options.out or Path("runs") / ("methods-smoke" if options.smoke else "methods")
    wanted = {"methods", *options.groups}  # what others are compared with, and the base
    variants = [v for v in VARIANTS if (v.name in SMOKE_VARIANTS if options.smoke else v.group in wanted)]
    count = 2 if options.smoke else options.seeds
    configs = {v.folder: config_of(v, out, count, options.smoke) for v in variants}
    perform(variants, configs, out, options.jobs)
    rows = [measure(v, out, configs[v.folder]) for v in variants]
    result = analyse(rows, configs["GRPO"])
    text = markdown(result)
    Console().print(text, highlight=False, soft_wrap=True)
    (out / "study.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "study.md").write_text(text + "\n")
    draw(result, out / "study.svg")
    if not options.smoke:
        shutil.copyfile(out / "study.svg", ROOT / "docs" / "study-methods.svg")
        splice(ROOT / "docs" / "study.md", text)
    return result


if __name__ == "__main__":
    main()
