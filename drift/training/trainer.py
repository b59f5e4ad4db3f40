"""Importance-weighted fine-tuning (A4, arXiv 2605.31455): packs in, one fused loss call a pack, AdamW.

Both denominators are those of the whole batch, over all packs and ranks, and are fixed before anything runs: the
gradient does not depend on how a batch was split, packed or ordered. Which trajectories a step sees follows from the
seed and the step's number alone, and so does the generator that dropout draws from: to go on needs no more than both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

import drift_kernels
from drift import interrupts
from drift.config import TrainConfig
from drift.track import Track
from drift.training import checkpoint, distributed, layout, sharding
from drift.training.guards import Guards, check_end, check_row, keep_batch
from drift.training.meter import StepResult, Stopwatch, Totals, TrainStats, measure, metrics
from drift.training.optimizer import MasterAdamW, learning_rate
from drift.types import PackedBatch, Trajectory, TreeBatch


class TrainedPolicy(Protocol):
    """What the trainer asks of a policy; `drift.model.policy.Policy` is one."""

    model: Any  # a transformers causal LM, or a peft wrapper of one

    def hidden(self, batch: PackedBatch | TreeBatch) -> torch.Tensor: ...  # [T, D] or [R, D], after the final norm

    def head(self) -> drift_kernels.Head: ...


def accumulate(
    policy: TrainedPolicy,
    packs: Sequence[PackedBatch | TreeBatch],
    optimizer: MasterAdamW,
    normalizer: float,
    config: TrainConfig,
) -> torch.Tensor:
    """Adds to the optimizer's gradients those of Σ token_weight·(−logp) / normalizer over `packs`.

    normalizer: the denominator of the whole batch, other packs and ranks included. Returns this rank's part of the
    loss, 0-d float32. Gradients are not yet summed over ranks.
    """
    device = next(iter(optimizer.trained.values())).device
    kernel = drift_kernels.KernelConfig(backend=config.backend, workspace_bytes=config.workspace_bytes)
    loss = torch.zeros((), device=device)
    for batch in sharding.rounds(policy.model, packs):
        batch = batch.to(device)
        hidden, head = policy.hidden(batch), policy.head()
        part = drift_kernels.weighted_cross_entropy(
            hidden,
            head,
            batch.targets,
            batch.token_weights,
            normalizer=normalizer,
            rows=_rows(batch, head),
            active=batch.active,
            config=kernel,
        ).loss
        part.backward()
        optimizer.collect()
        loss += part.detach()
    return loss


def _rows(batch: PackedBatch | TreeBatch, head: drift_kernels.Head) -> torch.Tensor | None:
    """`rows=` of a loss. Ranks that share a head make the same call, whether their packs are trees or not."""
    if isinstance(batch, TreeBatch):
        return batch.rows
    return None if head.parallel is None else torch.arange(len(batch.targets), device=batch.targets.device)


def train_step(
    policy: TrainedPolicy,
    packs: Sequence[PackedBatch | TreeBatch],
    optimizer: MasterAdamW,
    normalizer: float,
    config: TrainConfig,
    *,
    lr: float | None = None,
) -> StepResult:
    """One optimizer step over this rank's packs, which may be none; every rank calls it once a step.

    normalizer: see `accumulate`. lr: default config.lr. A step whose loss or gradient is not finite changes nothing.
    """
    loss = accumulate(policy, packs, optimizer, normalizer, config)
    return update(optimizer, float(loss), config, config.lr if lr is None else lr)


def update(optimizer: MasterAdamW, loss: float, config: TrainConfig, lr: float) -> StepResult:
    """Sums gradients and this rank's part of the loss over ranks, clips, and steps where both are finite; every rank calls it."""
    distributed.sum_gradients(optimizer.parameters)
    norm = optimizer.clip(config.grad_clip)
    total, *asked = distributed.sum_values(
        loss, *(float(interrupts.asked() == number) for number in interrupts.SIGNALS)
    )
    stop = next((int(number) for number, count in zip(interrupts.SIGNALS, asked) if count), 0)
    result = StepResult(total, float(norm), not (math.isfinite(total) and math.isfinite(norm)), stop)
    if not result.skipped:
        optimizer.step(lr)
    optimizer.zero()
    return result


def train(
    policy: TrainedPolicy,
    trajectories: Sequence[Trajectory],
    config: TrainConfig,
    *,
    seed: int,
    track: Track | None = None,
    checkpoint_dir: str | Path | None = None,
    prefix: str = "train",
    steps: int | None = None,
    min_weight: float = 0.0,
) -> TrainStats:
    """Trains in place for `config.epochs`, or for `steps` optimizer steps, over and over the trajectories if need be.

    An epoch is a permutation of all trajectories, cut into batches of `config.batch_size`. Those of a weight below
    `min_weight` cost no compute, yet count in steps and denominators: leaving them out only leaves terms out (A3).
    Under torchrun every rank gives the same trajectories and trains its share of each batch. Metrics go to `track` as
    PREFIX/NAME. With `checkpoint_dir` it saves every `config.save_every` steps and at the end, and goes on from what is
    there (a folder all ranks see). So it does when a signal asks the process to end (`drift.interrupts`), and then
    raises Stopped. Batches of skipped steps are kept in the track's folder (`drift.training.guards`).
    Raises ValueError if there is nothing to train or a trajectory does not fit (before the first step), CheckpointError
    if the folder holds another training, TrainingError after `config.max_skipped` skipped steps in a row, or if every
    step was skipped.
    """
    total, guards = (
        _count_steps(len(trajectories), config, steps),
        Guards(config.grad_spike, config.low_ess, config.sampler_gap),
    )
    _check(policy, trajectories, config, min_weight)
    track = track if track is not None and distributed.rank() == 0 else Track(None, progress=False)
    where = partial(checkpoint.describe, checkpoint_dir)
    with distributed.resuming(where), sharding.sharded(policy, config.shard, config.shard_head) as policy:
        optimizer, stats = MasterAdamW(policy.model, config), TrainStats()
        distributed.broadcast(optimizer.parameters)
        optimizer.write_back()
        job: dict[str, Any] = {}
        if checkpoint_dir is not None:
            job = {
                "seed": seed,
                "steps": total,
                "min_weight": min_weight,
                "trajectories": checkpoint.fingerprint(trajectories),
            }
            job |= config.model_dump(exclude=set(config.FREE))
            if (path := checkpoint.latest(checkpoint_dir, track.say)) is not None:
                _, counts = checkpoint.load(path, optimizer, job)
                stats = TrainStats(**counts)
        with training(policy.model), track.progress(prefix, total) as bar:
            bar.advance(stats.steps)
            for step in range(stats.steps, total):
                with interrupts.finishing():
                    watch = Stopwatch()
                    batch = _batch(len(trajectories), config.batch_size, seed, step)
                    mine = [trajectories[i] for i in distributed.share(batch)]
                    packs = _pack(policy, mine, config, min_weight)
                    totals = Totals(*distributed.sum_values(*astuple(measure(mine, packs))))
                    normalizer = totals.samples if config.normalize == "samples" else totals.weight
                    lr = learning_rate(step, total, config)
                    with seeded(seed, step, policy.model):
                        result = train_step(policy, packs, optimizer, normalizer or 1.0, config, lr=lr)
                    took = watch.read()
                    stats.count(totals, result, took["step_time"])
                    if result.skipped:
                        kept = keep_batch(track.folder, prefix, step + 1, result, [trajectories[i] for i in batch])
                        said = f"loss {result.loss}, gradient norm {result.grad_norm}" + (
                            f"; its batch: {kept}" if kept else ""
                        )
                        track.say(f"{prefix}: step {step + 1} is skipped: {said}")
                    for warning in guards.warnings(result, totals.ess):
                        track.say(f"{prefix}: step {step + 1}: {warning}")
                    track.log(
                        step + 1, **{f"{prefix}/{k}": v for k, v in metrics(stats, totals, result, lr, took).items()}
                    )
                    bar.advance(loss=result.loss, lr=lr)
                    failed = stats.skipped_in_a_row >= config.max_skipped
                    saved = None
                    if checkpoint_dir is not None and (due(step + 1, total, config) or result.stop or failed):
                        saved = checkpoint.save(checkpoint_dir, step + 1, optimizer, asdict(stats), job)
                    check_row(stats, config.max_skipped, prefix, result, saved)
                    if result.stop:
                        interrupts.stop(result.stop, str(saved) if saved else None)
    check_end(stats, prefix)
    return stats


def due(step: int, total: int, config: TrainConfig) -> bool:
    """Whether a checkpoint is written after this many steps."""
    return step == total or bool(config.save_every and step % config.save_every == 0)


def _count_steps(samples: int, config: TrainConfig, steps: int | None) -> int:
    if samples == 0:
        raise ValueError("trajectories: there are none to train on")
    if steps is not None and steps < 1:
        raise ValueError(f"steps {steps} should be at least 1, or None for config.epochs")
    return steps or max(1, math.ceil(config.epochs * math.ceil(samples / config.batch_size) - 1e-9))


def _batch(samples: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Which trajectories the step is about, over all ranks."""
    epoch, part = divmod(step, math.ceil(samples / batch_size))
    order = np.random.default_rng([seed, epoch]).permutation(samples)
    return order[part * batch_size : (part + 1) * batch_size].tolist()


def _pack(
    policy: TrainedPolicy, trajectories: Sequence[Trajectory], config: TrainConfig, min_weight: float
) -> Sequence[PackedBatch | TreeBatch]:
    options = {"turns": config.turns, "token_reduction": config.token_reduction}
    return layout.packs(policy, trajectories, config, min_weight=min_weight, **options)


def _check(policy: TrainedPolicy, trajectories: Sequence[Trajectory], config: TrainConfig, min_weight: float) -> None:
    """Packs everything once, so that what cannot be trained is said now and not hours later."""
    trained = 0
    for start in range(0, len(trajectories), config.batch_size):
        trained += sum(
            len(p.active) for p in _pack(policy, trajectories[start : start + config.batch_size], config, min_weight)
        )
    if trained == 0:
        raise ValueError(
            f"trajectories: not one token of all {len(trajectories)} would be trained: every weight is 0 or below min_weight"
        )


@contextmanager
def training(model: torch.nn.Module) -> Iterator[None]:
    """Inside, the model is in training mode."""
    was_training = model.training
    model.train()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def seeded(seed: int, step: int, model: torch.nn.Module) -> Iterator[None]:
    """Dropout's generator follows from (seed, step, rank), and the caller's is left as it was."""
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.SeedSequence([seed, step, distributed.rank()]).generate_state(1)[0]))
        yield


def has_dropout(model: torch.nn.Module) -> bool:
    """Whether a training pass may drop anything: in a module, or by a rate that the config names."""
    named: dict[str, Any] = model.config.get_text_config().to_dict()  # pyright: ignore
    rates = [value for name, value in named.items() if "drop" in name and isinstance(value, (int, float))]
    return any(rates) or any(module.p for module in model.modules() if isinstance(module, torch.nn.Dropout))
