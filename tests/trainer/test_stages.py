"""The stages by themselves do what the whole job does with the same files."""

import json

import pytest

from drift.config import parse
from drift.jobs import stages

CONFIG = {
    "name": "small",
    "model": {"hidden_size": 32, "layers": 1, "heads": 2},
    "warm_start": {"enabled": False},
    "train": {"batch_size": 8, "lr": 1e-3, "warmup_ratio": 0.0},
    "track": {"progress": False},
}


def row(prompt, answer, right):
    return {
        "prompt_id": prompt,
        "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}],
        "verifier": {"t1": int(right)},
        "turn_rewards": {"t1": float(right)},
        "answer_norms": [answer],
        "format_penalty": 0.0,
        "t_star": 1 if right else None,
    }


def test_skipped_groups_count_in_no_denominator(tmp_path):
    """Skipping a group gives the very loss that a file without its rows gives."""
    solved = [row("2 + 3", "5", True), row("2 + 3", "6", False)]
    unsolved = [row("9 + 9", str(n), False) for n in range(3)]
    losses = []
    for name, rows, skip in (("all", solved + unsolved, True), ("solved", solved, False), ("none", unsolved, True)):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(r) + "\n" for r in rows))
        config = parse(CONFIG | {"weights": {"skip_unsolved_groups": skip}})
        if name == "none":
            with pytest.raises(ValueError, match="none of 3 rows to train on"):
                stages.fit(config, file, tmp_path / name)
        else:
            losses.append(stages.fit(config, file, tmp_path / name).losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
