"""Rollout engines: prompts of token ids in, sampled ids with their log-probs out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(slots=True)
class Sample:
    """One continuation."""

    token_ids: list[int]  # as sampled; the end-of-turn token is the last one where `finished`
    logprobs: list[float]  # of each token under the distribution it was drawn from (after temperature, before top_p)
    finished: bool  # ended its turn, rather than ran into max_new_tokens


class Engine(Protocol):
    """What rollouts and evaluation ask of an engine."""

    def sync(self) -> None:
        """From here on, sample from the policy's weights as they are now.

        Called after each change of the weights and before the next `generate`; an engine that shares the policy's
        memory has nothing to do.
        """
        ...

    def generate(
        self,
        prompts: list[list[int]],
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
        bar: Any = None,
    ) -> list[Sample]:
        """One sample a prompt, in the prompts' order; temperature 0 is greedy. `bar.advance(n)` counts samples."""
        ...
