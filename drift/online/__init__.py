"""Method B: rollouts, routing, self-distillation and policy updates in one loop."""

from drift.online.loop import OnlineStats, train_online

__all__ = ["OnlineStats", "train_online"]
