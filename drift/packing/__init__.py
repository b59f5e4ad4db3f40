"""Trajectories into packs: end to end (`pack`), or as prefix trees in which a shared token is there once (`tree`)."""

from drift.packing.flat import IGNORE, best_fit_decreasing, pack
from drift.packing.trees import Prefixes, prefixes, tree

__all__ = ["IGNORE", "Prefixes", "best_fit_decreasing", "pack", "prefixes", "tree"]
