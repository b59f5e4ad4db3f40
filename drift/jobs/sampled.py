"""Says what was sampled before anything is trained on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from drift.config import Config
from drift.model.policy import Policy
from drift.rollouts.account import Account, account, expected
from drift.rollouts.rollout import framing
from drift.tasks import Task
from drift.track import Track


def say(
    policy: Policy, task: Task, rows: Sequence[dict[str, Any]], config: Config, track: Track, name: str = "sampled"
) -> Account | None:
    """One line about the rows, and a warning when nothing can be learned from them; None when there are none."""
    if not rows:
        return None
    found = account(rows, config.weights, policy.eos_ids | policy.turns.ends)
    own = config.rollout.environment is not None  # which reads answers by rules of its own
    form = None if own else expected(framing(task).parser, task.answer_tag)
    track.say(f"{name}: {found.line(form, config.rollout.max_new_tokens)}")
    if warning := found.warning(form):
        track.say(f"{name}: WARNING: {warning}")
    return found
