"""The embedded policy: a causal LM of under a million parameters with its own tokenizer and chat template.

It exists so that a whole run needs no download. Byte-level BPE covers any text; digits stay single tokens, since a tiny
model learns arithmetic digit by digit; answer and thinking tags are one token each.
"""

from __future__ import annotations

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from drift.config import ModelConfig

PAD, START, END = "<pad>", "<|im_start|>", "<|im_end|>"
TAGS = ("<think>", "</think>", "<answer>", "</answer>", "<tool_call>", "</tool_call>")
VOCABULARY = 512  # at most; the corpus runs out of pairs before
# Sentences that its prompts are made of, so that each of their words is a token or two.
CORPUS = (
    "system", "user", "assistant", "tool", "Incorrect. Please think again.",
    "State the final answer to the following arithmetic problem:",
    "Calculate the following arithmetic expression. What is the result?",
    "Solve this problem. Respond only with your final answer.",
    "Your answer was wrong. This is turn of. Answer inside answer tags.",
    "How many legs are there in total? Sort these numbers. Find the value of in the equation.",
)  # fmt: skip
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer, trained on `CORPUS` in a few milliseconds; the same every time."""
    tokenizer = Tokenizer(models.BPE())
    digits, bytes_ = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 3 - len(TAGS),
        special_tokens=[PAD, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([sentence for sentence in CORPUS for _ in range(4)], trainer)
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, additional_special_tokens=[START], padding_side="left"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(config: ModelConfig, tokenizer: PreTrainedTokenizerFast, seed: int, attention: str) -> Qwen2ForCausalLM:
    """A Qwen2-shaped model with random weights that follow from `seed` (initializer_range 0.08: smaller stays at chance)."""
    shape = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=8 * config.hidden_size // 3,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=max(1, config.heads // 2) if config.heads % 2 == 0 else config.heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.08,
        pad_token_id=int(tokenizer.convert_tokens_to_ids(PAD)),  # pyright: ignore[reportArgumentType]
        eos_token_id=int(tokenizer.convert_tokens_to_ids(END)),  # pyright: ignore[reportArgumentType]
        bos_token_id=None,
    )
    shape._attn_implementation = attention
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(shape)
