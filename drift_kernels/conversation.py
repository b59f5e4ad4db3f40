"""Which tokens of a conversation are trained: drawn, and checked. For any trainer: it takes ids and labels, or a mask.

    batch = next(iter(trainer.get_train_dataloader()))
    print(check_trained(batch["input_ids"], batch["labels"], tokenizer.decode,
                        markers=role_markers(tokenizer), eos=tokenizer.eos_token_id))

A turn begins where the ids that begin a turn of its role do. Left out: rendering messages, which is the template's; what
counts here is what the trainer is given.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

GREEN, GREY, RED, END = "\033[32m", "\033[90m", "\033[41m", "\033[0m"
ROLES = ("system", "user", "assistant", "tool")

Decode = Callable[[list[int]], str]
Markers = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Row:
    """One conversation: its ids, which of them are trained, whose turn each is in (None: not known), and what is wrong."""

    ids: list[int]
    trained: list[bool]
    roles: list[str | None]
    problems: tuple[str, ...]
    begins: frozenset[int] = frozenset()  # places where a turn's marker stands


def show_trained(ids: Any, labels: Any, decode: Decode, *, colour: bool | None = None, **options: Any) -> str:
    """Every conversation as text: trained tokens green (without colour: in ⟦ ⟧), what must not be trained on red.

    colour: None has it on a terminal alone. The other arguments are `check_trained`'s; nothing is raised, problems stand
    below their conversation.
    """
    rows = inspect_rows(ids, labels, **options)
    allowed = options.get("trained_roles", ("assistant",))
    return "\n".join(_drawn(number, row, decode, colour, allowed) for number, row in enumerate(rows))


def check_trained(ids: Any, labels: Any, decode: Decode, *, colour: bool | None = None, **options: Any) -> str:
    """As `show_trained`, once nothing is wrong; else ValueError with the conversations where something is.

    ids       [B, L] tensor, a list of rows, or [1, T] with `cu_seqlens` [S + 1] where conversations lie end to end
    labels    of the same shape: a mask (bool, or 0 and 1), or the id where trained and `ignore_index` elsewhere, not shifted
    decode    ids → text, a tokenizer's own
    markers   {role: the ids that a turn of it begins with}, as `role_markers` makes them; None: roles are not checked
    trained_roles  whose tokens may be trained ("assistant")
    eos       the id, or the ids, that a trained turn ends with; None: not checked
    attention_mask  of the shape of ids: 0 where nothing is

    Wrong is: a conversation that trains nothing; a trained token in a turn of another role; a trained turn (without
    markers: a run of trained tokens) that does not end with a trained `eos`; a label that is another token than the one in
    its place.
    """
    rows = inspect_rows(ids, labels, **options)
    allowed = options.get("trained_roles", ("assistant",))
    wrong = [number for number, row in enumerate(rows) if row.problems]
    if wrong:
        drawn = "\n".join(_drawn(number, rows[number], decode, colour, allowed) for number in wrong)
        raise ValueError(f"{len(wrong)} of {len(rows)} conversations are not trained as they should be:\n{drawn}")
    return "\n".join(_drawn(number, row, decode, colour, allowed) for number, row in enumerate(rows))


def inspect_rows(
    ids: Any,
    labels: Any,
    *,
    markers: Markers | None = None,
    trained_roles: Collection[str] = ("assistant",),
    eos: int | Collection[int] | None = None,
    attention_mask: Any = None,
    cu_seqlens: Any = None,
    ignore_index: int = -100,
) -> list[Row]:
    """What `check_trained` looks at. Raises ValueError for shapes that do not fit, or markers without one of `trained_roles`."""
    if markers is not None and not all(len(marker) for marker in markers.values()):
        raise ValueError(f"markers {dict(markers)} should have an id each, at least: nothing stands everywhere")
    if markers is not None and not set(trained_roles) <= markers.keys():
        raise ValueError(
            f"markers are of {sorted(markers)}, but {sorted(trained_roles)} may be trained: name those too"
        )
    ends = {eos} if isinstance(eos, int) else set(eos or ())
    inspected = []
    ids, labels, kept_in = _same_shape(ids, labels, attention_mask)
    if _is_mask(ids, labels):
        labels = [row.bool() for row in labels]
    for row, marks, mask in zip(*(_rows(t, cu_seqlens) for t in (ids, labels, kept_in))):
        kept = mask.bool()
        row, marks = row[kept], marks[kept]
        trained = marks if marks.dtype == torch.bool else marks != ignore_index
        problems = []
        if marks.dtype != torch.bool and bool((marks != row)[trained].any()):
            problems.append("labels are other tokens than those in their places (shifted already?)")
        roles, begins = _roles(row.tolist(), markers or {})
        example = Row(row.tolist(), trained.tolist(), roles, (), begins)
        problems += _problems(example, set(trained_roles), ends)
        inspected.append(replace(example, problems=tuple(problems)))
    return inspected


def role_markers(tokenizer: Any, roles: Sequence[str] = ROLES) -> dict[str, list[int]]:
    """{role: ids that a turn of it begins with}, read off a tokenizer's chat template: the first line that stands before it.

    Left out are roles that the template refuses, ignores, or shows as another (a tool's turns often are a user's). Raises
    ValueError if user or assistant turns have no beginning of their own; then `markers` are the caller's to name. An error
    other than the template's refusal is raised as it is: a tokenizer without a template, say.
    """
    markers: dict[str, list[int]] = {}
    for role in sorted(roles, key=lambda role: role not in ("user", "assistant")):  # others may look like a user
        before = {"system": [], "assistant": [("user", "QZA")]}.get(role, [("user", "QZA"), ("assistant", "QZB")])
        messages = [{"role": name, "content": text} for name, text in (*before, (role, "QZC"))]
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False)
        except _refusals():
            continue
        head = text.partition("QZC")[0]
        for end in [tokenizer.eos_token, *(text for _, text in before)]:
            head = head.rpartition(end)[2] if end else head
        line = head.strip().partition("\n")[0]
        ids = tokenizer.encode(line, add_special_tokens=False)
        if ids and ids not in markers.values():
            markers[role] = ids
    if not {"user", "assistant"} <= markers.keys():
        raise ValueError(
            f"the chat template begins turns with {markers}: not user and assistant; name `markers` yourself"
        )
    return markers


def _refusals() -> tuple[type[Exception], ...]:
    """The error by which a chat template refuses a role; jinja2 is loaded if a template has run."""
    jinja2 = sys.modules.get("jinja2")
    return () if jinja2 is None else (jinja2.TemplateError,)


def _same_shape(ids: Any, labels: Any, mask: Any) -> tuple[list[Tensor], ...]:
    """The three as lists of rows; a missing mask is all ones."""
    ids, labels = ([torch.as_tensor(row) for row in values] for values in (ids, labels))
    mask = [torch.ones_like(row) for row in ids] if mask is None else [torch.as_tensor(row) for row in mask]
    shapes = [[tuple(row.shape) for row in values] for values in (ids, labels, mask)]
    if shapes[0] != shapes[1] or shapes[0] != shapes[2] or any(len(shape) != 1 for shape in shapes[0]):
        raise ValueError(
            f"ids, labels and attention_mask have rows of {shapes[0]}, {shapes[1]} and {shapes[2]}; one shape"
        )
    return ids, labels, mask


def _is_mask(ids: list[Tensor], labels: list[Tensor]) -> bool:
    """Whether labels are 0 and 1, as TRL's and verl's masks are, while ids are not."""
    binary = all(bool(((row == 0) | (row == 1)).all()) for row in labels)
    return binary and not all(torch.equal(a, b) for a, b in zip(ids, labels))


def _rows(rows: list[Tensor], cu_seqlens: Any) -> list[Tensor]:
    if cu_seqlens is None:
        return rows
    if len(rows) != 1:
        raise ValueError(f"cu_seqlens is for one flattened row, not {len(rows)}")
    edges = torch.as_tensor(cu_seqlens).tolist()
    if edges != sorted(edges) or [edges[0], edges[-1]] != [0, len(rows[0])]:
        raise ValueError(f"cu_seqlens {edges} should rise from 0 to the {len(rows[0])} tokens of the row")
    return list(rows[0].split(torch.tensor(edges).diff().tolist()))


def _roles(ids: list[int], markers: Markers) -> tuple[list[str | None], frozenset[int]]:
    """Of each token, the role of the last marker at or before it; and where markers begin."""
    roles: list[str | None] = []
    begins, current = set(), None
    for place in range(len(ids)):
        for role, marker in markers.items():
            if ids[place : place + len(marker)] == list(marker):
                current = role
                begins.add(place)
        roles.append(current)
    return roles, frozenset(begins)


def _problems(row: Row, allowed: set[str], ends: set[int]) -> Iterator[str]:
    if not any(row.trained):
        yield "nothing is trained"
    trained_roles = [role for role, trained in zip(row.roles, row.trained) if trained and role is not None]
    for role in dict.fromkeys(role for role in trained_roles if role not in allowed):
        yield f"{trained_roles.count(role)} trained tokens are in a turn of {role}"
    for start, stop in _turns(row) if ends else ():
        last = max(place for place in range(start, stop) if row.trained[place])
        if row.ids[last] not in ends:
            yield f"the turn at tokens {start} to {stop - 1} is trained up to id {row.ids[last]}, which does not end it"


def _turns(row: Row) -> Iterator[tuple[int, int]]:
    """[start, stop) of stretches with a trained token: turns of a role, or where roles are not known runs of trained tokens."""
    by_role = any(role is not None for role in row.roles)
    keys = row.roles if by_role else row.trained
    start = 0
    for place in range(1, len(keys) + 1):
        if place == len(keys) or keys[place] != keys[start] or place in row.begins:
            if any(row.trained[start:place]):
                yield start, place
            start = place


def _drawn(number: int, row: Row, decode: Decode, colour: bool | None, allowed: Collection[str]) -> str:
    """Token by token, so that bytes of a character split over tokens show as they are."""
    colour = sys.stdout.isatty() if colour is None else colour
    out, before = [f"[{number}] "], None
    for token, trained, role in zip(row.ids, row.trained, row.roles):
        bad = trained and role is not None and role not in allowed
        style = RED if bad else GREEN if trained else GREY
        if colour and style != before:
            out.append((END if before else "") + style)
        if not colour and (style != GREY) != (before not in (None, GREY)):
            out.append("⟦" if style != GREY else "⟧")
        out.append(decode([token]))
        before = style
    if colour:
        out.append(END)
    elif before not in (None, GREY):
        out.append("⟧")
    out.append("".join(f"\n    wrong: {problem}" for problem in row.problems))
    return "".join(out)
