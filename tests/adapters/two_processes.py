"""Run by `torchrun` from test_trl_processes.py: trains, and saves the weights and logs of rank 0."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

import tiny
import torch
import torch.distributed as dist
import trl
from test_transformers import Rows, pad
from test_trl_sft import SGD, common, weighted
from test_trl_swap import grpo as grpo_trainer
from transformers import Trainer, TrainingArguments

from drift_kernels.adapters import transformers as fused
from drift_kernels.adapters import trl as adapter
from drift_kernels.adapters.trl import DriftGRPOTrainer, DriftSFTTrainer

OWN = ("per_device_train_batch_size", "shuffle_dataset")


def sft(path: str, size: int):
    """Weighted SFT over rows of its own."""
    args = trl.SFTConfig(**common(path, **SGD | {"per_device_train_batch_size": size, "max_length": 32}))
    data = weighted(per_token=True)
    return DriftSFTTrainer(
        tiny.model(), args, train_dataset=data, processing_class=tiny.tokenizer(), normalize="samples"
    )


def plain_sft(path: str, size: int, way: str):
    """SFT as TRL does it: without drift, with `enable()`, or by our trainer with weights of 1."""
    if way == "enable":
        adapter.enable()
    cls, more = (DriftSFTTrainer, {"normalize": "tokens"}) if way == "ours" else (trl.SFTTrainer, {})
    args = trl.SFTConfig(**common(path, **SGD | {"per_device_train_batch_size": size, "max_length": 32}))
    data = weighted().map(lambda row: {"weight": 1.0})
    return cls(tiny.model(), args, train_dataset=data, processing_class=tiny.tokenizer(), **more)


def grpo(path: str, size: int, way: str, loss_type: str):
    """GRPO likewise: sampled, rewarded, gone over twice in two micro-batches."""
    if way == "enable":
        adapter.enable()
    cls = DriftGRPOTrainer if way == "ours" else trl.GRPOTrainer
    settings = dict(num_iterations=2, max_steps=4, learning_rate=1e-2, gradient_accumulation_steps=2)
    return grpo_trainer(path, cls=cls, per_device_train_batch_size=size, loss_type=loss_type, **settings)


def trainer(path: str, size: int):
    """transformers' Trainer, the loss through compute_loss_func."""
    settings = {k: v for k, v in (common(path) | SGD).items() if k not in OWN}
    args = TrainingArguments(**settings, per_device_train_batch_size=size, remove_unused_columns=False)
    model = tiny.model(tied=True)
    loss = fused.compute_loss_func(model)
    collator = fused.WeightedCollator(pad)
    return Trainer(model, args, train_dataset=Rows(True), data_collator=collator, compute_loss_func=loss)


def sharded(path: str, size: int, head: str, through: str):
    """A model under FSDP2, by hand: each rank half the rows, gradients of the mean. The head a unit of its own, or the root's."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    world = int(os.environ.get("WORLD_SIZE", 1))
    model = fused.apply(tiny.model(tied=head == "tied").train())
    loss_of = fused.compute_loss_func(model) if through == "compute_loss_func" else None
    rows = pad(Rows(False).rows[:6])
    if world > 1:
        dist.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (world,))
        for module in [*model.model.layers, *([model.lm_head] if head == "alone" else [])]:
            fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh, reshard_after_forward=True if head == "resharded" else None)
        rows = {k: v[dist.get_rank() :: world] for k, v in rows.items()}
    for _ in range(2):  # gradients add up
        if loss_of is None:
            loss = model(**rows, num_items_in_batch=20).loss
        else:  # as Trainer calls them
            unlabelled = {name: value for name, value in rows.items() if name != "labels"}
            loss = loss_of(model(**unlabelled, num_items_in_batch=20), rows["labels"], 20)
        loss.backward()
    return {n: (p.grad.full_tensor() * world if world > 1 else p.grad) for n, p in model.named_parameters()}


def main(what: str, path: str, size: int) -> None:
    torch.set_num_threads(1)
    kind, *ways = what.split(":")
    kinds = {"sft": sft, "plain_sft": plain_sft, "grpo": grpo, "trainer": trainer, "sharded": sharded}
    made, logs = kinds[kind](path, size, *ways), []
    if not isinstance(made, dict):
        torch.manual_seed(3 + int(os.environ.get("RANK", 0)))
        made.train()
        made, logs = tiny.weights_of(made.accelerator.unwrap_model(made.model)), made.state.log_history
    if int(os.environ.get("RANK", 0)) == 0:
        torch.save(made, Path(path) / "end.pt")
        (Path(path) / "logs.json").write_text(json.dumps(logs))
    if dist.is_initialized():  # nobody leaves while another still talks to it
        dist.barrier()
        dist.destroy_process_group()
        sys.stderr.flush()
        os._exit(0)  # threads of gloo's may outlive the group, and abort a process that ends while they run


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
