"""A model spread over the ranks while it is trained: torch's FSDP2 (`fully_shard`), a decoder layer at a time.

Each rank holds 1/n of the parameters, gradients and moments, in float32, and the layer that is at work as a whole, in the
model's own type. Gradients are summed in float32, once a step. What the loss reads of the head is its whole weight,
gathered by FSDP with the embeddings and the final norm; or with `shard_head` each rank's share of it, the rows that count
being gathered instead (`drift_kernels.GatherHidden`).

A collective in every layer means that all ranks go through the model equally often: one with fewer packs than another,
or none, makes up for it with packs that no loss reads (`rounds`).

The policy itself is empty meanwhile. After the training it holds the new weights, whole, on every rank: that is what samples
and is evaluated, so every rank has to be able to hold it in its own type, without gradients and moments.

Left out: models that not one rank can hold at all, which need loading by shards; adapters on the head; buffers that train.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

import drift_kernels
from drift.packing import pack
from drift.training import distributed
from drift.types import PackedBatch, Trajectory, TreeBatch, Turn


@contextmanager
def sharded(policy: Any, shard: str, shard_head: bool = False) -> Iterator[Any]:
    """The policy to train: itself with `shard` "none", or on a single rank; with "fsdp" one that is spread over the ranks.

    Every rank enters, with rank 0's weights. Afterwards `policy` holds what was trained; after an error it holds NaN.
    With `shard_head` its head is a `GatherHidden`. Raises ValueError when the model does not say which of its modules are its
    layers, or if its head cannot be sharded alone.
    """
    if shard == "none" or distributed.world_size() == 1:
        yield policy
        return
    policy.check_packing()  # a forward pass of whole weights
    distributed.broadcast([p for p in policy.model.parameters() if p.requires_grad])
    spread = copy.copy(policy)
    shared = {id(p): torch.nn.Parameter(p.detach(), p.requires_grad) for p in policy.model.parameters()}
    model = copy.deepcopy(policy.model, shared)  # modules of its own around the policy's weights
    alone = _own_head(model) if shard_head else None
    if alone is not None:
        spread.head = _head_by_rows(alone, policy.head())
    spread.model = _spread(model, alone)
    whole = list(policy.model.parameters())
    sizes = [parameter.untyped_storage().size() for parameter in whole]
    for parameter in whole:
        parameter.untyped_storage().resize_(0)
    trained = False
    try:
        yield spread
        trained = True
    finally:
        for parameter, size in zip(whole, sizes):
            parameter.untyped_storage().resize_(size)
        with torch.no_grad():
            for parameter, part in zip(whole, _parts(spread.model)):
                parameter.copy_(full(part)) if trained else parameter.fill_(float("nan"))


def rounds(model: torch.nn.Module, packs: Sequence[PackedBatch | TreeBatch]) -> Iterator[PackedBatch | TreeBatch]:
    """The packs, and on ranks that have fewer of them than others as many idle ones; gradients meet after the last."""
    if not _is_sharded(model):
        yield from packs
        return
    most = int(max(distributed.gather([len(packs)])))
    for number, batch in enumerate([*packs, *[_idle()] * (most - len(packs))], 1):
        for unit in _units(model):
            unit.set_requires_gradient_sync(number == most, recurse=False)
        yield batch


def layers_of(root: Any) -> list[torch.nn.Module]:
    """The decoder layers of a model that is no wrapper. Raises ValueError when it does not name their class."""
    names = getattr(root, "_no_split_modules", None) or ()
    layers = [module for module in root.modules() if type(module).__name__ in names]
    if not layers:
        raise ValueError(
            f"train.shard 'fsdp': {type(root).__name__} does not name its layers (_no_split_modules), so that it cannot be "
            "spread over the ranks; it must be 'none' for this model"
        )
    return layers


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor, on every rank; every rank calls this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """`tensor`, which every rank holds, spread as `other` is; every rank calls this."""
    if not isinstance(other, DTensor):
        return tensor
    spread = DTensor.from_local(tensor.to(other.device), other.device_mesh, run_check=False)
    return spread.redistribute(other.device_mesh, other.placements)


def local_bytes(tensors: Iterator[torch.Tensor]) -> int:
    """Bytes of the tensors that this rank holds."""
    parts = (t.to_local() if isinstance(t, DTensor) else t for t in tensors)
    return sum(part.untyped_storage().size() for part in parts)


def _own_head(model: Any) -> torch.nn.Module:
    """The module of lm_head. Raises ValueError if its weight is the embeddings' too, or has an adapter."""
    module, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    reason = None
    if hasattr(module, "base_layer"):
        reason = "lm_head has an adapter"
    elif module.weight is embeddings.weight:
        reason = "lm_head is tied to the embeddings, which every token reads whole"
    if reason:
        raise ValueError(f"train.shard_head must be false for this model: {reason}")
    return module


def _head_by_rows(module: Any, whole: drift_kernels.Head) -> Any:
    """A policy's `head`: this rank's share of a sharded lm_head, in the type of `whole`, with its softcap and scale."""
    dtype, softcap, scale = whole.weight.dtype, whole.softcap, whole.logit_scale

    def own(tensor: Any) -> torch.Tensor | None:
        return None if tensor is None else tensor.to_local().to(dtype)

    def head(temperature: float | torch.Tensor = 1.0) -> drift_kernels.Head:
        parallel = drift_kernels.GatherHidden.of(module.weight)
        weight, bias = own(module.weight), own(module.bias)
        assert weight is not None
        return drift_kernels.Head(weight, bias, None, softcap, scale, temperature, parallel)

    return head


def _spread(model: Any, head: torch.nn.Module | None = None) -> Any:
    """Shards the model in place; its method `drift_backbone` gathers what lies outside the layers, but not `head`."""
    dtype = next(model.parameters()).dtype
    root = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = layers_of(root)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (distributed.world_size(),), mesh_dim_names=("data",))
    mixed = MixedPrecisionPolicy(param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32)
    for unit in [*layers, *([] if head is None else [head]), root]:  # one is whole in float32 at a time
        for parameter in unit.parameters():
            if parameter.requires_grad and not isinstance(parameter, DTensor):
                parameter.data = parameter.data.float()
        fully_shard(unit, mesh=mesh, mp_policy=mixed)
    for unit in _units(model):  # each by itself: on the root alone, the layers' gradients stay means, without a word
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # gloo has neither averages nor scaled sums

    def backbone(self: Any, **inputs: Any) -> torch.Tensor:
        return self.base_model(**inputs).last_hidden_state

    root.drift_backbone = types.MethodType(backbone, root)
    register_fsdp_forward_method(root, "drift_backbone")
    return model


def _units(model: torch.nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _is_sharded(model: torch.nn.Module) -> bool:
    return any(isinstance(module, FSDPModule) for module in model.modules())


def _parts(model: torch.nn.Module) -> list[torch.Tensor]:
    """The shards, after layers that are still whole have let go of what they gathered."""
    for unit in _units(model):
        unit.reshard()
    return list(model.parameters())


def _idle() -> PackedBatch:
    """Two tokens that no loss reads."""
    [batch] = pack([Trajectory("", [0, 0], [Turn(1, 2)])], 2)
    return replace(batch, token_weights=torch.zeros_like(batch.token_weights), active=batch.active[:0], indices=[])
