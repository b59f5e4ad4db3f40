"""What stays outside compiled graphs. Imported only while torch.compile traces: a function is marked by the compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def _call(op: Callable[..., Any], *args: Any, **options: Any) -> Any:
    return op(*args, **options)


pointwise: Any = torch.compiler.disable(
    _call,
    reason="pointwise_loss calls fn, a Python function, on each chunk of rows, and no op of a graph takes a function; "
    "without fullgraph=True it runs between two graphs",
)
