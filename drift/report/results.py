"""The headline of a report: how well each arm solves held-out problems, and how sure the differences are."""

from __future__ import annotations

import math
import re

from drift.report import plots
from drift.report.intervals import Difference, mean_stderr, paired_difference
from drift.report.records import Records, Results
from drift.report.text import count_of, esc, figures, percent, points, table

_CSS_COLOURS = {"base": "base", "uniform": "uniform", "success_only": "success", "drift": "drift"}


def section(records: Records) -> str:
    """The table, the two figures, and every seed's numbers; empty if nothing has been evaluated."""
    if not records.results:
        return ""
    results, turns = records.results, records.turns
    number = len(next(iter(results.values())).multi)
    reference = next(arm for arm in ("drift", *reversed(results)) if arm in results)  # the base is the last to be it
    rows = (_result_row(arm, result, records, reference) for arm, result in results.items())
    gain = "<small>points over base</small>" if "base" in results and len(results) > 1 else ""
    last = [f"{esc(reference)} ahead by<small>multi@{turns}, points</small>"] if len(results) > 1 else []
    shown = table(["Arm", f"multi@{turns}{gain}", f"single turn{gain}", *last], rows)
    error = "± is the standard error over seeds" if number > 1 else "With one seed there is no standard error"
    note = (
        '<p class="why">Greedy answers on problems that no model was trained on, mean over '
        f"{count_of(number, 'seed', 'seeds that start from the same model')}. multi@{turns} counts a problem as solved "
        f"when one of {turns} attempts, each after the same feedback, is right. {error}; differences are taken seed by "
        "seed.</p>"
    )
    if failed := records.summary.get("failed_checks", {}).get("evaluations", 0):
        note += f'<p class="bad">{count_of(failed, "check", "checks")} of the evaluations had no verdict and count as wrong.</p>'
    if lost := records.summary.get("lost_servers"):
        times = ", ".join(f"{esc(url)} {count_of(number, 'time', 'times')}" for url, number in lost.items())
        note += f'<p class="bad">Servers were set aside, and others did their work: {times}.</p>'
    drawn = [(plots.by_seed(results, turns), "A grey line joins the arms of one seed; a bar is an arm’s mean.")]
    if all(result.by_turn for result in results.values()):
        drawn.insert(0, (plots.by_turn(results), "Mean over seeds; the band is one standard error."))
    more = f"{_sets(records)}{_corrections(records)}{figures(drawn)}{_all_seeds(records)}{_moved(records)}"
    return f"<section><h2>Results</h2>{note}{shown}{more}</section>"


def _result_row(arm: str, result: Results, records: Records, reference: str) -> str:
    base, ours = records.results.get("base"), records.results[reference]
    cells = []
    for values, before in ((result.multi, base and base.multi), (result.single, base and base.single)):
        mean = mean_stderr(values).mean
        gain = f"<small>{points(paired_difference(values, before))}</small>" if before and arm != "base" else ""
        colour = f"var(--{_CSS_COLOURS.get(arm, 'other')})"
        bar = f'<span class="bar"><i style="width:{100 * mean:.1f}%;background:{colour}"></i></span>'
        cells.append(f"<td>{percent(mean)}{bar}{gain}</td>")
    if len(records.results) > 1:
        cells.append(f"<td>{_verdict(paired_difference(ours.multi, result.multi)) if arm != reference else '—'}</td>")
    dot = f'<span class="dot" style="background:var(--{_CSS_COLOURS.get(arm, "other")})"></span>'
    label = f'<span class="arm">{dot}{esc(arm)}</span><small>{esc(records.about(arm))}</small>'
    key = ' class="key"' if arm == reference else ""
    return f"<tr{key}><td>{label}</td>{''.join(cells)}</tr>"


def _verdict(difference: Difference) -> str:
    """The difference, in colour and with a word where it is more than twice its standard error from zero."""
    if math.isnan(difference.stderr):
        return points(difference)
    if abs(difference.mean) <= 2 * difference.stderr:
        return f"{points(difference)}<small>within 2 s.e.</small>"
    colour = "good" if difference.mean > 0 else "bad"
    return f'<span class="{colour}">{points(difference)}</span><small>beyond 2 s.e.</small>'


def _moved(records: Records) -> str:
    """Entropy of each trained arm, and how far from the base it went, where that was logged: means over seeds."""
    rows = []
    for arm in records.results:
        values = []
        for metric in ("base_entropy", "entropy", "base_kl"):
            series = records.curves.get(metric, {})
            ends = [
                points[-1][1]
                for name, points in series.items()
                if re.fullmatch(rf"seed-\d+/{re.escape(arm)}/watch", name)
            ]
            values.append(f"<td>{sum(ends) / len(ends):.3f}</td>" if ends else "")
        if all(values):
            rows.append(f"<tr><td>{esc(arm)}</td>{''.join(values)}</tr>")
    if not rows:
        return ""
    note = (
        '<p class="why">Nats a token, on some of the trajectories that the base sampled; KL(base‖arm), estimator k3. An arm '
        "that has collapsed has an entropy near 0 and a large KL.</p>"
    )
    shown = table(("Arm", "entropy before", "entropy after", "KL from the base"), rows)
    return f"<h3>How far training went</h3>{note}{shown}"


def _sets(records: Records) -> str:
    """multi@k of each evaluation set, means over seeds, the average over the sets last; empty for one set."""
    names = list(next(iter(records.results.values())).sets)
    if not names:
        return ""
    rows = []
    for arm, result in records.results.items():
        cells = [percent(mean_stderr(result.sets[name].multi).mean) for name in names if name in result.sets]
        cells.append(f"<b>{percent(mean_stderr(result.multi).mean)}</b>")
        rows.append(f"<tr><td>{esc(arm)}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    note = f'<p class="why">multi@{records.turns}; the average is over the sets, whatever their sizes.</p>'
    return f"<h3>By evaluation set</h3>{note}{table(['Arm', *map(esc, names), 'average'], rows)}"


def _corrections(records: Records) -> str:
    """The correction rate of each later turn, means over the seeds that have one."""
    rows = []
    for arm, result in records.results.items():
        turns = [[rate for rate in turn if rate is not None] for turn in zip(*result.corrected)]
        cells = (f"<td>{percent(sum(rates) / len(rates)) if rates else '–'}</td>" for rates in turns)
        rows += [f"<tr><td>{esc(arm)}</td>{''.join(cells)}</tr>"] if turns else []
    if not rows:
        return ""
    note = '<p class="why">Of the problems that are still unsolved before a turn, the share that it solves.</p>'
    return f"<h3>Corrections</h3>{note}{table(['Arm', *(f'turn {t}' for t in range(2, records.turns + 1))], rows)}"


def _all_seeds(records: Records) -> str:
    rows = []
    for arm, result in records.results.items():
        for label, values in (
            (f"multi@{records.turns}", result.multi),
            ("single", result.single),
            *result.sampled.items(),
        ):
            cells = "".join(f"<td>{percent(value)}</td>" for value in values)
            rows.append(f"<tr><td>{esc(arm)} <small>{label}</small></td>{cells}</tr>")
    shown = table(["", *(f"seed {esc(seed)}" for seed in records.seeds)], rows)
    return f"<details><summary>Every seed in numbers</summary>{shown}</details>"
