"""Conversations as token ids. What was sampled is never tokenised again: a later prompt is the ids so far plus what the
chat template puts between one assistant turn and the next.

The text that a template adds after an assistant turn is found by rendering the conversation with a marker in place of
that turn: whatever the template does with earlier turns (some drop old thinking) does not touch ids already sampled.

Turns are begun and ended by the template and by the model alone: where a prompt, feedback or a tool's result spells a
special token, such as <|im_end|>, it is given to the model as the letters that it is made of. So it is in all messages of
a row without token ids: what it spells cannot be told from what was sampled.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

from drift.model import sandbox
from drift.model.policy import Policy
from drift.model.sandbox import ChatTemplateError
from drift.model.turns import Turns
from drift.types import Trajectory, Turn

Messages = list[dict[str, Any]]
_MARK = "\u2402turn\u2403"


def text(tokenizer: Any, messages: Messages, add_generation_prompt: bool = False) -> str:
    """`messages` through the chat template."""
    return sandbox.render(tokenizer, messages, add_generation_prompt)


def encode(tokenizer: Any, rendered: str) -> list[int]:
    """Ids of text that already holds its special tokens."""
    return tokenizer(rendered, add_special_tokens=False)["input_ids"]


def render(tokenizer: Any, messages: Messages, add_generation_prompt: bool = False) -> list[int]:
    """`messages` as ids, with the opening of an assistant turn (and a template's prefill) at the end if wanted."""
    quoted, mark = _quoted(tokenizer, messages)
    return _encode_quoted(tokenizer, text(tokenizer, quoted, add_generation_prompt), mark)


def _quoted(tokenizer: Any, messages: Messages, *, assistant: bool = False) -> tuple[Messages, str]:
    """The messages with a mark on either side of each control token that others than the assistant spell, and the mark.

    All text is searched: content, whole or in parts, names, roles, reasoning, tool calls. `assistant`: the assistant's
    messages too.
    """
    mark = _absent(messages)
    control = re.compile("|".join(map(re.escape, Turns.of(tokenizer).control)) or "(?!)")

    def quote(value: Any) -> Any:
        if isinstance(value, str):
            return control.sub(lambda found: f"{mark}{found[0]}{mark}", value)
        if isinstance(value, dict):
            return {quote(key): quote(item) for key, item in value.items()}
        return [quote(item) for item in value] if isinstance(value, list) else value

    return [quote(m) if assistant or m["role"] != "assistant" else m for m in messages], mark


def _encode_quoted(tokenizer: Any, rendered: str, mark: str) -> list[int]:
    """Ids of what was rendered from `_quoted` messages."""
    return [i for start, piece, spelled in _pieces(rendered, mark) for i in _spans(tokenizer, piece, spelled, start)[0]]


def _pieces(rendered: str, mark: str) -> Iterator[tuple[int, str, bool]]:
    """Where each piece between marks begins, the piece, and whether it spells a special token."""
    start, parts = 0, rendered.split(mark)
    if len(parts) % 2 == 0:
        raise ChatTemplateError("the chat template cuts a message inside a control token that the message spells")
    for place, piece in enumerate(parts):
        if piece:
            yield start, piece, place % 2 == 1
        start += len(piece) + len(mark)


def _spans(tokenizer: Any, piece: str, spelled: bool, start: int) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids of a piece and where in the rendering each stands; `spelled`: as letters, whatever token the piece is."""
    parts = [(0, piece)] if not spelled else [(0, piece[:1]), (1, piece[1:])]  # in two, no token is whole
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    for shift, part in parts:
        options = {"add_special_tokens": False, "split_special_tokens": spelled, "return_offsets_mapping": True}
        encoded = tokenizer(part, **options)
        ids += encoded["input_ids"]
        offsets += [(start + shift + a, start + shift + b) for a, b in encoded["offset_mapping"]]
    return ids, offsets


def _absent(messages: Messages) -> str:
    """Text that no message holds, so that it can mark a place."""
    marks = (f"\u2402{number}\u2403" for number in count())
    return next(mark for mark in marks if mark not in repr(messages))


def decode(policy: Policy, ids: Sequence[int]) -> str:
    """A sampled turn as text, without the token that ends it."""
    ids = list(ids)
    if ids and ids[-1] in policy.eos_ids:
        ids.pop()
    return policy.tokenizer.decode(ids, skip_special_tokens=False)


def after_turn(tokenizer: Any, messages: Messages) -> str:
    """The text from the end of the last assistant message to the opening of the next one.

    `messages` ends with what followed that turn (user or tool messages). Raises ValueError for a template that changes
    or repeats an assistant message's place.
    """
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=-1)
    if last < 0 or last == len(messages) - 1:
        raise ValueError("messages: expected an assistant message and then at least one other")
    mark = _absent(messages)
    marked = [{**m, "content": mark} if i == last else m for i, m in enumerate(messages)]
    parts = text(tokenizer, marked, add_generation_prompt=True).split(mark)
    if len(parts) != 2:
        raise ValueError(
            f"the chat template shows the last assistant message {len(parts) - 1} times; history=template would do"
        )
    return parts[1]


def extend(policy: Policy, ids: Sequence[int], messages: Messages) -> list[int]:
    """The next prompt: `ids` as sampled, then what the template adds up to the next assistant turn."""
    quoted, mark = _quoted(policy.tokenizer, messages)
    added = _encode_quoted(policy.tokenizer, after_turn(policy.tokenizer, quoted), mark)
    if ids and ids[-1] in policy.eos_ids:  # the model has ended its turn itself
        first = next((k for k, token in enumerate(added) if not policy.tokenizer.decode([token]).isspace()), len(added))
        if first < len(added) and added[first] in policy.eos_ids | policy.turns.ends:
            added = added[first + 1 :]
    return [*ids, *added]


class Prompts:
    """The prompts of many conversations; what several share, siblings their problem and feedback, is rendered once."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self._made = policy, dict[str, list[int]]()

    def render(self, messages: Messages) -> list[int]:
        """`render` with the opening of an assistant turn."""
        key = repr(messages)
        if key not in self._made:
            self._made[key] = render(self.policy.tokenizer, messages, True)
        return list(self._made[key])

    def extend(self, ids: list[int], messages: Messages) -> list[int]:
        """`extend`. What the template adds does not depend on what the last assistant message says."""
        last = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
        key = repr([ids[-1], *messages[:last], {**messages[last], "content": None}, *messages[last + 1 :]])
        if key not in self._made:
            self._made[key] = extend(self.policy, ids[-1:], messages)[1:]
        return [*ids, *self._made[key]]


def check_role(tokenizer: Any, role: str) -> None:
    """Raises ValueError if the chat template refuses messages of this role, or leaves them out."""
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    try:
        shown = text(tokenizer, [*messages, {"role": role, "content": _MARK}], add_generation_prompt=True)
        why = None if _MARK in shown else "leaves it out"
    except ChatTemplateError as error:
        why = f"says {str(error.__cause__ or error)!r}"
    if why is not None:
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path!r} cannot show a message of role {role!r}: it {why}; take a "
            "model whose template does, or set tokenizer.chat_template to one"
        )


def preserves_prefix(tokenizer: Any, messages: Messages) -> bool:
    """Whether the template renders every earlier turn of `messages` as it was when it was the last one.

    False for templates that drop thinking once a user speaks again; then the template's own history and the sampled one
    differ, and `history: keep` trains the sampled one.
    """
    whole = text(tokenizer, messages)
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    return all(whole.startswith(text(tokenizer, messages[:i], True) + messages[i]["content"]) for i in turns)


def to_trajectories(
    policy: Policy, row: dict[str, Any], *, index: int, weight: float = 1.0, turns: str = "last"
) -> list[Trajectory]:
    """One rollout row as what is trained: its own token ids where it has them, else its messages, rendered in one go.

    A row whose turns are separate samples (history: template) gives one trajectory a turn with turns="assistant", all of
    the row's weight. Raises ValueError, naming the row, where an assistant message cannot be found in the rendering, and for
    ids that the model does not have.
    """
    if row.get("token_ids") is None:
        return [_from_messages(policy, row, index, weight, turns)]
    samples = [*(row.get("earlier_turns") or [] if turns == "assistant" else []), row]
    size = policy.causal_lm.get_input_embeddings().weight.shape[0]
    for sample in samples:
        if max(sample["token_ids"]) >= size:
            raise ValueError(
                f"row {row['prompt_id']!r}: token_ids holds {max(sample['token_ids'])}, and the model has {size} tokens; another "
                "tokenizer made the row: take that model, or leave token_ids out to have the messages tokenised"
            )
    return [_from_ids(row["prompt_id"], sample, index, weight) for sample in samples]


def _from_ids(problem_id: str, sample: dict[str, Any], index: int, weight: float) -> Trajectory:
    mask, spans = sample["loss_mask"], []
    for start in sample.get("turn_starts") or _rises(mask):
        stop = start
        while stop < len(mask) and mask[stop]:
            stop += 1
        spans.append(Turn(start, stop))
    return Trajectory(problem_id, sample["token_ids"], spans, weight, index, logprobs=sample.get("logprobs"))


def _rises(mask: Sequence[int]) -> list[int]:
    return [i for i, on in enumerate(mask) if on and (i == 0 or not mask[i - 1])]


def _from_messages(policy: Policy, row: dict[str, Any], index: int, weight: float, turns: str) -> Trajectory:
    messages, mark = _quoted(policy.tokenizer, row["messages"], assistant=True)
    whole = text(policy.tokenizer, messages)
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    for begin, piece, spelled in _pieces(whole, mark):
        more, where = _spans(policy.tokenizer, piece, spelled, begin)
        ids += more
        offsets += where
    spans = []
    places = _places(policy.tokenizer, row["prompt_id"], messages, whole, every=turns == "assistant")
    for number, (place, stop) in enumerate(places, 1):
        first = next((k for k, (_, end) in enumerate(offsets) if end > place), len(ids))
        last = next((k for k, (start, _) in enumerate(offsets) if start >= stop), len(ids))
        end = _end(policy, ids, last)
        if end is None and (turns == "assistant" or number == len(places)):
            raise ValueError(
                f"row {row['prompt_id']!r}: the chat template writes no token that ends an assistant's message right after "
                f"its content (message {number} of {len(places)}), so that its end would not be trained; give the row's "
                "token_ids, or set tokenizer.chat_template to a template that ends every turn"
            )
        spans.append(Turn(first, end or last))
    return Trajectory(row["prompt_id"], ids, spans, weight, index)


def _end(policy: Policy, ids: Sequence[int], last: int) -> int | None:
    """One past the token that ends the turn whose words end before `last`; None if there is no such token."""
    while last < len(ids) and policy.tokenizer.decode([ids[last]]).isspace():
        last += 1
    return last + 1 if last < len(ids) and ids[last] in policy.eos_ids | policy.turns.ends else None


def _places(tokenizer: Any, name: str, messages: Messages, whole: str, every: bool) -> list[tuple[int, int]]:
    """Where in `whole`, their rendering, the assistant messages stand, as character spans in order.

    The template's own words around them come from a rendering with marks in their place, and are matched from the end.
    The last message has to be there as it is (or stripped); earlier ones only with `every`, since some templates drop
    earlier thinking.
    """
    assistants = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    empty = f"row {name!r}: its last assistant message is empty or missing; leave the row out"
    if not assistants or not messages[assistants[-1]]["content"]:
        raise ValueError(empty)
    marked = [{**m, "content": f"{_MARK}{i}{_MARK}"} if i in assistants else m for i, m in enumerate(messages)]
    shown = text(tokenizer, marked)
    around = []  # the template's words after each assistant message
    for i in reversed(assistants):
        shown, found, after = shown.rpartition(f"{_MARK}{i}{_MARK}")
        if not found:
            raise ValueError(
                f"row {name!r}: the chat template does not show assistant message {len(assistants) - len(around)}"
            )
        around.append(after)
    places, end = [], len(whole)
    for number, (i, after) in enumerate(zip(reversed(assistants), around)):
        stop, content = end - len(after), messages[i]["content"]
        if not isinstance(content, str):
            if number == 0 or every:
                raise ValueError(f"row {name!r}: the content of message {i + 1}, an assistant's, must be text")
            break
        content = content if whole[:stop].endswith(content) else content.strip()
        if not content and number == 0:
            raise ValueError(f"{empty} (the chat template strips its white space)")
        if whole[stop:end] != after or not whole[:stop].endswith(content):
            if number == 0 or every:
                which = len(assistants) - number
                raise ValueError(f"row {name!r}: the chat template does not show assistant message {which} as it is")
            break
        end = stop - len(content)
        places.append((end, stop))
    return places[::-1]
