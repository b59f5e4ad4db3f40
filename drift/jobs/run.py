"""The whole job: base, and for each seed rollouts, weights, three trainings from the same base, and evaluations.
With `online:` in the config one training takes their place, which samples as it goes (`drift.online`).

Everything lies in one folder, and each stage leaves a file there, so that a run that was stopped goes on:

    config.yaml  metrics.jsonl  seconds.json  summary.json  report.html
    base/                     the warm-started model, and its evaluation
    rollouts.jsonl            the first seed's trajectories; later seeds' lie in seed-K/
    seed-K/ARM/               the trained model (while it is trained: checkpoints), later rounds' rollouts-N.jsonl;
                              trained online: rollouts.jsonl, every step's trajectories, and examples.jsonl, some of them
                              token by token
    seed-K/eval-ARM.json      what it solved

Seeds differ in what is sampled and in the order of training. They share the base and the problems, so that arms are
compared within a seed. Under torchrun, the first rank samples and evaluates and all ranks train.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from drift import report, store
from drift.config import Config, ConfigError, dump, load
from drift.engines import Engine, open_engine
from drift.engines.hf import HFEngine
from drift.jobs.evaluate import evaluate
from drift.jobs.warm_start import warm_start
from drift.model import chat
from drift.model.policy import Policy, load_policy
from drift.online import train_online
from drift.report.intervals import paired_difference
from drift.returns import weigh, weigh_for_training
from drift.rollouts.rollout import collect
from drift.tasks import Task, load_task, with_rules
from drift.track import Track, plain
from drift.training import distributed
from drift.training.reference import Reference
from drift.training.trainer import train
from drift.types import Problem

MAY_CHANGE = ("seeds", "arms", "track", "name", "output_dir", "engine")  # between two runs in one folder
WATCHED = 64  # trajectories that an arm is compared with the base on
LONGEST_WAIT = 7 * 24 * 3600.0  # seconds that ranks wait for the one that samples


class RunError(RuntimeError):
    """A run that cannot go on, for a reason that its settings can mend."""


def run(config: Config) -> dict[str, Any]:
    """Runs what is not done yet, writes summary.json and report.html, and returns the summary.

    Raises ConfigError where the folder holds a run with other settings, RunError where an arm has nothing to train on;
    WarmStartError, TaskError, StoreError and CheckpointError as their stages do.
    """
    folder = Path(config.output_dir) / config.name
    if (summary := _finished(folder, config)) is not None:
        Track(None).say(
            f"{folder} is done: seeds {', '.join(map(str, config.seeds))}, arms {', '.join(config.trained)}"
        )
        return summary
    _claim(folder, config)
    transformers_logging.disable_progress_bar()
    task = load_task(config.task)
    try:
        for split in ("train", "eval"):
            task.problems(split)  # too few are said now, not after the warm start
        with (
            distributed.launched(timeout=LONGEST_WAIT) as rank,
            Track(
                folder if rank == 0 else None, list(config.track.sinks), config.track.progress and rank == 0
            ) as track,
        ):
            job = _Job(config, folder, task, track)
            job.base()
            for seed in config.seeds:
                job.seed(seed)
            if rank == 0:
                job.summarise()
            distributed.barrier()
    finally:
        task.close()
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


class _Job:
    """What the stages share."""

    def __init__(self, config: Config, folder: Path, task: Task, track: Track) -> None:
        self.config, self.folder, self.task, self.track = config, folder, task, track
        self.clock = _Clock(folder / "seconds.json")
        self.policy: Policy
        self.start: dict[str, Any]  # the base's trainable parameters

    def base(self) -> None:
        """The model that all seeds start from, trained to the target where it is the embedded one, and evaluated."""
        config, folder = self.config, self.folder / "base"
        warmed = config.model.path is None and config.warm_start.enabled
        if warmed and distributed.rank() == 0 and not (folder / "warm_start.json").exists():
            policy = self._load(None)
            with self.clock("warm_start"):
                engine = HFEngine(policy, config.rollout.batch_size)  # a server would need the base first
                done = warm_start(policy, engine, self.task, config, folder, self.track)
            self.track.say(f"warm start: {done.solved:.0%} of the check problems solved after {done.steps} steps")
        distributed.barrier()
        self.policy = self._load(str(folder) if warmed else config.model.path)
        self.start = self.policy.state()
        self._evaluate("base", folder / "eval.json")

    def _load(self, path: str | None) -> Policy:
        model = self.config.model.model_copy(update={"path": path})
        return load_policy(model, device=distributed.device(), seed=self.config.task.seed)

    def _engine(self, batch_size: int) -> AbstractContextManager[Engine]:
        """Opened for each stage, which finds it in step with the policy's weights."""
        return open_engine(self.config.engine, self.policy, batch_size)

    def seed(self, seed: int) -> None:
        """Rollouts and all arms of one seed."""
        folder = self.folder / f"seed-{seed}"
        if all((folder / f"eval-{arm}.json").exists() for arm in ("base", *self.config.trained)):
            return
        folder.mkdir(exist_ok=True)
        self.policy.restore(self.start)
        if self.config.online:
            self._online(seed, folder / self.config.online.algorithm)
        else:
            self._offline(seed, folder)
        if distributed.rank() == 0:
            shutil.copyfile(self.folder / "base" / "eval.json", folder / "eval-base.json")

    def _online(self, seed: int, folder: Path) -> None:
        name, inside = f"seed-{seed}/{folder.name}", folder / "checkpoints"
        problems = self._asked(self.task.problems("train"))
        options: dict[str, Any] = {"seed": seed, "track": self.track, "checkpoint_dir": inside, "prefix": name}
        options["rollouts"] = folder / "rollouts.jsonl"
        options["examples_path"] = folder / "examples.jsonl"
        with self.clock("train"), ExitStack() as stack:
            with distributed.in_turn():
                engine = stack.enter_context(self._engine(self.config.rollout.batch_size))
            train_online(self.policy, engine, self.task, problems, self.config, **options)
        self._finish(name, folder, [inside])

    def _offline(self, seed: int, folder: Path) -> None:
        rows = self._sample(rollout_path(self.folder, self.config, seed), [seed], f"seed-{seed}/rollout")
        for arm in self.config.arms:
            if not (folder / f"eval-{arm}.json").exists():
                self._arm(seed, arm, rows, folder / arm)

    def _arm(self, seed: int, arm: str, rows: list[dict[str, Any]], folder: Path) -> None:
        """Trains from the base for as many steps as an epoch of all trajectories has, `train.rounds` times."""
        config, name = self.config, f"seed-{seed}/{arm}"
        self.policy.restore(self.start)
        sampled = rows
        for number in range(config.train.rounds):
            inside = folder / f"round-{number}"
            if number > 0:
                rows = self._sample(folder / f"rollouts-{number}.jsonl", [seed, number], f"{name}/rollout-{number}")
            weights = self._weights(arm, rows, f"{name}/weights", number)
            chosen = [
                trajectory
                for index, (row, weight) in enumerate(zip(rows, weights))
                if weight is not None
                for trajectory in chat.to_trajectories(
                    self.policy, row, index=index, weight=weight, turns=config.train.turns
                )
            ]
            with self.clock("train"):
                train(
                    self.policy,
                    chosen,
                    config.train,
                    seed=seed * config.train.rounds + number,
                    track=self.track,
                    checkpoint_dir=inside,
                    prefix=name,
                    steps=steps_of(len(rows), config.train.epochs, config.train.batch_size),
                    min_weight=config.weights.min_weight if arm == "drift" else 0.0,
                )
        self._watch(name, sampled)
        self._finish(name, folder, list(folder.glob("round-*")))

    def _watch(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Entropy, and KL from the base, on some of what the base sampled: a trained arm's signs of collapse."""
        some = rows[:: -(-len(rows) // WATCHED)]
        read = [t for row in some for t in chat.to_trajectories(self.policy, row, index=0, turns="assistant")]
        moved = Reference(self.policy, self.config, self.start).moved(read, len(read))
        self.track.log(self.config.train.rounds, **{f"{name}/watch/{key}": value for key, value in moved.items()})

    def _finish(self, name: str, folder: Path, checkpoints: Sequence[Path]) -> None:
        """Saves and evaluates what was trained; the checkpoints go last."""
        if distributed.rank() == 0:
            self.policy.save(folder)
        self._evaluate(name, folder.parent / f"eval-{folder.name}.json")
        if distributed.rank() == 0:
            for inside in checkpoints:
                shutil.rmtree(inside)

    def _weights(self, arm: str, rows: list[dict[str, Any]], name: str, number: int) -> Sequence[float | None]:
        """A weight for each row; None leaves it out."""
        if arm == "uniform":
            return [1.0] * len(rows)
        if arm == "success_only":
            chosen = [None if row["t_star"] is None else 1.0 for row in rows]
            if not any(chosen):
                raise RunError(
                    f"{name}: no trajectory has a right answer, so success_only has nothing to train on; leave it out of "
                    "arms, or take easier problems, a stronger base or a larger rollout.n"
                )
            return chosen
        weights, stats = weigh_for_training(rows, self.config.weights)
        self.track.log(number, **{f"{name}/{key}": value for key, value in stats.items()})
        return weights

    def _sample(self, path: Path, seed: Sequence[int], prefix: str) -> list[dict[str, Any]]:
        config = self.config
        if distributed.rank() == 0:
            with self.clock("rollouts"), self._engine(config.rollout.batch_size) as engine:
                problems = self._asked(self.task.problems("train"))
                collect(self.policy, engine, self.task, problems, config.rollout, path, seed, self.track, prefix)
        distributed.barrier()
        rows = store.read(path)
        store.check_policy(rows, self.policy.hash())
        return rows

    def _evaluation(self, path: Path) -> dict[str, Any]:
        """What lies there. Raises RunError where it was made with other settings than these, or is none."""
        config, found = self.config, _read_json(path)
        asked = {
            "eval.turns": config.eval.turns,
            "eval.samples": config.eval.samples,
            "task.eval_problems": config.task.eval_problems,
        }
        try:
            sizes = (len(found["by_turn"]), found.get("samples", 0), len(found["solved_at"]))
        except (TypeError, KeyError, AttributeError):
            raise RunError(f"{path} holds no evaluation; remove it, and the same command makes it again") from None
        differ = [f"{key}={had} and not {now}" for had, (key, now) in zip(sizes, asked.items()) if had != now]
        if differ:
            raise RunError(
                f"{path} was made with {', '.join(differ)}; set that back, or have everything trained and evaluated again: "
                f"rm {self.folder}/base/eval.json {self.folder}/seed-*/eval-*.json"
            )
        return found

    def _evaluate(self, name: str, path: Path) -> None:
        if distributed.rank() == 0 and path.exists():
            self._evaluation(path)
        elif distributed.rank() == 0:
            config = self.config
            with self.clock("evaluate"), self._engine(config.eval.batch_size) as engine:
                done = evaluate(
                    self.policy,
                    engine,
                    self.task,
                    self._asked(self.task.problems("eval")),
                    config.eval,
                    config.rollout.feedback,
                    history=config.rollout.history,
                    tool=config.rollout.tool,
                    tool_calls=config.rollout.tool_calls,
                    track=self.track,
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_json(path, done.to_json())
            shares = f"multi@{config.eval.turns} {done.multi_at_k:.1%}, single turn {done.single:.1%}"
            self.track.say(f"{name}: {shares} of {len(done.solved_at)} problems")
        distributed.barrier()

    def _asked(self, problems: list[Problem]) -> list[Problem]:
        """The problems as they are put to the model; one that was not warm-started on the format is told it."""
        if self.config.model.path is None:
            return problems
        return with_rules(problems, self.task.answer_tag)

    def summarise(self) -> None:
        """summary.json and report.html, from the files of the stages."""
        config = self.config
        multi, n = f"multi_at_{config.eval.turns}", config.eval.samples
        keys = (multi, "single", "by_turn", *((f"mean_at_{n}", f"pass_at_{n}") if n else ()))
        results: dict[str, dict[str, list[Any]]] = {}
        for arm in ("base", *config.trained):
            read = [self._evaluation(self.folder / f"seed-{seed}" / f"eval-{arm}.json") for seed in config.seeds]
            results[arm] = {key: [content[key] for content in read] for key in keys}
        summary = {
            "name": config.name,
            "seeds": config.seeds,
            "results": results,
            "paired": _paired(results, multi),
            "settings": _picked(config),
            **({"online": config.online.model_dump(mode="json")} if config.online else self._sampled()),
            "seconds": self.clock.seconds | {"total": sum(self.clock.seconds.values())},
        }
        _write_json(self.folder / "summary.json", plain(summary))
        report.write(self.folder)

    def _sampled(self) -> dict[str, list[float]]:
        """What the base sampled for each seed, and how the weights spread over it."""
        config = self.config
        sampled = [store.read(rollout_path(self.folder, config, seed)) for seed in config.seeds]
        stats = [weigh(rows, config.weights)[1] for rows in sampled]
        return {
            "ess": [s["ess_overall"] for s in stats],
            "ess_in_group": [s["ess_mean"] for s in stats],
            "unsolved_groups": [s["unsolved_share"] for s in stats],
            "sampled": [sum(row["t_star"] is not None for row in rows) / len(rows) for rows in sampled],
        }


def rollout_path(folder: Path, config: Config, seed: int) -> Path:
    """Where a seed's trajectories are: the first seed's lie on top, to be looked at."""
    inside = folder if seed == config.seeds[0] else folder / f"seed-{seed}"
    return inside / "rollouts.jsonl"


def steps_of(rows: int, epochs: float, batch_size: int) -> int:
    """Optimizer steps of every arm: those of `epochs` passes over all trajectories."""
    return max(1, round(epochs * -(-rows // batch_size)))


def _paired(results: dict[str, dict[str, list[Any]]], multi: str) -> dict[str, Any]:
    """Mean and standard error over seeds of what drift is ahead of each other arm."""
    if "drift" not in results:
        return {}
    return {
        f"drift - {arm}": {
            key: paired_difference(results["drift"][key], other[key])._asdict() for key in (multi, "single")
        }
        for arm, other in results.items()
        if arm != "drift"
    }


def _picked(config: Config) -> dict[str, Any]:
    """The settings that a reader of the results asks for first, of those that the method reads."""
    every = {
        "n": config.rollout.n,
        "turns": config.rollout.turns,
        "train_problems": config.task.train_problems,
        "eval_problems": config.task.eval_problems,
        "lr": config.train.lr,
    }
    if config.online:
        return {"gamma": config.weights.gamma, "repetition": config.weights.repetition, **every}
    offline = {"epochs": config.train.epochs, "batch_size": config.train.batch_size}
    return {**config.weights.model_dump(), **every, **offline}


class _Clock:
    """Seconds by stage, kept in a file, so that those of an interrupted run count."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = _read_json(path) if path.exists() else {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start
            if distributed.rank() == 0:
                _write_json(self.path, self.seconds)


def _finished(folder: Path, config: Config) -> dict[str, Any] | None:
    """The summary, if it is that of these settings, seeds and arms."""
    if not (folder / "summary.json").exists() or not (folder / "config.yaml").exists():
        return None
    before = _settings(folder / "config.yaml")
    kept = {key: getattr(config, key) for key in ("track", "output_dir", "engine")}
    same = before.model_copy(update=kept) == config
    return _read_json(folder / "summary.json") if same else None


def _settings(file: Path) -> Config:
    """What a run wrote there. Raises ConfigError naming the file, which is not the one that the command names."""
    try:
        return load(file, [])
    except ConfigError as error:
        raise ConfigError(
            f"{file}, which an earlier run wrote, cannot be read: {error}; give this run another name (name=…), or remove "
            "the folder"
        ) from None


def _claim(folder: Path, config: Config) -> None:
    """Writes config.yaml; in a folder where a run has got anywhere, only what may differ between two runs may differ."""
    file = folder / "config.yaml"
    if file.exists() and any((folder / name).exists() for name in ("base", "rollouts.jsonl")):
        before, now = _settings(file).model_dump(), config.model_dump()
        differ = [line for key in now if key not in MAY_CHANGE for line in _differences(key, before[key], now[key])]
        if before["seeds"][0] != config.seeds[0]:
            differ.append(f"seeds began with {before['seeds'][0]} and now with {config.seeds[0]}")
        if differ:
            raise ConfigError(
                f"{folder} holds a run with other settings: {'; '.join(differ)}. Set them back, give this run another "
                f"name (name=…), or remove the folder"
            )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").unlink(missing_ok=True)
    _write(file, dump(config))


def _differences(path: str, before: Any, now: Any) -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(before.keys() | now.keys())
        return [line for key in keys for line in _differences(f"{path}.{key}", before.get(key), now.get(key))]
    return [] if before == now else [f"{path} was {before!r} and is {now!r}"]


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is not JSON ({error}); remove it, and the same command makes it again") from None


def _write_json(path: Path, content: Any) -> None:
    _write(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _write(path: Path, text: str) -> None:
    """In one go: a reader finds the old file or the new one, even where several ranks write."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
