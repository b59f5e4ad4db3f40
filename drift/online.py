"""The online method (B), synchronous: sample a batch, verify, route, teach, train one step, and again.

What a step samples follows from the seed and its number; the router, the buffer, the running means and the teacher's
weights are in the checkpoint: an interrupted training goes on to the same bits. Under torchrun every rank samples its
share of the problems, all ranks see the whole batch and route it alike, and each trains its share of the trajectories.

    L = (Σ w_policy·policy_token + λ·Σ w_distill·divergence_token) / N

with N all response tokens of the global batch (ours: the public code divides each micro-batch by its own). Presets whose
policy loss is a mean over sequences (grpo, gspo) divide that branch by the number of sequences, global too.

Left out: sampling while training (the two alternate), and several optimizer steps a batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from drift import chat, checkpoint, distributed, token_values
from drift.algorithms import ALGORITHMS
from drift.branches import Branches, Measured, Sample
from drift.buffer import SuccessBuffer
from drift.config import Config
from drift.curriculum import Curriculum
from drift.engines import Engine
from drift.optimizer import MasterAdamW, learning_rate
from drift.policy import Policy
from drift.reference import Reference
from drift.reprompt import Attempt, lessons, teacher_trajectory
from drift.returns import trajectory_return
from drift.rhythm import StepMean
from drift.rollout import Episode, play
from drift.routing import DifficultyRouter
from drift.tasks import Task
from drift.teacher import Teacher
from drift.track import Track
from drift.trainer import seeded, training, update
from drift.types import Problem
from drift.watch import Watch, repeat_rate


@dataclass
class OnlineStats:
    """What a training did, over all ranks."""

    steps: int = 0
    skipped: int = 0  # steps without an update, since loss or gradient was not finite
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
    prefix: str = "online",
    examples_path: str | Path | None = None,
) -> OnlineStats:
    """Trains in place for `config.online.steps` steps. Metrics of every step go to `track` as PREFIX/NAME.

    `examples_path`: the file that gets a few responses of a few steps, token by token (see `drift.token_values`).

    With `checkpoint_dir` it saves every `config.train.save_every` steps and at the end, and goes on from what is there.
    Raises ValueError where `config.online` is missing or a trajectory does not fit a pack, CheckpointError where the
    folder holds another training.
    """
    loop = _Loop(policy, engine, task, problems, config, seed)
    track = track if track is not None and distributed.rank() == 0 else Track(None, progress=False)
    job = {"seed": seed, "problems": [problem.id for problem in problems], "rollout": config.rollout.model_dump()}
    job |= {"online": config.online.model_dump(mode="json") if config.online else None}
    job |= config.train.model_dump(exclude={"save_every", "workspace_bytes", "backend", "rounds"})
    if checkpoint_dir is not None and (path := checkpoint.latest(checkpoint_dir)) is not None:
        _, state = checkpoint.load(path, loop.optimizer, job)
        loop.load_state_dict(state, checkpoint.load_tensors(path, "teacher") if loop.teacher else {})
    stats, total = loop.stats, loop.online.steps
    with track.progress(prefix, total) as bar:
        bar.advance(stats.steps)
        while stats.steps < total:
            measured = loop.step(stats.steps)
            track.log(stats.steps, **{f"{prefix}/{key}": value for key, value in measured.items()})
            bar.advance(reward=measured["reward"], solved=measured["solved"])
            if measured["skipped"]:
                track.say(f"{prefix}: step {stats.steps} is skipped: loss {measured['loss']}")
            for warning in loop.watch.warnings:
                track.say(f"{prefix}: step {stats.steps}: {warning}; a collapse? (online.watch)")
            if examples_path is not None and distributed.rank() == 0:
                token_values.append(examples_path, ({"step": stats.steps, **row} for row in loop.examples))
            every = config.train.save_every
            if checkpoint_dir is not None and (stats.steps == total or (every and stats.steps % every == 0)):
                if distributed.rank() == 0:
                    tensors = {"teacher": loop.teacher.state_dict()["shadow"]} if loop.teacher else {}
                    checkpoint.save(checkpoint_dir, stats.steps, loop.optimizer, loop.state_dict(), job, tensors)
                distributed.barrier()
    return stats


class _Loop:
    """The components of one algorithm, and what a step does with them."""

    def __init__(
        self, policy: Policy, engine: Engine, task: Task, problems: Sequence[Problem], config: Config, seed: int
    ) -> None:
        if config.online is None:
            raise ValueError("config.online is missing; `online: {}` takes the published settings")
        self.policy, self.engine, self.task, self.problems = policy, engine, task, list(problems)
        self.config, self.online, self.seed = config, config.online, seed
        self.algorithm = ALGORITHMS[config.online.algorithm]
        self.optimizer, self.stats = MasterAdamW(policy.model, config.train), OnlineStats()
        distributed.broadcast(self.optimizer.parameters)
        self.optimizer.write_back()
        self.curriculum = Curriculum(self.online.curriculum)
        self.router = DifficultyRouter(self.online.router, self.curriculum.transition_end)
        self.buffer = SuccessBuffer(self.online.buffer) if self.algorithm.buffer else None
        self.difference, self.entropy = StepMean(), StepMean()
        self.watch, self.examples = Watch(self.online.watch), list[dict[str, Any]]()
        self.reference = Reference(policy, config) if self.online.watch.every else None
        self.teacher: Teacher | None = None
        if self.algorithm.teacher:
            parameters = policy.model.named_parameters()
            self.teacher = Teacher(parameters, self.online.teacher, self.optimizer.masters)
        self.branches = Branches(policy, self.optimizer, config, self.algorithm, self.difference, self.entropy)

    def step(self, number: int) -> dict[str, float]:
        """One rollout batch and one optimizer step; what to log."""
        start, phase = time.perf_counter(), self.curriculum.at(number)
        samples = self._sample(number)
        self._route(samples, number)
        sampled = time.perf_counter()
        keep = token_values.choose(
            number, self.online, [(sample.solved_at > 0, sample.taught is None) for sample in samples]
        )
        reference_kl = self._reference_kl(samples, number)
        with training(self.policy.model), seeded(self.seed, number, self.policy.model):
            measured = self.branches.accumulate(
                distributed.share(samples), phase, self.teacher, _tokens(samples), len(samples), keep
            )
        lr = learning_rate(number, self.online.steps, self.config.train)
        result = update(self.optimizer, measured.loss, self.config.train, lr)
        for mean in (self.difference, self.entropy):
            mean.advance(distributed.sum_values)
        if self.teacher:
            self.teacher.update(finite=not result.skipped)
        self.examples = distributed.gather(measured.examples) if keep else []
        outcomes, means = _outcomes(samples), _means(measured)
        self.watch.update(
            entropy=means["entropy"],
            repeat_rate=outcomes["repeat_rate"],
            problem_ids=[sample.problem_id for sample in samples],
            correct=[sample.solved_at > 0 for sample in samples],
            reference_kl=reference_kl,
        )
        seconds = time.perf_counter() - start
        self.stats.steps += 1
        self.stats.skipped += result.skipped
        self.stats.trajectories += len(samples)
        self.stats.seconds += seconds
        self.stats.rewards.append(math.fsum(sample.reward for sample in samples) / len(samples))
        return {
            **outcomes,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "skipped": float(result.skipped),
            "lr": lr,
            **means,
            "seconds_sampling": sampled - start,
            "step_time": seconds,
            **{f"{name}/{key}": value for name, part in self._parts() for key, value in part.metrics().items()},
        }

    def _reference_kl(self, samples: Sequence[Sample], number: int) -> float | None:
        watch = self.online.watch
        if self.reference is None or number % watch.every:
            return None
        return self.reference.kl([sample.trajectory for sample in samples], watch.trajectories)

    def _parts(self) -> list[tuple[str, Any]]:
        named = {"router": self.router, "buffer": self.buffer, "curriculum": self.curriculum, "teacher": self.teacher}
        named |= {"difference": self.difference, "entropy_mean": self.entropy, "watch": self.watch}
        return [(name, part) for name, part in named.items() if part is not None]

    def state_dict(self) -> dict[str, Any]:
        """As JSON holds it; the teacher's tensors are saved apart."""
        states = {name: part.state_dict() for name, part in self._parts()}
        states.get("teacher", {}).pop("shadow", None)
        return {**states, "stats": vars(self.stats)}

    def load_state_dict(self, state: dict[str, Any], shadow: dict[str, Any]) -> None:
        """Takes up what `state_dict` gave, in place."""
        for name, part in self._parts():
            part.load_state_dict(state[name] | ({"shadow": shadow} if name == "teacher" else {}))
        vars(self.stats).update(state["stats"])

    def _sample(self, number: int) -> list[Sample]:
        """The step's trajectories, of all ranks, in an order that all ranks share."""
        chosen = distributed.share(_batch(len(self.problems), self.online.prompts, self.seed, number))
        jobs = [(self.problems[i], index) for i in chosen for index in range(self.config.rollout.n)]
        seed = [self.seed, number, distributed.rank()]
        episodes = play(self.policy, self.engine, self.task, jobs, self.config.rollout, seed=seed) if jobs else []
        samples = distributed.gather([self._kept(episode) for episode in episodes])
        for place, sample in enumerate(samples):
            sample.trajectory.index = place
        groups: dict[str, list[Sample]] = {}
        for sample in samples:
            groups.setdefault(sample.problem_id, []).append(sample)
        for group in groups.values():
            _set_advantages(group, self.online.scale_advantages)
        return samples

    def _kept(self, episode: Episode) -> Sample:
        row, weights = episode.row(self.config.rollout.format_penalty), self.config.weights
        [trajectory] = chat.to_trajectories(self.policy, row, index=0, turns="assistant")
        told = [m["content"] for m in episode.messages if m["role"] == "user"]
        return Sample(
            trajectory,
            episode.messages,
            solved_at=episode.solved_at,
            reward=trajectory_return(row, weights.gamma, weights.repetition),
            answers=row["answer_norms"],
            unparsed=episode.answers.count(None),
            feedback=told[-1] if len(told) > 1 else None,
        )

    def _route(self, samples: Sequence[Sample], number: int) -> None:
        """Lessons from siblings and the buffer, then the weights; the buffer takes in this batch last."""
        if self.teacher:
            attempts = [Attempt(s.problem_id, s.text, s.solved_at > 0, s.feedback, s.reward) for s in samples]
            found = lessons(
                attempts,
                self.online.teacher,
                self.buffer,
                prompts=[sample.messages[0]["content"] for sample in samples],
                strip=self.online.buffer.strip_thinking,
                step=number,
                epoch=number * min(self.online.prompts, len(self.problems)) // len(self.problems),
            )
            for sample, lesson in zip(samples, found):
                if lesson is not None:
                    tokenizer, own = self.policy.tokenizer, sample.trajectory
                    sample.taught = teacher_trajectory(tokenizer, own, sample.messages, lesson)
        routes = self.router.update(
            [sample.problem_id for sample in samples],
            [sample.solved_at > 0 for sample in samples],
            [sample.taught is not None for sample in samples],
            number,
        )
        for sample, distill, policy, rebellious in zip(
            samples, routes.distill.tolist(), routes.policy.tolist(), routes.rebellious.tolist()
        ):
            sample.distill, sample.policy, sample.rebellious = distill, policy, rebellious
        if self.buffer is not None:
            for sample in samples:
                if sample.solved_at:
                    self.buffer.add(sample.problem_id, sample.text, sample.reward, number)


def _batch(count: int, size: int, seed: int, step: int) -> list[int]:
    """Which of `count` problems the step asks: permutation after permutation of all, cut into parts of `size`.

    A problem that comes twice, where one permutation ends and the next begins, is asked once.
    """
    size = min(size, count)
    places = range(step * size, (step + 1) * size)
    orders = {e: np.random.default_rng([seed, e]).permutation(count) for e in {place // count for place in places}}
    return list(dict.fromkeys(int(orders[place // count][place % count]) for place in places))


def _set_advantages(group: Sequence[Sample], scale: bool) -> None:
    """A = r − mean over the group, divided by its standard deviation if asked; 0 where all are equal (B7)."""
    mean = math.fsum(sample.reward for sample in group) / len(group)
    spread = math.sqrt(math.fsum((sample.reward - mean) ** 2 for sample in group) / len(group))
    flat = max(sample.reward for sample in group) == min(sample.reward for sample in group)
    for sample in group:
        sample.trajectory.advantage = 0.0 if flat else (sample.reward - mean) / (spread if scale else 1.0)


def _tokens(samples: Sequence[Sample]) -> int:
    return sum(turn.stop - turn.start for sample in samples for turn in sample.trajectory.turns)


def _outcomes(samples: Sequence[Sample]) -> dict[str, float]:
    """Rates over the batch's trajectories."""
    count = len(samples)
    return {
        "reward": math.fsum(sample.reward for sample in samples) / count,
        "solved": sum(sample.solved_at > 0 for sample in samples) / count,
        "solved_first": sum(sample.solved_at == 1 for sample in samples) / count,
        "turns": sum(len(sample.trajectory.turns) for sample in samples) / count,
        "unparsed": sum(sample.unparsed for sample in samples) / count,
        "repeat_rate": repeat_rate(sample.answers for sample in samples),
        "response_tokens": _tokens(samples) / count,
        "no_spread": sum(sample.trajectory.advantage == 0 for sample in samples) / count,
    }


def _means(measured: Measured) -> dict[str, float]:
    """The means of (sum, count) pairs over all ranks; nothing where nothing was counted."""
    names = sorted(measured.sums)
    totals = distributed.sum_values(*(value for name in names for value in measured.sums[name]))
    pairs = zip(names, totals[::2], totals[1::2])
    return {name: total / count for name, total, count in pairs if count}
