"""TRL: `enable()` before training and `disable()` after; or a trainer that also fuses what stands on the log-probs."""

from drift_kernels.adapters.trl.swap import SUPPORTED, disable, enable  # isort: skip  (says how to get TRL, so first)
from drift_kernels.adapters.trl.grpo import DriftGRPOTrainer, policy_spec
from drift_kernels.adapters.trl.sft import DriftSFTTrainer

__all__ = ["SUPPORTED", "DriftGRPOTrainer", "DriftSFTTrainer", "disable", "enable", "policy_spec"]
