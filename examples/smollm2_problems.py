"""Problems that SmolLM2-135M half-solves, as rows for `task.kind: jsonl`: which number comes after N?

    python examples/smollm2_problems.py runs/smollm2-problems.jsonl

Each prompt is a conversation: two solved examples, then the question. Without them a model of this size does not keep to the
answer tags.
"""

import json
import random
import sys
from pathlib import Path

EXAMPLES = [(12, 13), (30, 31)]


def question(number: int) -> str:
    """The question about one number."""
    return f"Which number comes after {number}?"


def row(number: int) -> dict:
    """One problem with its answer."""
    messages = []
    for before, after in EXAMPLES:
        messages += [{"role": "user", "content": question(before)}]
        messages += [{"role": "assistant", "content": f"<answer>{after}</answer>"}]
    return {"prompt": [*messages, {"role": "user", "content": question(number)}], "answer": str(number + 1)}


def main(path: str, count: int = 400) -> None:
    """Writes `count` rows in random order, of which the first 64 are for training."""
    numbers = random.Random(0).sample(sorted(set(range(31, 1000)) - {a for pair in EXAMPLES for a in pair}), count)
    rows = [{**row(number), "split": "train" if i < 64 else "eval"} for i, number in enumerate(numbers)]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(line) + "\n" for line in rows), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:2])
