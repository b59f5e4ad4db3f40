"""How a batch is laid out: trajectories end to end, or as prefix trees (`train.tree`), and a trial of whether a model may.

A tree changes no number beyond rounding, as long as tokens mix by attention alone. Whether they do is tried, on the model
itself: a layer that mixes neighbours in another way (a convolution, a linear attention's state, experts with a capacity)
would let siblings see each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from drift.config import TrainConfig
from drift.packing import pack, tree
from drift.types import PackedBatch, Trajectory, TreeBatch, Turn

LEAST = 0.05  # share of the tokens that a tree has to save to be taken by `auto`
Batch = PackedBatch | TreeBatch
_tried: WeakKeyDictionary[Any, str | None] = WeakKeyDictionary()  # model → why it may not


class Backbone(Protocol):
    """What runs a batch; `drift.model.policy.Policy` is one."""

    model: Any

    def hidden(self, batch: PackedBatch | TreeBatch) -> Tensor: ...  # [T, D] or [R, D]


def packs(policy: Backbone, trajectories: Sequence[Trajectory], config: TrainConfig, **options: Any) -> Sequence[Batch]:
    """Packs of the trajectories, by `config.tree`; options are those of `drift.packing.pack`.

    auto takes trees if they save 5 % of the tokens and the model may. Raises ValueError with the reason if `on` and it may
    not, and as `pack` does.
    """
    options = {"max_length": config.longest, **options}
    if config.tree == "on" and (reason := unsuited(policy)):
        raise ValueError(f"train.tree is on, but {reason}; set train.tree=off, or auto, which checks the model")
    if config.tree != "off":
        trees = tree(trajectories, config.max_tokens, **options)
        if config.tree == "on" or (saved(trees) >= LEAST and unsuited(policy) is None):
            return trees
    return pack(trajectories, config.max_tokens, **options)


def saved(batches: Sequence[Batch]) -> float:
    """The share of the trajectories' tokens that need not go through the model."""
    whole = sum(len(end_to_end(batch).input_ids) for batch in batches)
    return 1 - sum(len(batch.input_ids) for batch in batches) / whole if whole else 0.0


def end_to_end(batch: Batch) -> PackedBatch:
    """The batch's trajectories one after another."""
    return batch.flat if isinstance(batch, TreeBatch) else batch


def hidden_states(policy: Backbone, batch: Batch) -> Tensor:
    """The hidden states [T, D] of `end_to_end(batch)`; of a tree each shared row is computed once, and gathered."""
    hidden = policy.hidden(batch)
    return hidden[batch.flat_rows] if isinstance(batch, TreeBatch) else hidden


def unsuited(policy: Backbone) -> str | None:
    """Why this model may not be trained on trees, or None. The trial costs eight tokens, once a model."""
    if policy.model not in _tried:
        _tried[policy.model] = _try(policy)
    return _tried[policy.model]


def _try(policy: Backbone) -> str | None:
    model = policy.model
    named = model.config.get_text_config().to_dict() if hasattr(model, "config") else {}
    rates = [name for name, value in named.items() if "drop" in name and isinstance(value, (int, float)) and value]
    modules = any(module.p for module in model.modules() if isinstance(module, torch.nn.Dropout))
    if rates or modules:
        names = ", ".join(rates) or "of a module, such as lora_dropout"
        return f"the model has dropout ({names}): siblings would share what is dropped"
    device, kind = next(model.parameters()).device, type(model).__name__
    ids = [[1, 2, 3, 1], [1, 2, 3, 2], [1, 2, 2]]
    sequences = [Trajectory("", row, [Turn(1, len(row))], index=i) for i, row in enumerate(ids)]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            [shared] = tree(sequences, 16)
            ours = hidden_states(policy, shared.to(device)).float()
            alone = torch.cat([policy.hidden(pack([s], 16)[0].to(device)).float() for s in sequences])
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError) as error:
        return f"{kind} does not run on one ({error})"
    finally:
        model.train(training)
    limit = 1e-3 if next(model.parameters()).dtype in (torch.float32, torch.float64) else 0.1
    apart = float((ours - alone).abs().max() / alone.abs().max().clamp(min=1e-6))
    if not apart <= limit:
        return f"{kind} mixes tokens by more than attention (hidden states differ by {apart:.1e})"
    return None
