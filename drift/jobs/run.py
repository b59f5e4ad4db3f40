"""The whole job: base, and for each seed rollouts, weights, three trainings from the same base, and evaluations.
With `online:` in the config one training takes their place, which samples as it goes (`drift.online`).

Everything lies in one folder, and each stage leaves a file there, so that a run that was stopped goes on:

    config.yaml  metrics.jsonl  seconds.json  summary.json  report.html  servers.json (lost ones)
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
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from drift import files, report, store
from drift.config import Config
from drift.engines import Engine, open_engine
from drift.engines.hf import HFEngine
from drift.jobs import lengths, sampled, servers, stages
from drift.jobs.evaluate import lines
from drift.jobs.folder import Clock, RunError, claim, finished, locked, rollout_path, write_json
from drift.jobs.summary import evaluation, summarise
from drift.jobs.warm_start import warm_start
from drift.jobs.work import Work, prepare
from drift.model import chat
from drift.model.policy import Policy
from drift.online import train_online
from drift.returns import weigh_for_training
from drift.rollouts.resume import count_corrected
from drift.track import Track, plain
from drift.training import distributed
from drift.training.reference import Reference
from drift.training.trainer import train

WATCHED = 64  # trajectories that an arm is compared with the base on


def run(config: Config) -> dict[str, Any]:
    """Runs what is not done yet, writes summary.json and report.html, and returns the summary.

    Raises ConfigError if the folder holds a run with other settings, RunError if an arm has nothing to train on;
    LockedError if another process runs there; WarmStartError, TaskError, StoreError, CheckpointError and WriteError as
    the stages do.
    """
    folder = Path(config.output_dir) / config.name
    with locked(folder):
        return _run(config, folder)


def _run(config: Config, folder: Path) -> dict[str, Any]:
    if (summary := finished(folder, config)) is not None:
        Track(None).say(
            f"{folder} is done: seeds {', '.join(map(str, config.seeds))}, arms {', '.join(config.trained)}"
        )
        return summary
    work = prepare(config)  # all complaints before anything is written
    try:
        claim(folder, config)
        with (
            distributed.launched(config.train.timeout) as rank,
            Track(
                folder if rank == 0 else None, list(config.track.sinks), config.track.progress and rank == 0
            ) as track,
        ):
            job = _Job(config, folder, work, track)
            job.base()
            for seed in config.seeds:
                job.seed(seed)
            if rank == 0:
                job.summarise()
            distributed.meet("the summary")
    finally:
        work.close()
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


class _Job:
    """What the stages share."""

    def __init__(self, config: Config, folder: Path, work: Work, track: Track) -> None:
        self.config, self.folder, self.track = config, folder, track
        self.work, self.task = work, work.task
        self.clock = Clock(folder / "seconds.json")
        self.policy: Policy
        self.start: dict[str, Any]  # the base's trainable parameters, in the host's memory

    def base(self) -> None:
        """The model that all seeds start from, trained to the target where it is the embedded one, and evaluated."""
        config, folder = self.config, self.folder / "base"
        warmed = config.model.path is None and config.warm_start.enabled
        if warmed and distributed.rank() == 0 and not (folder / "warm_start.json").exists():
            policy = stages.load(config, None)
            with self.clock("warm_start"), distributed.alone():
                engine = HFEngine(policy, config.rollout.batch_size)  # a server would need the base first
                done = warm_start(policy, engine, self.task, config, folder, self.track)
            self.track.say(f"warm start: {done.solved:.0%} of the check problems solved after {done.steps} steps")
        distributed.meet("the warm start")
        self.policy = stages.load(config, str(folder) if warmed else config.model.path)
        if distributed.rank() == 0:
            self.track.say(f"{stages.about(self.policy, config.model.path)}; run folder {self.folder}")
        self.policy.check_packing()
        if distributed.rank() == 0:
            lengths.check(self.policy, self.task, config, self.track)
        self.start = self.policy.state("cpu")
        self._evaluate("base", folder / "eval.json")

    def _engine(self) -> AbstractContextManager[Engine]:
        """Opened for each stage, which finds it in step with the policy's weights."""
        return open_engine(self.config.engine, self.policy, self.config.rollout.batch_size, servers.teller(self.track))

    def seed(self, seed: int) -> None:
        """Rollouts and all arms of one seed."""
        folder = self.folder / f"seed-{seed}"
        missing = [arm for arm in self.config.trained if not (folder / f"eval-{arm}.json").exists()]
        for arm in self.config.trained:
            if arm not in missing:
                self._evaluate(f"seed-{seed}/{arm}", folder / f"eval-{arm}.json", folder / arm)
        if distributed.rank() == 0 and not self.config.online:
            self._say_corrected(seed, [arm for arm in self.config.trained if arm not in missing])
        if missing:
            folder.mkdir(exist_ok=True)
            self.policy.restore(self.start)
            if self.config.online:
                self._online(seed, folder / self.config.online.algorithm)
            else:
                self._offline(seed, folder, missing)
        if distributed.rank() == 0:
            files.write(folder / "eval-base.json", (self.folder / "base" / "eval.json").read_bytes())

    def _say_corrected(self, seed: int, done: Sequence[str]) -> None:
        """Names the arms that were trained before answers of training problems changed: they are not trained again."""
        path = rollout_path(self.folder, self.config, seed)
        if done and (changed := count_corrected(path, self.task.problems("train"))):
            self.track.say(
                f"seed-{seed}: WARNING: {', '.join(done)} trained on {changed} trajectories checked against answers that have "
                f"changed, and will not be trained again; remove {self.folder / f'seed-{seed}'} to train all arms on the new ones"
            )

    def _online(self, seed: int, folder: Path) -> None:
        name, inside = f"seed-{seed}/{folder.name}", folder / "checkpoints"
        problems = self.task.problems("train")
        options: dict[str, Any] = {"seed": seed, "track": self.track, "checkpoint_dir": inside, "prefix": name}
        options["rollouts"] = folder / "rollouts.jsonl"
        options["examples_path"] = folder / "examples.jsonl"
        with self.clock("train"), ExitStack() as stack:
            with distributed.in_turn("the first weights for the engine"):
                engine = stack.enter_context(self._engine())
            train_online(self.policy, engine, self.task, problems, self.config, **options)
        self._finish(name, folder, [inside])

    def _offline(self, seed: int, folder: Path, missing: Sequence[str]) -> None:
        rows = self._sample(rollout_path(self.folder, self.config, seed), [seed], f"seed-{seed}/rollout")
        if "success_only" in self.config.arms:
            self._weights("success_only", rows, f"seed-{seed}/success_only", 0)  # refused before another arm is trained
        for arm in missing:
            self._arm(seed, arm, rows, folder / arm)

    def _arm(self, seed: int, arm: str, rows: list[dict[str, Any]], folder: Path) -> None:
        """Trains from the base for as many steps as an epoch of all trajectories has, `train.rounds` times."""
        config, name = self.config, f"seed-{seed}/{arm}"
        self.policy.restore(self.start)
        first = rows
        for number in range(config.train.rounds):
            inside = folder / f"round-{number}"
            if number > 0:
                rows = self._sample(folder / f"rollouts-{number}.jsonl", [seed, number], f"{name}/rollout-{number}")
            weights = self._weights(arm, rows, f"{name}/weights", number)
            with self.clock("train"):
                train(
                    self.policy,
                    stages.weighted(config, self.policy, rows, weights),
                    config.train,
                    seed=seed * config.train.rounds + number,
                    track=self.track,
                    checkpoint_dir=inside,
                    prefix=name,
                    steps=steps_of(len(rows), config.train.epochs, config.train.batch_size),
                    min_weight=config.weights.min_weight if arm == "drift" else 0.0,
                )
        self._watch(name, first)
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
        if distributed.rank() == 0:
            with self.clock("rollouts"):
                stages.sample_into(self.config, self.policy, self.task, path, seed, self.track, prefix)
        distributed.meet(f"rollouts into {path}")
        rows = store.read(path)
        store.check_policy(rows, self.policy.hash())
        if distributed.rank() == 0:
            sampled.say(self.policy, self.task, rows, self.config, self.track, prefix)
        return rows

    def _evaluate(self, name: str, path: Path, saved: Path | None = None) -> None:
        """Writes `path`, unless it is there and about the problems of today. saved: the model, if not `self.policy`."""
        if distributed.rank() == 0 and not self._evaluated(name, path):
            with self.clock("evaluate"):
                policy = self.policy if saved is None else stages.finished(self.config, saved)
                done = stages.evaluated(self.config, policy, self.work, self.track)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, done.to_json())
            for line in lines(done):
                self.track.say(f"{name}: {line}")
        distributed.meet(f"the evaluation of {name}")

    def _evaluated(self, name: str, path: Path) -> bool:
        if not path.exists():
            return False
        before = evaluation(self.config, self.folder, path).get("problems", [])
        now = [problem.id for _, problems in self.work.evaluations.values() for problem in problems]
        if before != now:
            changed = len(set(now) - set(before))
            self.track.say(
                f"{name}: {changed} of {len(now)} evaluation problems have another question or answer than when "
                f"{path.name} was written; evaluated again"
            )
        return before == now

    def summarise(self) -> None:
        """summary.json and report.html, from the files of the stages."""
        summary = plain(summarise(self.config, self.folder, self.clock.seconds))
        report.write(self.folder, summary)
        write_json(self.folder / "summary.json", summary)  # last: with it the run counts as done


def steps_of(rows: int, epochs: float, batch_size: int) -> int:
    """Optimizer steps of every arm: those of `epochs` passes over all trajectories."""
    return max(1, round(epochs * -(-rows // batch_size)))
