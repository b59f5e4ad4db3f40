"""Rollouts in process: a cached decoding loop over a transformers model.

Prompts are sorted by length, padded on the left and decoded in batches; rows that have ended leave the batch once they
are half of it, so that a few long answers do not hold up many short ones. Only the last position's logits are made.
Prompts that are the same are read once, and inside `remembering` a prompt that goes on from what the call before
sampled, as the next turn of a conversation does, is read from there on.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from drift.engines import Sample, check_prompts, seeds
from drift.engines.memory import Memory
from drift.model.policy import Policy

REMEMBERED = 1 << 30  # bytes of keys and values at most


class HFEngine:
    """`generate` on the policy's own weights, as they are when it is called."""

    def __init__(self, policy: Policy, batch_size: int = 512) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size} should be at least 1")
        self.policy, self.batch_size = policy, batch_size
        self.memory: Memory | None = None  # of the call before
        self._next: Memory | None = None  # of this one
        names = inspect.signature(policy.causal_lm.forward).parameters
        self.cache_name = "cache" if "cache" in names else "past_key_values"  # renamed in transformers 5.24

    def sync(self) -> None:
        """Nothing to do: the weights are the policy's own."""

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """Inside, keys and values of a call's samples are kept for the next call; the weights must stay as they are."""
        self.memory = Memory(REMEMBERED)
        try:
            yield
        finally:
            self.memory = self._next = None

    def generate(
        self,
        prompts: list[list[int]],
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int | Sequence[int] = 0,
        bar: Any = None,
    ) -> list[Sample]:
        """One sample a prompt, in order; temperature 0 is greedy. A sample follows from its prompt and its seed.

        What else is in the batch moves logits by their last bits at most. Raises ValueError for an empty prompt,
        temperature < 0, or top_p outside (0, 1].
        """
        if temperature < 0 or not 0 < top_p <= 1:
            raise ValueError(f"temperature {temperature} should be at least 0 and top_p {top_p} in (0, 1]")
        check_prompts(prompts)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        samples: list[Sample | None] = [None] * len(prompts)
        chances = [np.random.default_rng(own) for own in seeds(seed, len(prompts))]
        self._next = None if self.memory is None else Memory(self.memory.most_bytes)
        with self.policy.inference():
            for first in range(0, len(order), self.batch_size):
                chosen = order[first : first + self.batch_size]
                own = np.stack([chances[i].integers(2**32, size=max_new_tokens) for i in chosen]) / 2**32
                done = self._batch([prompts[i] for i in chosen], temperature, top_p, torch.from_numpy(own))
                for i, sample in zip(chosen, done):
                    samples[i] = sample
                if bar is not None:
                    bar.advance(len(chosen))
        self.memory, self._next = self._next, None
        return [sample for sample in samples if sample is not None]

    def _batch(self, prompts: list[list[int]], temperature: float, top_p: float, chances: torch.Tensor) -> list[Sample]:
        """chances: [B, L], float64 in [0, 1), of each token of up to L."""
        chances, limit = chances.to(self.policy.device), chances.shape[1]
        ends = torch.tensor(sorted(self.policy.eos_ids), device=self.policy.device)
        samples = [Sample([], [], False) for _ in prompts]
        cache = DynamicCache(config=self.policy.causal_lm.config)
        options = {self.cache_name: cache, "use_cache": True, "logits_to_keep": 1}
        logits, mask, positions = self._read(prompts, cache, options)
        live = list(range(len(prompts)))
        running = torch.ones(len(live), dtype=torch.bool, device=self.policy.device)
        for number in range(limit):
            tokens, logprobs = draw(logits.float(), temperature, top_p, chances[:, number])
            ended = torch.isin(tokens, ends)
            for row, on, token, logprob, end in zip(
                live, running.tolist(), tokens.tolist(), logprobs.tolist(), ended.tolist()
            ):
                if on:
                    samples[row].token_ids.append(token)
                    samples[row].logprobs.append(logprob)
                    samples[row].finished = end
            running &= ~ended
            left = int(running.sum())
            if left == 0 or number + 1 == limit:
                break
            if left <= len(live) // 2:
                kept = running.nonzero().squeeze(1)
                self._remember(cache, mask, live, prompts, samples, (~running).nonzero().squeeze(1).tolist())
                cache.batch_select_indices(kept)
                tokens, mask, positions, running = tokens[kept], mask[kept], positions[kept], running[kept]
                chances = chances[kept]
                live = [live[i] for i in kept.tolist()]
            mask, positions = torch.cat([mask, mask.new_ones(len(live), 1)], 1), positions + 1
            out = self.policy.model(input_ids=tokens[:, None], attention_mask=mask, position_ids=positions, **options)
            logits = out.logits[:, -1]
        self._remember(cache, mask, live, prompts, samples, range(len(live)))
        return samples

    def _read(
        self, prompts: list[list[int]], cache: Any, options: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Fills the cache: what follows each prompt as logits [B, V], the mask [B, L], and the last positions [B, 1]."""
        device = self.policy.device
        places = {ids: place for place, ids in enumerate(dict.fromkeys(map(tuple, prompts)))}
        lengths, known = self.memory.fill(cache, list(places)) if self.memory else ([0] * len(places), None)
        new = [ids[length:] for ids, length in zip(places, lengths)]
        longest = max(map(len, new))
        ids = torch.full((len(new), longest), self.policy.tokenizer.pad_token_id or 0, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, part in enumerate(new):
            ids[row, longest - len(part) :] = torch.tensor(part)
            mask[row, longest - len(part) :] = 1
        ids, mask = ids.to(device), mask.to(device)
        if known is not None:
            mask = torch.cat([known, mask], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -longest:]
        out = self.policy.model(input_ids=ids, attention_mask=mask, position_ids=positions, **options)
        logits, last = out.logits[:, -1], positions[:, -1:]
        if len(places) < len(prompts):
            index = torch.tensor([places[tuple(prompt)] for prompt in prompts], device=device)
            cache.batch_select_indices(index)
            logits, mask, last = logits[index], mask[index], last[index]
        return logits, mask, last

    def _remember(
        self,
        cache: Any,
        mask: torch.Tensor,
        live: list[int],
        prompts: list[list[int]],
        samples: list[Sample],
        rows: Sequence[int],
    ) -> None:
        """Keeps rows of the batch; a sample's last token was never read."""
        if self._next is not None:
            read = [(*prompts[live[row]], *samples[live[row]].token_ids[:-1]) for row in rows]
            self._next.keep(cache, mask, rows, read)


def draw(
    logits: torch.Tensor, temperature: float, top_p: float, chances: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A token for each row of logits [B, V] float32 and its log-prob at this temperature, [B] each.

    chances: [B] float64, multiples of 2⁻³² below 1: the first token is taken up to which more than that share of the
    probability lies. So a row's token does not depend on the other rows.
    temperature 0 takes the most likely token, with its log-prob at temperature 1. top_p keeps the fewest most likely
    tokens that hold that much probability; the log-prob is that before the cut.
    """
    log_p = torch.log_softmax(logits / temperature if temperature > 0 else logits, -1)
    if temperature == 0:
        tokens = log_p.argmax(-1)
    else:
        p = log_p.exp()
        if top_p < 1:
            ranked, order = p.sort(-1, descending=True)
            ranked[ranked.cumsum(-1) - ranked >= top_p] = 0
            p = torch.zeros_like(p).scatter_(-1, order, ranked)
        below = p.double().cumsum(-1)
        tokens = torch.searchsorted(below, (chances * below[:, -1])[:, None], right=True).squeeze(1)
    return tokens, log_p.gather(-1, tokens[:, None]).squeeze(1)
