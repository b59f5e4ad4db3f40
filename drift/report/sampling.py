"""What the rollouts of a report amounted to: how often they succeeded, and how unequal returns made the weights."""

from __future__ import annotations

from drift.online.watch import pass_at, repeat_rate
from drift.report import plots
from drift.report.records import Records
from drift.report.text import count_of, esc, figures, percent, tile, tiles
from drift.rollouts.account import account, expected


def section(records: Records) -> str:
    """Some numbers and four histograms over all rollout files; empty if nothing was sampled."""
    sampled = records.sampled
    if not sampled:
        return ""
    rows = [row for part in sampled for row in part.rows]
    solved = [row["t_star"] is not None for row in rows]
    groups = sum(len(part.groups) for part in sampled)
    turns = sum(message["role"] == "assistant" for row in rows for message in row["messages"])
    parsed = sum(len(row["answer_norms"]) for row in rows)
    by_group = [share for part in sampled for share in part.ess_by_group]
    ess = sum(part.ess * len(part.rows) for part in sampled) / len(rows)
    unsolved = sum(part.unsolved * len(part.groups) for part in sampled) / groups
    numbers = [
        tile("trajectories", f"{len(rows):,}", f"in {count_of(groups, 'group', 'groups')}"),
        tile("solved", percent(sum(solved) / len(rows)), "of the trajectories"),
        tile("in the first turn", percent(sum(row["t_star"] == 1 for row in rows) / len(rows)), "of the trajectories"),
        tile("effective sample size", percent(ess), f"{percent(sum(by_group) / max(len(by_group), 1))} within a group"),
        tile("unsolved groups", percent(unsolved), "no trajectory succeeded"),
        tile("answers not parsed", percent(1 - parsed / max(turns, 1)), f"of {turns:,} turns"),
    ]
    found = pass_at([f"{n} {row['prompt_id']}" for n, part in enumerate(sampled) for row in part.rows], solved)
    numbers += [tile(f"pass@{k}", percent(found[k]), "of a prompt’s samples, unbiased") for k in (2, 4) if k in found]
    repeated = repeat_rate(row["answer_norms"] for row in rows)
    numbers.append(tile("repeat rate", percent(repeated), "answers given before in the trajectory"))
    if failed := sum(row.get("failed_checks", 0) for row in rows):
        numbers.append(tile("failed checks", f"{failed:,}", "without a verdict; they count as wrong"))
    settings = records.weights_config
    dropped = sum(part.dropped for part in sampled) / len(sampled)
    cut = f" Below {settings.min_weight:g} they are left out: {percent(dropped)} of all weight." if dropped else ""
    drawn = [
        (plots.returns_histogram(sampled), f"Discount γ = {settings.gamma:g}, repetition λ = {settings.repetition:g}."),
        (plots.weights_histogram(sampled), f"exp(R/β) with β = {settings.beta:g}, of mean 1 in every group.{cut}"),
        (plots.ess_histogram(sampled), "100%: all siblings weigh the same. 1/n: one of them carries the group."),
        (
            plots.group_histogram(sampled),
            "A group at 0 says nothing about being right, only about form and repetition.",
        ),
    ]
    source = f" Taken from {count_of(len(sampled), 'rollout file', 'rollout files')}." if len(sampled) > 1 else ""
    note = (
        '<p class="why">Before it is trained, the model answers every training prompt several times, with feedback '
        f"after a wrong answer. What a trajectory is worth decides how much it counts in training.{source}</p>"
    )
    return f"<section><h2>What was sampled</h2>{note}{tiles(numbers)}{figures(drawn)}</section>"


def warnings(records: Records) -> str:
    """A notice of the rollout files from which nothing can be learned; empty if there are none."""
    items, form = [], None
    if records.config and records.config.rollout.environment is None:
        form = expected(records.config.task.parser, records.config.task.answer_tag)
    for part in records.sampled:
        if part.rows and (warning := account(part.rows, records.weights_config).warning(form)):
            items.append(f"<li>{esc(part.source)}: {esc(warning)}</li>")
    if not items:
        return ""
    return f'<div class="notice" role="note"><b>There is nothing to learn from.</b><ul>{"".join(items)}</ul></div>'
