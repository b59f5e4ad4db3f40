"""Tiny causal LMs of any kind, a policy around one, and conversations and settings to train it with."""

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM
from transformers.models.qwen2 import Qwen2Config

from drift.config import TrainConfig
from drift.model import attention, policy, tiny
from drift.types import Trajectory, Turn

VOCAB = 23  # ids from 3 on are free
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "bos_token_id": 1,
}
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
TOKENIZER = tiny.build_tokenizer()


def causal_lm(shape, implementation=None, dtype=torch.float32):
    """A model of this transformers config, always with the same weights; packed attention unless another is named."""
    torch.manual_seed(0)
    name = implementation or attention.register("sdpa")
    return AutoModelForCausalLM.from_config(shape, attn_implementation=name, dtype=dtype)


class Policy(policy.Policy):
    """The real one around any tiny model; its tokenizer is never asked."""

    def __init__(self, shape=None, dtype=torch.float32, lora=None, checkpointing=False):
        shape = shape or Qwen2Config(**SHAPE, tie_word_embeddings=True, initializer_range=0.2)
        model = causal_lm(shape, dtype=dtype)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        super().__init__(get_peft_model(model, lora) if lora else model, TOKENIZER)

    def weights(self):
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}


def trajectory(index, generator, weight=None, turns=None):
    """A conversation of one to three turns of one to five tokens, between prompts of one to six."""
    ids, spans = [], []
    for _ in range(turns or int(torch.randint(1, 4, (), generator=generator))):
        prompt, answer = (int(torch.randint(1, n, (), generator=generator)) for n in (7, 6))
        ids += torch.randint(3, VOCAB, (prompt + answer,), generator=generator).tolist()
        spans.append(Turn(len(ids) - answer, len(ids)))
    if weight is None:
        weight = float(torch.rand((), generator=generator)) * 3
    return Trajectory(f"p{index // 4}", ids, spans, weight=weight, index=index)


def some(count, seed=0, **options):
    """`count` trajectories that follow from the seed."""
    generator = torch.Generator().manual_seed(seed)
    return [trajectory(index, generator, **options) for index in range(count)]


def config(**options):
    """Training settings that suit such a model."""
    length = min(64, options.get("max_tokens", 64))
    return TrainConfig(**({"lr": 1e-2, "batch_size": 4, "max_tokens": 64, "max_length": length} | options))
