"""Per-token weights inside transformers' Trainer: one line on, one line off, and a column of weights beside the labels.

    pip install "transformers>=5.0,<6" accelerate
    python examples/in_transformers.py

A tiny random model is made here; nothing is downloaded. Half of each row is noise with weight 0, the other half a rule:
after training the rule is known, and the noise has cost no products with the vocabulary.
"""

import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Trainer, TrainingArguments, default_data_collator

from drift_kernels.adapters import transformers as fused
from drift_kernels.conversation import show_trained

VOCABULARY, HALF = 64, 8


def rows(count: int) -> list[dict]:
    """Noise, then numbers that count up by one."""
    g = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        noise = torch.randint(VOCABULARY, (HALF,), generator=g).tolist()
        start = int(torch.randint(VOCABULARY, (), generator=g))
        ids = noise + [(start + i) % VOCABULARY for i in range(HALF)]
        made.append({"input_ids": ids, "labels": ids, "token_weights": [0.0] * (HALF + 1) + [1.0] * (HALF - 1)})
    return made


def main(steps: int = 60) -> float:
    """Trains, and returns how often the next number is the most likely one."""
    torch.manual_seed(0)
    shape = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.1, pad_token_id=0,
    )  # fmt: skip
    model = fused.apply(Qwen2ForCausalLM(shape))  # on
    data = rows(256)
    weighted = torch.tensor([row["token_weights"] for row in data[:1]]) > 0
    print(show_trained([data[0]["input_ids"]], weighted, lambda ids: f" {ids[0]}"))
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, max_steps=steps, learning_rate=1e-2, per_device_train_batch_size=32, logging_steps=20, report_to="none",
            save_strategy="no", remove_unused_columns=False, use_cpu=not torch.cuda.is_available(), disable_tqdm=True,
        )  # fmt: skip
        collator = fused.WeightedCollator(default_data_collator)
        Trainer(model, settings, train_dataset=data, data_collator=collator).train()
    fused.remove(model)  # off: as it came

    ids = torch.tensor([row["input_ids"] for row in data[:32]], device=model.device)
    with torch.no_grad():
        best = model.eval()(ids).logits.argmax(-1)
    right = (best[:, HALF:-1] == ids[:, HALF + 1 :]).float().mean().item()
    print(f"right: {right:.0%}")
    return right


if __name__ == "__main__":
    main()
