"""torchtitan with the fused loss: one line of its config, here as its trainer calls it, on its own debug model.

    pip install "torchtitan>=0.3,<0.4"
    python examples/in_torchtitan.py

Nothing is downloaded. In a training run the line stands in a config function (docs/adapters.md), and torchtitan's trainer
does what `main` does by hand: it gives the loss the head, and has the model leave the head to it.
"""

import torch
from torchtitan.models import llama3
from torchtitan.models.common.attention import ScaledDotProductAttention

from drift_kernels.adapters.torchtitan import DriftLoss


def main(steps: int = 20) -> list[float]:
    """Trains on one batch, and returns the losses."""
    if not torch.cuda.is_available():  # flex attention, its choice, wants compiling
        llama3.get_attention_config = lambda _: ScaledDotProductAttention.Config()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = llama3.model_registry("debugmodel").model.build()
    model.to_empty(device=device)
    with torch.no_grad():
        model.init_weights(buffer_device=device)

    loss_fn = DriftLoss.Config().build()  # the line: was ChunkedLossWrapper.Config()
    loss_fn.set_lm_head(model.lm_head)
    model._skip_lm_head = True

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = torch.randint(256, (4, 33), device=device)
    labels = tokens[:, 1:].clone()
    labels[:, :8] = -100  # a prompt: never multiplied
    losses = []
    for _ in range(steps):
        loss, _ = loss_fn(model(tokens[:, :-1]), labels, (labels != -100).sum())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} → {losses[-1]:.3f} in {steps} steps")
    return losses


if __name__ == "__main__":
    main()
