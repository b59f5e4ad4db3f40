"""The text around a problem and the reading of a reply: system message, instruction, format rule, prefill, parser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from drift.config import TaskConfig


@dataclass(frozen=True, slots=True)
class Framing:
    """The part of a task's settings that rollouts need; None adds nothing."""

    system: str | None = None
    instruction: str | None = None
    format_rule: str | None = None
    prefill: str = ""
    parser: Literal["strict", "lenient", "whole"] = "lenient"
    cut_answers: Literal["count", "drop"] = "count"
    max_failed: float = 0.05

    @classmethod
    def of(cls, config: TaskConfig) -> Framing:
        """Those of `task`."""
        return cls(
            config.system or None,
            config.instruction,
            config.format_rule,
            config.prefill or "",
            config.parser,
            config.cut_answers,
            config.max_failed,
        )

    def prompt(self, text: str) -> str:
        """The first user message about a problem: instruction, problem, format rule, a blank line between two of them."""
        return "\n\n".join(part for part in (self.instruction, text, self.format_rule) if part)
