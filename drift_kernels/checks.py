"""Checks that every frozen value of this package makes of its fields. No torch here."""

from __future__ import annotations

from typing import Any

HUGE = 1e30  # fits float32; stands for infinity in specs, which travel as text


def one_of(name: str, value: object, allowed: tuple) -> None:
    """ValueError naming the choices unless `value` is among them."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not known; it is one of {', '.join(map(repr, allowed))}")


def number(name: str, value: Any, optional: bool = False) -> Any:
    """`value` as a plain float, so that specs hash and travel as text; an infinite bound as a very large one."""
    if value is None and optional:
        return None
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
