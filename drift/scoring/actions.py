"""Tool use as an answer: the same calls, in whatever order, with the same arguments.

The calls are compared as a multiset of names, their arguments merged into one mapping, as the tool-use set is scored.

>>> called('Action: add\\nAction Input: {"a": 1}')
[('add', {'a': 1})]
>>> same('[{"name": "add", "arguments": {"a": 1}}]', '{"name": "add", "arguments": {"a": 1.0}}')
True
"""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

LONGEST = 20_000  # characters of an answer
_NAMES = ("name", "action", "tool", "function")
_ARGUMENTS = ("arguments", "action_input", "parameters", "args", "input")
_ACTION = re.compile(r"^[ \t]*Action[ \t]*:[ \t]*(\S[^\n]*)$", re.MULTILINE)
_INPUT = re.compile(r"\s*Action[ \t]+Input[ \t]*:[ \t]*")

Call = tuple[str, dict[str, Any]]


def called(text: str) -> list[Call] | None:
    """(name, arguments) of each call; None for text that holds none, or one that cannot be read.

    Read are JSON, an object or a list of them ({"name", "arguments"} and its usual other spellings), such objects inside
    <tool_call> tags, and lines of "Action: NAME" each followed by "Action Input: JSON".
    """
    if len(text) > LONGEST:
        return None
    text = re.sub(r"^```\w*\n|\n```$", "", text.strip())
    try:
        if tagged := re.findall(r"<tool_call>((?:(?!<tool_call>).)*?)</tool_call>", text, re.DOTALL):
            return [_call(json.loads(part)) for part in tagged]
        if text[:1] in ("{", "["):
            read = json.loads(text)
            return [_call(part) for part in (read if isinstance(read, list) else [read])] or None
        return _lines(text) or None
    except (ValueError, RecursionError):
        return None


def same(gold: str, answer: str) -> bool:
    """Whether both hold the same multiset of names and, merged, the same arguments."""
    wanted, given = called(gold), called(answer)
    if wanted is None or given is None:
        return False
    return Counter(name for name, _ in wanted) == Counter(name for name, _ in given) and _merged(wanted) == _merged(
        given
    )


def _call(value: Any) -> Call:
    if not isinstance(value, dict):
        raise ValueError("a call must be an object")
    if isinstance(value.get("function"), dict):
        value = value["function"]
    value = {str(key).lower(): item for key, item in value.items()}  # the tool-use set writes Action, Action_Input
    name = next((value[key] for key in _NAMES if isinstance(value.get(key), str)), None)
    arguments = next((value[key] for key in _ARGUMENTS if key in value), {})
    if isinstance(arguments, str):
        arguments = json.loads(arguments) if arguments.strip() else {}
    if name is None or not isinstance(arguments, dict):
        raise ValueError("a call must have a name, and arguments by name")
    return name.strip(), arguments


def _lines(text: str) -> list[Call]:
    calls = []
    for found in _ACTION.finditer(text):
        arguments: Any = {}
        if at := _INPUT.match(text, found.end()):
            begin = at.end()
            if begin < len(text) and text[begin] == "{":
                arguments, _ = json.JSONDecoder().raw_decode(text, begin)
        if not isinstance(arguments, dict):
            raise ValueError("arguments must be an object")
        calls.append((found[1].strip(), arguments))
    return calls


def _merged(calls: list[Call]) -> dict[str, Any]:
    return {key: value for _, arguments in calls for key, value in arguments.items()}
