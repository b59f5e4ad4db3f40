"""`drift doctor CONFIG`: the template's tokens, a conversation with its masks, and whether the longest one fits.

The model's weights are not read: its shape, its tokenizer and its generation settings are enough.
"""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from drift.config import Config
from drift.jobs import lengths
from drift.jobs.work import prepare
from drift.model import chat, tiny
from drift.model.policy import Policy
from drift.model.sandbox import set_defaults
from drift.rollouts.rollout import default_environment, default_feedback, framing
from drift.tasks import Task
from drift.types import Problem

SHOWN = 700  # characters of a prompt


def show(config: Config) -> bool:
    """Prints all of it; False when something must be changed before a run. Raises what loading raises."""
    console = Console()
    work = prepare(config)
    try:
        policy, problem = shape(config), work.task.problems("train")[0]
        _facts(console, "turns", tokens(policy))
        console.print(Text("an example of two turns: ").append_text(_legend()))
        console.print(example(policy, work.task, problem, config), soft_wrap=True)
        console.print()
        found = lengths.measure(policy, work.task, work.task.problems("train"), config)
        must, should = lengths.complaints(found, config)
        sizes = [("training problems", f"{len(work.task.problems('train'))}")]
        for name, (_, problems) in work.evaluations.items():
            sizes.append((f"evaluation {name}".strip(), f"{len(problems)}"))
        sizes += [("longest", f"{found} tokens"), ("train.max_length", str(config.train.longest))]
        sizes += [("positions", str(found.positions or "the model does not say"))]
        _facts(console, "lengths", sizes)
        for text, style in [*((text, "bold red") for text in must), *((text, "yellow") for text in should)]:
            console.print(Text(f"{'wrong' if style == 'bold red' else 'warning'}: {text}", style), soft_wrap=True)
        if not must and not should:
            console.print(Text("the longest conversation fits", "green"))
        return not must
    finally:
        work.close()


def shape(config: Config) -> Policy:
    """The config's policy without its weights: on torch's meta device."""
    if config.model.path is None:
        tokenizer = tiny.build_tokenizer()
        with torch.device("meta"):
            model: Any = tiny.build_model(config.model, tokenizer, 0, "sdpa")
    else:
        path = config.model.path
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path, trust_remote_code=False))
        try:
            model.generation_config = GenerationConfig.from_pretrained(path)
        except OSError:  # a model without such a file
            model.generation_config = GenerationConfig.from_model_config(model.config)
    set_defaults(tokenizer, config.model.chat_template_kwargs)
    return Policy(model, tokenizer)


def tokens(policy: Policy) -> list[tuple[str, str]]:
    """What opens and closes a turn, what is trained of it, and what stops sampling."""
    turns, tokenizer = policy.turns, policy.tokenizer
    spelled = {token: tokenizer.decode([token]) for token in sorted(policy.eos_ids | turns.ends | {turns.closer})}
    return [
        ("opens", repr(turns.opening)),
        ("closes", f"{spelled[turns.closer]!r} ({turns.closer}); it is trained, as the last token of the turn"),
        ("then", repr(turns.between)),
        ("stops sampling", ", ".join(f"{spelled[token]!r} ({token})" for token in sorted(policy.eos_ids))),
        ("may not be spelled", ", ".join(map(repr, turns.control[:12])) + (" …" if len(turns.control) > 12 else "")),
    ]


def example(policy: Policy, task: Task, problem: Problem, config: Config) -> Text:
    """A wrong answer, feedback, and the right one, with what is trained in colour."""
    tokenizer, frame = policy.tokenizer, framing(task)
    environment, told = default_environment(task, config.rollout), default_feedback(task, config.rollout)
    messages, text = list(environment.reset(problem)), Text()
    ids = [*chat.render(tokenizer, messages, True), *_ids(tokenizer, frame.prefill)]
    text.append(_cut(tokenizer.decode(ids)), "dim")
    every = config.train.turns == "assistant" or config.online is not None
    for turn, answer in enumerate(("0", problem.answer or "1"), 1):
        said = _reply(answer, task.answer_tag, config.task.parser, frame.prefill)
        sampled = [*_ids(tokenizer, said), policy.turns.closer]
        text.append(tokenizer.decode(sampled), "bold green" if every or turn == 2 else "cyan")
        ids += sampled
        messages.append({"role": "assistant", "content": frame.prefill + said})
        if turn == 1:
            messages.append({"role": "user", "content": told(problem, 1)})
            more = [*chat.extend(policy, ids, messages)[len(ids) :], *_ids(tokenizer, frame.prefill)]
            text.append(tokenizer.decode(more), "dim")
            ids += more
    return text


def _reply(answer: str, tag: str, parser: str, prefill: str) -> str:
    thinking = "" if "<think>" in prefill else "<think>"
    said = answer if parser == "whole" else f"<{tag}>{answer}</{tag}>"
    return f"{thinking}…</think>{said}" if parser == "strict" or "<think>" in prefill else said


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} […] {text[-SHOWN // 2 :]}"


def _legend() -> Text:
    kinds = {"prompt, template, feedback": "dim", "sampled, not trained": "cyan", "trained": "bold green"}
    return Text("  ").join(Text(what, style) for what, style in kinds.items())


def _facts(console: Console, title: str, facts: list[tuple[str, str]]) -> None:
    table = Table(title=title, title_justify="left", box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for what, value in facts:
        table.add_row(Text(what), Text(value))
    console.print(table)
    console.print()
