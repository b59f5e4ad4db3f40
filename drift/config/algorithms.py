"""The parts of each published algorithm. Data only; `drift.online` and `drift.jobs.run` read it.

>>> from drift.config.algorithms import ALGORITHMS
>>> ALGORITHMS["srpo"].routing, ALGORITHMS["srpo"].teacher, ALGORITHMS["srpo"].curriculum
('srpo', 'ema', False)
>>> [name for name, algorithm in ALGORITHMS.items() if algorithm.buffer]
['drift']
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Algorithm:
    """One row of the table; a part that is None or False is not there."""

    data: Literal["demonstrations", "offline", "online"]  # the source of trajectories
    policy: str | None  # preset of `drift_kernels.PolicySpec`; None is weighted cross-entropy
    routing: Literal["drift", "sdpo", "grpo", "srpo"] | None = None  # mode of `drift.routing`
    teacher: Literal["ema"] | None = None  # whose weights teach, unless a run says otherwise (`TeacherConfig.weights`)
    buffer: bool = False  # demonstrations from past batches
    rhythm: bool = False  # gate and rebellious bonus
    curriculum: bool = False  # warm-up and transition
    source: str = ""  # arXiv number


ALGORITHMS: dict[str, Algorithm] = {
    "sft": Algorithm("demonstrations", None),
    "importance-weighted": Algorithm("offline", None, source="2605.31455"),
    "grpo": Algorithm("online", "grpo", "grpo", source="2402.03300"),
    "dapo": Algorithm("online", "dapo", "grpo", source="2503.14476"),
    "gspo": Algorithm("online", "gspo", "grpo", source="2507.18071"),
    "sdpo": Algorithm("online", "dapo", "sdpo", "ema", source="2601.20802"),
    "srpo": Algorithm("online", "dapo", "srpo", "ema"),
    "drift": Algorithm("online", "dapo", "drift", "ema", True, True, True, source="2606.30345"),
}
