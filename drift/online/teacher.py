"""The teacher's weights (B5; SDPO, arXiv 2601.20802): an average of the policy's, a mix with the reference, or the policy's.

    >>> import torch
    >>> from drift.online.teacher import Teacher, TeacherConfig
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> teacher = Teacher(model.named_parameters(), TeacherConfig(weights="ema", rate=0.5))
    >>> with torch.no_grad():
    ...     before = model.weight.clone()
    ...     _ = model.weight.add_(1.0)
    >>> teacher.update(finite=True)
    >>> with teacher.weights():
    ...     torch.equal(model.weight, before + 0.5)
    True

All kinds are one: a float32 shadow, which follows the policy at `rate` (0: never), and of which `mix` is replaced by the
policy when it is put in place. Everything is elementwise, in one fused pass: sharded (DTensor) parameters work
as they are, each rank on its part.

For LoRA the adapters' *factors* are averaged, A and B each, not their product: the teacher is a LoRA of the same rank,
and close to the averaged product as long as the policy moves little within the average's memory of 1/rate steps.
The published trust region mixes *logits*: its shadow is the reference, and `logit_mix` says which share of the logits is
the policy's (`drift.online.branches` mixes them). `weight_mix`, a mix of weights, is ours. Buffers of the model (there are
none to train) are the policy's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from drift.config.online import TeacherConfig
from drift.training.sharding import full

__all__ = ["Teacher", "TeacherConfig"]


class Teacher:
    """Weights to score with, beside those of a policy that goes on training.

    parameters: (name, parameter) of the policy, those that are trained; a frozen base needs no shadow.
    masters: name → float32 tensor that a half-precision parameter is a rounding of (`MasterAdamW.masters`); the average
    follows these where they are given, and a parameter itself where they are not.
    Raises ValueError if a master's name or shape is not a parameter's.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, Tensor]],
        config: TeacherConfig,
        masters: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.config = config
        self._parameters = {name: p for name, p in parameters if p.requires_grad}
        self._sources = dict(self._parameters)
        for name, master in (masters or {}).items():
            if name not in self._parameters or master.shape != self._parameters[name].shape:
                raise ValueError(f"masters: {name!r} of shape {list(master.shape)} is not a trained parameter's")
            self._sources[name] = master
        self._mix = {"weight_mix": config.mix, "policy": 1.0}.get(config.weights, 0.0)
        self.logit_mix = config.mix if config.weights == "trust_region" else 0.0  # share of the policy's logits
        self._rate = config.rate if config.weights == "ema" else 0.0
        self._shadow: dict[str, Tensor] = {}
        if self._mix < 1:
            self._shadow = {name: s.detach().to(torch.float32, copy=True) for name, s in self._sources.items()}
        self._updates = self._skipped = 0

    @torch.no_grad()
    def update(self, finite: bool) -> None:
        """Follows the policy, once a rollout step; not after a step that was skipped since it was not finite."""
        if not finite:
            self._skipped += 1
            return
        self._updates += 1
        if self._rate:
            torch._foreach_lerp_(list(self._shadow.values()), _float(self._sources.values()), self._rate)

    @contextmanager
    def weights(self) -> Iterator[None]:
        """Inside, the policy's parameters hold the teacher's values; after it their own, to the bit.

        Score inside, under no_grad or inference_mode; an optimizer step or a backward pass in here is an error of the
        caller's. Costs a copy of the trained parameters, in their own type, for as long as it lasts.
        """
        if not self._shadow:
            yield
            return
        parameters = list(self._parameters.values())
        with torch.no_grad():
            saved = [p.detach().clone() for p in parameters]
            teaching = list(self._shadow.values())
            if self._mix:
                teaching = [tensor.clone() for tensor in teaching]
                torch._foreach_lerp_(teaching, _float(self._sources.values()), self._mix)
            _copy(parameters, teaching)
        try:
            yield
        finally:
            with torch.no_grad():
                _copy(parameters, saved)

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """updates and skipped since the start; distance, the norm of (policy − shadow). Of shards, every rank calls this."""
        counts: dict[str, float] = {"updates": self._updates, "skipped": self._skipped}
        if not self._shadow:
            return counts
        gaps = [s.detach().float() - t for s, t in zip(self._sources.values(), self._shadow.values())]
        return {**counts, "distance": float(full(torch.nn.utils.get_total_norm(gaps)))}

    def state_dict(self) -> dict[str, Any]:
        """{"shadow": name → float32 tensor, "updates", "skipped"}; the tensors are the live ones."""
        return {"shadow": dict(self._shadow), "updates": self._updates, "skipped": self._skipped}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what `state_dict` gave. Raises ValueError if it belongs to other parameters or another kind."""
        shadow = state["shadow"]
        if shadow.keys() != self._shadow.keys():
            odd = sorted(shadow.keys() ^ self._shadow.keys())
            raise ValueError(f"teacher state: {len(odd)} names differ from this policy's, such as {odd[0]!r}")
        for name, tensor in self._shadow.items():
            tensor.copy_(shadow[name])
        self._updates, self._skipped = state["updates"], state["skipped"]


def _float(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [tensor.detach().float() for tensor in tensors]


def _copy(into: list[Tensor], values: list[Tensor]) -> None:
    for target, value in zip(into, values):
        target.copy_(value)
