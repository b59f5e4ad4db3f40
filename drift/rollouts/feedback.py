"""The user's reply to a turn that was not right."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from drift.types import Problem

FEEDBACK = "Incorrect. Please think again."
UNPARSED = "No answer could be read."
_FULL = re.compile(
    rf"Reward: \S+\n\nTurn \d+:\nState: ({re.escape(FEEDBACK)}|{re.escape(UNPARSED)}\n.*)\nYou have \d+ attempts? left\. .*",
    re.DOTALL,
)


def is_bare(said: str) -> bool:
    """Whether the text is a `Feedback`, which only says that an answer was wrong."""
    return said == FEEDBACK or _FULL.fullmatch(said) is not None


@dataclass(frozen=True, slots=True)
class Feedback:
    """The words for one rollout or evaluation. mode: simple says FEEDBACK; full is the published long form (A1)."""

    mode: Literal["simple", "full"] = "simple"
    turns: int = 5  # attempts in all
    length: int | None = None  # tokens of a turn, at most
    tag: str = "answer"
    format_rule: str | None = None

    def __call__(self, problem: Problem, turn: int, *, reward: float = 0.0, parsed: bool = True) -> str:
        """The message after attempt number `turn`, which got `reward`.

        In full: the reward, the number of the coming turn, the sentence of `simple` as its state, the attempts left, the
        format and the length. The problem is repeated only after a first turn without an answer that could be read.
        """
        if self.mode == "simple":
            return FEEDBACK
        state = FEEDBACK if parsed or turn > 1 else f"{UNPARSED}\n{problem.prompt}"
        rule = self.format_rule or f"Always output: <think> … </think> <{self.tag}> … </{self.tag}>, and nothing else."
        left = self.turns - turn
        lines = [f"Reward: {reward:g}", "", f"Turn {turn + 1}:", f"State: {state}"]
        lines += [f"You have {left} {'attempt' if left == 1 else 'attempts'} left. {rule}"]
        lines += [f"Maximum length: {self.length} tokens."] if self.length else []
        return "\n".join(lines)
