"""The stages of the job: load, ask, sample, fit, score. `drift.jobs.run` strings them together.

`drift rollout`, `drift train` and `drift eval` run one of them by itself (`sample`, `fit`, `score`): each takes a config,
and files in place of the output of the stage before. The model is the one that is named, else `model.path`, else the base
of the config's own run; an embedded tiny model that nobody trained is refused, unless `warm_start.enabled` is off and its
random weights are therefore meant.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from drift import store
from drift.config import Config, ConfigError
from drift.engines import open_engine
from drift.jobs import sampled, servers
from drift.jobs.evaluate import Evaluation, average, evaluate
from drift.jobs.folder import locked
from drift.jobs.work import Work, prepare
from drift.model import chat
from drift.model.policy import Policy, load_policy
from drift.model.rows import check_ids
from drift.returns import weigh_for_training
from drift.rollouts.rollout import collect
from drift.tasks import Task
from drift.track import Track
from drift.training import distributed, saving, sharding
from drift.training.guards import ratio_warnings
from drift.training.offpolicy import log_ratios
from drift.training.trainer import TrainStats, train
from drift.types import Trajectory

_UNITS = ((1e9, " billion"), (1e6, " million"), (1e3, " thousand"), (1, ""))


def load(config: Config, path: str | None, empty: bool = False) -> Policy:
    """The model at `path`, or the embedded one with random weights, on this rank's device; `empty` as in `load_policy`."""
    transformers_logging.disable_progress_bar()
    model = config.model.model_copy(update={"path": path})
    return load_policy(model, device=distributed.device(), seed=config.task.seed, empty=empty)


def finished(config: Config, folder: Path) -> Policy:
    """The model that a run saved in `folder`, adapters included, on this rank's device."""
    return load(config.model_copy(update={"model": config.model.model_copy(update={"lora": None})}), str(folder))


def about(policy: Policy, path: str | None) -> str:
    """Model, parameters, device and dtype, in a line."""
    count = sum(parameter.numel() for parameter in policy.model.parameters())
    size = next(f"{count / unit:.3g}{name}" for unit, name in _UNITS if count >= unit)
    trained = sum(parameter.numel() for parameter in policy.model.parameters() if parameter.requires_grad)
    part = f", of which {trained:,} are trained" if trained < count else ""
    dtype = str(sharding.dtype_of(policy)).removeprefix("torch.")
    return f"model {path or 'embedded tiny model'}: {size} parameters{part}, {policy.device}, {dtype}"


def sample_into(
    config: Config, policy: Policy, task: Task, path: Path, seed: Sequence[int], track: Track, prefix: str = "rollout"
) -> int:
    """Appends `rollout.n` trajectories of every training problem to `path`; returns how many were new."""
    problems = task.problems("train")
    with open_engine(config.engine, policy, config.rollout.batch_size, servers.teller(track)) as engine:
        return collect(policy, engine, task, problems, config.rollout, path, seed, track, prefix)


def weighted(
    config: Config, policy: Policy, rows: Sequence[store.Row], weights: Sequence[float | None]
) -> list[Trajectory]:
    """The rows as trajectories of these weights; a row whose weight is None is left out.

    Without the sampler's log-probs, which weighted training does not read: rows with and without them may be mixed.
    """
    return [
        replace(trajectory, logprobs=None)
        for index, (row, weight) in enumerate(zip(rows, weights))
        if weight is not None
        for trajectory in chat.to_trajectories(policy, row, index=index, weight=weight, turns=config.train.turns)
    ]


def evaluated(config: Config, policy: Policy, work: Work, track: Track) -> Evaluation:
    """multi@k and single-turn accuracy of `policy` on the evaluation problems, or on each of `eval.sets` and on average."""
    how = config.rollout
    options: dict[str, Any] = {key: getattr(how, key) for key in ("history", "tool", "tool_calls", "environment")}
    with open_engine(config.engine, policy, config.eval.batch_size, servers.teller(track)) as engine:
        done = {
            name: evaluate(policy, engine, task, problems, config.eval, name=name, track=track, **options)
            for name, (task, problems) in work.evaluations.items()
        }
    return average(done) if work.sets else done[""]


def sample(config: Config, out: Path, *, model: str | None = None, seed: int = 0) -> int:
    """Appends `rollout.n` trajectories of every training problem to `out`; returns how many were new."""
    work = prepare(config, evaluate=False)
    try:
        with Track(None, progress=config.track.progress) as track:
            policy = _policy(config, model, track)
            new = sample_into(config, policy, work.task, out, [seed], track)
            sampled.say(policy, work.task, store.read(out), config, track)
            return new
    finally:
        work.close()


def fit(config: Config, rollouts: Path, out: Path, *, model: str | None = None, seed: int = 0) -> TrainStats:
    """Trains on a rollout file with importance weights, and saves the model in `out`, with metrics.jsonl.

    Raises StoreError for a bad row, and for one that another policy sampled, unless `weights.off_policy` is correct.
    """
    with (
        locked(out),
        distributed.launched(config.train.timeout) as rank,
        Track(out if rank == 0 else None, config.track.sinks) as track,
        _spread(config, _policy(config, model, track, fitted=True)) as policy,
    ):
        if policy.source is not None:
            track.say(about(policy, model or config.model.path))
        policy.check_packing()
        places: list[int] = []
        rows = store.read(rollouts, places=places)
        check_ids(policy, rows, places, rollouts)
        ratios, corrected = None, {}
        if config.weights.off_policy == "correct":
            ratios, corrected = log_ratios(policy, rows, config.weights.off_policy_clip)
            exploding = ratio_warnings(
                corrected["offpolicy_gap"], config.train.sampler_gap, corrected["offpolicy_clipped_share"]
            )
            for warning in exploding:
                track.say(f"{rollouts}: {warning}")
        else:
            store.check_policy(rows, policy.hash())
        if unknown := sum("policy_hash" not in row for row in rows):
            track.say(f"{unknown} of {len(rows)} rows do not say which policy sampled them; taken to be this one")
        weights, stats = weigh_for_training(rows, config.weights, ratios)
        stats |= corrected
        track.log(0, **{f"weights/{key}": value for key, value in stats.items()})
        done = train(
            policy,
            weighted(config, policy, rows, weights),
            config.train,
            seed=seed,
            track=track,
            checkpoint_dir=out / "checkpoints",
            min_weight=config.weights.min_weight,
        )
        saving.save(policy, out)
        return done


def _spread(config: Config, policy: Policy) -> AbstractContextManager[Policy]:
    """A policy without weights reads them as shards, and is trained and saved so."""
    return nullcontext(policy) if policy.source is None else sharding.sharded(policy, config.train.shard)


def _by_shards(config: Config, path: str | None) -> bool:
    """Whether no rank needs the whole model: it is trained as shards of a folder's files, and nothing is scored before."""
    train = config.train
    files_there = path is not None and any(Path(path).glob("model*.safetensors"))
    spread = train.shard != "none" and not train.shard_head and distributed.world_size() > 1
    return spread and files_there and config.weights.off_policy != "correct"


def score(config: Config, *, model: str | None = None) -> Evaluation:
    """multi@k and single-turn accuracy on the evaluation problems."""
    work = prepare(config, train=False)
    try:
        with Track(None, progress=config.track.progress) as track:
            return evaluated(config, _policy(config, model, track), work, track)
    finally:
        work.close()


def _policy(config: Config, model: str | None, track: Track, fitted: bool = False) -> Policy:
    """fitted: it is only trained, and may be left without weights; then its caller says what it is."""
    base = Path(config.output_dir) / config.name / "base"
    path = model or config.model.path
    if path is None and config.warm_start.enabled:
        if not (base / "warm_start.json").exists():
            raise ConfigError(
                f"the embedded model is not trained yet: {base} is not there. `drift run` makes it; or name a model, "
                "by --model or model.path=…; or take random weights by warm_start.enabled=false"
            )
        path = str(base)
    policy = load(config, path, empty=fitted and _by_shards(config, path))
    if policy.source is None:
        track.say(about(policy, path))
    return policy
