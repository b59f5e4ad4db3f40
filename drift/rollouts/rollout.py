"""The multi-turn loop (A1): ask, have the environment answer, ask again; and its rows, written as they are finished.

Trajectories are played in chunks of `rollout.batch_size`, all live ones of a chunk in one call of the engine a turn. The
samples of a chunk follow from the seed and the chunk's number. An interrupted collection plays its last chunk again and
writes the missing rows, so it ends with the same file as one without an interruption.
"""

from __future__ import annotations

import hashlib
import math
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from drift import store
from drift.engines import Engine, Sample, remembering
from drift.model import chat
from drift.model.policy import Policy
from drift.rollouts.environments import (
    TOOLS,
    Environment,
    Step,
    ToolEnvironment,
    VerifyEnvironment,
    load_environment,
)
from drift.rollouts.failures import CheckError, Failures
from drift.rollouts.feedback import FEEDBACK, Feedback
from drift.rollouts.resume import forget_corrected
from drift.tasks import PARSERS, Framing, Task, normalise, parse_answer
from drift.tasks.parsing import OPEN
from drift.track import Bar, Track
from drift.training.meter import Stopwatch
from drift.types import Problem

__all__ = ["FEEDBACK", "Episode", "Settings", "collect", "default_environment", "default_feedback", "framing", "play"]


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
    @property
    def tool(self) -> str | None: ...
    @property
    def tool_calls(self) -> int: ...  # an episode's, at most
    @property
    def environment(self) -> str | None: ...  # module:Class, in place of the verifier


@dataclass(slots=True)
class Episode:
    """One trajectory while it is played, and after."""

    problem: Problem
    index: int  # among the trajectories of its problem
    messages: list[dict[str, str]]
    samples: list[dict[str, Any]] = field(default_factory=list)  # token ids, loss mask, log-probs, turn starts
    answers: list[str | None] = field(default_factory=list)  # of each attempt, None if none could be parsed
    rewards: list[float] = field(default_factory=list)  # of each attempt
    solved_at: int = 0  # the attempt that was right first, 0 for none
    tool_calls: int = 0  # turns of tool calls are no attempts
    tool_errors: int = 0
    failed: int = 0  # checks of its turns without a verdict
    opened: str = ""  # the beginning that the template gives the present turn: <think>, or nothing
    cut: bool = False  # the last turn ran into max_new_tokens
    ended: bool = False

    @property
    def reply(self) -> str:
        """The last turn."""
        return self.messages[-1]["content"]

    @property
    def turn(self) -> int:
        """The number of the attempt that is being made, from 1."""
        return len(self.rewards) + 1

    def prompt(self, prompts: chat.Prompts, history: str, prefill: Sequence[int] = ()) -> list[int]:
        """Ids of the next turn's prompt, up to and with the prefill."""
        if history == "template" or not self.samples:
            ids = prompts.render(self.messages)
        else:
            ids = prompts.extend(self.samples[-1]["token_ids"], self.messages)
        self.opened = OPEN if prompts.policy.tokenizer.decode(ids[-8:]).rstrip().endswith(OPEN) else ""
        return [*ids, *prefill]

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
        self.cut = not sample.finished

    def answered(self, step: Step, turns: int) -> None:
        """Adds the environment's step on the last turn; the attempt number `turns` is the last one.

        Raises ValueError for a step that is not done and has no messages, speaks as the assistant, or has a reward that is
        not finite, and for a turn of tool calls with an outcome.
        """
        if any(message["role"] == "assistant" for message in step.messages) or not math.isfinite(step.reward):
            raise ValueError(
                f"environment: {step} must have a finite reward, and messages of other roles than assistant"
            )
        if step.tool_calls:
            if step.reward or step.done:
                raise ValueError(
                    f"environment: {step} is a turn of tool calls, which has no reward and ends no episode"
                )
            self.tool_calls += step.tool_calls
            self.tool_errors += step.tool_errors
            self.failed += bool(step.failed)
        else:
            self.failed += bool(step.failed)
            self.answers.append(step.answer)
            self.rewards.append(float(step.reward))
            if step.reward >= 1 and not self.solved_at:
                self.solved_at = len(self.rewards)
        self.ended = step.done or len(self.rewards) == turns
        if not self.ended and not step.messages:
            raise ValueError(f"environment: {step} is not done and has no messages; it must have at least one")
        if not self.ended:
            self.messages.extend(step.messages)

    def row(self, format_penalty: float) -> dict[str, Any]:
        """The published fields, then ours (see `drift.store`); with a template history the earlier turns too."""
        keys = [f"t{turn}" for turn in range(1, len(self.rewards) + 1)]
        row = {
            "prompt_id": self.problem.id,
            "traj_idx": self.index,
            "messages": self.messages,
            "verifier": {key: int(reward >= 1) for key, reward in zip(keys, self.rewards)},
            "turn_rewards": dict(zip(keys, self.rewards)),
            "answer_norms": [normalise(answer) for answer in self.answers if answer],
            "format_penalty": format_penalty * self.answers.count(None) or 0.0,  # not -0.0
            "t_star": self.solved_at or None,
            **self.samples[-1],
        }
        if self.tool_calls:
            row |= {"tool_calls": self.tool_calls, "tool_errors": self.tool_errors}
        if self.failed:
            row["failed_checks"] = self.failed
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
    environment: Environment | None = None,
    failures: Failures | None = None,
) -> list[Episode]:
    """Plays every (problem, trajectory index) to its end: its environment's, or `settings.turns` attempts; in order.

    seed: numbers that all samples follow from; each trajectory draws for itself, by its problem's identity and its index,
    whatever is played with it. The bar advances by the trajectories that end. environment: default the one that the
    settings name. failures: counts checks without a verdict; default a count of these episodes alone. Raises CheckError
    when they are too many or the environment raises, ValueError if its answer cannot be continued, and when the chat
    template does not know tool messages.
    """
    if settings.tool is not None:
        chat.check_role(policy.tokenizer, "tool")
    environment, frame = environment or default_environment(task, settings), framing(task)
    failures = failures or Failures(frame.max_failed)
    prefill = chat.encode(policy.tokenizer, frame.prefill) if frame.prefill else []
    episodes = [Episode(problem, index, list(environment.reset(problem))) for problem, index in jobs]
    live = episodes
    with remembering(engine):
        for number in range(1, settings.turns + settings.tool_calls + 1):
            asked = chat.Prompts(policy)
            prompts = [episode.prompt(asked, settings.history, prefill) for episode in live]
            samples = engine.generate(
                prompts,
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                top_p=settings.top_p,
                seed=[_seed(seed, episode, number) for episode in live],
            )
            for episode, prompt, sample in zip(live, prompts, samples):
                episode.take(prompt, sample, frame.prefill + chat.decode(policy, sample.token_ids), settings.history)
            steps = _stepped(environment, live)
            if len(steps) != len(live):
                raise ValueError(f"environment: {len(steps)} steps for {len(live)} episodes; there must be one each")
            for episode, step in zip(live, steps):
                episode.answered(step, settings.turns)
            failures.add([step.failed for step in steps])
            still = [episode for episode in live if not episode.ended]
            if bar is not None:
                bar.advance(len(live) - len(still))
            live = still
            if not live:
                break
    for episode in live:  # of an environment that takes more calls than the settings allow: the last turn stays last
        while episode.messages[-1]["role"] != "assistant":
            episode.messages.pop()
    if bar is not None:
        bar.advance(len(live))
    return episodes


def _seed(seed: Sequence[int], episode: Episode, number: int) -> int:
    """The seed of a trajectory's turn."""
    problem = int.from_bytes(hashlib.sha256(episode.problem.id.encode()).digest()[:8], "little")
    return int(np.random.SeedSequence([*seed, problem, episode.index, number]).generate_state(1)[0])


def _stepped(environment: Environment, live: Sequence[Episode]) -> list[Step]:
    try:
        return environment.step(live)
    except Exception as error:  # the user's code, on text that a model wrote
        raise CheckError(
            f"{type(environment).__name__}.step failed on a batch of {len(live)} episodes:\n{traceback.format_exc().rstrip()}"
        ) from error


def framing(task: Task) -> Framing:
    """The text around the task's problems and the reading of replies; a task without a framing adds nothing."""
    return getattr(task, "framing", Framing())


def default_feedback(task: Task, settings: Settings) -> Feedback:
    """The reply to a wrong answer under these settings."""
    rule = framing(task).format_rule
    return Feedback(settings.feedback, settings.turns, settings.max_new_tokens, task.answer_tag, rule)


def default_environment(task: Task, settings: Settings) -> Environment:
    """The environment that the settings name; else the verifier with its feedback, and the tool that they name."""
    if settings.environment is not None:
        return load_environment(settings.environment)(task, settings)
    frame, said = framing(task), default_feedback(task, settings)
    parse = parse_answer if frame.parser == "lenient" else PARSERS[frame.parser]
    if settings.tool is None:
        return VerifyEnvironment(task, settings.turns, said, parse, frame.cut_answers)
    options: dict[str, Any] = {"tool": TOOLS[settings.tool], "calls": settings.tool_calls}
    return ToolEnvironment(task, settings.turns, said, parse, frame.cut_answers, **options)


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
    environment: Environment | None = None,
) -> int:
    """`config.n` trajectories of each problem, appended to the rollout file `path`; returns how many were new.

    config: a `drift.config.RolloutConfig`. Continues from the rows in the file. Raises StoreError if a row of the
    file is bad, or was sampled by another policy than this one, CheckError if too many checks have no verdict. Rows about a
    problem whose answer has changed since are sampled and verified again. Metrics of each chunk go to `track` as
    PREFIX/NAME.
    """
    track = track or Track(None, progress=False)
    who = {"temperature": config.temperature, "top_p": config.top_p, "policy_hash": policy.hash()}
    numbers = [seed] if isinstance(seed, int) else seed
    jobs = [(problem, index) for problem in problems for index in range(config.n)]
    failures = Failures(framing(task).max_failed)
    if changed := forget_corrected(path, problems):
        track.say(
            f"{path}: {changed} trajectories were checked against answers that have changed; they are sampled again"
        )
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
            watch = Stopwatch()
            options: dict[str, Any] = {"seed": [*numbers, number], "bar": bar, "environment": environment}
            options["failures"] = failures
            episodes = play(policy, engine, task, chunk, config, **options)
            measured = _metrics(episodes, watch.read())
            if environment is not None or config.tool is not None:
                measured |= tool_metrics([(episode.tool_calls, episode.tool_errors) for episode in episodes])
            track.log(number + 1, **{f"{prefix}/{key}": value for key, value in measured.items()})
            for episode in episodes:  # after the metrics: a chunk whose rows are all there is not played again
                if (episode.problem.id, episode.index) in missing:
                    writer.write({**episode.row(config.format_penalty), **who})
        if failures.failed:
            track.say(f"{failures.failed} of {failures.checks} checks have no verdict; they count as wrong")
        return len(writer.done) - before


def _metrics(episodes: Sequence[Episode], took: dict[str, float]) -> dict[str, float]:
    sampled = sum(sum(sample["loss_mask"]) for episode in episodes for sample in episode.samples)
    return {
        "solved": sum(episode.solved_at > 0 for episode in episodes) / len(episodes),
        "solved_first": sum(episode.solved_at == 1 for episode in episodes) / len(episodes),
        "turns": sum(len(episode.answers) for episode in episodes) / len(episodes),
        "unparsed": sum(episode.answers.count(None) for episode in episodes) / len(episodes),
        "failed_checks": float(sum(episode.failed for episode in episodes)),
        "tokens_per_second": sampled / took["step_time"],
        **took,
    }


def tool_metrics(counts: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Means over trajectories, each given as (calls, errors among them)."""
    calls, errors = sum(calls for calls, _ in counts), sum(errors for _, errors in counts)
    return {
        "tool_calls": calls / len(counts),
        "tool_errors": errors / len(counts),
        "tool_users": sum(calls > 0 for calls, _ in counts) / len(counts),
    }
