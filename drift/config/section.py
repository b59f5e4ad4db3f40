"""The base of every section of a config, and the ranges that settings have."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]
LearningRate = Annotated[float, Field(gt=0, le=10)]
Share = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """The base of all sections: frozen, strict, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def preset(data: dict[str, Any], name: str, values: dict[str, Any], section: str = "") -> dict[str, Any]:
    """`data` with the values that a preset sets; keys that were given other values are contradictions.

    section: the owner of these keys, if it is not the one that complains.
    """
    given = {key: data.get(key, value) for key, value in values.items()}
    wrong = [key for key, value in given.items() if (tuple(value) if isinstance(value, list) else value) != values[key]]
    if wrong:
        said = ", ".join(f"{section}{key} {given[key]!r}" for key in wrong)
        sets = f"{'it' if len(wrong) == 1 else 'them'} to {', '.join(repr(values[key]) for key in wrong)}"
        drop = f"drop one; {section.rstrip('.')}={{}} drops all that a file says" if section else "drop one"
        raise ValueError(f"{said} contradicts {name}, which sets {sets}; {drop}")
    return {**data, **values}
