"""The shapes of a model's parameters from its config alone, without weights: published models by name, and folders."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from drift.config import LoRAConfig, ModelConfig
from drift.model import tiny
from drift.training.sharding import layers_of

BYTES = {"float32": 4, "bfloat16": 2}
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SIZES += ("vocab_size", "tie_word_embeddings")
PUBLISHED: dict[str, tuple[type, tuple[int, ...]]] = {  # the files config.json on the hub, in the order of SIZES
    "SmolLM2-135M": (LlamaConfig, (576, 1536, 30, 9, 3, 49_152, True)),
    "Qwen2.5-0.5B": (Qwen2Config, (896, 4864, 24, 14, 2, 151_936, True)),
    "Qwen2.5-1.5B": (Qwen2Config, (1536, 8960, 28, 12, 2, 151_936, True)),
    "Qwen2.5-3B": (Qwen2Config, (2048, 11_008, 36, 16, 2, 151_936, True)),
    "Qwen2.5-7B": (Qwen2Config, (3584, 18_944, 28, 28, 4, 152_064, False)),
    "Llama-3.1-8B": (LlamaConfig, (4096, 14_336, 32, 32, 8, 128_256, False)),
    "Qwen3-8B": (Qwen3Config, (4096, 12_288, 36, 32, 8, 151_936, False)),
    "Qwen2.5-14B": (Qwen2Config, (5120, 13_824, 48, 40, 8, 152_064, False)),
    "Qwen2.5-32B": (Qwen2Config, (5120, 27_648, 64, 40, 8, 152_064, False)),
    "Llama-3.1-70B": (LlamaConfig, (8192, 28_672, 80, 64, 8, 128_256, False)),
    "Qwen2.5-72B": (Qwen2Config, (8192, 29_568, 80, 64, 8, 152_064, False)),
}
ALIASES = {"smollm2": "SmolLM2-135M"}  # of `model.path`
ATTENTION = {"full_attention", "sliding_attention"}  # layers of one shape


@dataclass(frozen=True)
class Weight:
    """A parameter: `rows` × `rest` elements; `size` bytes each in the model, not in the trainer's float32."""

    rows: int
    rest: int
    size: int
    trained: bool

    @property
    def numel(self) -> int:
        return self.rows * self.rest

    def shard(self, ranks: int, rank: int = 0) -> int:
        """Elements that a rank holds when rows are divided; the first rank holds the most."""
        most = -(-self.rows // ranks)
        return max(0, min(most, self.rows - rank * most)) * self.rest

    def padded(self, ranks: int) -> int:
        """Elements that each rank sends and stores: all shares are as large as the first."""
        return -(-self.rows // ranks) * self.rest


@dataclass(frozen=True)
class Shapes:
    """A model's parameters: those of a layer, and those outside the layers."""

    layer: tuple[Weight, ...]
    layers: int
    outside: tuple[Weight, ...]  # embeddings, final norm, and lm_head if it is not tied
    config: Any  # of transformers

    def each(self) -> Iterator[tuple[Weight, int]]:
        """(parameter, how many of it there are)."""
        yield from ((weight, self.layers) for weight in self.layer)
        yield from ((weight, 1) for weight in self.outside)

    def count(self, trained: bool = False) -> int:
        """Parameters; with `trained`, those that are trained."""
        return sum(weight.numel * times for weight, times in self.each() if weight.trained or not trained)

    @property
    def head(self) -> int:
        """Elements of lm_head, tied or not."""
        return self.config.vocab_size * self.config.hidden_size

    @property
    def head_trained(self) -> bool:
        return any(weight.trained and weight.numel == self.head for weight in self.outside)

    @property
    def head_width(self) -> int:
        """Of a head of attention."""
        return getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads

    @property
    def keys(self) -> int:
        """Key heads of attention; as many values."""
        return self.config.num_key_value_heads


def shapes_of(model: ModelConfig) -> Shapes:
    """Of the model that drift would train. Raises ValueError for a name without a published shape, or for unequal layers."""
    config = _config_of(model)
    if set(getattr(config, "layer_types", None) or ATTENTION) - ATTENTION:
        raise ValueError(f"model.path {model.path!r}: its layers are of several kinds, which are not counted here")
    layers, two = config.num_hidden_layers, type(config)(**{**config.to_dict(), **_first_two(config)})
    with torch.device("meta"):
        made: Any = AutoModelForCausalLM.from_config(two, dtype=getattr(torch, model.dtype))
    root = made
    if model.lora is not None:
        made = _with_lora(made, model.lora)
    blocks = [_weights(block) for block in layers_of(root)]
    if len(set(blocks)) > 1:
        raise ValueError(
            f"model.path {model.path!r}: its first two layers differ, and only equal layers are counted here"
        )
    inside = {id(p) for block in layers_of(root) for p in block.parameters()}
    outside = tuple(_weight(p) for p in made.parameters() if id(p) not in inside)
    return Shapes(blocks[0], layers, outside, config)


def _config_of(model: ModelConfig) -> Any:
    if model.path is None:
        return tiny.build_model(model, tiny.build_tokenizer(), 0, "sdpa").config
    if Path(model.path).is_dir():
        if (Path(model.path) / "adapter_config.json").exists():
            raise ValueError(f"model.path {model.path!r} holds adapters; name its base, and say model.lora={{…}}")
        return AutoConfig.from_pretrained(model.path)
    bare = ALIASES.get(model.path, model.path.rpartition("/")[2]).removesuffix("-Instruct").removesuffix("-Base")
    if bare not in PUBLISHED:
        raise ValueError(
            f"model.path {model.path!r} is neither a folder with a config.json nor a model whose shape is listed here: "
            f"{', '.join(PUBLISHED)}; download its config.json and name the folder"
        )
    kind, sizes = PUBLISHED[bare]
    shape: dict[str, Any] = dict(zip(SIZES, sizes))
    return kind(**shape, **({"head_dim": 128} if kind is Qwen3Config else {}))


def _first_two(config: Any) -> dict[str, Any]:
    kinds = getattr(config, "layer_types", None)
    return {"num_hidden_layers": 2, **({"layer_types": kinds[:2]} if kinds else {})}


def _with_lora(made: Any, lora: LoRAConfig) -> Any:
    from peft import LoraConfig, get_peft_model

    alpha: Any = lora.alpha  # peft says int, and multiplies by it
    named = LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=lora.target_modules, task_type="CAUSAL_LM")
    return get_peft_model(made, named)


def _weights(module: Any) -> tuple[Weight, ...]:
    return tuple(_weight(parameter) for parameter in module.parameters())


def _weight(parameter: torch.Tensor) -> Weight:
    rows, *rest = parameter.shape
    return Weight(rows, math.prod(rest), parameter.element_size(), parameter.requires_grad)
