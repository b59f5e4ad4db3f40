"""A task of plain words and an engine that says what it is told, so that the loop around them can be looked at alone."""

from __future__ import annotations

import json
from pathlib import Path

from drift.config import Config, parse
from drift.engines import Sample
from drift.model import chat
from drift.types import Problem

END = "<|im_end|>"


class WordTask:
    """Right is the answer itself; problem i asks "q{i}" and wants "a{i}"."""

    answer_tag = "answer"

    def __init__(self, count: int = 3) -> None:
        self.made = [Problem(f"p{i}", f"q{i}", f"a{i}") for i in range(count)]

    def problems(self, split: str) -> list[Problem]:
        return self.made

    def verify(self, problem: Problem, answer: str) -> bool:
        return problem.answer == answer

    def verify_many(self, pairs):
        return [self.verify(*pair) for pair in pairs]

    def close(self) -> None:
        pass


class ScriptedEngine:
    """Says `lines[first user message]` turn by turn; a line that ends in … has no end-of-turn token.

    `calls` keeps the keyword arguments of each call, `prompts` its prompts.
    """

    def __init__(self, policy, lines: dict[str, list[str]]) -> None:
        self.policy, self.lines, self.calls, self.prompts = policy, lines, [], []

    def sync(self):
        pass

    def generate(self, prompts, **settings):
        self.calls.append(settings)
        self.prompts.append(prompts)
        return [self._say(self.policy.tokenizer.decode(prompt)) for prompt in prompts]

    def _say(self, shown: str) -> Sample:
        question = shown.split("user\n", 1)[1].split(END)[0]
        line = self.lines[question][shown.count("assistant\n") - 1]
        cut = line.endswith("…")
        ids = chat.encode(self.policy.tokenizer, line.removesuffix("…") + ("" if cut else END))
        return Sample(ids, [-0.25 * (i + 1) for i in range(len(ids))], not cut)


def say(answer: str) -> str:
    return f"<answer>{answer}</answer>"


def quarters(folder: Path, **sections) -> Config:
    """A run whose problems, to tell which quarter a last digit lies in, the tiny model half-solves after a few steps."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"prompt": f"Say {n}", "answer": str(n % 10 // 3), "split": ("warm", "train", "eval")[n // 200]}
        for n in range(600)
    ]
    (folder / "digits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = {"warm_problems": 200, "train_problems": 12, "eval_problems": 30}
    base = {
        "name": "digits",
        "output_dir": str(folder / "runs"),
        "seeds": [0, 1],
        "model": {"hidden_size": 48},
        "task": {"kind": "jsonl", "path": str(folder / "digits.jsonl"), **sizes},
        "warm_start": {"target_low": 0.2, "target_high": 0.95, "check_every": 10, "check_problems": 40, "lr": 5e-3},
        "rollout": {"n": 4, "turns": 3, "max_new_tokens": 6, "batch_size": 16},
        "train": {"lr": 1e-3, "batch_size": 16, "max_tokens": 1024, "max_length": 256},
        "eval": {"turns": 3, "max_new_tokens": 6},
        "track": {"progress": False},
    }
    for name, changed in sections.items():
        base[name] = {**base.get(name, {}), **changed} if isinstance(changed, dict) else changed
    return parse(base)
