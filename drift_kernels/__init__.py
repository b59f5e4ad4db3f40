"""Fused log-prob, policy and weighted cross-entropy ops from hidden states and lm_head, never holding [T, V] logits."""

from drift_kernels.backends import available_backends
from drift_kernels.ops import (
    LinearLogprob,
    LossOutput,
    linear_logprob,
    pointwise_loss,
    policy_loss,
    shift_targets,
    weighted_cross_entropy,
)
from drift_kernels.products import LoRAHead
from drift_kernels.scored import policy_token_loss
from drift_kernels.spec import KernelConfig, PolicySpec

__version__ = "0.1.0"

__all__ = [
    "KernelConfig",
    "LinearLogprob",
    "LoRAHead",
    "LossOutput",
    "PolicySpec",
    "available_backends",
    "linear_logprob",
    "pointwise_loss",
    "policy_loss",
    "policy_token_loss",
    "shift_targets",
    "weighted_cross_entropy",
]
