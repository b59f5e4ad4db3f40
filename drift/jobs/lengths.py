"""Whether the longest conversation of a run fits: into what is trained, and into the model's positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from drift.config import Config, ConfigError
from drift.model import chat
from drift.model.policy import Policy
from drift.rollouts.rollout import default_environment, default_feedback
from drift.tasks import Task
from drift.track import Track
from drift.types import Problem

LOOKED_AT = 256  # problems: the longest texts of all


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens, at most."""

    prompt: int  # of the longest prompt
    problem: str  # whose that is
    between: int  # what template and feedback add between two turns
    turns: int  # that a conversation may have, those of tool calls included
    new: int  # of a turn
    positions: int | None  # that the model is made for; None if it does not say

    @property
    def whole(self) -> int:
        """The longest conversation."""
        return self.prompt + self.turns * self.new + (self.turns - 1) * self.between

    def __str__(self) -> str:
        gaps = f" + {self.turns - 1} × {self.between} between them" if self.turns > 1 else ""
        longest = f"{self.prompt} of the longest prompt (problem {self.problem})"
        return f"{longest} + {self.turns} turns × {self.new}{gaps} = {self.whole}"


def measure(policy: Policy, task: Task, problems: Sequence[Problem], config: Config) -> Lengths:
    """The lengths of rollouts of these problems, whose prompts are rendered."""
    how = config.rollout
    environment = default_environment(task, how)
    longest = sorted(problems, key=lambda p: len(p.prompt) + len(p.system or ""), reverse=True)[:LOOKED_AT]
    sizes = [(len(chat.render(policy.tokenizer, environment.reset(p), True)), p) for p in longest]
    size, problem = max(sizes, key=lambda pair: pair[0])
    opened = environment.reset(problem)
    said = default_feedback(task, how)(problem, 1, parsed=False)
    answered = [*opened, {"role": "assistant", "content": "0"}, {"role": "user", "content": said}]
    between = len(chat.extend(policy, [0], answered)) - 1
    turns = how.turns + (how.tool_calls if how.tool else 0)
    shape = policy.causal_lm.config.get_text_config()
    return Lengths(
        size, problem.id, between, turns, how.max_new_tokens, getattr(shape, "max_position_embeddings", None)
    )


def complaints(found: Lengths, config: Config) -> tuple[list[str], list[str]]:
    """(what must be changed, what should be): settings by name, with the numbers."""
    must, should = list[str](), list[str]()
    limit, how = config.train.longest, config.rollout
    every = config.online is not None or config.train.turns == "assistant"
    trained = found.whole if how.history == "keep" else found.prompt + found.new
    if every and trained > limit:
        must.append(
            f"train.max_length {limit} is below the longest conversation, {found} tokens, and trained turns are never cut; set "
            f"train.max_tokens={trained} and train.max_length={trained}, or lower rollout.max_new_tokens or rollout.turns"
        )
    elif trained > limit:
        should.append(
            f"train.max_length {limit} is below the longest conversation, {found} tokens: the oldest prompt turns of such a "
            f"trajectory are cut; train.max_tokens={trained} and train.max_length={trained} cut nothing"
        )
    if found.positions is not None and found.whole > found.positions:
        should.append(
            f"the model is made for {found.positions} positions, and the longest conversation has {found} tokens; lower "
            "rollout.max_new_tokens or rollout.turns, or leave out the longest prompts"
        )
    return must, should


def check(policy: Policy, task: Task, config: Config, track: Track) -> Lengths:
    """Raises ConfigError if a full-length conversation could not be trained; says what would be cut."""
    found = measure(policy, task, task.problems("train"), config)
    must, should = complaints(found, config)
    if must:
        raise ConfigError("\n".join(must))
    for text in should:
        track.say(f"warning: {text}")
    return found
