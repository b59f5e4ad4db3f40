"""A causal LM without its weights: modules and buffers from a folder's config, and parameters of no elements.

It is for a model that is spread over ranks (`drift.training.sharding`): one layer after another takes its weights from the
folder's safetensors files, so that no rank ever holds the whole.

Left out: models whose files have other names than their parameters (experts that are merged when they are read).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig


class Weights:
    """The tensors in a folder's safetensors files, by name."""

    def __init__(self, folder: str | Path) -> None:
        self.folder, index = Path(folder), Path(folder) / "model.safetensors.index.json"
        if index.is_file():
            self.files: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return
        with safe_open(self.folder / "model.safetensors", "pt") as file:
            self.files = dict.fromkeys(file.keys(), "model.safetensors")

    def read(self, name: str) -> torch.Tensor:
        """Raises ValueError for values that are not finite."""
        with safe_open(self.folder / self.files[name], "pt") as file:
            tensor = file.get_tensor(name)
        if bad := int((~torch.isfinite(tensor)).sum()):
            raise ValueError(
                f"the model at {str(self.folder)!r} is damaged: {bad} of the {tensor.numel()} values of {name} are NaN or "
                "infinite; take another copy of it, or an earlier checkpoint"
            )
        return tensor


def build(folder: str, dtype: torch.dtype, attention: str) -> tuple[Any, Weights]:
    """The model without its weights, and these. Raises ValueError if the files lack a parameter by its name."""
    weights, config = Weights(folder), AutoConfig.from_pretrained(folder, trust_remote_code=False)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention, "trust_remote_code": False}
    with _parameters_on_meta():
        model = AutoModelForCausalLM.from_config(config, **options)
    if missing := [name for name, _ in model.named_parameters() if name not in weights.files]:
        raise ValueError(
            f"train.shard 'fsdp' reads {folder!r} by the names of parameters, and its files lack {len(missing)} of them, such as "
            f"{missing[0]!r}; set train.shard=none"
        )
    if (Path(folder) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    meta = list(model.parameters())
    empty = {id(p): nn.Parameter(torch.empty(0, dtype=dtype)) for p in meta}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = empty[id(parameter)]
    return model, weights


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Inside, a parameter of a module that is made has a shape and no memory; buffers are computed as ever."""
    plain = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.detach().to("meta"), param.requires_grad)
        plain(self, name, param)

    nn.Module.register_parameter = register
    try:
        yield
    finally:
        nn.Module.register_parameter = plain
