"""Launch choices from a file, over the rules of the GPU backends.

DRIFT_TUNING names a JSON file {"cuda": {...}, "triton": {...}}; each backend says which keys it takes.
"""

from __future__ import annotations

import json
import os
from functools import lru_cache
from typing import Any

VARIABLE = "DRIFT_TUNING"


def tuning(backend: str, keys: tuple[str, ...]) -> dict[str, Any]:
    """What the file sets for `backend`, {} without a file; ValueError names a key that is not one of `keys`."""
    path = os.environ.get(VARIABLE)
    numbers = _read(path).get(backend, {}) if path else {}
    for key in numbers:
        if key not in keys:
            raise ValueError(f"{VARIABLE}={path}: {backend!r} has no key {key!r}; it takes {', '.join(keys)}")
    return numbers


@lru_cache(maxsize=4)
def _read(path: str) -> dict[str, dict[str, Any]]:
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"{VARIABLE}={path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(v, dict) for v in content.values()):
        raise ValueError(f'{VARIABLE}={path} must hold {{"cuda": {{…}}, "triton": {{…}}}}')
    return content
