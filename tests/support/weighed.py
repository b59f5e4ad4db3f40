"""Bytes that a training holds and receives, read off its tensors and its collectives, to compare `bench.scale` with."""

from contextlib import contextmanager

import torch
import torch.distributed as dist
from peft import LoraConfig
from tiny_policy import LORA, SHAPE, Policy, config
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.models.qwen2 import Qwen2Config

from bench.scale import Plan, plan
from drift.config import parse
from drift.training import sharding, trainer
from drift.types import Trajectory, Turn

UNTIED = {**SHAPE, "num_hidden_layers": 3, "tie_word_embeddings": False}  # 23 tokens: shares are uneven
JOBS = {"float32": ("float32", None), "bfloat16": ("bfloat16", None), "lora": ("bfloat16", LORA)}
LENGTH = 20  # of a trajectory, and of a pack
COLLECTIVES = ("all_gather_single", "all_gather_into_tensor", "reduce_scatter_single", "reduce_scatter_tensor")


def computed(folder, name, ranks, packs, shard) -> Plan:
    """By `bench.scale`, from a folder with a config.json."""
    dtype, lora = JOBS[name]
    Qwen2Config(**UNTIED).save_pretrained(folder)
    adapters = {"rank": lora["r"], "alpha": lora["lora_alpha"]} if lora else None
    model = {"path": str(folder), "dtype": dtype, "lora": adapters}
    train = {"batch_size": packs * ranks, "max_tokens": LENGTH, "max_length": LENGTH, "shard": shard}
    return plan(parse({"name": "t", "model": model, "train": train, "rollout": {"max_new_tokens": 8}}), ranks)


def measured(name, packs, shard):
    """What this rank holds and receives in a step of so many packs: the second, since the first looks at the head too."""
    dtype, lora = JOBS[name]
    policy = Policy(Qwen2Config(**UNTIED), getattr(torch, dtype), LoraConfig(**lora) if lora else None)
    count, found = packs * (dist.get_world_size() if dist.is_initialized() else 1), {}
    rows = [Trajectory(f"p{i}", [3 + i] * LENGTH, [Turn(8, LENGTH)], weight=1.0, index=i) for i in range(count)]
    settings = config(batch_size=count, max_tokens=LENGTH, shard=shard, tree="off", epochs=2.0)
    with weighing(found, policy):
        trainer.train(policy, rows, settings, seed=0)
    return found


@contextmanager
def weighing(found, policy):
    """Inside, a training's step leaves its bytes in `found`."""
    accumulate, update, fully_shard = trainer.accumulate, trainer.update, sharding.fully_shard

    layers_of, roots = sharding.layers_of, []

    def layers(root):
        roots.append(root)
        return layers_of(root)

    def spread(unit, **options):
        found["before"] = max(found.get("before", 0), held((*roots[-1].parameters(), *policy.model.parameters())))
        return fully_shard(unit, **options)

    def counted(policy, packs, optimizer, *args):
        hidden, units = policy.hidden, [m for m in policy.model.modules() if isinstance(m, FSDPModule)]

        def before_a_pack(batch):
            found["gradients before the last pack"] = held(_unsharded_gradients(units))
            return hidden(batch)

        policy.hidden = before_a_pack
        with Received() as received:
            loss = accumulate(policy, packs, optimizer, *args)
        for unit in units:
            unit.reshard()
        found["received"], found["weights"] = received.bytes, held(policy.model.parameters())
        return loss

    def weighed(optimizer, *args):
        pairs = zip(optimizer.trained.values(), optimizer.masters.values())
        found["masters"] = held(master for parameter, master in pairs if master is not parameter)
        found["gradients"] = held(master.grad for master in optimizer.masters.values())
        result = update(optimizer, *args)
        states = optimizer._adamw.state.values()
        found["moments"] = sum(local(one[key]).nbytes for one in states for key in ("exp_avg", "exp_avg_sq"))
        found["checkpoint"] = found["moments"] + sum(local(m).nbytes for m in optimizer.masters.values())
        return result

    trainer.accumulate, trainer.update, sharding.fully_shard = counted, weighed, spread
    sharding.layers_of = layers
    try:
        yield
    finally:
        trainer.accumulate, trainer.update, sharding.fully_shard = accumulate, update, fully_shard
        sharding.layers_of = layers_of


def _unsharded_gradients(units):
    for unit in units:
        for part in unit._get_fsdp_state()._fsdp_param_group.fsdp_params:
            yield part.unsharded_accumulated_grad
            yield part._unsharded_param.grad if hasattr(part, "_unsharded_param") else None


def local(tensor):
    """This rank's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def held(tensors):
    """Bytes of the storages, each once."""
    parts = [local(tensor) for tensor in tensors if tensor is not None]
    return sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in parts}.values())


class Received:
    """Bytes from other ranks in FSDP's collectives, under the names that versions of torch give them."""

    def __init__(self):
        self.bytes, self.inside = 0, False
        self.plain = {name: getattr(dist, name) for name in COLLECTIVES if hasattr(dist, name)}

    def __enter__(self):
        for name, function in self.plain.items():
            setattr(dist, name, self._counted(function, "gather" in name))
        return self

    def __exit__(self, *_):
        for name, function in self.plain.items():
            setattr(dist, name, function)

    def _counted(self, function, gathers):
        def call(*args, **options):
            whole, n = (
                options.get("output_tensor", options.get("output", args[0] if args else None)),
                dist.get_world_size(),
            )
            if not self.inside:
                self.bytes += whole.nbytes * (n - 1) // n if gathers else whole.nbytes * (n - 1)
            self.inside, before = True, self.inside
            try:
                return function(*args, **options)
            finally:
                self.inside = before

        return call
