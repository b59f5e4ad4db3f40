"""A tiny model, tokenizer and data sets for real trainers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

if TYPE_CHECKING:
    from datasets import Dataset

WORDS = [f"{a}{b}" for a in "bdfgklmn" for b in ("a", "e", "i")]
VOCABULARY = 64


def tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over `WORDS`, left-padding as generation wants."""
    specials = ["<pad>", "<eos>", "<unk>", "<bos>"]
    vocabulary = {word: i for i, word in enumerate(specials + WORDS)}
    vocabulary |= {f"w{i}": i for i in range(len(vocabulary), VOCABULARY)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    fast.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return fast


def model(seed: int = 0, tied: bool = False, **changes) -> Qwen2ForCausalLM:
    """Two layers, D 32; the initialiser is wide enough for losses to move within ten steps."""
    torch.manual_seed(seed)
    shape = dict(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.1,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    made = Qwen2ForCausalLM(Qwen2Config(**(shape | changes)))
    made.config._name_or_path = "tiny"
    return made


def sentences(count: int, seed: int = 0, longest: int = 12) -> list[str]:
    """Random sentences of 4 to `longest` words."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, longest + 1, (count,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=generator).tolist()) for n in lengths]


def dataset(columns: dict[str, list]) -> Dataset:
    """Imported here, since not every trainer needs it."""
    from datasets import Dataset

    return Dataset.from_dict(columns)


def texts(count: int = 48) -> Dataset:
    """{"text"}."""
    return dataset({"text": sentences(count)})


def completions(count: int = 48) -> Dataset:
    """{"prompt", "completion"}."""
    return dataset({"prompt": sentences(count, 1, 5), "completion": [" " + s for s in sentences(count, 2)]})


def preferences(count: int = 48) -> Dataset:
    """{"prompt", "chosen", "rejected"}."""
    return dataset(
        {
            "prompt": sentences(count, 3, 5),
            "chosen": [" " + s for s in sentences(count, 4)],
            "rejected": [" " + s for s in sentences(count, 5)],
        }
    )


def prompts(count: int = 32) -> Dataset:
    """{"prompt"}."""
    return dataset({"prompt": sentences(count, 6, 6)})


def reward(completions: list[str], **_) -> list[float]:
    """How many distinct words, less a tenth of the length: differs within a group."""
    return [len(set(text.split())) - 0.1 * len(text.split()) for text in completions]


def weights_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every parameter."""
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def differences(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest difference of two sets of weights, relative to each tensor's largest entry."""
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max() / a[k].abs().max().clamp(min=1e-3)) for k in a)
