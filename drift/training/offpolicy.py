"""Rows that another policy sampled, corrected for: a sum of log-prob ratios per trajectory (A1, **ours**).

Weighted fine-tuning is towards π_ref·exp(R/β), from samples of the reference. A sample of μ counts exp(log π_ref − log μ)
times as much, over all sampled tokens of the trajectory; the sum is clipped, and the share that was clipped is logged.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from drift import returns, store
from drift.config import TrainConfig
from drift.model import chat
from drift.model.policy import Policy
from drift.training import layout
from drift.training.reference import score_pack


def log_ratios(
    policy: Policy, rows: Sequence[store.Row], clip: float, *, max_tokens: int = 8192
) -> tuple[list[float], dict[str, float]]:
    """log π_ref − log μ of each row, within ±clip, with `policy` as the reference; for `drift.returns.weigh`.

    0 for rows that this very policy sampled, or without a policy's name. Both are log-probs at the row's temperature.
    max_tokens: of a pack that is scored at once. Also returns metrics of the other rows. Raises StoreError for
    one of them without the sampler's log-probs.
    """
    own = policy.hash()
    foreign = [index for index, row in enumerate(rows) if row.get("policy_hash", own) != own]
    samples = [[rows[index], *rows[index].get("earlier_turns", [])] for index in foreign]
    for index, parts in zip(foreign, samples):
        if any("logprobs" not in part for part in parts):
            where = f"prompt_id {rows[index]['prompt_id']!r}, traj_idx {rows[index].get('traj_idx')}"
            raise store.StoreError(
                f"{where} has no logprobs, so how likely its sampler was to say it is unknown; leave the row out"
            )
    ours = _score(policy, rows, foreign, max_tokens)
    theirs = [sum(sum(part["logprobs"]) for part in parts) for parts in samples]
    clipped, stats = returns.offpolicy_correction([ours[index] for index in foreign], theirs, clip)
    tokens = sum(sum(part["loss_mask"]) for parts in samples for part in parts)
    stats["offpolicy_gap"] = sum(abs(mu - ours[i]) for i, mu in zip(foreign, theirs)) / max(tokens, 1)
    found = dict(zip(foreign, clipped))
    return [found.get(i, 0.0) for i in range(len(rows))], {**stats, "offpolicy_share": len(foreign) / len(rows)}


def _score(policy: Policy, rows: Sequence[store.Row], chosen: Sequence[int], max_tokens: int) -> dict[int, float]:
    """Row number → Σ log π over its sampled tokens."""
    total = dict.fromkeys(chosen, 0.0)
    parts = [part for i in chosen for part in chat.to_trajectories(policy, rows[i], index=i, turns="assistant")]
    longest = max((len(part.token_ids) for part in parts), default=0)
    room = max(max_tokens, longest, 2)
    for batch in layout.packs(policy, parts, TrainConfig(max_tokens=room, max_length=room), turns="assistant"):
        temperatures = torch.tensor([float(rows[index].get("temperature", 1.0)) for index in batch.indices])
        logprobs = _logprobs(policy, batch.to(policy.device), temperatures)
        for index, piece in zip(batch.indices, logprobs.split(layout.end_to_end(batch).cu_seqlens.diff().tolist())):
            total[index] += float(piece.double().sum())
    return total


def _logprobs(policy: Policy, batch: layout.Batch, temperatures: torch.Tensor) -> torch.Tensor:
    """[T] float32 on the CPU, 0 outside the turns; temperatures [S], one a segment."""
    flat = layout.end_to_end(batch)
    spread = temperatures.to(policy.device).repeat_interleave(flat.cu_seqlens.diff().to(torch.int64))
    with policy.inference():
        return score_pack(policy, batch, spread).logprobs.where(flat.response_mask, 0.0).cpu()
