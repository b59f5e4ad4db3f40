"""What a batch of trajectories holds to learn from, in a line; and a warning when that is nothing."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

from drift.config import WeightsConfig
from drift.returns import trajectory_return, without_residue

NEEDED = {
    "strict": "<think>…</think><{tag}>…</{tag}>",
    "lenient": "<{tag}>…</{tag}>",
    "whole": "something outside <think>…</think>",
}  # of a reply, by `task.parser`


@dataclass(frozen=True, slots=True)
class Account:
    """Counts over rows of the rollout file."""

    rows: int
    solved: int  # rows with a right answer
    graded: int  # other rows with a reward
    groups: int  # problems
    flat: int  # groups whose returns are all equal
    turns: int  # attempts
    unparsed: int  # attempts without an answer that could be read
    cut: int | None  # rows with a turn that ran into the limit; None when that is not known

    def line(self, expected: str | None = None, limit: int | None = None) -> str:
        """Solved, unparsed, without spread, cut. expected: the format of an answer; limit: tokens of a turn at most."""
        parts = [f"{self.solved} of {self.rows} trajectories are solved ({self.solved / self.rows:.0%})"]
        form = f" (expected {expected})" if expected and self.unparsed else ""
        parts.append(f"{self.unparsed} of {self.turns} answers could not be read{form}")
        parts.append(f"{self.flat} of {self.groups} groups have no spread in their returns")
        if self.cut is not None:
            at = f" at {limit} tokens" if limit and self.cut else ""
            parts.append(f"{self.cut} trajectories have a turn that was cut{at}")
        return "; ".join(parts)

    def warning(self, expected: str | None = None) -> str | None:
        """Why nothing can be learned, and what to do about it; None when something can."""
        if self.flat < self.groups and (self.solved or self.graded):
            return None
        if self.solved == self.rows:
            return "nothing can be learned: every trajectory is right; take harder problems"
        if self.turns and self.unparsed > self.turns / 2:
            form = f", which must read {expected}" if expected else ""
            remedy = f"{self.unparsed} of {self.turns} answers could not be read{form}; say so in task.format_rule, or change "
            remedy += "task.parser or task.answer_tag"
        elif self.cut is not None and self.cut > self.rows / 2:
            remedy = f"{self.cut} of {self.rows} trajectories were cut; raise rollout.max_new_tokens"
        else:
            remedy = "take easier problems, a stronger model or a larger rollout.n, or check task.scorer on the right answers"
        if self.flat < self.groups:
            return f"no trajectory is right, so only form and repetition can be learned: {remedy}"
        return f"nothing can be learned: no group has any spread in its returns, and {self.solved} are right: {remedy}"


def account(rows: Sequence[dict[str, Any]], weights: WeightsConfig, ends: Container[int] | None = None) -> Account:
    """Counts `rows`, which must not be empty. ends: ids that end a turn, with which cut turns can be told."""
    groups: dict[str, list[float]] = {}
    for row in rows:
        groups.setdefault(row["prompt_id"], []).append(trajectory_return(row, weights.gamma, weights.repetition))
    turns = sum(len(row["turn_rewards"]) for row in rows)
    parsed = sum(len(row["answer_norms"]) for row in rows)
    known = ends is not None and all("token_ids" in row for row in rows)
    return Account(
        len(rows),
        sum(row["t_star"] is not None for row in rows),
        sum(row["t_star"] is None and any(row["turn_rewards"].values()) for row in rows),
        len(groups),
        sum(len(set(without_residue(returns))) == 1 for returns in groups.values()),
        turns,
        max(turns - parsed, 0),
        sum(_is_cut(row, ends) for row in rows) if known and ends is not None else None,
    )


def _is_cut(row: dict[str, Any], ends: Container[int]) -> bool:
    """Whether a sampled turn of the row does not end with one of the ids."""
    for sample in (*(row.get("earlier_turns") or []), row):
        ids, mask = sample["token_ids"], sample["loss_mask"]
        last = (i for i, on in enumerate(mask) if on and (i + 1 == len(mask) or not mask[i + 1]))
        if any(ids[i] not in ends for i in last):
            return True
    return False


def expected(parser: str, tag: str) -> str:
    """The format of an answer that a task's parser can read."""
    return NEEDED[parser].format(tag=tag)
