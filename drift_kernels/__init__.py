"""Fused log-prob, policy and weighted cross-entropy ops from hidden states and lm_head, never holding [T, V] logits."""

from drift_kernels.backends import available_backends
from drift_kernels.calls import KernelConfig
from drift_kernels.distill_ops import Exploration, distill_loss, self_distill_loss, topk_logprobs
from drift_kernels.distill_spec import DistillSpec, ExplorationSpec
from drift_kernels.head import Head
from drift_kernels.memory import empty_cache
from drift_kernels.ops import (
    linear_logprob,
    pointwise_loss,
    policy_loss,
    shift,
    shift_targets,
    weighted_cross_entropy,
)
from drift_kernels.outputs import LinearLogprob, LossOutput
from drift_kernels.parallel import GatherHidden, VocabParallel
from drift_kernels.scored import policy_token_loss
from drift_kernels.spec import PolicySpec
from drift_kernels.teachers import Teacher, TeacherLogprobs, TeacherTopK
from drift_kernels.tensors import LoRAHead

__version__ = "0.1.0"

__all__ = [
    "DistillSpec",
    "Exploration",
    "ExplorationSpec",
    "GatherHidden",
    "Head",
    "KernelConfig",
    "LinearLogprob",
    "LoRAHead",
    "LossOutput",
    "PolicySpec",
    "Teacher",
    "TeacherLogprobs",
    "TeacherTopK",
    "VocabParallel",
    "available_backends",
    "distill_loss",
    "empty_cache",
    "linear_logprob",
    "pointwise_loss",
    "policy_loss",
    "policy_token_loss",
    "self_distill_loss",
    "shift",
    "shift_targets",
    "topk_logprobs",
    "weighted_cross_entropy",
]
