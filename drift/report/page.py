"""One self-contained page about a run, made from the files in its folder: `write(run_dir)` -> report.html.

No script, no font, no image and no request comes from elsewhere; figures are inline SVG. Everything that a model, a
data set or a settings file wrote is escaped. A run that is not finished gives a page that says what is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from drift import files
from drift.report import heat, online, online_files, plots, results, sampling, trajectories
from drift.report.intervals import mean_stderr, paired_difference
from drift.report.online_files import Seed
from drift.report.records import ARMS, Records, read
from drift.report.style import CSS
from drift.report.text import count_of, duration, esc, figures, percent, points

MOST_CURVES = 24
_FIRST_CURVES = (
    "loss",
    "ess",
    "grad_norm",
    "solved · warm_start",
    "lr",
    "tokens_per_second",
    "tokens_shared",
    "attention_shared",
)
_SHOWN_SETTINGS = (
    ("model", "path"),
    ("task", "name"),
    ("task", "train_problems"),
    ("task", "eval_problems"),
    ("rollout", "n"),
    ("rollout", "turns"),
    ("rollout", "temperature"),
    ("weights", "beta"),
    ("weights", "gamma"),
    ("weights", "repetition"),
    ("train", "lr"),
    ("train", "epochs"),
    ("train", "batch_size"),
    ("train", "turns"),
    ("train", "normalize"),
    ("train", "rounds"),
)


def write(run_dir: str | Path, summary: dict[str, Any] | None = None) -> Path:
    """Reads the run folder and writes report.html into it; returns its path.

    summary: in place of summary.json, for a run that writes that file last.

    Raises NotADirectoryError if there is no such folder.
    """
    records = read(run_dir, summary=summary)
    path = records.path / "report.html"
    # A model can emit half of a surrogate pair, which UTF-8 cannot hold.
    files.write(path, page(records).encode("utf-8", errors="replace"))
    return path


def page(records: Records) -> str:
    """The whole document."""
    name = str(records.summary.get("name") or (records.config and records.config.name) or records.path.resolve().name)
    seeds = online_files.read(records)
    online_run = records.config is not None and records.config.online is not None
    sections = [
        _header(name, records),
        _missing(records),
        _nothing_learnt(records),
        online.warnings(seeds),
        "" if online_run else sampling.warnings(records),
        results.section(records),
        *(_online(records, seeds) if online_run else [sampling.section(records)]),
        _training(records),
        _time(records),
        trajectories.of_online(seeds) if online_run else trajectories.section(records),
        _settings(records),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{esc(name)} · drift</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(filter(None, sections))
        + "\n<footer>Made by <code>drift report</code> from the files in this run’s folder, and from nothing else."
        "</footer>\n</main>\n</body>\n</html>\n"
    )


def _online(records: Records, seeds: Sequence[Seed]) -> list[str]:
    return [
        online.against_base(records),
        online.learning(records, seeds),
        online.watched(seeds),
        online.routing(records, seeds),
        heat.section(records, seeds),
    ]


def _header(name: str, records: Records) -> str:
    means = {arm: percent(mean_stderr(result.multi).mean) for arm, result in records.results.items()}
    trained = records.config.online.algorithm if records.config and records.config.online else None
    if trained in means and "base" in means:
        ours, base = records.results[trained].multi, records.results["base"].multi
        lede = (
            f"Online training ({esc(trained)}) solves <b>{means[trained]}</b> of the held-out problems within "
            f"{records.turns} turns. Before training it was {means['base']}: {points(paired_difference(ours, base))} "
            f"points over {count_of(len(ours), 'seed', 'seeds')}."
        )
    elif trained is None and "drift" in means and "base" in means:
        ours, base = records.results["drift"].multi, records.results["base"].multi
        lede = (
            f"Importance-weighted training solves <b>{means['drift']}</b> of the held-out problems within "
            f"{records.turns} turns. Before training it was {means['base']}: {points(paired_difference(ours, base))} "
            f"points over {count_of(len(ours), 'seed', 'seeds')}."
        )
        controls = {"uniform": "with all weights 1", "success_only": "on the successes alone"}
        others = [f"{text} it is {means[arm]}" for arm, text in controls.items() if arm in means]
        lede += f" Trained {', and '.join(others)}." if others else ""
    else:
        lede = "This run has no finished comparison yet; what there is, is below."
    return (
        f'<header><p class="eyebrow">DRIFT RUN</p><h1>{esc(name)}</h1>'
        f'<p class="lede">{lede}</p><p class="muted">{" · ".join(_facts(records))}</p></header>'
    )


def _facts(records: Records) -> list[str]:
    """What was run, in a few words: model, task, seeds, time."""
    facts = []
    if records.config is not None:
        config = records.config
        facts = [esc(config.model.path or "embedded tiny model"), esc(config.task.path or config.task.name)]
    if records.seeds:
        facts.append(count_of(len(records.seeds), "seed", "seeds"))
    total = records.seconds.get("total")
    return facts + ([duration(total)] if isinstance(total, (int, float)) else [])


def _missing(records: Records) -> str:
    if not records.missing:
        return ""
    items = "".join(f"<li>{esc(item)}</li>" for item in records.missing)
    return f'<div class="notice" role="note"><b>Not everything is here.</b><ul>{items}</ul></div>'


def _nothing_learnt(records: Records) -> str:
    """A notice of trainings whose every step had a gradient of zero."""
    still = [
        f"{esc(series)}: {count_of(len(points), 'step', 'steps')}"
        for series, points in records.curves.get("grad_norm", {}).items()
        if points and all(value == 0 for _, value in points)
    ]
    if not still:
        return ""
    items = "".join(f"<li>{item}</li>" for item in still)
    return (
        '<div class="notice" role="note"><b>Nothing was learnt: the gradient was 0 in every step.</b>'
        f"<ul>{items}</ul>Samples of a problem that all have the same reward teach nothing, and the online warm-up trains only "
        "samples with a teacher. See how many were solved, and how many answers could not be read.</div>"
    )


def _training(records: Records) -> str:
    drawable = _curves(records)
    if not drawable:
        return ""
    drawn = [(plots.curve(title, series), _about(title, series)) for title, series in drawable.items()]
    more = (
        f"<details><summary>More curves: {len(drawn) - 4}</summary>{figures(drawn[4:])}</details>" if drawn[4:] else ""
    )
    note = '<p class="why">Against optimizer steps. A thin line is a seed, a thick one the mean of an arm.</p>'
    title = "Learning curves" if records.config is None or records.config.online is None else "All other curves"
    return f"<section><h2>{title}</h2>{note}{figures(drawn[:4])}{more}</section>"


def _about(title: str, series: dict[str, list[tuple[int, float]]]) -> str:
    """What to know before reading a curve."""
    arms = {plots.arm_of(name) for name in series}
    if title == "loss" and len(arms) > 1:
        return "Arms weigh tokens differently: their losses cannot be compared with each other, only each with its own past."
    equal = [arm for arm in ("uniform", "success_only") if arm in arms]
    if title == "ess" and len(equal) > 1:
        return "Arms with equal weights, uniform and success_only, lie on each other at 1."
    return ""


def _curves(records: Records) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Title -> series, the most telling first. Arms share a figure, other stages have their own, flat zeros none."""
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for metric, series in records.curves.items():
        for name, curve in series.items():
            stage, title = plots.arm_of(name), online.name_of(records, name, metric)
            if online.is_drawn(title):
                continue
            if not title:
                title = metric if stage in ARMS or not stage else f"{metric} · {stage}"
            found.setdefault(title, {})[name] = curve
    telling = [t for t, series in found.items() if any(len(c) > 1 for c in series.values()) and _moves(series)]
    rank = {metric: place for place, metric in enumerate(_FIRST_CURVES)}
    telling.sort(key=lambda title: (rank.get(title, len(rank)), title))
    return {title: found[title] for title in telling[:MOST_CURVES]}


def _moves(series: dict[str, list[tuple[int, float]]]) -> bool:
    return any(value != 0 for curve in series.values() for _, value in curve)


def _time(records: Records) -> str:
    seconds = {k: v for k, v in records.seconds.items() if isinstance(v, (int, float))}
    total = seconds.pop("total", sum(seconds.values()))
    if not seconds or total <= 0:
        return ""
    if total - sum(seconds.values()) > 0.01 * total:
        seconds["everything else"] = total - sum(seconds.values())
    colours = dict(zip(seconds, (f"var(--{name})" for name in cycle(("uniform", "success", "drift", "other", "base")))))
    bars = "".join(f'<i style="flex:{v:.3f};background:{colours[k]};opacity:.85"></i>' for k, v in seconds.items())
    legend = "".join(
        f'<li><span class="dot" style="background:{colours[k]}"></span>{esc(k)} '
        f'<span class="muted">{duration(v)} · {v / total:.0%}</span></li>'
        for k, v in seconds.items()
    )
    return (
        f'<section><h2>Where the time went</h2><p class="why">{duration(total)} in all.</p>'
        f'<div class="stages" aria-hidden="true">{bars}</div><ul class="legend">{legend}</ul></section>'
    )


def _settings(records: Records) -> str:
    if not records.config_text:
        return ""
    facts = "".join(
        f"<div><dt>{esc(label)}</dt><dd>{esc(value)}</dd></div>" for label, value in _shown_settings(records)
    )
    facts = f'<dl class="facts">{facts}</dl>' if facts else ""
    full = f'<pre class="yaml">{esc(records.config_text)}</pre>'
    return f"<section><h2>Settings</h2>{facts}<details><summary>config.yaml in full</summary>{full}</details></section>"


def _shown_settings(records: Records) -> list[tuple[str, Any]]:
    if records.config is None:
        return []
    shown: list[tuple[str, Any]] = []
    sections = ("model", "task", "rollout") if records.config.online else None
    for section, key in _SHOWN_SETTINGS:
        if sections and section not in sections:
            continue
        value = getattr(getattr(records.config, section), key)
        if (section, key) == ("model", "path") and value is None:
            value = "embedded tiny model"
        if value is not None or section != "task":
            shown.append((f"{section}.{key}", value))
    if online_settings := records.config.online:
        shown += [(f"online.{key}", getattr(online_settings, key)) for key in ("algorithm", "steps", "prompts")]
        shown += [("train.lr", records.config.train.lr), ("online.teacher.weights", online_settings.teacher.weights)]
    return [*shown, ("seeds", ", ".join(map(str, records.config.seeds)))]
