"""verl with the fused head and a policy loss of ours: what its engine does in a step, on a tiny model without a GPU.

    pip install "verl>=0.9.1,<0.10"
    python examples/in_verl.py

In a training run two lines of its config do this (docs/adapters.md):

    actor_rollout_ref.model.external_lib=drift_kernels.adapters.verl.on
    actor_rollout_ref.model.use_fused_kernels=True

and a third chooses the loss: actor_rollout_ref.actor.policy_loss.loss_mode=drift_gspo. Nothing is downloaded.
"""

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from verl.models.transformers.monkey_patch import patch_forward_with_backends
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.workers.config import ActorConfig

from drift_kernels.adapters import verl as fused


def main(steps: int = 30) -> list[float]:
    """Goes over one batch of made-up answers, rewarded for a token; returns that token's mean probability, step by step."""
    torch.manual_seed(0)
    shape = Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.1,
    )  # fmt: skip
    model = Qwen2ForCausalLM(shape)
    fused.enable()  # external_lib's line
    patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend="torch")  # use_fused_kernels'
    config = ActorConfig(strategy="fsdp", rollout_n=8, ppo_micro_batch_size_per_gpu=16, clip_ratio=0.2)
    config.global_batch_info.update(dp_size=1, batch_num_tokens=None, global_batch_size=None, loss_scale_factor=None)
    loss_fn = get_policy_loss_fn("drift_gspo")

    prompt, answers = torch.randint(64, (1, 4)).expand(16, 4), torch.randint(32, (16, 6))
    answers[::2, -1] = 7
    ids, positions = torch.cat([prompt, answers], 1), torch.arange(10).expand(16, 10)
    rewards = (answers[:, -1:] == 7).float()
    advantages = ((rewards - rewards.mean()) / rewards.std()).expand(16, 6)
    mask = torch.ones(16, 6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def logprobs() -> torch.Tensor:
        out = model(input_ids=ids, position_ids=positions, temperature=1.0, return_dict=True)
        return out.log_probs[:, 3:-1]  # place i holds the log-prob of token i + 1

    seen = []
    for step in range(steps):
        if step % 2 == 0:
            with torch.no_grad():
                old = logprobs()
        current = logprobs()
        seen.append(current[::2, -1].exp().mean().item())
        loss, _ = loss_fn(old, current, advantages, mask, "token-mean", config)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"probability of the rewarded token {seen[0]:.3f} → {seen[-1]:.3f}")
    return seen


if __name__ == "__main__":
    main()
