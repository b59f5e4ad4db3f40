"""Importance-weighted fine-tuning inside TRL: one more column in the data, one other name for the trainer.

    pip install "trl>=1.16,<2"
    python examples/in_trl.py

A tiny random model and its tokenizer are made here; nothing is downloaded. Rows that end in the right answer have a weight,
rows that do not have nearly none: after training the model prefers the right ones.
"""

import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import SFTConfig

from drift_kernels.adapters.trl import DriftSFTTrainer

WORDS = ["<pad>", "<eos>", "<unk>", "what", "comes", "after", *(str(i) for i in range(10))]


def rows() -> Dataset:
    """What comes after n? Each n is answered by every digit; only n + 1 weighs."""
    made = [(n, answer, 1.0 if answer == n + 1 else 0.02) for n in range(9) for answer in range(10)]
    return Dataset.from_dict(
        {
            "prompt": [f"what comes after {n}" for n, _, _ in made],
            "completion": [f" {answer}" for _, answer, _ in made],
            "weight": [weight for _, _, weight in made],
        }
    )


def main(steps: int = 60) -> float:
    """Trains, and returns how often the right digit is the most likely one."""
    torch.manual_seed(0)
    vocabulary = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="<pad>", eos_token="<eos>")
    shape = Qwen2Config(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.1, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    model = Qwen2ForCausalLM(shape)
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            folder, max_steps=steps, learning_rate=5e-3, per_device_train_batch_size=32, logging_steps=20, bf16=False,
            report_to="none", save_strategy="no", use_cpu=not torch.cuda.is_available(), disable_tqdm=True,
        )  # fmt: skip
        DriftSFTTrainer(model, settings, train_dataset=rows(), processing_class=tokenizer).train()

    prompts = torch.tensor([tokenizer(f"what comes after {n}")["input_ids"] for n in range(9)])
    with torch.no_grad():
        best = model.eval()(prompts.to(model.device)).logits[:, -1].argmax(-1)
    right = sum(WORDS[int(token)] == str(n + 1) for n, token in enumerate(best)) / 9
    print(f"right: {right:.0%}")
    return right


if __name__ == "__main__":
    main()
