"""summary.json of a run, from the files that its stages left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from drift import store
from drift.config import Config
from drift.jobs.folder import RunError, read_json, rollout_path
from drift.jobs.servers import losses
from drift.report.intervals import paired_difference
from drift.returns import weigh


def summarise(config: Config, folder: Path, seconds: dict[str, float]) -> dict[str, Any]:
    """Results by arm, what drift is ahead of each other arm, and the settings. seconds: by stage."""
    multi, n = f"multi_at_{config.eval.turns}", config.eval.samples
    keys = (multi, "single", "by_turn", *((f"mean_at_{n}", f"pass_at_{n}") if n else ()))
    results: dict[str, dict[str, Any]] = {}
    for arm in ("base", *config.trained):
        read = [evaluation(config, folder, folder / f"seed-{seed}" / f"eval-{arm}.json") for seed in config.seeds]
        results[arm] = {key: [content[key] for content in read] for key in keys}
        results[arm]["corrected"] = [content["corrected"] for content in read]
        if config.eval.sets:
            sets = {one.name: [content["sets"][one.name] for content in read] for one in config.eval.sets}
            every = (*keys, "corrected")
            results[arm]["sets"] = {
                name: {key: [one[key] for one in had] for key in every} for name, had in sets.items()
            }
    online = config.online.model_dump(mode="json") if config.online else None
    return {
        "name": config.name,
        "seeds": config.seeds,
        "results": results,
        "paired": _paired(results, multi),
        "failed_checks": _failed(config, folder),
        **({"lost_servers": lost} if (lost := losses(folder)) else {}),
        "settings": _picked(config),
        **({"online": online} if online else _sampled(config, folder)),
        "seconds": seconds | {"total": sum(seconds.values())},
    }


def evaluation(config: Config, folder: Path, path: Path) -> dict[str, Any]:
    """The evaluation that lies at `path`. Raises RunError if it was made with other settings, or is none."""
    found = read_json(path)
    asked: dict[str, Any] = {
        "eval.turns": config.eval.turns,
        "eval.samples": config.eval.samples,
        "eval.sets": [one.name for one in config.eval.sets],
    }
    if config.task.eval_problems is not None and not config.eval.sets:
        asked["task.eval_problems"] = config.task.eval_problems
    try:
        sizes = (len(found["by_turn"]), found.get("samples", 0), list(found.get("sets", {})), len(found["solved_at"]))
    except (TypeError, KeyError, AttributeError):
        raise RunError(f"{path} holds no evaluation; remove it, and the same command makes it again") from None
    differ = [f"{key}={had} and not {now}" for had, (key, now) in zip(sizes, asked.items()) if had != now]
    if differ:
        raise RunError(
            f"{path} was made with {', '.join(differ)}; set that back, or have everything trained and evaluated again: "
            f"rm {folder}/base/eval.json {folder}/seed-*/eval-*.json"
        )
    return found


def _sampled(config: Config, folder: Path) -> dict[str, list[float]]:
    """What the base sampled for each seed, and how the weights spread over it."""
    sampled = [store.read(rollout_path(folder, config, seed)) for seed in config.seeds]
    stats = [weigh(rows, config.weights)[1] for rows in sampled]
    return {
        "ess": [s["ess_overall"] for s in stats],
        "ess_in_group": [s["ess_mean"] for s in stats],
        "unsolved_groups": [s["unsolved_share"] for s in stats],
        "sampled": [sum(row["t_star"] is not None for row in rows) / len(rows) for rows in sampled],
    }


def _failed(config: Config, folder: Path) -> dict[str, int]:
    """Checks without a verdict, which count as wrong: in all evaluations, and in all trajectories that were sampled."""
    trained = ("base", *config.trained)
    files = [folder / f"seed-{seed}" / f"eval-{arm}.json" for seed in config.seeds for arm in trained]
    rollouts = [
        *folder.glob("rollouts*.jsonl"),
        *folder.glob("seed-*/rollouts*.jsonl"),
        *folder.glob("seed-*/*/rollouts*.jsonl"),
    ]
    return {
        "evaluations": sum(read_json(file).get("failed_checks", 0) for file in files),
        "rollouts": sum(row.get("failed_checks", 0) for path in rollouts for row in store.read(path)),
    }


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
        **{
            key: value
            for key in ("train_problems", "eval_problems")
            if (value := getattr(config.task, key)) is not None
        },
        "lr": config.train.lr,
    }
    if config.online:
        return {"gamma": config.weights.gamma, "repetition": config.weights.repetition, **every}
    offline = {"epochs": config.train.epochs, "batch_size": config.train.batch_size}
    return {**config.weights.model_dump(), **every, **offline}
