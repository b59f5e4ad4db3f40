"""Rollout engines: prompts of token ids in, sampled ids with their log-probs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # the server's process imports this package without its dependencies (vllm_worker)
    from drift.config import EngineConfig
    from drift.model.policy import Policy


class EngineError(RuntimeError):
    """A server that cannot be used, or that is not there any more."""


@dataclass(slots=True)
class Sample:
    """One continuation."""

    token_ids: list[int]  # as sampled; the end-of-turn token is the last one where `finished`
    logprobs: list[float]  # of each token under the distribution it was drawn from (after temperature, before top_p)
    # a server gives those after top_p: NaN for each when top_p < 1
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
        seed: int | Sequence[int],
        bar: Any = None,
    ) -> list[Sample]:
        """One sample a prompt, in the prompts' order; temperature 0 is greedy. `bar.advance(n)` counts samples.

        seed: one for each prompt, which its sample follows from whatever else is asked for; or one number for all, from
        which each place gets a seed of its own.
        """
        ...


def remembering(engine: Engine) -> AbstractContextManager[None]:
    """Inside, an engine that can may keep what it computed for one call for the next; the weights must stay as they are.

    `HFEngine` can; others have no `remembering`, and nothing changes.
    """
    return getattr(engine, "remembering", nullcontext)()


def seeds(seed: int | Sequence[int], count: int) -> list[int]:
    """A seed for each of `count` prompts. Raises ValueError when as many are given and they are not as many."""
    if isinstance(seed, int):
        import numpy as np

        return [int(np.random.SeedSequence([seed, place]).generate_state(1)[0]) for place in range(count)]
    if len(seed) != count:
        raise ValueError(f"seed: {len(seed)} seeds for {count} prompts; there must be one each, or one number for all")
    return list(seed)


def check_prompts(prompts: list[list[int]]) -> None:
    """Raises ValueError if one is empty."""
    if not all(prompts):
        raise ValueError(f"prompts: number {next(i for i, p in enumerate(prompts) if not p)} is empty")


@contextmanager
def open_engine(
    config: EngineConfig,
    policy: Policy,
    batch_size: int,
    tell: Callable[[str, str | None], None] | None = None,
) -> Iterator[Engine]:
    """The engine that `config` names, in step with the policy's weights; inside, `sync` keeps it so.

    batch_size  prompts at once, of an engine in process; a server has its own
    tell        of servers that are set aside, or back (`VLLMEngine`); by default on standard error

    Raises EngineError if a server cannot be used, with the command that starts one that can.
    """
    match config.kind:
        case "hf":
            from drift.engines.hf import HFEngine

            yield HFEngine(policy, batch_size)
        case "vllm":
            from drift.engines.vllm import VLLMEngine

            with VLLMEngine(policy, config, tell) as engine:
                engine.sync()
                yield engine
