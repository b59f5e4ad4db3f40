"""A reward function of your own, by import path: task.scorer=own_scorer:reward.

    python examples/own_scorer.py

The function gets the answer that was read, the row's "answer", and the problem, whose metadata holds the row's other
columns. It returns a number: 1 or more is right and ends the conversation, less is a partial reward. It runs in a worker
process without network and without the right to write files. Here half of the reward is for the right length.
"""

import json
import sys
import tempfile
from pathlib import Path


def reward(answer: str, gold: str, problem: dict) -> float:
    """1 for the right number, half of it for one of as many digits, and nothing for what is longer than a row allows."""
    if len(answer) > problem["metadata"].get("longest", 3):
        return 0.0
    return 1.0 if answer == gold else 0.5 if len(answer) == len(gold) else 0.0


def main(folder: Path) -> int:
    """Runs the embedded model, untrained, on a few problems, to show the settings; a real run names model.path."""
    from drift.cli import main as drift

    rows = [{"prompt": f"Calculate {n} + {n + 1}.", "answer": 2 * n + 1, "longest": 2} for n in range(10, 30)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = "name: own-scorer\narms: [drift]\nwarm_start: {enabled: false}\n"
    config += "task: {kind: jsonl, path: PATH, warm_share: 0.0, scorer: 'own_scorer:reward', parser: whole}\n"
    config += "rollout: {n: 4, turns: 2, max_new_tokens: 2}\neval: {turns: 2, max_new_tokens: 2}\n"
    (folder / "own.yaml").write_text(config.replace("PATH", str(folder / "problems.jsonl")))
    return drift(["run", str(folder / "own.yaml"), f"output_dir={folder / 'runs'}", *sys.argv[1:]])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        sys.exit(main(Path(made)))
