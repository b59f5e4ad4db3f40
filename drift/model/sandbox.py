"""Chat templates come with a model's folder: they are programs of strangers, and are run with bounds.

transformers renders them in jinja2's immutable sandbox. Here a rendering also ends after `SECONDS`, its output is at most
`LONGEST` letters, and templates that name huge numbers or powers, by which one expression fills the memory, are refused.
"""

from __future__ import annotations

import ctypes
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from jinja2 import Environment, TemplateError, nodes

SECONDS = 10.0  # for one rendering
LONGEST = 16_000_000  # letters of one rendering
LARGEST = 1_000_000  # number that a template may name


class ChatTemplateError(ValueError):
    """A chat template that cannot be used: it fails, takes too long, or writes too much."""


class _Late(Exception):
    pass


def render(tokenizer: Any, messages: Any, add_generation_prompt: bool) -> str:
    """`messages` through the chat template. Raises ChatTemplateError."""
    template = tokenizer.chat_template
    where = f"the chat template of {tokenizer.name_or_path!r}"
    if isinstance(template, str) and (refused := _too_large(template)):
        raise ChatTemplateError(f"{where} {refused}; set tokenizer.chat_template to one that does not")
    try:
        with deadline(SECONDS):
            shown = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except _Late:
        raise ChatTemplateError(
            f"{where} did not end within {SECONDS:g} seconds; take another model or template"
        ) from None
    except MemoryError:
        raise ChatTemplateError(f"{where} takes more memory than there is; take another model or template") from None
    except (
        TemplateError,
        TypeError,
        LookupError,
        AttributeError,
        ValueError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise ChatTemplateError(f"{where} says {' '.join(str(error).split())!r}; the messages must suit it") from error
    if len(shown) > LONGEST:
        raise ChatTemplateError(
            f"{where} wrote {len(shown):,} letters, more than {LONGEST:,}; take another model or template"
        )
    return shown


def set_defaults(tokenizer: Any, values: dict[str, Any]) -> None:
    """Gives variables of the chat template a value that holds unless a caller gives another; it is saved with the model.

    values: of JSON's simple types, by name. Raises ValueError for a string that is no name, and for a variable that the template
    does not read.
    """
    template = tokenizer.chat_template
    for name, value in values.items():
        if not name.isidentifier() or not re.search(rf"\b{name}\b", template):
            raise ValueError(
                f"model.chat_template_kwargs: the chat template of {tokenizer.name_or_path!r} reads no variable {name!r}"
            )
        literal = "none" if value is None else json.dumps(value, ensure_ascii=False)
        template = f"{{%- if {name} is not defined -%}}{{%- set {name} = {literal} -%}}{{%- endif -%}}{template}"
    tokenizer.chat_template = template


@lru_cache(maxsize=64)
def _too_large(template: str) -> str | None:
    """Why an expression of the template could fill the memory at one go."""
    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except TemplateError:
        return None  # of transformers' own tags, or of an error that the rendering tells
    for node in tree.find_all(nodes.Const):
        if isinstance(node.value, (int, float)) and abs(node.value) > LARGEST:
            return f"names the number {node.value!r} in line {node.lineno}, above {LARGEST:,}"
    power = next(iter(tree.find_all(nodes.Pow)), None)
    return None if power is None else f"takes a power in line {power.lineno}"


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raises _Late in this thread if its body takes longer. Python code ends; one long call of C code does not."""
    thread, lock, over = ctypes.c_ulong(threading.get_ident()), threading.Lock(), False

    def late() -> None:
        with lock:
            if not over:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(_Late))

    timer = threading.Timer(seconds, late)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        with lock:
            over = True
        ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, None)
