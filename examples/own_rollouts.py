"""Importance-weighted fine-tuning on rollouts of your own, step by step: read, weigh, pack, train, save.

    python examples/own_rollouts.py OUT [ROLLOUTS.jsonl MODEL]

Without a file it makes one up and takes the embedded tiny model; nothing is downloaded. `drift train` does the same from
a config; here each step is a call, to be changed at will.
"""

import sys
from pathlib import Path

from drift import packing, returns, store
from drift.config import ModelConfig, TrainConfig, WeightsConfig
from drift.model import chat
from drift.model.policy import load_policy
from drift.training.trainer import train


def made_up(path: Path, prompts: int = 8) -> Path:
    """Two trajectories a prompt: one is right at once, one in its second turn. These keys are what a line has to have."""
    with store.Writer(path) as writer:  # checks every row, and knows what the file holds already
        for number in range(prompts) if not writer.done else ():
            ask = {"role": "user", "content": f"What is {number} + 1?"}
            again = {"role": "user", "content": "Incorrect. Please think again."}
            wrong, right = (
                {"role": "assistant", "content": f"<answer>{answer}</answer>"} for answer in (number, number + 1)
            )
            for messages, solved in (([ask, right], [1]), ([ask, wrong, again, right], [0, 1])):
                turns = {f"t{turn}": hit for turn, hit in enumerate(solved, 1)}
                writer.write(
                    {
                        "prompt_id": f"plus-one-{number}",  # rows of one prompt are weighed against each other
                        "messages": messages,
                        "verifier": turns,  # 0 or 1 a turn
                        "turn_rewards": {turn: float(hit) for turn, hit in turns.items()},
                        "answer_norms": [str(number + 1)] if len(solved) == 1 else [str(number), str(number + 1)],
                        "format_penalty": 0.0,
                        "t_star": len(solved),  # the first right turn, or None
                    }
                )
    return path


def main(out: str, rollouts: str | None = None, model: str | None = None, steps: int = 30) -> list[float]:
    file = Path(rollouts) if rollouts else made_up(Path(out) / "rollouts.jsonl")
    policy = load_policy(ModelConfig(path=model))  # a folder or a hub name; None: the tiny one
    rows = store.read(file)
    store.check_policy(rows, policy.hash())  # rows that say another policy sampled them are refused

    # R = Σ γ^(t−1)·r_t + penalties, then w = exp(R/β), normalised within each prompt's group
    weights, stats = returns.weigh(rows, WeightsConfig(beta=0.1, gamma=0.9))
    print(f"{len(rows)} rows, effective sample size {stats['ess_overall']:.0%}")

    # ids as they were sampled where a row has token_ids, else its messages through the chat template
    trajectories = [
        trajectory
        for index, (row, weight) in enumerate(zip(rows, weights))
        for trajectory in chat.to_trajectories(policy, row, index=index, weight=weight)
    ]

    settings = TrainConfig(lr=2e-3, batch_size=16, max_tokens=1024, max_length=512)
    packs = packing.pack(
        trajectories, settings.max_tokens, max_length=settings.max_length
    )  # for a look: train packs itself
    print(
        f"{sum(len(p.input_ids) for p in packs)} tokens in {len(packs)} packs, {sum(len(p.active) for p in packs)} trained"
    )

    done = train(policy, trajectories, settings, seed=0, steps=steps, checkpoint_dir=Path(out) / "checkpoints")
    policy.save(Path(out) / "model")  # transformers and `drift eval --model` read it
    print(
        f"loss {done.losses[0]:.3f} → {done.losses[-1]:.3f} in {done.steps} steps; the model is in {Path(out) / 'model'}"
    )
    return done.losses


if __name__ == "__main__":
    if len(sys.argv) not in (2, 4):
        sys.exit(__doc__)
    main(*sys.argv[1:])
