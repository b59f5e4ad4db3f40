"""A calculator that a model cannot break; `drift.rollouts.environments` puts it into a conversation.

    >>> from drift.rollouts.tools import calculate
    >>> calculate("(12 + 3) * 4 ** 2")
    '240'

Left out: running code. `calculate` walks a syntax tree of numbers, operators and a few functions: no names but theirs,
no attributes, no text, no assignment; and it works out how large a result could be before it is made.
"""

from __future__ import annotations

import ast
import math
import operator
import time
import warnings
from collections.abc import Callable
from typing import Any

LONGEST = 500  # characters of an expression
DEEPEST = 40  # levels of its tree
BITS = 1024  # of a whole number; what fits in fewer also fits a float
SECONDS = 0.25  # for one expression; the bounds above keep any far below it


class ToolError(ValueError):
    """An expression that is not evaluated, and why; the text is fit to be shown to the model."""


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
