"""Rows from a file against the model that is to learn from them: do their token ids spell their messages?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from drift.model import chat
from drift.model.policy import Policy
from drift.store import StoreError


def check_ids(policy: Policy, rows: Sequence[dict[str, Any]], places: Sequence[int], path: str | Path) -> None:
    """Raises StoreError for the first row whose sampled ids do not decode to its last assistant messages.

    places: the rows' lines in `path`. A message may begin with text of the template's that was not sampled. Rows without
    ids are rendered from their messages, and have nothing to compare.
    """
    for row, line in zip(rows, places, strict=True):
        if row.get("token_ids") is None:
            continue
        try:
            wrong = _difference(policy, row)
        except ValueError as error:
            raise StoreError(f"{path}:{line}: {error}") from None
        if wrong:
            raise StoreError(
                f"{path}:{line}: {wrong}; another tokenizer made the row, or it was changed: leave token_ids out to have "
                "the messages tokenised, or leave the row out"
            )


def _difference(policy: Policy, row: dict[str, Any]) -> str | None:
    said = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
    parts = chat.to_trajectories(policy, row, index=0, turns="assistant")
    sampled = [chat.decode(policy, part.token_ids[turn.start : turn.stop]) for part in parts for turn in part.turns]
    if len(sampled) > len(said):
        return f"token_ids hold {len(sampled)} sampled turns, and messages {len(said)} of the assistant"
    first = len(said) - len(sampled)
    for number, (text, message) in enumerate(zip(sampled, said[first:]), first + 1):
        same = text.strip() == message.strip()
        if not same and not (text.strip() and message.strip().endswith(text.strip())):
            return f"token_ids of assistant message {number} decode to {_short(text)}, and the message is {_short(message)}"
    return None


def _short(text: str) -> str:
    shown = repr(text)
    return shown if len(shown) <= 60 else shown[:57] + "…'"
