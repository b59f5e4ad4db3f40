"""`drift`, the command. Each sub-command loads a config or a folder, calls one function, and says what was written.

Exit status: 0 done, 1 the run failed for a reason that can be put in words, 2 the command or its settings are wrong,
130 interrupted. A traceback means a bug.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from drift.config import Config, ConfigError, load
from drift.intervals import Difference, mean_stderr, paired_difference
from drift.records import ARMS, Records, read

EPILOG = """\
examples:
  drift run configs/quickstart.yaml                        the whole job: sample, weigh, train, evaluate, report
  drift run configs/quickstart.yaml seeds=[0] train.lr=1e-4    the same with two settings changed
  drift report runs/quickstart                             the page again, also of a run that is not finished
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. `argv` without the program's name; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(arguments)
    try:
        return options.call(options)
    except KeyboardInterrupt:
        again = f"drift {shlex.join(arguments)}"
        _complain(f"stopped. What was finished is kept; the same command goes on from there:\n  {again}")
        return 130
    except ConfigError as error:
        _complain(str(error))
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="drift",
        description="Multi-turn post-training by importance-weighted fine-tuning.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, call: Callable[[argparse.Namespace], int], text: str, more: str = "") -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}. {more}".strip())
        command.set_defaults(call=call)
        return command

    def with_config(command: argparse.ArgumentParser) -> None:
        command.add_argument("config", metavar="CONFIG", help="a YAML file, such as configs/quickstart.yaml")
        command.add_argument(
            "overrides", metavar="key=value", nargs="*", help="settings to change, such as train.lr=1e-4"
        )

    resumes = "It goes on where an earlier run in the same folder stopped."
    with_config(add("run", _run, "the whole job: sample, weigh, train, evaluate, report", resumes))
    with_config(add("study", _study, "run over all seeds, with bootstrapped intervals", resumes))
    report = add("report", _report, "write report.html for a run folder, finished or not")
    report.add_argument("run_dir", metavar="RUN_DIR", help="a run's folder, such as runs/quickstart")
    add("doctor", _doctor, "what is installed, which backends can run, and why not")
    return parser


def _run(options: argparse.Namespace) -> int:
    config = load_config(options.config, options.overrides)
    folder = run_dir(config)
    from drift import run  # torch and transformers load here, not for --help

    done = (folder / "summary.json").exists()
    run.run(config)
    records = read(folder, rollouts=False)
    console = Console()
    console.print(results_table(records))
    if done:
        console.print(_how_to_start_afresh(folder), markup=False, highlight=False, soft_wrap=True)
    for name in ("summary.json", "report.html", "metrics.jsonl", "rollouts.jsonl"):
        if (folder / name).exists():
            console.print(f"  {folder / name}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _study(options: argparse.Namespace) -> int:
    config = load_config(options.config, options.overrides)
    from drift import study

    if len(config.seeds) < 2:
        raise ConfigError(f"seeds: a study needs at least two and has {config.seeds}; say seeds=[0,1,2,3,4,5,6,7,8,9]")
    result = study.study(config)
    console = Console()
    console.print(study.table(result))
    for name in ("study.json", "study.md", "study.svg"):
        console.print(f"  {run_dir(config) / name}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _report(options: argparse.Namespace) -> int:
    if not Path(options.run_dir).is_dir():
        raise ConfigError(f"RUN_DIR {options.run_dir!r} is not a folder; a run writes to output_dir/name")
    from drift import report

    print(report.write(options.run_dir))
    return 0


def _doctor(_: argparse.Namespace) -> int:
    from drift import doctor

    doctor.show()
    return 0


def load_config(path: str, overrides: Sequence[str]) -> Config:
    """`drift.config.load`, with a file that cannot be read as a ConfigError too."""
    try:
        return load(path, list(overrides))
    except OSError as error:
        raise ConfigError(f"CONFIG {path!r} cannot be read: {error.strerror}") from None


def run_dir(config: Config) -> Path:
    """The folder that a run of `config` lives in."""
    return Path(config.output_dir) / config.name


def results_table(records: Records) -> Table:
    """Means over seeds, and how far ahead drift is of each arm, with the standard error of the paired difference."""
    seeds = len(records.seeds)
    table = Table(title=f"{records.path.name}: held-out problems solved, {seeds} seed{'s' * (seeds != 1)}", box=None)
    table.add_column("arm", no_wrap=True)
    table.add_column("", style="dim")
    for heading in (f"multi@{records.turns} %", "single %", "drift ahead"):
        table.add_column(heading, justify="right", no_wrap=True)
    ours = records.results.get("drift")
    for arm, result in records.results.items():
        ahead = _points(paired_difference(ours.multi, result.multi)) if ours and arm != "drift" else ""
        means = (f"{100 * mean_stderr(values).mean:.1f}" for values in (result.multi, result.single))
        table.add_row(arm, ARMS.get(arm, ""), *means, ahead, style="bold" if arm == "drift" else None)
    return table


def _points(difference: Difference) -> str:
    text = f"{100 * difference.mean:+.1f}"
    return text if difference.stderr != difference.stderr else f"{text} ± {100 * difference.stderr:.1f}"


def _how_to_start_afresh(folder: Path) -> str:
    return (
        f"{folder} was done already; nothing was run again. To start afresh, remove the folder "
        f"(rm -r {shlex.quote(str(folder))}) or give the run another name (name=…)."
    )


def _complain(text: str) -> None:
    Console(stderr=True).print(f"drift: {text}", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
