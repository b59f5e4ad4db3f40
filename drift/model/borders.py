"""How a policy's backbone is told where the trajectories of a pack begin: checked once a model, before its first step.

Attention obeys `segments`. Layers with a state of their own (linear attention, state space, convolution) take the borders
as arguments, or do not know them: then a pack would train a trajectory on what its neighbour says, and is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from drift.model.attention import register, segments
from drift_kernels.packs import Layout, PackingError, border_arguments, check_packing


def run_packed(causal_lm: Any, ids: torch.Tensor, positions: torch.Tensor, bounds: torch.Tensor, borders: bool) -> Any:
    """Hidden states [T, D] of a pack. ids, positions: [T]; bounds: [S + 1] int32; borders: as arguments of layers too."""
    with segments(bounds):
        hidden = backbone(
            causal_lm,
            input_ids=ids[None],
            position_ids=positions[None],
            attention_mask=None,
            use_cache=False,
            **(border_arguments(bounds) if borders else {}),
        )
    return hidden[0]


def backbone(causal_lm: Any, **inputs: Any) -> torch.Tensor:
    """Hidden states [B, L, D] below the head. A model that is spread over ranks gathers its weights in a method of its own."""
    if hasattr(causal_lm, "drift_backbone"):
        return causal_lm.drift_backbone(**inputs)
    return causal_lm.base_model(**inputs).last_hidden_state


def run_alone(causal_lm: Any, ids: torch.Tensor, positions: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """The same, one sequence after the other: right for every model, and slower."""
    lengths = bounds.diff().tolist()
    pieces = [
        run_packed(causal_lm, i, p, torch.tensor([0, len(i)], dtype=torch.int32, device=ids.device), False)
        for i, p in zip(ids.split(lengths), positions.split(lengths))
    ]
    return torch.cat(pieces)


def needs_borders(causal_lm: Any) -> bool:
    """`check_packing` of a model under drift's attention. Raises PackingError, with the setting that helps."""

    def forward(layout: Layout, borders: dict[str, Any]) -> torch.Tensor:
        device = next(causal_lm.parameters()).device
        ids, positions, bounds = (x.to(device) for x in (layout.tokens, layout.positions, layout.bounds))
        return run_packed(causal_lm, ids, positions, bounds, bool(borders))

    try:
        with _float32_attention(causal_lm):
            return check_packing(causal_lm, forward=forward)
    except PackingError as error:
        raise PackingError(
            f"{error}. model.packed=false trains any model right: each trajectory runs by itself, which is slower"
        ) from None


@contextmanager
def _float32_attention(model: Any) -> Iterator[None]:
    """Inside, attention that takes half types alone gives way to the one that takes all."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(getattr(m, "config", None), "model_type")}
    varlen = [c for c in configs.values() if getattr(c, "_attn_implementation", None) == "drift_varlen"]
    other = register("sdpa") if varlen else ""
    try:
        for config in varlen:
            config._attn_implementation = other
        yield
    finally:
        for config in varlen:
            config._attn_implementation = "drift_varlen"
