"""What every section of a config is: frozen, strict, without unknown keys; and the ranges that settings have."""

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
    """What all sections share: frozen, strict, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def preset(data: dict[str, Any], name: str, values: dict[str, Any]) -> dict[str, Any]:
    """`data` with the values that a preset sets; a key that was given another value is a contradiction."""
    for key, value in values.items():
        given = data.get(key, value)
        if (tuple(given) if isinstance(given, list) else given) != value:
            raise ValueError(f"{key} {given!r} contradicts {name}, which sets it to {value!r}; drop one")
    return {**data, **values}
