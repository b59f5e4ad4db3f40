"""What a sandboxed worker can be asked: math-verify, a reasoning-gym scorer, or a function by import path.

reasoning-gym's scorers call `eval` and sympy's `parse_expr` on answers (`EVALUATES`). In a worker those names mean
`evaluate` and `parse_expression` of this module, which take literals and arithmetic and refuse everything else; the
sandbox around them is the second wall.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import logging
import math
import os
import sys
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

from drift.scoring import answers

EVALUATES = frozenset(  # generators whose scorers have a parser of Python read the answer
    {
        "binary_matrix",
        "countdown",
        "intermediate_integration",
        "n_queens",
        "polynomial_multiplication",
        "puzzle24",
        "simple_integration",
        "spiral_matrix",
        "string_insertion",
    }
)
AS_TEXT = frozenset({"game_of_life_halting"})  # scorers that take any text for true; the gold answer is asked for too
LONGEST = 10_000  # characters of an expression
POWER = 10_000  # bits that a power of numbers may have
_NODES = (ast.Expression, ast.Constant, ast.BinOp, ast.UnaryOp, ast.List, ast.Tuple, ast.Set, ast.Dict, ast.Load)
_OPERATORS = (ast.operator, ast.unaryop)


class Judge(Protocol):
    """Scores answers inside a worker."""

    folders: list[str]  # to stay readable besides the interpreter's
    may_raise: bool  # on an answer that it cannot read, which is then wrong, if the gold answer does not make it raise

    def score(self, answer: str, gold: str, problem: dict[str, Any]) -> float:
        """1 or more is right."""
        ...


class MathJudge:
    """`drift.scoring.answers.right` with math-verify for what only algebra can tell."""

    may_raise = True

    def __init__(self) -> None:
        self.folders: list[str] = []
        from latex2sympy2_extended import NormalizationConfig  # noqa: F401  imported before rights are given up
        from math_verify import LatexExtractionConfig, parse, verify

        logging.disable(logging.CRITICAL)  # math-verify logs what it cannot parse; here that is a wrong answer
        options: dict[str, Any] = {"extraction_config": [LatexExtractionConfig()], "fallback_mode": "no_fallback"}
        options |= {"parsing_timeout": None, "raise_on_error": True}

        def equal(gold: str, answer: str) -> bool:
            right, read = (parse(f"${text}$", **options) for text in (gold, answer))
            return verify(right, read, timeout_seconds=None, raise_on_error=True)

        self._equal = equal
        equal("x+1", "1+x")  # loads what is imported late

    def score(self, answer: str, gold: str, problem: dict[str, Any]) -> float:
        """1.0 when the answer is right. The gold answer itself goes through math-verify too, as the probe of a failure."""
        return float(self._equal(gold, answer) if answer is gold else answers.right(gold, answer, self._equal))


class GymJudge:
    """Scorers of reasoning-gym's generators; right means that one pays exactly 1."""

    may_raise = True

    def __init__(self) -> None:
        import reasoning_gym
        import sympy
        from reasoning_gym.factory import DATASETS

        self.folders = [os.path.dirname(os.path.realpath(str(reasoning_gym.__file__)))]
        self.names = sorted(DATASETS)
        _shield(sympy)

    def score(self, answer: str, gold: str, problem: dict[str, Any]) -> float:
        """problem: {"name", "options", "entry"}; the entry is what the generator made."""
        scorer = _scorer(problem["name"], repr(sorted(problem["options"].items())), _Once(problem["options"]))
        if problem["name"] in AS_TEXT and not answers.exact(gold, answer):
            return 0.0
        return float(scorer.score_answer(answer, problem["entry"]) == 1.0)


class _Once(dict[str, Any]):
    """Options that a cache does not look at."""

    def __hash__(self) -> int:  # type: ignore[override]
        return 0

    def __eq__(self, other: object) -> bool:
        return True


@cache
def _scorer(name: str, key: str, options: _Once) -> Any:
    from reasoning_gym.factory import create_dataset

    return create_dataset(name, **{**options, "size": 1, "seed": 0})


def _shield(sympy: Any) -> None:
    """Puts the harmless readers in place of `eval` and `parse_expr` in all modules of reasoning-gym."""
    real = sympy.parse_expr
    safe = parse_expression(real)
    sympy.parse_expr = safe
    for name, module in list(sys.modules.items()):
        if name.startswith("reasoning_gym"):
            vars(module)["eval"] = evaluate
            if vars(module).get("parse_expr") is real:
                vars(module)["parse_expr"] = safe


def evaluate(text: str, *_: Any) -> Any:
    """The value of literals and arithmetic, as `eval` gives it. Raises ValueError for anything else."""
    tree = _tree(text)
    for node in ast.walk(tree):
        if not isinstance(node, (*_NODES, *_OPERATORS)):
            raise ValueError(f"{type(node).__name__} is neither a literal nor arithmetic")
    _bound(tree)
    return eval(compile(tree, "answer", "eval"), {"__builtins__": {}})


def parse_expression(real: Callable[..., Any]) -> Callable[..., Any]:
    """sympy's `parse_expr` behind a check: numbers, names, arithmetic, and calls of sympy's functions."""

    def parse_expr(text: str, *args: Any, **options: Any) -> Any:
        check_expression(text)
        return real(text, *args, **options)

    return parse_expr


def check_expression(text: str) -> None:
    """Raises ValueError unless the text is arithmetic over numbers, names and calls of elementary functions."""
    tree = _tree(text)
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name):
                fits = name in _FUNCTIONS if id(node) in called else len(name) == 1 or name in _CONSTANTS
            case ast.Call(func=ast.Name(), keywords=[]):
                fits = True
            case ast.Constant(value=int() | float() | complex()):
                fits = True
            case ast.Expression() | ast.BinOp() | ast.UnaryOp() | ast.operator() | ast.unaryop() | ast.Load():
                fits = True
            case _:
                fits = False
        if not fits:
            raise ValueError(f"{ast.dump(node)[:80]} is no part of an expression")
    _bound(tree)


_CONSTANTS = {"pi", "oo", "theta", "alpha", "beta", "gamma"}
_FUNCTIONS = {
    "sin",
    "cos",
    "tan",
    "cot",
    "sec",
    "csc",
    "asin",
    "acos",
    "atan",
    "sinh",
    "cosh",
    "tanh",
    "asinh",
    "acosh",
}
_FUNCTIONS |= {"atanh", "exp", "log", "ln", "sqrt", "Abs", "abs"}


def _tree(text: str) -> ast.Expression:
    if len(text) > LONGEST:
        raise ValueError(f"{len(text)} characters are too many")
    try:
        return ast.parse(text.strip(), mode="eval")
    except (RecursionError, MemoryError) as error:
        raise ValueError("nested too deeply") from error


def _bound(tree: ast.AST) -> None:
    """Raises ValueError for powers, products of text, and shifts that could be large."""
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
            if _bits(node) > POWER:
                raise ValueError("the power is too large")
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.LShift):
            if _size(node.right) > POWER:
                raise ValueError("the shift is too large")
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            for side in (node.left, node.right):
                if any(isinstance(part, ast.List | ast.Tuple) for part in ast.walk(side)) or any(
                    isinstance(part, ast.Constant) and isinstance(part.value, str | bytes) for part in ast.walk(side)
                ):
                    raise ValueError("sequences are not multiplied")


def _bits(node: ast.AST) -> float:
    """Bits of the value of an expression, at most."""
    match node:
        case ast.Constant(value=int(value)):
            return value.bit_length()
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _bits(left) * _size(right) if _has_number(left) else _size(right)
        case ast.BinOp(left=left, right=right):
            return _bits(left) + _bits(right) + 1
        case ast.UnaryOp(operand=operand):
            return _bits(operand)
    return 1


def _size(node: ast.AST) -> float:
    """The largest value that an expression can have, at most."""
    return 2.0 ** min(_bits(node), 1000)


def _has_number(node: ast.AST) -> bool:
    return any(isinstance(part, ast.Constant) for part in ast.walk(node))


class FunctionJudge:
    """A function of the user's own, `module:function`, called with (answer, gold, problem); it returns a number."""

    may_raise = False  # a raise is a fault of the function, whatever the answer

    def __init__(self, path: str) -> None:
        module, _, name = path.partition(":")
        self.function = getattr(importlib.import_module(module), name)
        self.folders = [os.path.dirname(os.path.realpath(inspect.getfile(inspect.unwrap(self.function))))]

    def score(self, answer: str, gold: str, problem: dict[str, Any]) -> float:
        """The function's own number, which has to be finite."""
        value = float(self.function(answer, gold, problem))
        if not math.isfinite(value):
            raise ValueError(f"the scorer returned {value}; it must be a finite number")
        return value


JUDGES: dict[str, Callable[..., Judge]] = {"math": MathJudge, "gym": GymJudge, "function": FunctionJudge}
