"""Run by `torchrun` from test_trl_processes.py: trains and saves the weights of rank 0."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

import tiny
import torch
import torch.distributed as dist
import trl
from test_transformers import Rows, pad
from test_trl_trainers import SGD, common, weighted
from transformers import Trainer, TrainingArguments

from drift_kernels.adapters import transformers as fused
from drift_kernels.adapters.trl import DriftSFTTrainer

OWN = ("per_device_train_batch_size", "shuffle_dataset")


def sft(path: str, size: int):
    """Weighted SFT over rows of its own."""
    args = trl.SFTConfig(**common(path, **SGD | {"per_device_train_batch_size": size, "max_length": 32}))
    data = weighted(per_token=True)
    return DriftSFTTrainer(
        tiny.model(), args, train_dataset=data, processing_class=tiny.tokenizer(), normalize="samples"
    )


def trainer(path: str, size: int):
    """transformers' Trainer, the loss through compute_loss_func."""
    settings = {k: v for k, v in (common(path) | SGD).items() if k not in OWN}
    args = TrainingArguments(**settings, per_device_train_batch_size=size, remove_unused_columns=False)
    model = tiny.model(tied=True)
    loss = fused.compute_loss_func(model)
    collator = fused.WeightedCollator(pad)
    return Trainer(model, args, train_dataset=Rows(True), data_collator=collator, compute_loss_func=loss)


def sharded(path: str, size: int):
    """A model under FSDP2, by hand: each rank half the rows, gradients of the mean."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    world = int(os.environ.get("WORLD_SIZE", 1))
    model = fused.apply(tiny.model().train())
    rows = pad(Rows(False).rows[:6])
    if world > 1:
        dist.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (world,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model.lm_head, mesh=mesh)
        fully_shard(model, mesh=mesh)
        rows = {k: v[dist.get_rank() :: world] for k, v in rows.items()}
    model(**rows, num_items_in_batch=20).loss.backward()
    return {n: (p.grad.full_tensor() * world if world > 1 else p.grad) for n, p in model.named_parameters()}


def main(what: str, path: str, size: int) -> None:
    torch.set_num_threads(1)
    made = {"sft": sft, "trainer": trainer, "sharded": sharded}[what](path, size)
    if not isinstance(made, dict):
        made.train()
        made = tiny.weights_of(made.accelerator.unwrap_model(made.model))
    if int(os.environ.get("RANK", 0)) == 0:
        torch.save(made, Path(path) / "end.pt")
    if dist.is_initialized():  # nobody leaves while another still talks to it
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
