"""The fused loss inside an ordinary training loop of a transformers model: five lines replace logits and loss.

    python examples/drop_in.py

A tiny random model learns one batch of made-up sequences with per-token weights; nothing is downloaded.
"""

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import drift_kernels as dk


def main(steps: int = 20) -> list[float]:
    torch.manual_seed(0)
    shape = Qwen2Config(
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.08,
    )
    model = Qwen2ForCausalLM(shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    input_ids = torch.randint(0, 1000, (4, 32))
    weights = torch.rand(4, 32)  # a weight a token
    weights[:, :16] = (
        0  # a prompt: its tokens are not trained, and their rows never reach a product with the vocabulary
    )
    token_weights = dk.shift(weights)  # aligned with targets: row i has the weight of token i + 1, which it predicts

    losses = []
    for _ in range(steps):
        hidden = model.model(input_ids).last_hidden_state  # [B, L, D]; the head is not called
        targets = dk.shift_targets(input_ids)  # [B, L], -100 at the end of each row
        out = dk.weighted_cross_entropy(hidden, model.lm_head.weight, targets, token_weights)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
    print(f"loss {losses[0]:.3f} → {losses[-1]:.3f} in {steps} steps")
    return losses


if __name__ == "__main__":
    main()
