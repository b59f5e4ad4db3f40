"""The calculator, and what a model might try to break it with."""

import doctest
import math
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drift.rollouts import tools
from drift.rollouts.tools import ToolError, calculate


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("(12 + 3) * 4 ** 2", "240"),
        (" 7//2 + 7 % 4\n", "6"),
        ("-2 ** 2", "-4"),
        ("1 / 8", "0.125"),
        ("1_000 + 0x10", "1016"),
        ("sqrt(2) ** 2 == 2", "False"),
        ("1 < 2 < 3 != 4", "True"),
        ("max(3, min(9, 7.5)) - abs(-2)", "5.5"),
        ("round(2.675, 2)", repr(round(2.675, 2))),
        ("round(1234, -2)", "1200"),
        ("factorial(100) // factorial(98)", "9900"),
        ("comb(1000, 500)", str(math.comb(1000, 500))),
        ("gcd(84, 36) + lcm(4, 6)", "24"),
        ("2 ** 1023", str(2**1023)),
        ("floor(pi) + ceil(e)", "6"),
        ("2 ** -1", "0.5"),
        ("0 ** 0", "1"),
    ],
)
def test_value(expression, value):
    assert calculate(expression) == value


@pytest.mark.parametrize(
    ("expression", "why"),
    [
        ("9**9**9", "more than 1024 bits"),
        ("(9**9)**(9**9)", "more than 1024 bits"),
        ("2 ** 1024", "more than 1024 bits"),
        ("(-3) ** (10**300)", "more than 1024 bits"),
        ("2**1000 * 2**1000", "more than 1024 bits"),
        ("9" * 400, "more than 1024 bits"),
        ("9.0**9**9", "too large"),
        ("factorial(10**9)", "more than 1024 bits"),
        ("factorial(10**307)", "too large"),
        ("factorial(1e9)", "float"),
        ("comb(10**300, 10**299)", "more than 1024 bits"),
        ("comb(10**9, 10**9 - 9)", "more than 1024 bits"),
        ("lcm(10**300, 10**300 - 1, 7**300)", "more than 1024 bits"),
        ("round(5, -10**9)", "the most is 100"),
        ("1 << 10**9", "operator LShift"),
        ("1e400", "not a finite real"),
        ("1e308 * 10", "not a finite real"),
        ("(-8) ** 0.5", "not a finite real"),
        ("1 / 0", "division by zero"),
        ("0 ** -1", "division by zero"),
        ("log(-1)", "domain|positive"),
        ("sqrt()", "argument"),
        ("min()", "empty"),
        ("().__class__.__bases__[0].__subclasses__()", "Call is not allowed"),
        ("(1).real", "Attribute is not allowed"),
        ("__import__('os').system('true')", "Call is not allowed"),
        ("open('/etc/passwd')", "name 'open'"),
        ("eval('1')", "name 'eval'"),
        ("sqrt", "name 'sqrt'"),
        ("sqrt(x=4)", "name 'sqrt'"),
        ("sqrt(*[4])", "Starred"),
        ("sqrt(**{})", "name 'sqrt'"),
        ("'a' * 10**9", "value 'a'"),
        ("[1] * 10**9", "List"),
        ("[x for x in (1, 2)]", "ListComp"),
        ("(lambda: 1)()", "Call is not allowed"),
        ("f'{9**9}'", "JoinedStr"),
        ("(x := 3)", "NamedExpr"),
        ("1 if 1 else 2", "IfExp"),
        ("1 and 2", "operator And"),
        ("~1", "operator Invert"),
        ("True", "value True"),
        ("2j", "value 2j"),
        ("...", "value Ellipsis"),
        ("1 is 1", "Compare"),
        ("x = 3", "not one expression"),
        ("1; 2", "not one expression"),
        ("1\n2", "not one expression"),
        ("", "not one expression"),
        ("1\x002", "not one expression"),
        ("import os", "not one expression"),
        ("(" * 249 + "1" + ")" * 249, "not one expression"),
        ("-" * 400 + "1", "nested more than 40"),
        ("1" + "+1" * 60, "nested more than 40"),
        ("1" * 501, "501 characters"),
    ],
)
def test_refused(expression, why):
    before = time.process_time()
    with pytest.raises(ToolError, match=why):
        calculate(expression)
    assert time.process_time() - before < 5  # minutes or for ever, where a bound is missing


def test_a_slow_expression_is_given_up(monkeypatch):
    monkeypatch.setattr(tools, "SECONDS", -1.0)
    with pytest.raises(ToolError, match="takes longer"):
        calculate("1 + 1")


def test_as_python_says_on_random_arithmetic():
    draw = random.Random(0)

    def some(depth):
        if depth == 0 or draw.random() < 0.2:
            return str(draw.choice([draw.randrange(20), round(draw.random() * 9, 2)]))
        return f"({some(depth - 1)} {draw.choice(['+', '-', '*', '/', '//', '%', '<', '=='])} {some(depth - 1)})"

    for _ in range(300):
        text = some(4)
        try:
            expected = repr(eval(text))
        except ZeroDivisionError:
            with pytest.raises(ToolError, match="zero"):
                calculate(text)
        else:
            assert calculate(text) == expected


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(max_size=60), st.text("0123456789.e+-*/%()<>=, abslqrtm_'[]{}:\n", max_size=60)))
def test_any_text_gives_a_value_or_a_tool_error(text):
    try:
        value = calculate(text)
    except ToolError:
        return
    assert value in ("True", "False") or math.isfinite(float(value))


def test_the_example_runs():
    assert doctest.testmod(tools) == doctest.TestResults(failed=0, attempted=2)
