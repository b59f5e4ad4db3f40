"""TRL: `enable()` before training and `disable()` after; or one of the trainers, which also fuse what stands on log-probs."""

from drift_kernels.adapters.trl.swap import SUPPORTED, disable, enable

__all__ = ["SUPPORTED", "disable", "enable"]
