"""A base that half-solves its task: supervised training on made-up demonstrations, up to a target instead of for so long.

A demonstration is a dialogue that ends in the right answer. Before it come wrong ones, `wrong_share` of all that are
given, each followed by the feedback that a rollout gives and none given twice. Every assistant turn is trained, the
wrong ones too: so the base errs now and then, and tries something else when told so. `taught_share` of them show the
right answer in the first message, as a teacher's prompt does (`drift.online.reprompt`), and train the last turn alone, which
gives it: a model that cannot read a solution, or not after a wrong answer, has nothing to distil.

The target is checked by playing problems that no demonstration is made of, and that are in neither of the other splits.
Which demonstrations a step sees follows from the seed and the step's number; every check leaves a checkpoint.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from drift import files
from drift.config import Config, TrainConfig, WarmStartConfig
from drift.engines import Engine
from drift.model import chat
from drift.model.policy import Policy
from drift.online.reprompt import Lesson, rewrite
from drift.packing import pack
from drift.rollouts.environments import TOOLS
from drift.rollouts.rollout import default_environment, default_feedback, play
from drift.tasks import Task, TaskError
from drift.track import Track
from drift.training import checkpoint
from drift.training.optimizer import MasterAdamW
from drift.training.trainer import train_step
from drift.types import Problem, Trajectory

WARM_UP = 20  # steps over which the learning rate rises
NEAR = (1, -1, 2, -2, 10, -10, 9, -9, 11, -11, 20, -20)  # how far a made-up wrong number is off
_INTEGER = re.compile(r"-?\d+")


class WarmStartError(RuntimeError):
    """The target was not reached, or was jumped over."""


@dataclass
class WarmStart:
    """How a warm start went."""

    steps: int = 0
    solved: float = 0.0  # share of check problems solved within rollout.turns sampled turns, at the end
    checks: list[dict[str, float]] = field(default_factory=list)  # {"step", "solved", "single"}, one a check


def warm_start(
    policy: Policy, engine: Engine, task: Task, config: Config, folder: str | Path, track: Track | None = None
) -> WarmStart:
    """Trains `policy` in place until a check lies in [target_low, target_high]; saves it as a model in `folder`.

    A folder that holds a finished warm start is not run again, and `policy` is left alone: load it from there. One that
    was interrupted goes on from its last check. A check above target_high takes the training back to the one before,
    and checks twice as often from there. Raises WarmStartError if max_steps do not reach the target or a single step
    jumps over it, TaskError if the task has too few problems, CheckpointError if settings have changed.
    """
    folder, track = Path(folder), track or Track(None, progress=False)
    done = folder / "warm_start.json"
    if done.exists():
        try:
            return WarmStart(**json.loads(done.read_text(encoding="utf-8")))
        except (ValueError, TypeError, RecursionError):
            raise WarmStartError(
                f"{done} cannot be read; remove it, and the same command trains the base again"
            ) from None
    settings, check = config.warm_start, _Check(policy, engine, task, config)
    training = TrainConfig(lr=settings.lr, weight_decay=0.01, betas=(0.9, 0.98), backend=config.train.backend)
    optimizer = MasterAdamW(policy.model, training)
    job = {name: getattr(config, name).model_dump(mode="json") for name in ("warm_start", "task", "model")}
    result, every = WarmStart(), settings.check_every
    if (path := checkpoint.latest(folder, track.say)) is None:
        path = checkpoint.save(folder, 0, optimizer, {"result": asdict(result), "every": every}, job)
    else:
        _, state = checkpoint.load(path, optimizer, job)
        result, every = WarmStart(**state["result"]), state["every"]
    with track.progress(f"warm start to {settings.target_low:.0%} solved", None) as bar:
        bar.advance(result.steps)
        while result.solved < settings.target_low:
            until = min(result.steps + every, settings.max_steps)
            if until == result.steps:
                raise WarmStartError(_too_slow(result, settings))
            for step in range(result.steps, until):
                batch = demonstrations(policy, task, check.others, config, [config.task.seed, step])
                packs = pack(batch, training.max_tokens, turns="assistant")
                rate = settings.lr * min(1.0, (step + 1) / WARM_UP)
                outcome = train_step(policy, packs, optimizer, len(batch), training, lr=rate)
                track.log(step + 1, **{"warm_start/loss": outcome.loss, "warm_start/grad_norm": outcome.grad_norm})
                bar.advance(loss=outcome.loss)
            solved, single = check.run(until)
            track.log(until, **{"warm_start/solved": solved, "warm_start/single": single})
            bar.advance(0, solved=solved)
            if solved <= settings.target_high:
                result = WarmStart(until, solved, [*result.checks, {"step": until, "solved": solved, "single": single}])
                path = checkpoint.save(folder, until, optimizer, {"result": asdict(result), "every": every}, job)
            elif every == 1:
                raise WarmStartError(_jumped(until, solved, settings))
            else:
                bar.advance(result.steps - until)
                every //= 2
                checkpoint.load(path, optimizer, job)
    policy.save(folder)
    files.write(done, json.dumps(asdict(result), indent=1) + "\n")
    for old in folder.glob("checkpoint-*"):
        shutil.rmtree(old)
    return result


class _Check:
    """The problems that the target is checked on, and the others, which demonstrations are made of."""

    def __init__(self, policy: Policy, engine: Engine, task: Task, config: Config) -> None:
        problems, held_out = task.problems("warm"), config.warm_start.check_problems
        if len(problems) <= held_out:
            raise TaskError(
                f"task.warm_problems={len(problems)} leaves none to demonstrate beside warm_start.check_problems="
                f"{held_out}; raise the one or lower the other"
            )
        self._play = partial(
            play, policy, engine, task, [(problem, 0) for problem in problems[:held_out]], config.rollout
        )
        self.others = problems[held_out:]

    def run(self, step: int) -> tuple[float, float]:
        """(share solved within all turns, share solved in the first), sampled as rollouts are."""
        solved_at = [episode.solved_at for episode in self._play(seed=[step])]
        return sum(at > 0 for at in solved_at) / len(solved_at), sum(at == 1 for at in solved_at) / len(solved_at)


def demonstrations(
    policy: Policy, task: Task, problems: Sequence[Problem], config: Config, seed: Sequence[int]
) -> list[Trajectory]:
    """`warm_start.batch_size` dialogues about problems drawn from `problems`, ready to pack; they follow from `seed`."""
    draw = np.random.default_rng(seed)
    made = []
    for index, number in enumerate(draw.integers(len(problems), size=config.warm_start.batch_size).tolist()):
        problem, share = problems[number], config.warm_start.taught_share
        messages = _dialogue(problem, task, problems, config, draw)
        taught = share > 0 and draw.random() < share  # nothing is drawn where it is off
        if taught:
            messages = rewrite(messages, Lesson(f"<{task.answer_tag}>{problem.answer}</{task.answer_tag}>"))
        row = {"prompt_id": problem.id, "messages": messages}
        [trajectory] = chat.to_trajectories(policy, row, index=index, turns="assistant")
        made.append(replace(trajectory, turns=trajectory.turns[-1:]) if taught else trajectory)
    return made


def _dialogue(
    problem: Problem, task: Task, problems: Sequence[Problem], config: Config, draw: np.random.Generator
) -> list[dict[str, str]]:
    """Wrong answers by chance, then the right one, in at most `rollout.turns` turns; or a tool call and the right one."""
    tag, turns, given = task.answer_tag, config.rollout.turns, [problem.answer]
    messages = list(default_environment(task, config.rollout).reset(problem))
    share, tool = config.warm_start.tool_share, config.rollout.tool
    if tool is not None and draw.random() < share:
        call = {"role": "assistant", "content": f"<tool_call>{_expression(problem)}</tool_call>"}
        messages += [call, {"role": "tool", "content": TOOLS[tool](_expression(problem))}]
        turns = 1
    for turn in range(1, turns + 1):
        if turn == turns or draw.random() >= config.warm_start.wrong_share:
            break
        given.append(_wrong(problem, given, problems, draw))
        said = default_feedback(task, config.rollout)(problem, turn)
        messages += [{"role": "assistant", "content": f"<{tag}>{given[-1]}</{tag}>"}, {"role": "user", "content": said}]
    return [*messages, {"role": "assistant", "content": f"<{tag}>{problem.answer}</{tag}>"}]


def _expression(problem: Problem) -> str:
    """What the generator says that the problem works out."""
    expression = problem.metadata.get("metadata", {}).get("expression")
    if not isinstance(expression, str):
        raise TaskError(
            f"problem {problem.id} ({problem.prompt!r}) has no expression to show a tool with; set warm_start.tool_share=0"
        )
    return expression


def _wrong(problem: Problem, given: Sequence[str], problems: Sequence[Problem], draw: np.random.Generator) -> str:
    """A number near the right one, or another problem's answer; not given before."""
    for _ in range(100):
        if _INTEGER.fullmatch(problem.answer):
            answer = str(int(problem.answer) + NEAR[draw.integers(len(NEAR))])
        else:
            answer = problems[int(draw.integers(len(problems)))].answer
        if answer not in given:
            return answer
    raise TaskError(f"problem {problem.id} ({problem.prompt!r}): found no wrong answer to demonstrate beside {given}")


def _too_slow(result: WarmStart, settings: WarmStartConfig) -> str:
    return (
        f"warm_start.max_steps={settings.max_steps} is reached with {result.solved:.0%} of the check problems solved, "
        f"below target_low={settings.target_low:.0%}; raise max_steps or lr, choose easier task.options, or lower "
        "target_low"
    )


def _jumped(step: int, solved: float, settings: WarmStartConfig) -> str:
    return (
        f"at step {step} the share of check problems solved jumps to {solved:.0%}, from below target_low="
        f"{settings.target_low:.0%} past target_high={settings.target_high:.0%}, in a single step; lower warm_start.lr, "
        "raise check_problems, or widen the target"
    )
