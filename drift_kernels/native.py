"""The compiled extension. If it is absent, importing works, and the first use says what is missing."""

from __future__ import annotations

from typing import Any


class Absent:
    """Stands in for an extension that does not import."""

    def __init__(self, error: str) -> None:
        self.error = error

    def __getattr__(self, name: str) -> Any:
        raise ImportError(
            f"drift_kernels._cpu does not import ({self.error}); install drift-rl again with a C++ compiler on PATH"
        )


extension: Any
try:
    from drift_kernels import _cpu as extension  # pyright: ignore[reportAttributeAccessIssue]
except ImportError as error:
    extension = Absent(str(error))
