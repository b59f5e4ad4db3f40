"""Keys and values of what was sampled, so that a prompt that goes on from it costs its new tokens alone.

A conversation's next prompt is what was sampled so far plus a few tokens; without this every turn computes all before it
again. Only plain caches are kept (`DynamicLayer`): sliding windows have let go of what a longer prompt would need.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

Ids = tuple[int, ...]


@dataclass
class _Block:
    """Rows that left a batch together."""

    layers: list[tuple[torch.Tensor, torch.Tensor]]  # keys and values, [R, H, L, d] each
    columns: torch.Tensor  # [R, L] int64, the places of a row's tokens in order, then those of padding


@dataclass
class Memory:
    """Of one call of `generate`, for the next. most_bytes: what would go beyond it is not kept."""

    most_bytes: int
    blocks: list[_Block] = field(default_factory=list)
    places: dict[Ids, tuple[int, int]] = field(default_factory=dict)  # block and row of a sequence
    order: list[Ids] = field(default_factory=list)  # the sequences, sorted; empty until one is asked for
    bytes: int = 0

    def keep(self, cache: Any, mask: torch.Tensor, rows: Sequence[int], sequences: Sequence[Ids]) -> None:
        """Takes over `rows` of a batch. mask: [B, L], 1 where a token is; sequences: what it holds of each row, first to last."""
        if not rows or not all(type(layer) is DynamicLayer for layer in cache.layers):
            return
        size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) * len(rows) // len(mask)
        if self.bytes + size > self.most_bytes:
            return
        self.bytes += size
        index = torch.tensor(rows, device=mask.device)
        layers = [(layer.keys[index], layer.values[index]) for layer in cache.layers]
        self.places.update((ids, (len(self.blocks), row)) for row, ids in enumerate(sequences))
        self.blocks.append(_Block(layers, mask[index].argsort(dim=1, descending=True, stable=True)))
        self.order = []

    def fill(self, cache: Any, prompts: Sequence[Ids]) -> tuple[list[int], torch.Tensor | None]:
        """Puts into an empty cache what is known of each prompt: how many of its first tokens, and the mask [B, L] of them.

        At least the last token of a prompt is left to compute. Rows are padded on the left; None if nothing is known.
        """
        self.order = self.order or sorted(self.places)
        found = [self._longest(prompt) for prompt in prompts]
        lengths = [length for length, _ in found]
        longest = max(lengths)
        if longest == 0:
            return lengths, None
        device = self.blocks[0].columns.device
        starts = longest - torch.tensor(lengths, device=device)[:, None]
        mask = (torch.arange(longest, device=device) >= starts).long()
        source = (torch.arange(longest, device=device) - starts).clamp(min=0)
        members: dict[int, list[tuple[int, int]]] = {}
        for place, (length, sequence) in enumerate(found):
            if length:
                block, row = self.places[sequence]
                members.setdefault(block, []).append((place, row))
        for number in range(len(self.blocks[0].layers)):
            pair = [
                part.new_zeros(len(prompts), part.shape[1], longest, part.shape[3])
                for part in self.blocks[0].layers[number]
            ]
            for block, chosen in members.items():
                to, rows = torch.tensor(chosen, device=device).T
                columns = self.blocks[block].columns[rows].gather(1, source[to])
                for whole, part in zip(pair, self.blocks[block].layers[number]):
                    whole[to] = part[rows[:, None], :, columns].transpose(1, 2)
            cache.update(*pair, number)
        return lengths, mask

    def _longest(self, prompt: Ids) -> tuple[int, Ids]:
        """How much of the prompt some sequence begins with, its last token left out, and which does.

        Of all sequences sorted before a prompt, the nearest shares the most with it.
        """
        place = bisect_right(self.order, prompt)
        if place == 0:
            return 0, ()
        sequence = self.order[place - 1]
        low, high = 0, min(len(sequence), len(prompt) - 1)
        if sequence[:high] == prompt[:high]:
            return high, sequence
        while high - low > 1:  # the first `low` tokens agree, the first `high` do not
            middle = (low + high) // 2
            low, high = (middle, high) if sequence[:middle] == prompt[:middle] else (low, middle)
        return low, sequence
