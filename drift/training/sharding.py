"""A model spread over the ranks while it is trained: torch's FSDP2 (`fully_shard`), a decoder layer at a time.

Each rank holds 1/n of the parameters, gradients and moments, in float32, and the layer that is at work as a whole, in the
model's own type. Gradients are summed in float32, once a step. What the loss reads of the head is its whole weight,
gathered by FSDP with the embeddings and the final norm; or with `shard_head` each rank's share of it, the rows that count
being gathered instead (`drift_kernels.GatherHidden`).

A collective in every layer means that all ranks go through the model equally often: one with fewer packs than another,
or none, makes up for it with packs that no loss reads (`rounds`).

The policy itself is empty meanwhile: a unit at a time, its parameters give their memory to the shards. `fill` lends it the
present weights, whole, on every rank, gathered one parameter at a time: from that an engine samples, and `empty` takes them
back. After the training it holds the new weights. So every rank has to be able to hold the policy in its own type, without
gradients and moments, for as long as it samples. A hollow policy (`drift.model.hollow`) has no weights to begin with: each unit
reads its own from files, and `drift.training.saving` writes them.

Weights that stand in for others (a teacher's, a reference's) are shards too: they are copied into the shards inside of
`settled`, which lets go of everything that was gathered from those before.

Left out: adapters on the head; buffers that train.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

import drift_kernels
from drift.packing import pack
from drift.training import distributed, layout
from drift.types import PackedBatch, Trajectory, TreeBatch, Turn


@contextmanager
def sharded(policy: Any, shard: str, shard_head: bool = False) -> Iterator[Any]:
    """The policy to train: itself with `shard` "none", or on a single rank; with "fsdp" one that is spread over the ranks.

    Every rank enters, with rank 0's weights. Afterwards `policy` holds what was trained; after an error it holds NaN.
    With `shard_head` its head is a `GatherHidden`. Raises ValueError when the model does not say which of its modules are its
    layers, or if its head cannot be sharded alone. A policy that is spread already is yielded as it is. One that is hollow
    (`drift.model.hollow`) stays empty: `save` writes what was trained, inside of this.
    """
    if shard == "none" or distributed.world_size() == 1 or is_sharded(policy.model):
        yield policy
        return
    hollow = getattr(policy, "source", None) is not None
    if hollow and shard_head:
        raise ValueError("train.shard_head must be false for a model whose weights are read as shards")
    if not hollow:
        policy.check_packing()  # a forward pass of whole weights
    distributed.broadcast([p for p in policy.model.parameters() if p.requires_grad and p.numel()])
    spread, head = copy.copy(policy), policy.head() if shard_head else None
    spread.lent = Lent(policy.model, policy.source if hollow else None)
    spread.model = spread.lent.spread(shard_head)
    spread.named_weights = spread.lent.named_weights
    if head is not None:
        spread.head = _head_by_rows(spread.model.get_output_embeddings(), head)
    with settled(spread.model):
        if hollow:
            spread.check_packing()
        layout.unsuited(spread)  # all ranks try it here: later each decides by its own share
    del head
    trained = False
    try:
        yield spread
        trained = True
    finally:
        spread.lent.fill(trained)


class Lent:
    """The parameters of a model that is trained as shards: empty, unless they are filled.

    weights: the files of a hollow model, which is never filled.
    """

    def __init__(self, model: Any, weights: Any = None) -> None:
        self.model, self.weights, self.whole = model, weights, list(model.parameters())
        self.dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        self.shapes = [parameter.shape for parameter in self.whole]
        self.shards: Any = None

    def spread(self, shard_head: bool) -> Any:
        """A model of the same weights in shards; this one is empty afterwards."""
        model: Any = copy.deepcopy(self.model, {id(p): _placeholder(p) for p in self.whole})
        whole = {id(p): (name, w) for (name, p), w in zip(model.named_parameters(), self.whole, strict=True)}

        def fetch(unit: torch.nn.Module) -> None:
            for parameter in unit.parameters():
                if (found := whole.pop(id(parameter), None)) is not None:
                    name, source = found
                    values = source.detach() if source.numel() else self._read(name, source)
                    parameter.data = values.to(torch.float32 if parameter.requires_grad else source.dtype)
                    source.data = source.new_empty(0)

        _spread(model, self.whole[0].dtype, fetch, _own_head(model) if shard_head else None)
        self.shards = model
        return model

    def _read(self, name: str, like: torch.Tensor) -> torch.Tensor:
        name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")  # of peft
        return self.weights.read(name).to(like.device, like.dtype)

    def named_weights(self, trained: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        """`Policy.named_weights`, gathered one at a time, in the policy's own type."""
        reshard(self.shards)
        for name, parameter in sorted(self.shards.named_parameters(), key=lambda pair: pair[0]):
            if parameter.requires_grad or not trained:
                yield name, full(parameter.detach().to(self.dtypes[name]))

    def empty(self) -> None:
        """Gives the memory back."""
        for parameter in self.whole:
            parameter.data = parameter.new_empty(0)

    @torch.no_grad()
    def fill(self, known: bool = True) -> None:
        """Takes the shards' present weights, or NaN if those are not `known`; every rank calls this, if they are."""
        if self.weights is not None:
            return
        if not known:
            for parameter, shape in zip(self.whole, self.shapes):
                parameter.data = parameter.new_full(shape, float("nan"))
            return
        reshard(self.shards)
        for parameter, part in zip(self.whole, self.shards.parameters(), strict=True):
            parameter.data = full(part.detach().to(parameter.dtype))


def fill(policy: Any) -> None:
    """The model that `policy` was spread from holds its weights until `empty`; of one that is not spread they are its own."""
    if hasattr(policy, "lent"):
        policy.lent.fill()


def empty(policy: Any) -> None:
    """The model that `policy` was spread from holds nothing."""
    if hasattr(policy, "lent"):
        policy.lent.empty()


def dtype_of(policy: Any) -> torch.dtype:
    """The type that the policy computes in, which is not that of its shards."""
    if hasattr(policy, "lent"):
        return next(iter(policy.lent.dtypes.values()))
    return policy.causal_lm.get_input_embeddings().weight.dtype


def rounds(
    model: torch.nn.Module, packs: Sequence[PackedBatch | TreeBatch], *, gradients: bool = True
) -> Iterator[PackedBatch | TreeBatch]:
    """The packs, and on ranks that have fewer of them than others as many idle ones (`is_idle`), each for one pass.

    With `gradients` every pass has a backward, and gradients meet after the last.
    """
    if not is_sharded(model):
        yield from packs
        return
    most = int(max(distributed.gather([len(packs)])))
    head: Any = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    gathered = [
        unit for unit in _units(model) if unit is not head
    ]  # with shard_head: its gradient is of the share itself
    for number, batch in enumerate([*packs, *[_idle()] * (most - len(packs))], 1):
        for unit in gathered if gradients else ():
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


def is_idle(batch: PackedBatch | TreeBatch) -> bool:
    """Whether no loss reads the batch: it is one that `rounds` made up."""
    return not batch.indices


@contextmanager
def settled(model: torch.nn.Module) -> Iterator[None]:
    """Around passes without a backward: what they gather is of the shards as these are now, and is let go of at the end."""
    reshard(model)
    try:
        yield
    finally:
        reshard(model)


def reshard(model: Any) -> None:
    """Lets go of what layers have gathered: the model's parameters are its shards, if it has any."""
    for unit in _units(model):
        unit.reshard()


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether the model is spread over the ranks."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor, on every rank; every rank calls this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """`tensor`, whole on every rank or spread already, spread as `other` is; every rank calls this."""
    if not isinstance(other, DTensor) or isinstance(tensor, DTensor):
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


def _placeholder(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    return torch.nn.Parameter(parameter.detach().new_empty(0), parameter.requires_grad)


def _spread(model: Any, dtype: torch.dtype, fetch: Callable[[Any], None], head: torch.nn.Module | None = None) -> None:
    """Shards the model in place; its method `drift_backbone` gathers what lies outside the layers, but not `head`.

    fetch: gives the parameters of a module their values, unless they have them; called before that module is cut in pieces.
    """
    root = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = layers_of(root)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (distributed.world_size(),), mesh_dim_names=("data",))
    mixed = MixedPrecisionPolicy(param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32)
    for unit in [*layers, *([] if head is None else [head]), root]:
        fetch(unit)
        fully_shard(unit, mesh=mesh, mp_policy=mixed)
    for unit in _units(model):  # each by itself: on the root alone, the layers' gradients stay means, without a word
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # gloo has neither averages nor scaled sums

    def backbone(self: Any, **inputs: Any) -> torch.Tensor:
        return self.base_model(**inputs).last_hidden_state

    root.drift_backbone = types.MethodType(backbone, root)
    register_fsdp_forward_method(root, "drift_backbone")


def _units(model: torch.nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _idle() -> PackedBatch:
    """Two tokens that no loss reads."""
    [batch] = pack([Trajectory("", [0, 0], [Turn(1, 2)])], 2)
    return replace(batch, token_weights=torch.zeros_like(batch.token_weights), active=batch.active[:0], indices=[])
