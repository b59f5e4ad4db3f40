"""Responses to look at, with what each of their tokens was worth in the step that trained them: `examples.jsonl`.

One JSON object a line, a response of a step:

    step, prompt_id, index (place in the batch), solved_at (turn, 0 for none), reward, advantage, phase (of the curriculum)
    policy_weight, distill_weight, rebellious_weight   the router's
    routing   the curriculum's share of them in the loss; the rest is plain self-distillation
    tokens    pieces of text, the prompt's included
    trained   1 for a token that was sampled
    logprobs, entropy                                 of the student, one a token, 0 where `trained` is 0
    teacher_logprobs, teacher_entropy, divergence     where the response has a teacher
    rhythm, gate, bonus                               likewise, with exploration; bonus is the factor on the policy loss

Numbers are rounded to six decimals; what was not finite is null. A step that was repeated after an interruption is there
twice; the last one counts.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from torch import Tensor

from drift import files
from drift.config.online import OnlineConfig
from drift.track import plain
from drift.types import PackedBatch

VALUES = ("logprobs", "entropy", "teacher_logprobs", "teacher_entropy", "divergence", "rhythm", "gate", "bonus")
CONTEXT = 8  # ids before a token that are decoded with it: a piece may depend on its neighbours


def choose(step: int, config: OnlineConfig, kinds: Sequence[Hashable]) -> set[int]:
    """Places of the samples that are kept of a step, counted from 0, where kinds[i] says what sample i is an example of.

    `watch.examples` of all steps keep any, evenly spread, the last among them: up to `watch.responses` samples, of each
    kind in turn, in the order in which kinds and samples come.
    """
    times = config.watch.examples
    if step + 1 not in {round((i + 1) * config.steps / times) for i in range(times)}:
        return set()
    by_kind: dict[Hashable, list[int]] = {}
    for place, kind in enumerate(kinds):
        by_kind.setdefault(kind, []).append(place)
    ranked = sorted((rank, places[0], place) for places in by_kind.values() for rank, place in enumerate(places))
    return {place for _, _, place in ranked[: config.watch.responses]}


def tokens_of(batch: PackedBatch, segment: int, values: Mapping[str, Tensor], tokenizer: Any) -> dict[str, Any]:
    """The per-token part of a row: a segment of a pack, with `values` [T] that are aligned with the pack's targets."""
    start, stop = (int(edge) for edge in batch.cu_seqlens[segment : segment + 2])
    trained = [0, *batch.response_mask[start : stop - 1].int().tolist()]  # row i is about token i + 1
    row: dict[str, Any] = {"tokens": pieces(tokenizer, batch.input_ids[start:stop].tolist()), "trained": trained}
    for name, value in values.items():
        numbers = [0.0, *value[start : stop - 1].tolist()]
        row[name] = [round(number, 6) if there else 0.0 for number, there in zip(numbers, trained)]
    return row


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text; joined, they are the text. A character cut over tokens is its last token's."""
    found, waiting = [], 0
    for place in range(len(ids)):
        first = max(place - waiting - CONTEXT, 0)
        before = tokenizer.decode(ids[first : place - waiting], skip_special_tokens=False)
        whole = tokenizer.decode(ids[first : place + 1], skip_special_tokens=False)
        if whole.endswith("\N{REPLACEMENT CHARACTER}") and waiting < 3 and place + 1 < len(ids):
            found.append("")
            waiting += 1
            continue
        found.append(
            whole[len(before) :] if whole.startswith(before) else tokenizer.decode(ids[place - waiting : place + 1])
        )
        waiting = 0
    return found


def append(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Adds rows to the file, which is made if absent; a last line that an interruption tore is cut off."""
    files.repair(Path(path))
    with closing(files.Lines(path)) as file:
        file.append("".join(json.dumps(plain(dict(row)), allow_nan=False) + "\n" for row in rows).encode("utf-8"))
