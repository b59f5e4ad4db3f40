"""Published sets of problems as rows of our own, for `drift data`: the address of each set, and the reading of its rows."""

from __future__ import annotations

from drift.data.convert import convert
from drift.data.sets import SETS, PublishedSet, Skip

__all__ = ["SETS", "PublishedSet", "Skip", "convert"]
