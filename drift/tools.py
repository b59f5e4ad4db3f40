"""Environments that answer a model's turn with messages, and one real tool: a calculator that a model cannot break.

    >>> from drift.tools import CalculatorEnvironment, calculate
    >>> calculate("(12 + 3) * 4 ** 2")
    '240'
    >>> environment = CalculatorEnvironment(answer="240")
    >>> messages = environment.reset("What is (12 + 3) · 4²?")
    >>> environment.step("<tool_call>(12 + 3) * 4 ** 2</tool_call>").messages
    [{'role': 'tool', 'content': '240'}]

What an environment says is never trained: the loop appends it as a message of another role than the assistant's, and
its ids come from the chat template, outside every `Turn`.

Left out: running code. `calculate` walks a syntax tree of numbers, operators and a few functions: no names but theirs,
no attributes, no text, no assignment; and it works out how large a result could be before it is made.
"""

from __future__ import annotations

import ast
import math
import operator
import re
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

LONGEST = 500  # characters of an expression
DEEPEST = 40  # levels of its tree
BITS = 1024  # of a whole number; what fits in fewer also fits a float
SECONDS = 0.25  # for one expression; the bounds above keep any far below it


class ToolError(ValueError):
    """An expression that is not evaluated, and why; the text is fit to be shown to the model."""


@dataclass(frozen=True, slots=True)
class Step:
    """What an environment answers to one assistant message."""

    messages: list[dict[str, str]] = field(default_factory=list)  # of other roles; empty where the episode is over
    reward: float = 0.0
    done: bool = False


class Environment(Protocol):
    """One episode's other side. `reset` before the first `step`; no `step` after one that was done."""

    def reset(self, prompt: str) -> list[dict[str, str]]:
        """The conversation's opening messages."""
        ...

    def step(self, reply: str) -> Step:
        """Takes the assistant's message, as text without the token that ends it."""
        ...


class CalculatorEnvironment:
    """A question, a calculator, and a check of the answer.

    `<tool_call>EXPRESSION</tool_call>` is answered by a tool message with the value, or with the reason why there is
    none. `<answer>…</answer>` ends the episode, reward 1.0 where it is right. A reply with neither gets `nudge`.
    A reply with both is an answer. check: whether an answer is right, default equality with `answer` after stripping.
    calls: how many tool calls there may be; the next one ends the episode.
    """

    nudge = "Call the calculator inside <tool_call> and </tool_call>, or answer inside <answer> and </answer>."

    def __init__(self, answer: str, check: Callable[[str], bool] | None = None, calls: int = 8) -> None:
        self.check = check or (lambda given: given == answer.strip())
        self.calls, self.used = calls, 0

    def reset(self, prompt: str) -> list[dict[str, str]]:
        """The question as a user message."""
        self.used = 0
        return [{"role": "user", "content": prompt}]

    def step(self, reply: str) -> Step:
        """See the class."""
        said = reply.rsplit("</think>", 1)[-1]
        if answers := re.findall(r"<answer>(.*?)</answer>", said, re.DOTALL):
            return Step(reward=float(self.check(answers[-1].strip())), done=True)
        calls = re.findall(r"<tool_call>(.*?)</tool_call>", said, re.DOTALL)
        if not calls:
            return Step([{"role": "user", "content": self.nudge}])
        self.used += len(calls)
        if self.used > self.calls:
            return Step(done=True)
        return Step([{"role": "tool", "content": _answer(call)} for call in calls])


def _answer(call: str) -> str:
    try:
        return calculate(call)
    except ToolError as error:
        return f"Error: {error}"


def calculate(expression: str) -> str:
    """The value of a Python expression of numbers, as text: whole numbers in full, others by `repr`, or True or False.

    Operators + - * / // % **, comparisons, brackets, and FUNCTIONS and CONSTANTS by name. Raises ToolError for anything
    else, for a result that is not a finite real number or that could have more than BITS bits (so 9**9**9 is refused
    before any of it is computed), and for an expression that is too long, too deep, or takes too long.
    """
    return repr(_evaluate(_parse(expression), time.monotonic() + SECONDS))


def _parse(expression: str) -> ast.expr:
    text = expression.strip()
    if len(text) > LONGEST:
        raise ToolError(f"the expression is {len(text)} characters long; the most is {LONGEST}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as "1if": a warning in one version, an error in the next
            tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ToolError("this is not one expression") from error
    level: list[ast.AST] = [tree]
    for _ in range(DEEPEST):
        level = [child for node in level for child in ast.iter_child_nodes(node)]
    if level:
        raise ToolError(f"the expression is nested more than {DEEPEST} levels deep")
    return tree


def _evaluate(node: ast.expr, deadline: float) -> Any:
    if time.monotonic() > deadline:
        raise ToolError(f"this takes longer than {SECONDS} seconds")
    match node:
        case ast.Constant(value=value) if type(value) in (int, float):
            return _bounded(value)
        case ast.Name(id=name) if name in CONSTANTS:
            return CONSTANTS[name]
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            return _bounded(_UNARY[type(op)](_evaluate(operand, deadline)))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            bits, function = _BINARY[type(op)]
            return _apply(function, bits, [_evaluate(left, deadline), _evaluate(right, deadline)])
        case ast.Compare(left=left, ops=ops, comparators=others) if all(type(op) in _COMPARE for op in ops):
            values = [_evaluate(value, deadline) for value in (left, *others)]
            return all(_COMPARE[type(op)](a, b) for op, a, b in zip(ops, values, values[1:]))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in FUNCTIONS:
            bits, function = FUNCTIONS[name]
            return _apply(function, bits, [_evaluate(value, deadline) for value in args])
    raise ToolError(f"{_name(node)} is not allowed; numbers, operators and {', '.join(sorted(FUNCTIONS))} are")


def _apply(function: Callable[..., Any], bits: Callable[..., float], values: list[Any]) -> Any:
    try:
        if all(isinstance(value, int) for value in values) and bits(*values) > BITS:
            raise ToolError(f"the result could have more than {BITS} bits")
        return _bounded(function(*values))
    except ToolError:
        raise
    except OverflowError as error:
        raise ToolError("the result is too large") from error
    except ZeroDivisionError as error:  # which Python words in six ways
        raise ToolError("division by zero") from error
    except (ValueError, TypeError) as error:
        raise ToolError(str(error)) from error


def _bounded(value: Any) -> Any:
    if isinstance(value, complex) or (isinstance(value, float) and not math.isfinite(value)):
        raise ToolError("the result is not a finite real number")
    if isinstance(value, int) and value.bit_length() > BITS:
        raise ToolError(f"the result has more than {BITS} bits")
    return value


def _name(node: ast.AST) -> str:
    match node:
        case ast.Name(id=name) | ast.Call(func=ast.Name(id=name)):
            return f"the name {name!r}"
        case ast.Constant(value=value):
            return f"the value {value!r}"[:60]
        case ast.BinOp(op=op) | ast.UnaryOp(op=op) | ast.BoolOp(op=op):
            return f"the operator {type(op).__name__}"
    return type(node).__name__


def _small(*_: Any) -> float:
    """Bits of a result that is no larger than its operands, or a float."""
    return 0


def _power_bits(base: int, exponent: int) -> float:
    return exponent * math.log2(abs(base)) if exponent > 0 and base else 0


def _factorial_bits(n: int) -> float:
    return math.lgamma(n + 1) / math.log(2) if n > 0 else 0


def _round(value: float, digits: int = 0) -> float:
    if abs(digits) > 100:  # 10**digits is made for whole numbers
        raise ToolError(f"round to {digits} digits: the most is 100")
    return round(value, digits) if digits else round(value)


_Rule = tuple[Callable[..., float], Callable[..., Any]]  # bits of the result from whole operands, at most; the function
_BINARY: dict[type[ast.operator], _Rule] = {
    ast.Add: (_small, operator.add),
    ast.Sub: (_small, operator.sub),
    ast.Mult: (_small, operator.mul),  # twice the bits of bounded operands is no work yet
    ast.Div: (_small, operator.truediv),
    ast.FloorDiv: (_small, operator.floordiv),
    ast.Mod: (_small, operator.mod),
    ast.Pow: (_power_bits, operator.pow),
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {ast.USub: operator.neg, ast.UAdd: operator.pos}
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
CONSTANTS = {"pi": math.pi, "e": math.e}
FUNCTIONS: dict[str, _Rule] = {
    "abs": (_small, abs),
    "min": (_small, lambda *values: min(values)),
    "max": (_small, lambda *values: max(values)),
    "round": (_small, _round),
    "sqrt": (_small, math.sqrt),
    "floor": (_small, math.floor),
    "ceil": (_small, math.ceil),
    "exp": (_small, math.exp),
    "log": (_small, math.log),
    "sin": (_small, math.sin),
    "cos": (_small, math.cos),
    "tan": (_small, math.tan),
    "gcd": (_small, math.gcd),
    "lcm": (lambda *values: sum(value.bit_length() for value in values), math.lcm),
    "factorial": (_factorial_bits, math.factorial),
    "comb": (lambda n, k: min(n, max(k, 0) * n.bit_length()), math.comb),
}
