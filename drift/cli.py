"""`drift`, the command. Each sub-command loads a config or a folder, calls one function, and says what was written.

Exit status: 0 done, 1 the run failed for a reason that the message states, 2 the command or its settings are wrong,
130 interrupted (Ctrl-C), 143 terminated (SIGTERM). A traceback means a bug.
"""

from __future__ import annotations

import argparse
import difflib
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from drift import interrupts, shipped, threads  # threads first of all: before torch is imported  # noqa: F401

if TYPE_CHECKING:  # what takes seconds to import is imported by the command that needs it
    from rich.table import Table

    from drift.config import Config
    from drift.report.intervals import Difference
    from drift.report.records import Records

T = TypeVar("T")
FILES = ("summary.json", "metrics.jsonl", "rollouts.jsonl")  # of a run
TRAINER_PACKAGES = ("pydantic", "yaml", "rich", "matplotlib", "safetensors", "transformers", "tokenizers")
INSTALL = 'pip install "drift-rl[train]", or pip install -e ".[train]" in a clone; `drift doctor` lists what is there'
COMMANDS = ("run", "study", "rollout", "train", "eval", "report", "export", "data", "config", "init", "doctor")
EPILOG = """\
examples:
  drift init                                         copy the shipped configs and examples into this folder
  drift run quickstart                               the whole job: sample, weigh, train, evaluate, report
  drift run quickstart 'seeds=[0]' train.lr=1e-4     the same with two settings changed
  drift report runs/quickstart                       the page again, also of a run that is not finished
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. `argv` without the program's name; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments:
        _parser().print_help()
        return 0
    options = _parse(arguments)
    try:
        with interrupts.handled(_complain):
            return options.call(options)
    except KeyboardInterrupt as stop:
        again, saved = f"drift {shlex.join(arguments)}", getattr(stop, "saved", None)
        kept = f"The step in flight has ended and {saved} is written" if saved else "What was finished is kept"
        _complain(f"stopped. {kept}; the same command goes on from there:\n  {again}")
        return 128 + int(getattr(stop, "signal", signal.SIGINT))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in TRAINER_PACKAGES:
            raise
        _complain(f"{error.name} is not installed. The trainer's packages are an extra of this one, [train]: {INSTALL}")
        return 1
    except Exception as error:
        if not _worded(error):
            raise
        _complain(str(error))
        return 2 if _is_config_error(error) else 1


def _is_config_error(error: Exception) -> bool:
    from drift.config import ConfigError

    return isinstance(error, ConfigError)


def _worded(error: Exception) -> bool:
    """Whether the message says what to do: our own exceptions, ones that our own lines raise, and the system's about files.

    Anything else is a bug, and its traceback is what helps.
    """
    if type(error).__module__.partition(".")[0] == "drift" or isinstance(error, OSError):
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    package = trace.tb_frame.f_globals.get("__name__", "").partition(".")[0] if trace is not None else ""
    return isinstance(error, (ValueError, RuntimeError)) and package in ("drift", "drift_kernels")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Like parse_args, but settings may also stand behind options, where argparse does not look for them."""
    parser = _parser()
    if arguments and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        near = difflib.get_close_matches(arguments[0], COMMANDS, 1, 0.4)
        hint = f"did you mean `drift {near[0]}`?" if near else f"there are {', '.join(COMMANDS)}"
        parser.error(f"no such command: {arguments[0]}; {hint}")
    options, rest = parser.parse_known_args(arguments)
    if any(text.startswith("-") for text in rest) or (rest and not hasattr(options, "overrides")):
        hint = "; settings are given as key=value, such as train.lr=1e-4" if hasattr(options, "overrides") else ""
        parser.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="drift",
        description="Multi-turn post-training by importance-weighted fine-tuning.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"drift {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, call: Callable[[argparse.Namespace], int], text: str, more: str = "") -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}. {more}".strip())
        command.set_defaults(call=call)
        return command

    def with_config(command: argparse.ArgumentParser) -> None:
        names = ", ".join(shipped.configs())
        command.add_argument("config", metavar="CONFIG", help=f"a YAML file, or a shipped config by name: {names}")
        command.add_argument(
            "overrides", metavar="key=value", nargs="*", default=[], help="settings to change, such as train.lr=1e-4"
        )

    def with_model(command: argparse.ArgumentParser) -> None:
        base = "model.path, else the base that `drift run CONFIG` left"
        command.add_argument("--model", metavar="MODEL", help=f"a folder or hub name; default: {base}")

    resumes = "It goes on where an earlier run in the same folder stopped."
    with_config(add("run", _run, "the whole job: sample, weigh, train, evaluate, report", resumes))
    with_config(add("study", _study, "run, then intervals bootstrapped over seeds and problems", resumes))
    rollout = add(
        "rollout", _rollout, "sample trajectories of the training problems into a file", "It goes on from it."
    )
    train = add("train", _train, "train on a file of trajectories, with importance weights", "Checkpoints are kept.")
    for command, out in ((rollout, "the rollout file to append to"), (train, "the folder for the model")):
        with_config(command)
        with_model(command)
        command.add_argument("--out", metavar="PATH", required=True, type=Path, help=out)
        command.add_argument("--seed", type=int, default=0, help="default: 0")
    train.add_argument(
        "--rollouts", metavar="FILE", required=True, type=Path, help="JSONL, as `drift rollout` writes it"
    )
    evaluate = add("eval", _eval, "multi@k and single-turn accuracy of a model")
    with_config(evaluate)
    with_model(evaluate)
    report = add("report", _report, "write report.html for a run folder, finished or not; compare several")
    report.add_argument("run_dirs", metavar="RUN_DIR", nargs="+", help="a run's folder, such as runs/quickstart")
    export = add("export", _export, "the trained model in a folder of its own, for transformers and vLLM")
    export.add_argument(
        "run", metavar="RUN", type=Path, help="a run's folder (its first seed's last arm), or one trained model's"
    )
    export.add_argument("--out", metavar="DIR", type=Path, help="default: RUN/export")
    export.add_argument("--merge-lora", action="store_true", help="add adapters to their base's weights")
    export.add_argument("--shard-size", metavar="SIZE", help="of a file at most, such as 5GB; default: as they are")
    data = add("data", _data, "a published set of problems as a JSONL file", "Without NAME it lists the sets.")
    data.add_argument("set", metavar="NAME", nargs="?", help="such as math-500")
    data.add_argument(
        "--from", dest="source", metavar="SOURCE", help="a file, a folder or a hub name; default: the hub"
    )
    data.add_argument("--out", metavar="FILE", type=Path, help="the JSONL file; default: data/NAME.jsonl")
    data.add_argument("--limit", metavar="N", type=int, help="the first so many rows of each split")
    data.add_argument("--shuffle", metavar="SEED", type=int, help="shuffle the rows first; the public code takes 42")
    with_config(add("config", _config, "every setting with its value, its default and its origin"))
    init = add("init", _init, "copy the shipped configs and examples into a folder", "Nothing is overwritten.")
    init.add_argument("folder", metavar="FOLDER", nargs="?", default=".", type=Path, help="default: this one")
    doctor = add(
        "doctor", _doctor, "what is installed, which backends can run", "With CONFIG: its tokens, masks and lengths."
    )
    doctor.add_argument("config", metavar="CONFIG", nargs="?", help="a config: its model's turns, and what fits")
    doctor.add_argument("overrides", metavar="key=value", nargs="*", default=[], help="settings to change")
    return parser


def _version() -> str:
    try:
        return metadata.version("drift-rl")
    except metadata.PackageNotFoundError:
        return "(from a folder, not installed)"


def _run(options: argparse.Namespace) -> int:
    config = load_config(options.config, options.overrides)
    _announce("run", config, run_dir(config))
    folder = run_dir(config)
    from rich.console import Console

    from drift.jobs import run  # torch and transformers load here, not for --help
    from drift.report.records import read

    before = _written(folder / "summary.json")
    run.run(config)
    if os.environ.get("RANK", "0") != "0":  # under torchrun the first process speaks
        return 0
    records = read(folder, rollouts=False)
    console = Console()
    console.print(results_table(records))
    if before is not None and before == _written(folder / "summary.json"):
        console.print(_how_to_start_afresh(folder), markup=False, highlight=False, soft_wrap=True)
    for name in (FILES[0], "report.html", *FILES[1:]):
        if (folder / name).exists():
            console.print(f"  {folder / name}", markup=False, highlight=False, soft_wrap=True)
    _say_how_to_load(folder / f"seed-{config.seeds[0]}" / config.trained[-1], config)
    return 0


def _study(options: argparse.Namespace) -> int:
    config = load_config(options.config, options.overrides)
    _announce("study", config, run_dir(config))
    from rich.console import Console

    from drift.config import ConfigError
    from drift.jobs import study

    if len(config.seeds) < 2:
        raise ConfigError(f"seeds: a study needs at least two and has {config.seeds}; say seeds=[0,1,2,3,4,5,6,7,8,9]")
    result = study.study(config)
    console = Console()
    console.print(study.table(result))
    for name in ("study.json", "study.md", "study.svg"):
        console.print(f"  {run_dir(config) / name}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _rollout(options: argparse.Namespace) -> int:
    config = load_config(options.config, options.overrides)
    _announce("rollout", config, run_dir(config))
    from rich.console import Console

    from drift.jobs import stages

    new = stages.sample(config, options.out, model=options.model, seed=options.seed)
    Console(soft_wrap=True).print(f"{new} new trajectories in {options.out}", markup=False, highlight=False)
    return 0


def _train(options: argparse.Namespace) -> int:
    config = load_config(options.config, options.overrides)
    from rich.console import Console

    from drift.config import ConfigError

    if not options.rollouts.is_file():
        raise ConfigError(f"--rollouts {str(options.rollouts)!r} is not a file; `drift rollout` makes one")
    _announce("train", config, options.out)
    from drift.jobs import stages

    done = stages.fit(config, options.rollouts, options.out, model=options.model, seed=options.seed)
    text = f"{done.steps} steps on {done.trained_tokens:,} trained of {done.tokens:,} tokens; the model is in {options.out}"
    Console(soft_wrap=True).print(text, markup=False, highlight=False)
    _say_how_to_load(options.out, config)
    return 0


def _eval(options: argparse.Namespace) -> int:
    config = load_config(options.config, options.overrides)
    _announce("eval", config, run_dir(config))
    from drift.jobs import evaluate, stages

    print("\n".join(evaluate.lines(stages.score(config, model=options.model))))
    return 0


def _report(options: argparse.Namespace) -> int:
    for run_dir in options.run_dirs:
        _check_run_dir(run_dir)
    from drift import report

    for run_dir in options.run_dirs:
        print(report.write(run_dir))
    if len(options.run_dirs) > 1:
        from rich.console import Console

        from drift.report import compare
        from drift.report.records import read

        console, runs = Console(), [read(run_dir, rollouts=False) for run_dir in options.run_dirs]
        for table in filter(None, (compare.results(runs), compare.settings(runs))):
            console.print(table)
    return 0


def _export(options: argparse.Namespace) -> int:
    from drift.jobs.export import export

    print(export(options.run, options.out, merge_lora=options.merge_lora, shard_size=options.shard_size))
    return 0


def _check_run_dir(text: str) -> None:
    """Raises ConfigError unless the folder holds what a run wrote."""
    from drift.config import ConfigError

    if not Path(text).is_dir():
        raise ConfigError(f"RUN_DIR {text!r} is not a folder; a run writes to output_dir/name")
    names = ("config.yaml", "summary.json", "metrics.jsonl", "rollouts.jsonl")
    if not any((Path(text) / name).exists() for name in names):
        inside = sorted(str(path.parent) for path in Path(text).glob("*/config.yaml"))
        hint = f"; did you mean {' or '.join(inside[:5])}?" if inside else "; a run writes one to output_dir/name"
        raise ConfigError(f"RUN_DIR {text!r} holds no run: there is no config.yaml{hint}")


def _init(options: argparse.Namespace) -> int:
    for path in shipped.copy_to(options.folder):
        print(f"  {path}")
    return 0


def _data(options: argparse.Namespace) -> int:
    from drift.jobs import commands

    text, warnings = commands.data(
        options.set, options.source, options.out, limit=options.limit, shuffle=options.shuffle
    )
    for warning in warnings:
        _complain(warning)
    print(text)
    return 0


def _config(options: argparse.Namespace) -> int:
    from drift.config import explain
    from drift.jobs import commands

    commands.show(commands.settings_table(_loaded(explain, options.config, options.overrides)))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    if options.config is None:
        from drift.jobs import doctor

        doctor.show()
        return 0
    config = load_config(options.config, options.overrides)
    from drift.jobs import examine

    return 0 if examine.show(config) else 1


def load_config(path: str, overrides: Sequence[str]) -> Config:
    """`drift.config.load` of a file, or of a shipped config by its name; a file that cannot be read is a ConfigError too."""
    from drift.config import load

    return _loaded(load, path, overrides)


def _loaded(load: Callable[[str, list[str]], T], path: str, overrides: Sequence[str]) -> T:
    from drift.config import ConfigError

    known = shipped.configs()
    source = str(known[path]) if path in known and not Path(path).exists() else path
    try:
        return load(source, list(overrides))
    except OSError as error:
        names = f"; shipped configs are {', '.join(known)}" if "/" not in path and not Path(path).suffix else ""
        raise ConfigError(f"CONFIG {path!r} cannot be read: {error.strerror}{names}") from None


def _written(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def run_dir(config: Config) -> Path:
    """The folder that a run of `config` lives in."""
    return Path(config.output_dir) / config.name


def results_table(records: Records) -> Table:
    """Means over seeds, and how far ahead drift is of each arm, with the standard error of the paired difference."""
    from rich.table import Table

    from drift.report.intervals import mean_stderr, paired_difference

    seeds = len(records.seeds)
    table = Table(title=f"{records.path.name}: held-out problems solved, {seeds} seed{'s' * (seeds != 1)}", box=None)
    table.add_column("arm", no_wrap=True)
    table.add_column("", style="dim")
    sampled = (name for result in records.results.values() for name in result.sampled)
    means = sorted({name for name in sampled if name.startswith("mean")})
    sets = list(next(iter(records.results.values())).sets) if records.results else []
    first = (*sets, f"{'average ' * bool(sets)}multi@{records.turns} %", "single %")
    for heading in (*first, *(f"{name} %" for name in means), "drift ahead"):
        table.add_column(heading, justify="right", no_wrap=True)
    ours = records.results.get("drift")
    for arm, result in records.results.items():
        ahead = _points(paired_difference(ours.multi, result.multi)) if ours and arm != "drift" else ""
        parts = (result.sets[name].multi for name in sets)
        shown = (*parts, result.multi, result.single, *(result.sampled.get(name) for name in means))
        cells = (f"{100 * mean_stderr(values).mean:.1f}" if values else "" for values in shown)
        table.add_row(arm, records.about(arm), *cells, ahead, style="bold" if arm == "drift" else None)
    return table


def _points(difference: Difference) -> str:
    text = f"{100 * difference.mean:+.1f}"
    return text if difference.stderr != difference.stderr else f"{text} ± {100 * difference.stderr:.1f}"


def _announce(command: str, config: Config, folder: Path) -> None:
    """The first line, before the libraries load: they take seconds."""
    from drift.jobs import commands

    if os.environ.get("RANK", "0") == "0":
        _complain(commands.first_line(command, config, folder))


def _say_how_to_load(folder: Path, config: Config) -> None:
    from drift.jobs import commands

    if os.environ.get("RANK", "0") == "0" and folder.is_dir():
        print(commands.how_to_load(folder, config))


def _how_to_start_afresh(folder: Path) -> str:
    return (
        f"{folder} was done already; nothing was run again. To start afresh, remove the folder "
        f"(rm -r {shlex.quote(str(folder))}) or give the run another name (name=…)."
    )


def _complain(text: str) -> None:
    print(f"drift: {text}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
