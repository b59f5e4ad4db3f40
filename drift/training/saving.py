"""A model that is spread over ranks, written as transformers reads it, without any rank holding the whole."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from drift import files
from drift.training import distributed, sharding

MOST = 5 << 30  # bytes of a file, and of the first rank's host memory


def save(policy: Any, folder: str | Path, most: int = MOST) -> None:
    """`Policy.save`, of a policy that is spread or not; every rank calls this. most: bytes of a file with several tensors."""
    first = distributed.rank() == 0
    if not sharding.is_sharded(policy.model):
        if first:
            policy.save(folder)
        return
    with files.into(folder) if first else nullcontext() as partial:
        if hasattr(policy.model, "peft_config"):
            adapters = {name: tensor.cpu() for name, tensor in policy.named_weights(trained=True)}
            if partial is not None:
                policy.model.save_pretrained(partial, state_dict=adapters)
        else:
            _write(policy, partial, most)
        if partial is not None:
            policy.tokenizer.save_pretrained(partial)


def _write(policy: Any, partial: Path | None, most: int) -> None:
    """partial: where the first rank writes; the others gather with it."""
    parts: list[list[str]] = []
    bucket: dict[str, torch.Tensor] = {}
    total = 0

    def flush() -> None:
        assert partial is not None
        save_file(bucket, partial / f"part-{len(parts)}", metadata={"format": "pt"})
        parts.append(list(bucket))
        bucket.clear()

    for name, tensor in policy.named_weights():
        if partial is None:
            continue
        if bucket and sum(t.nbytes for t in bucket.values()) + tensor.nbytes > most:
            flush()
        bucket[name] = tensor.cpu().contiguous()
        total += tensor.nbytes
    if partial is None:
        return
    flush()
    places: dict[str, str] = {}
    for number, names in enumerate(parts, 1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors" if len(parts) > 1 else "model.safetensors"
        (partial / f"part-{number - 1}").rename(partial / file)
        places |= dict.fromkeys(names, file)
    if len(parts) > 1:
        index = json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=1)
        (partial / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    model = policy.lent.model
    model.config.architectures, model.config.dtype = [type(model).__name__], sharding.dtype_of(policy)
    model.config.save_pretrained(partial)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(partial)
