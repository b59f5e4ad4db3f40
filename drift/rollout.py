"""The multi-turn loop (A1): ask, verify, say "Incorrect.", ask again; and its rows, written as they are finished.

Trajectories are played in chunks of `rollout.batch_size`, all live ones of a chunk in one call of the engine a turn. What a
chunk samples follows from the seed and the chunk's number, so an interrupted collection, which plays the chunk that it
was in again and writes what is missing, ends with the same file as one that ran through.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from drift import chat, store
from drift.engines import Engine, Sample
from drift.policy import Policy
from drift.tasks import Task, normalise, parse_answer
from drift.track import Bar, Track
from drift.types import Problem

FEEDBACK = "Incorrect. Please think again."


class Settings(Protocol):
    """How to play; `drift.config.RolloutConfig` is one, and `evaluate` makes another."""

    @property
    def turns(self) -> int: ...
    @property
    def temperature(self) -> float: ...
    @property
    def top_p(self) -> float: ...
    @property
    def max_new_tokens(self) -> int: ...
    @property
    def feedback(self) -> Literal["simple", "full"]: ...
    @property
    def history(self) -> Literal["keep", "template"]: ...


@dataclass(slots=True)
class Episode:
    """One trajectory while it is played, and after."""

    problem: Problem
    index: int  # among the trajectories of its problem
    messages: list[dict[str, str]]
    samples: list[dict[str, Any]] = field(default_factory=list)  # token ids, loss mask, log-probs, turn starts
    answers: list[str | None] = field(default_factory=list)  # of each turn, None where none could be parsed
    solved_at: int = 0  # the turn of the right answer, 0 for none

    def prompt(self, policy: Policy, history: str) -> list[int]:
        """Ids of the next turn's prompt."""
        if history == "template" or not self.samples:
            return chat.render(policy.tokenizer, self.messages, True)
        return chat.extend(policy, self.samples[-1]["token_ids"], self.messages)

    def take(self, prompt: list[int], sample: Sample, said: str, history: str) -> None:
        """Adds a sampled turn. One token sequence grows with `history` keep, one a turn is kept with template."""
        before = self.samples.pop() if self.samples and history == "keep" else None
        old = before or {"token_ids": [], "loss_mask": [], "logprobs": [], "turn_starts": []}
        new, gap = len(sample.token_ids), len(prompt) - len(old["token_ids"])
        self.samples.append(
            {
                "token_ids": prompt + sample.token_ids,
                "loss_mask": old["loss_mask"] + [0] * gap + [1] * new,
                "logprobs": old["logprobs"] + [0.0] * gap + sample.logprobs,
                "turn_starts": [*old["turn_starts"], len(prompt)],
            }
        )
        self.messages.append({"role": "assistant", "content": said})

    def row(self, format_penalty: float) -> dict[str, Any]:
        """The published fields, then ours (see `drift.store`); earlier turns of a template history beside the last."""
        keys = [f"t{turn}" for turn in range(1, len(self.answers) + 1)]
        right = [int(turn == self.solved_at) for turn in range(1, len(self.answers) + 1)]
        row = {
            "prompt_id": self.problem.id,
            "traj_idx": self.index,
            "messages": self.messages,
            "verifier": dict(zip(keys, right)),
            "turn_rewards": dict(zip(keys, map(float, right))),
            "answer_norms": [normalise(answer) for answer in self.answers if answer is not None],
            "format_penalty": format_penalty * self.answers.count(None) or 0.0,  # not -0.0
            "t_star": self.solved_at or None,
            **self.samples[-1],
        }
        return row if len(self.samples) == 1 else {**row, "earlier_turns": self.samples[:-1]}


def play(
    policy: Policy,
    engine: Engine,
    task: Task,
    jobs: Sequence[tuple[Problem, int]],
    settings: Settings,
    *,
    seed: Sequence[int],
    bar: Bar | None = None,
) -> list[Episode]:
    """Plays every (problem, trajectory index) to its first right answer or through `settings.turns`; in order.

    seed: numbers that all samples follow from. The bar advances by the trajectories that end.
    """
    episodes = [Episode(problem, i, [{"role": "user", "content": problem.prompt}]) for problem, i in jobs]
    live = episodes
    for turn in range(1, settings.turns + 1):
        prompts = [episode.prompt(policy, settings.history) for episode in live]
        samples = engine.generate(
            prompts,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=int(np.random.SeedSequence([*seed, turn]).generate_state(1)[0]),
        )
        for episode, prompt, sample in zip(live, prompts, samples):
            said = chat.decode(policy, sample.token_ids)
            episode.take(prompt, sample, said, settings.history)
            episode.answers.append(parse_answer(said, task.answer_tag))
        _verify(task, live, turn)
        still = [episode for episode in live if not episode.solved_at]
        if bar is not None:
            bar.advance(len(live) - (len(still) if turn < settings.turns else 0))
        live = still
        if turn == settings.turns or not live:
            break
        for episode in live:
            said = feedback(episode.problem, turn, settings.turns, settings.feedback)
            episode.messages.append({"role": "user", "content": said})
    return episodes


def _verify(task: Task, live: Sequence[Episode], turn: int) -> None:
    parsed = [(episode, answer) for episode in live if (answer := episode.answers[-1]) is not None]
    verdicts = task.verify_many([(episode.problem, answer) for episode, answer in parsed])
    for (episode, _), right in zip(parsed, verdicts):
        if right:
            episode.solved_at = turn


def feedback(problem: Problem, turn: int, turns: int, mode: str) -> str:
    """What a wrong answer in this turn gets; `full` also says which turn it was and repeats the first message (A1)."""
    return FEEDBACK if mode == "simple" else f"{FEEDBACK} This was turn {turn} of {turns}.\n\n{problem.prompt}"


def collect(
    policy: Policy,
    engine: Engine,
    task: Task,
    problems: Sequence[Problem],
    config: Any,
    path: str | Path,
    seed: int | Sequence[int],
    track: Track | None = None,
    prefix: str = "rollout",
) -> int:
    """`config.n` trajectories of each problem, appended to the rollout file `path`; returns how many were new.

    config: a `drift.config.RolloutConfig`. Goes on from what is in the file. Raises StoreError where a row of the file
    is bad, or was sampled by another policy than this one. Metrics of each chunk go to `track` as PREFIX/NAME.
    """
    track = track or Track(None, progress=False)
    who = {"temperature": config.temperature, "top_p": config.top_p, "policy_hash": policy.hash()}
    numbers = [seed] if isinstance(seed, int) else seed
    jobs = [(problem, index) for problem in problems for index in range(config.n)]
    with store.Writer(path) as writer, track.progress("rollouts", len(jobs)) as bar:
        if writer.done:
            store.check_policy(store.read(path), who["policy_hash"])
        before = len(writer.done)
        for number, first in enumerate(range(0, len(jobs), config.batch_size)):
            chunk = jobs[first : first + config.batch_size]
            missing = {(problem.id, index) for problem, index in chunk} - writer.done
            if not missing:
                bar.advance(len(chunk))
                continue
            start = time.perf_counter()
            episodes = play(policy, engine, task, chunk, config, seed=[*numbers, number], bar=bar)
            for episode in episodes:
                if (episode.problem.id, episode.index) in missing:
                    writer.write({**episode.row(config.format_penalty), **who})
            measured = _metrics(episodes, time.perf_counter() - start)
            track.log(number + 1, **{f"{prefix}/{key}": value for key, value in measured.items()})
        return len(writer.done) - before


def _metrics(episodes: Sequence[Episode], seconds: float) -> dict[str, float]:
    sampled = sum(sum(sample["loss_mask"]) for episode in episodes for sample in episode.samples)
    return {
        "solved": sum(episode.solved_at > 0 for episode in episodes) / len(episodes),
        "solved_first": sum(episode.solved_at == 1 for episode in episodes) / len(episodes),
        "turns": sum(len(episode.answers) for episode in episodes) / len(episodes),
        "unparsed": sum(episode.answers.count(None) for episode in episodes) / len(episodes),
        "tokens_per_second": sampled / seconds,
    }
