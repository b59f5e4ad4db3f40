"""The online method (B): sample a batch, verify, route, teach, train one step, and again.

What a step samples follows from the seed and its number; the router, the buffer, the running means and the teacher's
weights are in the checkpoint: an interrupted training goes on to the same bits, and to the same file of trajectories,
each row with the weights that the router gave it. Under torchrun every rank samples its share of the problems, all
ranks see the whole batch and route it alike, and each trains its share of the trajectories.

    L = Σ w_policy·policy_token / N_p + λ·Σ w_distill·divergence_token / N_d

with denominators over the global batch (`drift.online.branches.denominators`). With `history: template` a turn is a
sequence, under the weights and the advantage of its trajectory.

Sampling and training alternate, or with `online.ahead` the next batch is sampled while this one is trained on: by weights
one step older, which the correction of sampler against trainer covers, and to the same bits whatever the threads do.

Left out: several optimizer steps a batch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from drift import interrupts, store
from drift.config import Config
from drift.config.algorithms import ALGORITHMS
from drift.engines import Engine
from drift.engines.hf import HFEngine
from drift.model.policy import Policy
from drift.online import examples
from drift.online.ahead import Ahead, Still
from drift.online.branches import Branches, denominators
from drift.online.guide import Guide
from drift.online.outcomes import outcomes, token_means
from drift.online.samples import Sample, problems_of, read, set_advantages, stored
from drift.online.teacher import Teacher
from drift.online.watch import Watch
from drift.rhythm import StepMean
from drift.rollouts.account import account, expected
from drift.rollouts.environments import Environment
from drift.rollouts.rollout import framing, play, tool_metrics
from drift.tasks import Task
from drift.track import Track
from drift.training import checkpoint, distributed, sharding
from drift.training.guards import Guards, check_end, check_row, keep_batch
from drift.training.meter import StepResult, Stopwatch
from drift.training.optimizer import MasterAdamW, learning_rate
from drift.training.reference import Reference, chosen
from drift.training.trainer import due, has_dropout, seeded, training, update
from drift.types import Problem, Trajectory


@dataclass
class OnlineStats:
    """What a training did, over all ranks."""

    steps: int = 0
    skipped: int = 0  # steps without an update, since loss or gradient was not finite
    skipped_in_a_row: int = 0  # up to the last step
    trajectories: int = 0
    rewards: list[float] = field(default_factory=list)  # means, one a step
    seconds: float = 0.0


def train_online(
    policy: Policy,
    engine: Engine,
    task: Task,
    problems: Sequence[Problem],
    config: Config,
    *,
    seed: int,
    track: Track | None = None,
    checkpoint_dir: str | Path | None = None,
    rollouts: str | Path | None = None,
    environment: Environment | None = None,
    prefix: str = "online",
    examples_path: str | Path | None = None,
) -> OnlineStats:
    """Trains in place for `config.online.steps` steps. Metrics of every step go to `track` as PREFIX/NAME.

    With `checkpoint_dir` it saves every `config.train.save_every` steps and at the end, and goes on from what is there.
    rollouts: a file that every step's trajectories are appended to (`drift.store`), with their step (as in the metrics),
    staleness, advantage, pass_rate, had_teacher and routed weights; rows past the step that it goes on from are cut off.
    environment: in place of the one that `config.rollout` names (`drift.rollouts.environments`).
    examples_path: a file that a few responses of a few steps go to, token by token (`drift.online.examples`).
    Raises ValueError if `config.online` is missing or a trajectory does not fit a pack, CheckpointError if the
    folder holds another training.
    """
    first = distributed.rank() == 0
    track = track if track is not None and first else Track(None, progress=False)
    job = {"seed": seed, "problems": [problem.id for problem in problems], "rollout": config.rollout.model_dump()}
    job |= {"online": config.online.model_dump(mode="json") if config.online else None}
    job |= config.train.model_dump(exclude=set(config.train.FREE))
    with (
        distributed.resuming(partial(checkpoint.describe, checkpoint_dir)),
        sharding.sharded(policy, config.train.shard) as spread,
        closing(_Loop(policy, engine, task, problems, config, seed, environment, spread)) as loop,
        _rows(rollouts if first else None, loop.resume(checkpoint_dir, job, track), track) as writer,
        track.progress(prefix, loop.online.steps) as bar,
    ):
        stats = loop.stats
        bar.advance(stats.steps)
        while stats.steps < loop.online.steps:
            with interrupts.finishing():
                measured = loop.step(stats.steps, writer, track)
                loop.tell(track, prefix, measured)
                bar.advance(reward=measured["reward"], solved=measured["solved"])
                if examples_path is not None and first:
                    examples.append(examples_path, ({"step": stats.steps, **row} for row in loop.examples))
                result, failed = loop.result, stats.skipped_in_a_row >= config.train.max_skipped
                saved = None
                if checkpoint_dir is not None and (
                    due(stats.steps, loop.online.steps, config.train) or result.stop or failed
                ):
                    if writer is not None:
                        writer.sync()  # a checkpoint never knows of rows that a power loss takes
                    saved = loop.save(checkpoint_dir, job)
                check_row(stats, config.train.max_skipped, prefix, result, saved)
                if result.stop:
                    interrupts.stop(result.stop, str(saved) if saved else None)
    check_end(stats, prefix)
    return stats


@contextmanager
def _rows(path: str | Path | None, stats: OnlineStats, track: Track) -> Iterator[store.Writer | None]:
    """The file of trajectories, as it was after the steps so far."""
    if path is None:
        yield None
        return
    if cut := store.rewind(path, stats.steps):
        track.say(f"{path}: cut off {cut} rows past step {stats.steps}, which is where the training goes on")
    with store.Writer(path) as writer:
        if len(writer.done) != stats.trajectories:
            raise store.StoreError(
                f"{path} holds {len(writer.done)} rows, and the {stats.steps} steps of the checkpoint wrote "
                f"{stats.trajectories}: rows were lost, or another process wrote there too. Put the file back, or remove "
                f"the folder {Path(path).parent}, and the same command does this training again"
            )
        yield writer


class _Loop:
    """The components of one algorithm, and what a step does with them."""

    def __init__(
        self,
        policy: Policy,
        engine: Engine,
        task: Task,
        problems: Sequence[Problem],
        config: Config,
        seed: int,
        environment: Environment | None = None,
        spread: Policy | None = None,
    ) -> None:
        """spread: the policy that is trained in place of `policy`, which samples (`drift.training.sharding`)."""
        if config.online is None:
            raise ValueError(
                "config.online is missing; `online: {}` takes the method's own settings, and its optimizer's"
            )
        self.policy, self.task, self.problems = policy, task, list(problems)
        self.config, self.online, self.seed = config, config.online, seed
        self.trained = trained = policy if spread is None else spread
        sharding.fill(trained)
        self.base, self.environment = policy.hash(), environment
        self.ahead = Ahead(policy.device) if config.online.ahead else None
        still = trained is not policy
        self.engine = Still(engine, policy, self.ahead.stop, still) if self.ahead else engine
        sharding.empty(trained)
        self.in_process = isinstance(engine, HFEngine)  # it samples from the policy's own weights
        self.pending: list[store.Row] | None = None  # the next step's, all ranks', where they are sampled already
        self.algorithm = ALGORITHMS[config.online.algorithm]
        self.optimizer, self.stats = MasterAdamW(trained.model, config.train), OnlineStats()
        self.guards = Guards(config.train.grad_spike, config.train.low_ess, config.train.sampler_gap)
        self.result = StepResult(0.0, 0.0, False)  # of the last step
        self.trajectories: list[Trajectory] = []  # its batch, if it was skipped
        distributed.broadcast(self.optimizer.parameters)
        self.optimizer.write_back()
        has = {"teacher": self.algorithm.teacher is not None, "buffer": self.algorithm.buffer}
        self.guide = Guide(self.online, policy.tokenizer, len(self.problems), **has)
        self.difference, self.entropy = StepMean(), StepMean()
        self.watch, self.examples = Watch(self.online.watch), list[dict[str, Any]]()
        self.reference = Reference(trained, config) if self.online.watch.every else None
        self.certain = not has_dropout(trained.model)  # its log-probs in training are those out of it
        self.teacher: Teacher | None = None
        if self.algorithm.teacher:
            parameters = trained.model.named_parameters()
            self.teacher = Teacher(parameters, self.online.teacher, self.optimizer.masters)
        self.branches = Branches(trained, self.optimizer, config, self.algorithm, self.difference, self.entropy)

    def step(self, number: int, writer: store.Writer | None = None, track: Track | None = None) -> dict[str, float]:
        """One rollout batch and one optimizer step; what to log. The first batch is accounted for in words to `track`."""
        clock, phase = Stopwatch(), self.guide.phase(number)
        sharding.fill(self.trained)
        with distributed.in_turn(
            "the step's weights for the engine"
        ):  # once all ranks have their samples of older ones
            self.engine.sync()
        if not self.in_process:
            sharding.empty(self.trained)
        samples = self._sample(number)
        self.guide.route(samples, number)
        if number == 0 and track is not None:
            self._account(samples, track)
        if writer is not None:
            rollout = self.config.rollout
            for sample in samples:
                writer.write(stored(sample, number, self.base, rollout.temperature, rollout.top_p))
        more = number + 1 < self.online.steps
        if self.ahead and more:
            self.ahead.start(partial(self._play, number + 1, number))
        else:
            sharding.empty(self.trained)
        sampled = clock.read()["step_time"]
        parts = [part for sample in samples for part in sample.parts]
        keep = examples.choose(number, self.online, [(part.solved_at > 0, part.taught is None) for part in parts])
        compared = self._compared(parts, number)
        known = {part.trajectory.index for part in compared} if self.certain else set[int]()
        with training(self.trained.model), seeded(self.seed, number, self.trained.model):
            measured = self.branches.accumulate(
                distributed.share(parts), phase, self.teacher, denominators(parts, self.online), keep, known
            )
        reference_kl = self._reference_kl(parts, compared, measured.logprobs)
        if self.ahead:
            self.ahead.check()
        lr = learning_rate(number, self.online.steps, self.config.train)
        result = update(self.optimizer, measured.loss, self.config.train, lr)
        for mean in (self.difference, self.entropy):
            mean.advance(distributed.sum_values)
        if self.teacher:
            self.teacher.update(finite=not result.skipped)
        trained = time.perf_counter()
        if self.ahead and more:
            own = self.ahead.result()
            distributed.meet(f"the rollouts of step {number + 2}")
            self.pending = distributed.gather(own)
        waited = {"seconds_waiting": time.perf_counter() - trained} if self.ahead else {}
        self.examples = distributed.gather(measured.examples) if keep else []
        rates, means = outcomes(samples) | self._tool_use(samples), token_means(measured.sums)
        self.watch.update(
            entropy=means["entropy"],
            repeat_rate=rates["repeat_rate"],
            problem_ids=[sample.problem_id for sample in samples],
            correct=[sample.solved_at > 0 for sample in samples],
            reference_kl=reference_kl,
        )
        took = clock.read()
        self.stats.steps += 1
        self.stats.skipped += result.skipped
        self.stats.skipped_in_a_row = self.stats.skipped_in_a_row + 1 if result.skipped else 0
        self.result = result
        self.trajectories = [part.trajectory for part in parts] if result.skipped else []
        self.stats.trajectories += len(samples)
        self.stats.seconds += took["step_time"]
        self.stats.rewards.append(rates["reward"])
        return {
            **rates,
            "staleness": sum(number - sample.row["policy_version"] for sample in samples) / len(samples),
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "skipped": float(result.skipped),
            "lr": lr,
            **means,
            "seconds_sampling": sampled,
            **waited,
            **took,
            **{f"{name}/{key}": value for name, part in self._parts() for key, value in part.metrics().items()},
        }

    def _account(self, samples: Sequence[Sample], track: Track) -> None:
        parser = expected(framing(self.task).parser, self.task.answer_tag) if self.environment is None else None
        ends = self.policy.eos_ids | self.policy.turns.ends
        first = account([sample.row for sample in samples], self.config.weights, ends)
        track.say(f"first step: {first.line(parser, self.config.rollout.max_new_tokens)}")
        if warning := first.warning(parser):
            track.say(f"first step: WARNING: {warning}")
        untaught = self.algorithm.teacher and all(sample.taught is None for sample in samples)
        if untaught and self.guide.phase(0).name == "warmup":
            warmup = self.online.curriculum.warmup_steps
            track.say(
                "first step: WARNING: nothing is trained: the warm-up trains samples with a teacher, and no problem has a right "
                f"answer to teach with. It lasts online.curriculum.warmup_steps={warmup} steps; 0 leaves it out"
            )

    def _tool_use(self, samples: Sequence[Sample]) -> dict[str, float]:
        if self.environment is None and self.config.rollout.tool is None:
            return {}
        return tool_metrics([(s.row.get("tool_calls", 0), s.row.get("tool_errors", 0)) for s in samples])

    def _compared(self, parts: Sequence[Sample], number: int) -> Sequence[Sample]:
        """Those that the reference scores in this step."""
        watch = self.online.watch
        return chosen(parts, watch.trajectories) if self.reference and number % watch.every == 0 else []

    def _reference_kl(
        self, parts: Sequence[Sample], compared: Sequence[Sample], logprobs: dict[int, Tensor]
    ) -> float | None:
        """logprobs: what this rank's training has found; with dropout nothing, and the policy is run once more."""
        if self.reference is None or not compared:
            return None
        known = dict(distributed.gather(list(logprobs.items()))) if self.certain else None
        return self.reference.kl([part.trajectory for part in parts], self.online.watch.trajectories, known)

    def _parts(self) -> list[tuple[str, Any]]:
        named = {name: getattr(self.guide, name) for name in ("router", "buffer", "curriculum")}
        named["teacher"] = self.teacher
        named |= {"difference": self.difference, "entropy_mean": self.entropy, "watch": self.watch}
        return [(name, part) for name, part in named.items() if part is not None]

    def state_dict(self) -> dict[str, Any]:
        """As JSON holds it; the teacher's tensors are saved apart."""
        states = {name: part.state_dict() for name, part in self._parts()}
        states.get("teacher", {}).pop("shadow", None)
        return {**states, "stats": vars(self.stats), "base": self.base}

    def load_state_dict(self, state: dict[str, Any], shadow: dict[str, Any]) -> None:
        """Takes up what `state_dict` gave, in place."""
        for name, part in self._parts():
            part.load_state_dict(state[name] | ({"shadow": shadow} if name == "teacher" else {}))
        vars(self.stats).update(state["stats"])
        self.base = state["base"]

    def save(self, folder: str | Path, job: dict[str, Any]) -> Path:
        """Writes the checkpoint of the steps so far; every rank calls this."""
        rows = {"pending": self.pending or []} if self.ahead else {}
        return checkpoint.save(folder, self.stats.steps, self.optimizer, self.state_dict(), job, self._tensors(), rows)

    def resume(self, folder: str | Path | None, job: dict[str, Any], track: Track) -> OnlineStats:
        """Goes on from the last checkpoint in `folder`, if there is one; returns what is done."""
        if folder is not None and (path := checkpoint.latest(folder, track.say)) is not None:
            tensors = self._tensors()
            _, state = checkpoint.load(path, self.optimizer, job, tensors)
            self.load_state_dict(state, tensors.get("teacher", {}))
            self.pending = checkpoint.load_rows(path, "pending") if self.ahead else None
        return self.stats

    def _tensors(self) -> checkpoint.Groups:
        """Those of a checkpoint beside the optimizer's; the live ones."""
        return {"teacher": self.teacher.state_dict()["shadow"]} if self.teacher else {}

    def tell(self, track: Track, prefix: str, measured: dict[str, float]) -> None:
        """Logs the last step, and says what looks wrong in it."""
        step, result = self.stats.steps, self.result
        track.log(step, **{f"{prefix}/{key}": value for key, value in measured.items()})
        if result.skipped:
            kept = keep_batch(track.folder, prefix, step, result, self.trajectories)
            said = f"loss {result.loss}, gradient norm {result.grad_norm}" + (f"; its batch: {kept}" if kept else "")
            track.say(f"{prefix}: step {step} is skipped: {said}")
        for warning in self.watch.warnings:
            track.say(f"{prefix}: step {step}: {warning}; a collapse? (online.watch)")
        for warning in self.guards.warnings(result, sampler_kl=measured.get("sampler_kl")):
            track.say(f"{prefix}: step {step}: {warning}")

    def close(self) -> None:
        """Ends the thread, if there is one."""
        if self.ahead:
            self.ahead.close()

    def _sample(self, number: int) -> list[Sample]:
        """The step's trajectories, of all ranks, in an order that all ranks share."""
        rows, self.pending = self.pending, None
        if rows is None:
            own = self._play(number, number)
            distributed.meet(f"the rollouts of step {number + 1}")
            rows = distributed.gather(own)
        samples = [read(self.trained, row, self.config.weights) for row in rows]
        for place, part in enumerate(part for sample in samples for part in sample.parts):
            part.trajectory.index = place
        set_advantages(samples, self.online.scale_advantages)
        return samples

    def _play(self, number: int, version: int) -> list[store.Row]:
        """This rank's trajectories of a step, sampled from the weights after `version` steps; no collective."""
        chosen = distributed.share(problems_of(number, len(self.problems), self.online.prompts, self.seed))
        jobs = [(self.problems[i], index) for i in chosen for index in range(self.config.rollout.n)]
        seed, settings = [self.seed, number], self.config.rollout
        policy = self.engine.policy if isinstance(self.engine, Still) else self.policy
        options: dict[str, Any] = {"seed": seed, "environment": self.environment}
        episodes = play(policy, self.engine, self.task, jobs, settings, **options) if jobs else []
        rows = [episode.row(settings.format_penalty) for episode in episodes]
        unparsed = [episode.answers.count(None) for episode in episodes]
        return [{**row, "policy_version": version, "unparsed": count} for row, count in zip(rows, unparsed)]
