"""Checks that every frozen value of this package makes of its fields. They do not import torch."""

from __future__ import annotations

import sys
from typing import Any

HUGE = 1e30  # fits float32; stands for infinity in specs, which travel as text


def one_of(name: str, value: object, allowed: tuple) -> None:
    """ValueError naming the choices unless `value` is among them."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not known; it is one of {', '.join(map(repr, allowed))}")


def constant(value: Any) -> Any:
    """`value` itself. While torch.compile traces, a number that it holds for a variable: the graph then depends on its value.

    With dynamic=True every float is such a variable; the numbers of a spec travel as text, and text has no variables.
    """
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.compiler.is_compiling() or not isinstance(value, (int, float)):
        return value
    return torch.fx.experimental.symbolic_shapes.guard_scalar(value)


def number(name: str, value: Any, optional: bool = False) -> Any:
    """`value` as a plain float, so that specs hash and travel as text; an infinite bound as a very large one."""
    if value is None and optional:
        return None
    value = constant(value)
    if value is None or isinstance(value, (str, bytes)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name}={value!r} must be a number")
    converted = float(value)
    if converted != converted:
        raise ValueError(f"{name} is NaN; it must be a number")
    return max(min(converted, HUGE), -HUGE)


def numbers(name: str, values: Any, size: int) -> tuple[float, ...]:
    """`values` as `size` plain floats."""
    if not isinstance(values, (tuple, list)) or len(values) != size:
        raise ValueError(f"{name}={values!r} must be {size} numbers")
    return tuple(number(name, v) for v in values)
