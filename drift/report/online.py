"""The sections of an online run: how it learns, what is watched for collapse, where samples go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from drift.config.algorithms import ALGORITHMS
from drift.online.watch import SIGNS
from drift.report import plots
from drift.report.online_files import BANDS, Points, Seed, by_difficulty
from drift.report.plots import BASE, DRIFT, MUTED, OTHER, SUCCESS, UNIFORM
from drift.report.records import Records
from drift.report.text import count_of, esc, figures, percent, table

SMOOTH = 5  # steps
PHASES = ("warm-up", "transition")
COLOURS = {"easy": SUCCESS, "medium": UNIFORM, "hard": DRIFT}

_DRAWN = {
    "reward",
    "solved",
    "solved_first",
    "entropy",
    "teacher_entropy",
    "teacher_kl",
    "repeat_rate",
    "gate",
    "rebellious",
}
_DRAWN |= {f"router/{name}" for name in (*BANDS, "teacher")} | {"curriculum/phase", "curriculum/routing"}
_DRAWN |= {f"router/{branch}_{what}" for branch in ("policy", "distill", "rebellious") for what in ("share", "weight")}
_DRAWN |= {f"buffer/{name}" for name in ("problems", "fill", "asked", "served")} | {"no_spread"}


def learning(records: Records, seeds: Sequence[Seed]) -> str:
    """Reward and solved share over steps, and the pass rate by difficulty; empty if no step was logged."""
    if not seeds:
        return ""
    drawn = [
        _lines("Reward", seeds, {"reward": ("mean return of a step’s trajectories", DRIFT)}, smooth=SMOOTH),
        _lines(
            "Solved",
            seeds,
            {"solved": ("within all turns", DRIFT), "solved_first": ("in the first turn", UNIFORM)},
            shares=True,
            smooth=SMOOTH,
        ),
    ]
    captions = ["The return of the trajectories that a step sampled.", "Share of those trajectories."]
    drawn.append(_by_difficulty(records, seeds))
    captions.append(
        "Training problems by how often they were solved when first asked: rarely (hard), sometimes, mostly (easy). That first "
        "time is left out; part of the step towards the middle after it is chance."
    )
    if routes_by_difficulty(records):
        bands = {f"router/{name}": (name, COLOURS[name]) for name in BANDS}
        drawn.append(_stacked("How hard the router finds them", seeds, bands, shares=True))
        captions.append("Mean gates over the samples of a step, by the faded history of each problem.")
    steps = max(len(seed.curves.get("reward", [])) for seed in seeds)
    note = (
        f'<p class="why">{count_of(steps, "step", "steps")}, each a batch of problems that is sampled, routed and trained '
        f"on once. Thin lines are {'seeds' if len(seeds) > 1 else 'single steps'}, thick ones their means"
        f"{_shaded(seeds)}.</p>"
    )
    return f"<section><h2>Learning, step by step</h2>{note}{_figures(drawn, captions)}</section>"


def routes_by_difficulty(records: Records) -> bool:
    """Whether the run's algorithm reads the router's gates; the others route every problem alike."""
    online = records.config.online if records.config else None
    return online is None or ALGORITHMS[online.algorithm].routing == "drift"


def name_of(records: Records, series: str, metric: str) -> str:
    """What a logged curve is called below its training, such as buffer/added; empty if it is of something else."""
    online = records.config.online if records.config else None
    return f"/{series}/{metric}".partition(f"/{online.algorithm}/")[2] if online else ""


def is_drawn(name: str) -> bool:
    """Whether one of the sections here shows the curve of this name, or says what it holds."""
    return name in _DRAWN or name.startswith("watch/")


def watched(seeds: Sequence[Seed]) -> str:
    """What a collapse would show in, and whether it did."""
    if not seeds:
        return ""
    entropies = {"entropy": ("student", DRIFT), "teacher_entropy": ("teacher", UNIFORM)}
    sizes = sorted(
        {int(name.rpartition("_")[2]) for seed in seeds for name in seed.curves if name.startswith("watch/pass_at_")}
    )
    colours = (DRIFT, OTHER, UNIFORM, SUCCESS, BASE, MUTED)
    passes = {f"watch/pass_at_{k}": (f"pass@{k}", colour) for k, colour in zip(sizes, colours)}
    divergences = {"watch/reference_kl": ("from the base", DRIFT), "teacher_kl": ("from the teacher", UNIFORM)}
    drawn = [
        _lines("Entropy", seeds, entropies),
        _lines("KL, policy against base and teacher", seeds, divergences),
        _lines("pass@k of a step’s groups", seeds, passes, shares=True),
        _lines("Repeat rate", seeds, {"repeat_rate": ("answers given before", DRIFT)}, shares=True),
    ]
    captions = [
        "Nats a token. A policy that collapses grows certain of everything.",
        "Nats a token. Base: the policy that training started from, estimator k3. Teacher: mean of logp − its logp.",
        "1 − C(n−c, k)/C(n, k) for c right of n. Where all come together, samples have become alike.",
        "Share of answers that were given before in the same trajectory.",
    ]
    verdict = (
        "Signs of a collapse are listed on top." if warnings(seeds) else "No sign of a collapse by these measures."
    )
    return f'<section><h2>Watched for collapse</h2><p class="why">{verdict}</p>{_figures(drawn, captions)}</section>'


def warnings(seeds: Sequence[Seed]) -> str:
    """A notice of the signs of collapse that stood, with their steps; empty if there was none."""
    items = []
    for seed in seeds:
        for name, said in SIGNS.items():
            steps = [step for step, value in seed.curves.get(f"watch/{name}", []) if value]
            if steps:
                span = f"step {steps[0]}" if len(steps) == 1 else f"{len(steps)} steps from {steps[0]} to {steps[-1]}"
                items.append(f"<li>{esc(seed.name)}, {span}: {said}</li>")
    still = "".join(
        f"<li>{esc(seed.name)}: {count_of(len(steps), 'step', 'steps')}, the first of them {steps[0]}</li>"
        for seed in seeds
        if (steps := [step for step, value in seed.curves.get("grad_norm", []) if value == 0])
    )
    if still:
        still = f'<div class="notice" role="note"><b>Steps had no gradient: nothing could be learned.</b><ul>{still}</ul></div>'
    if not items:
        return still
    return still + (
        f'<div class="notice" role="note"><b>This run may have collapsed.</b><ul>{"".join(items)}</ul>'
        "Thresholds: <code>online.watch</code>.</div>"
    )


def routing(records: Records, seeds: Sequence[Seed]) -> str:
    """Where samples went, how far teacher and buffer reached; empty for an algorithm without a teacher."""
    if not any("router/teacher" in seed.curves for seed in seeds):
        return ""
    shares = {
        "router/policy_share": ("policy", UNIFORM),
        "router/rebellious_share": ("with bonus", OTHER),
        "router/distill_share": ("distillation", DRIFT),
    }
    weights = {
        "router/policy_weight": ("policy", UNIFORM),
        "router/rebellious_weight": ("bonus", OTHER),
        "router/distill_weight": ("distillation", DRIFT),
    }
    total = records.config.task.train_problems if records.config else None
    drawn = [
        _stacked("Samples by branch", [_without_overlap(seed) for seed in seeds], shares, shares=True),
        _stacked("Mean weight of each branch", [_faded(seed) for seed in seeds], weights),
        _lines("Teacher coverage", seeds, {"router/teacher": ("samples with a teacher", DRIFT)}, shares=True),
        _lines(
            "Success buffer",
            [_buffer(seed, total) for seed in seeds],
            {
                "held": ("problems held" if total else "share of its limit", DRIFT),
                "served": ("questions answered", UNIFORM),
            },
            shares=True,
        ),
        _lines("Gate and bonus", seeds, {"gate": ("mean gate", DRIFT), "rebellious": ("mean bonus", OTHER)}),
        _lines("Samples without an advantage", seeds, {"no_spread": ("advantage 0", DRIFT)}, shares=True),
    ]
    captions = [
        "Share of samples with a weight above 0. A sample with two branches counts in both.",
        "The router’s, the policy’s times the curriculum’s factor.",
        "A demonstration by a successful sibling or the buffer, or feedback that says more than “wrong”.",
        "Held: of the training problems. Answered: of a step’s questions to it, which come where no sibling succeeded.",
        "Over tokens with a teacher. A bonus of 1 changes nothing.",
        "All samples of their problem had the same reward: nothing for the policy branch.",
    ]
    note = f'<p class="why">What the router made of each step{_shaded(seeds)}.</p>'
    return f"<section><h2>Where samples go</h2>{note}{_figures(drawn, captions)}</section>"


def against_base(records: Records) -> str:
    """What became of the held-out problems that the base solved at once, later and never."""
    trained = next((arm for arm in records.solved_at if arm != "base"), None)
    if trained is None or "base" not in records.solved_at:
        return ""
    pairs = [
        pair
        for before, after in zip(records.solved_at["base"], records.solved_at[trained])
        if len(before) == len(after)
        for pair in zip(before, after)
    ]
    rows = []
    for label, fits in (
        ("in the first turn", lambda turn: turn == 1),
        ("in a later turn", lambda turn: turn > 1),
        ("never", lambda turn: turn == 0),
    ):
        now = [after for before, after in pairs if fits(before)]
        if now:
            shares = (sum(turn == 1 for turn in now) / len(now), sum(turn > 0 for turn in now) / len(now))
            cells = f"<td>{len(now):,}</td>" + "".join(f"<td>{percent(share)}</td>" for share in shares)
            rows.append(f"<tr><td>{label}</td>{cells}</tr>")
    columns = ("Solved by the base", "problems", "now in the first turn", f"now within {records.turns}")
    return f"<section><h3>The same problems, before and after</h3>{table(columns, rows)}</section>" if rows else ""


def _by_difficulty(records: Records, seeds: Sequence[Seed]) -> str:
    online = records.config.online if records.config else None
    if online is None:
        return ""
    found = [by_difficulty(seed.asked, online.router.hard_below, online.router.easy_above) for seed in seeds]
    series = {
        name: (COLOURS[name], [bands[name] for bands in found if name in bands])
        for name in BANDS
        if any(name in bands for bands in found)
    }
    if not series:
        return ""
    return plots.lines("Pass rate by difficulty", series, phases=_phases(seeds), shares=True, smooth=SMOOTH)


def _faded(seed: Seed) -> Seed:
    """The weights as the loss had them, by step: the curriculum's share of the router's, the rest plain distillation's."""
    share = dict(seed.curves.get("curriculum/routing", []))
    taught = dict(seed.curves.get("router/teacher", []))

    def mixed(name: str, plain: Mapping[int, float]) -> list[tuple[int, float]]:
        points = [(step, value, share.get(step, 1.0)) for step, value in seed.curves[name]]
        return [(step, routing * value + (1 - routing) * plain.get(step, 0.0)) for step, value, routing in points]

    plain = {"router/policy_weight": {}, "router/rebellious_weight": {}, "router/distill_weight": taught}
    faded = {name: mixed(name, values) for name, values in plain.items() if name in seed.curves}
    return Seed(seed.name, seed.curves | faded)


def _without_overlap(seed: Seed) -> Seed:
    """Samples with a bonus are among those of the policy; a stack shows them apart."""
    bonus = dict(seed.curves.get("router/rebellious_share", []))
    name = "router/policy_share"
    apart = [(step, max(share - bonus.get(step, 0.0), 0.0)) for step, share in seed.curves.get(name, [])]
    return Seed(seed.name, seed.curves | {name: apart})


def _buffer(seed: Seed, total: int | None) -> Seed:
    """held and served as shares; served, which the log counts up, step by step."""
    problems, fill = seed.curves.get("buffer/problems", []), seed.curves.get("buffer/fill", [])
    held = [(step, value / total) for step, value in problems] if total else fill
    asked, served = _increments(seed, "buffer/asked"), _increments(seed, "buffer/served")
    answered = [(step, served.get(step, 0.0) / count) for step, count in asked.items() if count > 0]
    curves: dict[str, Points] = {"held": held, "served": answered}
    return Seed(seed.name, {name: points for name, points in seed.curves.items() if "/phase" in name} | curves)


def _increments(seed: Seed, name: str) -> dict[int, float]:
    points = seed.curves.get(name, [])
    return {step: value - before for (step, value), (_, before) in zip(points, [(0, 0.0), *points])}


def _phases(seeds: Sequence[Seed]) -> list[tuple[str, float, float]]:
    """Warm-up and transition as the first seed logged them."""
    points = seeds[0].curves.get("curriculum/phase", [])
    found = []
    for number, name in enumerate(PHASES):
        steps = [step for step, value in points if value == number]
        if steps:
            found.append((name, steps[0], steps[-1]))
    return found if any(value < len(PHASES) for _, value in points) else []


def _shaded(seeds: Sequence[Seed]) -> str:
    return "; grey grounds are the curriculum’s phases before both branches count in full" if _phases(seeds) else ""


def _series(seeds: Sequence[Seed], names: Mapping[str, tuple[str, str]]) -> dict[str, tuple[str, list[Points]]]:
    runs = {name: [seed.curves[name] for seed in seeds if seed.curves.get(name)] for name in names}
    return {label: (colour, runs[name]) for name, (label, colour) in names.items() if runs[name]}


def _lines(
    title: str,
    seeds: Sequence[Seed],
    names: Mapping[str, tuple[str, str]],
    *,
    shares: bool = False,
    smooth: int = 1,
) -> str:
    """A figure of the curves that are there, or nothing."""
    series = _series(seeds, names)
    return plots.lines(title, series, phases=_phases(seeds), shares=shares, smooth=smooth) if series else ""


def _stacked(title: str, seeds: Sequence[Seed], names: Mapping[str, tuple[str, str]], *, shares: bool = False) -> str:
    series = _series(seeds, names)
    return plots.stacked(title, series, phases=_phases(seeds), shares=shares) if series else ""


def _figures(drawn: Sequence[str], captions: Sequence[str]) -> str:
    return figures([(svg, caption) for svg, caption in zip(drawn, captions) if svg])
