"""Reads text that is one number as a whole: digits, a fraction, a percentage, scientific notation, a unit.

>>> read("1,331").value, read(r"\\frac{1}{2}").value, read("7 dollars").unit
(Fraction(1331, 1), Fraction(1, 2), '$')
>>> read("12:30"), read("1 and 2"), read("7 - 3")
(None, None, None)
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

LONGEST = 300  # characters of a number
UNITS = {  # what may stand beside a number; different names of one unit
    **dict.fromkeys(["%", "percent", "per cent"], "%"),
    **dict.fromkeys(["$", "dollar", "dollars", "usd"], "$"),
    **dict.fromkeys(["€", "euro", "euros", "eur"], "€"),
    **dict.fromkeys(["£", "pound", "pounds", "gbp"], "£"),
    **dict.fromkeys(["cent", "cents", "¢"], "¢"),
    **dict.fromkeys(["°", "degree", "degrees", r"^\circ", r"^{\circ}", r"\circ"], "°"),
    **dict.fromkeys(["s", "sec", "second", "seconds"], "s"),
    **dict.fromkeys(["min", "minute", "minutes"], "min"),
    **dict.fromkeys(["h", "hr", "hrs", "hour", "hours"], "h"),
    **dict.fromkeys(["day", "days"], "day"),
    **dict.fromkeys(["week", "weeks"], "week"),
    **dict.fromkeys(["month", "months"], "month"),
    **dict.fromkeys(["year", "years"], "year"),
    **dict.fromkeys(["mm", "millimeter", "millimeters", "millimetre", "millimetres"], "mm"),
    **dict.fromkeys(["cm", "centimeter", "centimeters", "centimetre", "centimetres"], "cm"),
    **dict.fromkeys(["m", "meter", "meters", "metre", "metres"], "m"),
    **dict.fromkeys(["km", "kilometer", "kilometers", "kilometre", "kilometres"], "km"),
    **dict.fromkeys(["in", "inch", "inches"], "in"),
    **dict.fromkeys(["ft", "foot", "feet"], "ft"),
    **dict.fromkeys(["mile", "miles"], "mile"),
    **dict.fromkeys(["g", "gram", "grams"], "g"),
    **dict.fromkeys(["kg", "kilogram", "kilograms"], "kg"),
    **dict.fromkeys(["l", "liter", "liters", "litre", "litres"], "l"),
    **dict.fromkeys(["mph", "miles per hour"], "mph"),
    **dict.fromkeys(["km/h", "kmh", "kilometers per hour", "kilometres per hour"], "km/h"),
    **dict.fromkeys(["m/s", "meters per second", "metres per second"], "m/s"),
    **dict.fromkeys(["unit", "units"], "unit"),
    **dict.fromkeys(["square units", "units^2", "units^{2}"], "unit²"),
    **dict.fromkeys(["cubic units", "units^3", "units^{3}"], "unit³"),
    **dict.fromkeys(["cm^2", "cm^{2}", "square centimeters", "square cm"], "cm²"),
    **dict.fromkeys(["m^2", "m^{2}", "square meters"], "m²"),
    **dict.fromkeys(["cm^3", "cm^{3}", "cubic centimeters"], "cm³"),
    **dict.fromkeys(["m^3", "m^{3}", "cubic meters"], "m³"),
}

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_PLAIN = rf"(?:{_DIGITS}(?:\.\d*)?|\.\d+)"
_DECIMAL = re.compile(
    rf"(?P<digits>{_PLAIN})(?:[eE](?P<e>[+-]?\d{{1,4}})"
    rf"|\s*(?:\\times|\\cdot|×|·|\*|x)\s*10\s*(?:\^|\*\*)\s*(?:\{{\s*(?P<p>[+-]?\d{{1,4}})\s*\}}|(?P<q>[+-]?\d{{1,4}})))?"
)
_TEN = re.compile(r"10\s*(?:\^|\*\*)\s*(?:\{\s*([+-]?\d{1,4})\s*\}|([+-]?\d{1,4}))")
_FRACTION = re.compile(rf"(-?{_PLAIN})\s*/\s*(-?{_PLAIN})")
_LATEX = re.compile(rf"\\frac\s*(?:\{{\s*(-?{_PLAIN})\s*\}}|(\d))\s*(?:\{{\s*(-?{_PLAIN})\s*\}}|(\d))")
_MIXED = re.compile(r"(\d{1,9})\s*(\\frac.*|(?<=\s)\d{1,9}\s*/\s*\d{1,9})")
_BEFORE = re.compile(r"^(?:\\?([$€£]))\s*(?=[\d.+-])")
_BY_LENGTH = sorted(UNITS, key=len, reverse=True)
_AFTER = re.compile(rf"(?<=[\d}}.)])\s*\\?({'|'.join(map(re.escape, _BY_LENGTH))})$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Number:
    """One number as it was written."""

    value: Fraction
    unit: str = ""
    places: int | None = None  # digits after the point; None for a fraction


def read(text: str) -> Number | None:
    """The number that the whole text is, or None."""
    text = text.strip()
    if not text or len(text) > LONGEST:
        return None
    unit = ""
    sign, body = _signed(text)
    if found := _BEFORE.match(body):
        unit, body = found[1], body[found.end() :]
        if sign > 0:
            sign, body = _signed(body)
    if (found := _AFTER.search(body)) and not unit:
        unit, body = UNITS[found[1].lower()], body[: found.start()].strip()
    if body.startswith("(") and body.endswith(")") and "(" not in body[1:]:
        inner_sign, body = _signed(body[1:-1].strip())
        sign *= inner_sign
    value, places = _value(body)
    return None if value is None else Number(sign * value, unit, places)


def same(gold: Number, answer: Number) -> bool:
    """Whether the answer is the gold number: exactly, or as a fraction without an end cut at its fourth digit or later.

    A unit may be left out, and one that the question implies may be added; two that differ are different answers. A
    percentage is right as "50%", as 50 and as 0.5, if only one of both says percent.
    """
    values = {answer.value}
    if (gold.unit == "%") != (answer.unit == "%"):
        if gold.unit or answer.unit:
            other = gold.unit if answer.unit == "%" else answer.unit
            if other:
                return False
        values.add(answer.value / 100 if answer.unit == "%" else answer.value * 100)
    elif gold.unit and answer.unit and gold.unit != answer.unit:
        return False
    if gold.value in values:
        return True
    endless = gold.places is None and not _ends(gold.value)
    if not endless or not answer.places or answer.places < 4 or gold.unit != answer.unit:
        return False
    return abs(gold.value - answer.value) <= Fraction(1, 2 * 10**answer.places)


def close(gold: Number, answer: Number, tolerance: float) -> bool:
    """`same`, or within a relative tolerance of a gold number that is not whole."""
    if same(gold, answer):
        return True
    if gold.value.denominator == 1 or (gold.unit and answer.unit and gold.unit != answer.unit):
        return False
    return abs(gold.value - answer.value) <= abs(gold.value) * Fraction(tolerance)


def _signed(text: str) -> tuple[int, str]:
    if text[:1] in ("+", "-"):
        return (-1 if text[0] == "-" else 1), text[1:].strip()
    return 1, text


def _value(text: str) -> tuple[Fraction | None, int | None]:
    if found := _DECIMAL.fullmatch(text):
        digits = found["digits"].replace(",", "")
        power = int(found["e"] or found["p"] or found["q"] or 0)
        places = len(digits.partition(".")[2])
        if abs(power) > LONGEST:
            return None, None
        return Fraction(digits if digits[-1] != "." else digits[:-1]) * Fraction(10) ** power, places
    if found := _TEN.fullmatch(text):
        power = int(found[1] or found[2])
        return (Fraction(10) ** power, 0) if abs(power) <= LONGEST else (None, None)
    if (found := _FRACTION.fullmatch(text)) or (found := _LATEX.fullmatch(text)):
        above, below = (part for part in found.groups() if part is not None)
        divisor = _plain(below)
        return (_plain(above) / divisor, None) if divisor else (None, None)
    if found := _MIXED.fullmatch(text):
        part, _ = _value(found[2].strip())
        if part is not None and 0 <= part < 1:
            return int(found[1]) + part, None
    return None, None


def _plain(text: str) -> Fraction:
    text = text.replace(",", "")
    return Fraction(text[:-1] if text.endswith(".") else text)


def _ends(value: Fraction) -> bool:
    """Whether the decimals of a fraction come to an end."""
    below = value.denominator
    for prime in (2, 5):
        while below % prime == 0:
            below //= prime
    return below == 1
