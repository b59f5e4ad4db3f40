"""A trajectory of a step on its way from the rollout's row to the loss, and the row that is stored of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from drift import store
from drift.config import WeightsConfig
from drift.model import chat
from drift.model.policy import Policy
from drift.returns import advantages, trajectory_return
from drift.types import Trajectory


@dataclass(slots=True)
class Sample:
    """One trajectory of a rollout batch on its way to the loss."""

    trajectory: Trajectory  # `index` is its place in the global batch
    messages: list[dict[str, str]]
    solved_at: int  # turn of the right answer, 0 for none
    reward: float
    answers: list[str]  # normalised, those that could be parsed
    unparsed: int
    feedback: str | None = None  # the environment's answer to its last wrong answer before the final one
    taught: Trajectory | None = None  # the same responses under the teacher's prompt
    cut: bool = False  # the teacher's prompt was too long, and its lesson was cut or dropped
    distill: float = 0.0  # weights by the router
    policy: float = 0.0
    rebellious: float = 0.0
    pass_rate: float = 0.0  # of its problem, as the router believed it
    row: dict[str, Any] = field(default_factory=dict)  # as it was sampled, in the names of `drift.store`
    earlier: list[Sample] = field(default_factory=list)  # with history: template, its turns before the last one

    @property
    def parts(self) -> list[Sample]:
        """Every token sequence of the trajectory: itself, after those of earlier turns."""
        return [*self.earlier, self]

    @property
    def problem_id(self) -> str:
        """Whose group it belongs to."""
        return self.trajectory.problem_id

    @property
    def text(self) -> str:
        """The final turn's, as it was sampled."""
        return self.messages[-1]["content"]

    @property
    def question(self) -> str:
        """The first user message."""
        return next((message["content"] for message in self.messages if message["role"] == "user"), "")

    @property
    def tokens(self) -> int:
        """Sampled tokens of this sequence, without earlier parts."""
        return sum(turn.stop - turn.start for turn in self.trajectory.turns)

    @property
    def entropy(self) -> float | None:
        """Sequence entropy in nats a token, over all parts; None without the sampler's log-probs.

        It is the mean of −log-prob over the sampled tokens, an unbiased estimate of the mean token entropy that costs no
        pass over the logits (ours).
        """
        total, count = 0.0, 0
        for part in self.parts:
            if part.trajectory.logprobs is None:
                return None
            for turn in part.trajectory.turns:
                total -= math.fsum(part.trajectory.logprobs[turn.start : turn.stop])
                count += turn.stop - turn.start
        return total / count if count else 0.0


def read(policy: Policy, row: store.Row, weights: WeightsConfig) -> Sample:
    """The sample of a row, with its return as reward."""
    messages = row["messages"]
    *earlier, last = chat.to_trajectories(policy, row, index=0, turns="assistant")
    ends = [place for place, message in enumerate(messages, 1) if message["role"] == "assistant"]
    ends = ends[-(len(earlier) + len(last.turns)) :]  # without those that the environment opened with
    told = [message["content"] for message in messages[ends[0] :] if message["role"] == "user"]
    result: dict[str, Any] = {
        "solved_at": row["t_star"] or 0,
        "reward": trajectory_return(row, weights.gamma, weights.repetition),
        "answers": row["answer_norms"],
        "unparsed": row["unparsed"],
    }
    return Sample(
        last,
        messages,
        feedback=told[-1] if told else None,
        row=row,
        earlier=[Sample(turn, messages[:end], **result) for turn, end in zip(earlier, ends)],
        **result,
    )


def stored(sample: Sample, step: int, base: str, temperature: float, top_p: float) -> store.Row:
    """The row on file: the trajectory as it was sampled, and how the step used it.

    traj_idx is left to the file, where a problem may come again. The weights that sampled are the base's hash, and the
    number of steps since.
    """
    version = sample.row["policy_version"]
    return {
        **{key: value for key, value in sample.row.items() if key != "traj_idx"},
        "temperature": temperature,
        "top_p": top_p,
        "policy_hash": f"{base}+{version}" if version else base,
        "step": step + 1,
        "staleness": step - version,
        "advantage": sample.trajectory.advantage,
        "pass_rate": sample.pass_rate,
        "had_teacher": sample.taught is not None,
        "distill_weight": sample.distill,
        "policy_weight": sample.policy,
        "rebellious_weight": sample.rebellious,
    }


def problems_of(step: int, count: int, size: int, seed: int) -> list[int]:
    """Which of `count` problems the step asks: permutation after permutation of all, cut into parts of `size`.

    A problem that comes twice, because one permutation ends and the next begins, is asked once.
    """
    size = min(size, count)
    places = range(step * size, (step + 1) * size)
    orders = {e: np.random.default_rng([seed, e]).permutation(count) for e in {place // count for place in places}}
    return list(dict.fromkeys(int(orders[place // count][place % count]) for place in places))


def set_advantages(samples: Sequence[Sample], scale: bool) -> None:
    """A = r − mean over the problem's group, divided by its standard deviation if asked; 0 if all are equal (B7)."""
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.problem_id, []).append(sample)
    for group in groups.values():
        for sample, advantage in zip(group, advantages([sample.reward for sample in group], scale)):
            for part in sample.parts:
                part.trajectory.advantage = advantage
