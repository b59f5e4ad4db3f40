"""Published sets of problems as rows of our own, for `drift data`: where each lies, and how a row of it is read."""

from __future__ import annotations

from drift.data.convert import convert
from drift.data.sets import SETS, PublishedSet, Skip

__all__ = ["SETS", "PublishedSet", "Skip", "convert"]
