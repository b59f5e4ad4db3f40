"""Heads whose vocabulary is spread over ranks: `Head(weight, parallel=…)`, the weight being this rank's share of the rows.

`VocabParallel`  every rank has the same hidden rows (tensor parallel). Per row and rank 24 bytes of statistics are gathered;
                 dhidden is summed over the ranks.
`GatherHidden`   each rank has hidden rows of its own (data parallel, with a head sharded as FSDP does). The rows that count
                 are gathered with their per-token inputs, the weight never is; each rank gets the sum over ranks of its
                 rows' gradients, and the weight's gradient is complete on the rank that owns it.

Bias and LoRA's B are shares like the weight; LoRA's A is whole on every rank. All ranks make the same calls in the same order,
and scale their losses by the same number in backward. Teachers are spread as the student is. On backend "cpu" alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from torch import Tensor

from drift_kernels.calls import Share
from drift_kernels.tensors import is_dtensor

Kind = TypeVar("Kind", bound="_Spread")


@dataclass(frozen=True)
class _Spread:
    """This rank holds tokens first … first + rows of the weight, out of `vocabulary`. Shares may differ in size.

    `group` is a process group, a mesh of one dimension, or a process group's name. Raises TypeError or ValueError.
    """

    group: Any
    first: int
    vocabulary: int
    share: Share = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        group = self.group.get_group() if hasattr(self.group, "get_group") else self.group
        name = getattr(group, "group_name", group)
        if not isinstance(name, str):
            raise TypeError(
                f"group is a {type(group).__name__}; it must be a process group, a 1-d DeviceMesh or a name"
            )
        for what in ("first", "vocabulary"):
            value = getattr(self, what)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{what}={value!r} must be a whole number")
        if not 0 <= self.first < self.vocabulary:
            raise ValueError(f"first={self.first} must lie in [0, vocabulary={self.vocabulary})")
        object.__setattr__(self, "group", name)
        object.__setattr__(self, "share", Share(name, self.first, self.vocabulary, isinstance(self, GatherHidden)))

    def check_rows(self, rows: int) -> None:
        """Raises ValueError unless a weight of so many rows can be this share."""
        if not 1 <= rows <= self.vocabulary - self.first:
            raise ValueError(
                f"weight has {rows} rows from token first={self.first} on; it must have 1 … "
                f"{self.vocabulary - self.first}, since the vocabulary has {self.vocabulary}"
            )

    @classmethod
    def of(cls: type[Kind], weight: Tensor) -> Kind:
        """Read off a DTensor sharded by its rows, as `fully_shard` and `parallelize_module` make them; pass its `to_local()`.

        Raises TypeError for another tensor, NotImplementedError for other placements.
        """
        if not is_dtensor(weight):
            raise TypeError(
                f"weight is a {type(weight).__name__}; it must be a DTensor, or say group, first, vocabulary"
            )
        mesh, placements = weight.device_mesh, weight.placements  # pyright: ignore[reportAttributeAccessIssue]
        shards = [i for i, p in enumerate(placements) if p.is_shard()]
        if len(shards) != 1 or type(placements[shards[0]]).__name__ != "Shard" or placements[shards[0]].dim != 0:
            raise NotImplementedError(
                f"placements={placements} of weight: one of them must be Shard(0), no other a shard"
            )
        size = -(-weight.shape[0] // mesh.size(shards[0]))  # as torch.chunk cuts
        first = min(size * mesh.get_local_rank(shards[0]), weight.shape[0] - 1)
        return cls(mesh.get_group(shards[0]), first, weight.shape[0])


class VocabParallel(_Spread):
    """Every rank has the same hidden rows and its share of the vocabulary. Losses, outputs and metrics are the same on all."""


class GatherHidden(_Spread):
    """Each rank has its own hidden rows and its share of the vocabulary. Losses, outputs and metrics are of the own rows.

    Gradients are those of the sum of all ranks' losses, so `normalizer` should be the global denominator. A gradient of LoRA's A
    is one rank's summand: they add up over the ranks, as those of any parameter that every rank holds.
    """


def as_share_of(share: Share, first: int) -> Share:
    """The share with another first token; with 0 it is the same text on every rank."""
    return replace(share, first=first)
