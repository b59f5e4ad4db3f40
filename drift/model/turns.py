"""Where a chat template ends an assistant's turn, and which tokens are its own: nobody but it and the model writes those."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from drift.model.sandbox import ChatTemplateError, render

_MARKS = ("\u2402q\u2403", "\u2402a\u2403", "\u2402r\u2403")


@dataclass(frozen=True, eq=False)
class Turns:
    """What a tokenizer's chat template writes around messages.

    tokenizer  with a chat template
    """

    tokenizer: Any

    @classmethod
    def of(cls, tokenizer: Any) -> Turns:
        """The same object for the same tokenizer and template."""
        kept = getattr(tokenizer, "_drift_turns", None)
        if kept is None or kept[0] != tokenizer.chat_template:
            kept = (tokenizer.chat_template, cls(tokenizer))
            tokenizer._drift_turns = kept
        return kept[1]

    @cached_property
    def after_last(self) -> str:
        """The text after an assistant message that ends a conversation."""
        return self._show([("user", _MARKS[0]), ("assistant", _MARKS[1])], False).rpartition(_MARKS[1])[2]

    @cached_property
    def between(self) -> str:
        """The text from the end of an assistant message to the user's next words."""
        said = [("user", _MARKS[0]), ("assistant", _MARKS[1]), ("user", _MARKS[2])]
        return self._show(said, True).rpartition(_MARKS[1])[2].partition(_MARKS[2])[0]

    @cached_property
    def opening(self) -> str:
        """The text from the end of a user's message to an assistant's first word, a prefill included."""
        return self._show([("user", _MARKS[0])], True).rpartition(_MARKS[0])[2]

    @cached_property
    def closer(self) -> int:
        """The token that ends an assistant's turn. Raises ChatTemplateError if the template writes none."""
        before = self._show([("user", _MARKS[0])], False).partition(_MARKS[0])[0]
        openers = {*self._ids(before), *self._configured}
        last, middle = self._first(self.after_last), self._first(self.between)
        if last is not None:
            return last
        if middle is not None and (middle not in openers or middle in self._configured):
            return middle
        raise ChatTemplateError(
            f"the chat template of {self.tokenizer.name_or_path!r} writes no token that ends an assistant's turn (after it "
            f"stands {self.between[:40]!r}), so the model would never learn to end one; set tokenizer.chat_template to a "
            "template that does, such as ChatML's <|im_end|>"
        )

    @cached_property
    def ends(self) -> frozenset[int]:
        """The tokens that the template writes right after an assistant's turn."""
        last, middle = self._first(self.after_last), self._first(self.between)
        return frozenset({self.closer} if last is None or middle is None else {self.closer, middle})

    @cached_property
    def control(self) -> list[str]:
        """Texts that are read as tokens of the template: special ones, and added ones that it writes itself. Longest first."""
        frame = self.opening + self.between + self.after_last
        for messages in self._exchanges():
            try:
                frame += render(self.tokenizer, messages, True)
            except ChatTemplateError:
                continue  # a template without such a role
        added = self.tokenizer.added_tokens_decoder.values()
        return sorted((t.content for t in added if t.special or t.content in frame), key=len, reverse=True)

    @property
    def _configured(self) -> set[int]:
        return {self.tokenizer.eos_token_id} - {None}

    def _exchanges(self) -> list[list[dict[str, Any]]]:
        question = {"role": "user", "content": _MARKS[0]}
        call = {"type": "function", "id": "call00000", "function": {"name": "f", "arguments": {"x": 1}}}
        calls = {"role": "assistant", "content": "", "tool_calls": [call]}
        result = {"role": "tool", "name": "f", "content": _MARKS[1], "tool_call_id": "call00000"}
        return [
            [{"role": "system", "content": _MARKS[2]}, question],
            [question, calls, result],
            [question, {"role": "assistant", "content": _MARKS[1]}, {"role": "tool", "content": _MARKS[2]}],
        ]

    def _show(self, said: list[tuple[str, str]], more: bool) -> str:
        messages = [{"role": role, "content": content} for role, content in said]
        shown = render(self.tokenizer, messages, more)
        if any(content not in shown for _, content in said):
            raise ChatTemplateError(
                f"the chat template of {self.tokenizer.name_or_path!r} does not show what a message says"
            )
        return shown

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _first(self, text: str) -> int | None:
        """The added token that the text begins with, white space apart."""
        ids = self._ids(text.lstrip())
        added = self.tokenizer.added_tokens_decoder
        return ids[0] if ids and (ids[0] in added or ids[0] in self._configured) else None
