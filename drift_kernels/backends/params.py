"""What row kernels take besides logits, the same for every backend. C rows of V logits, M entries."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from drift_kernels.formulas import ratio_bounds
from drift_kernels.spec import HeadOptions, PolicySpec

ROW_OUTPUTS = {"lse": "lse", "entropy": "entropy", "mean_logits": "mean_logits", "log_sum_sq_probs": "log_sum_sq"}
ENTRY_OUTPUTS = {"logprobs": "logprobs", "is_top1": "top1"}
POLICY_OUTPUTS = ("loss", "ratio", "kl", "clipped")
OBJECTIVES = {"clip": 0, "cispo": 1, "sapo": 2, "reinforce": 3, "dppo_tv": 4, "dppo_kl": 5, "dro": 6}
ESTIMATORS = {"k1": 0, "k2": 1, "k3": 2, "abs": 3}


@dataclass(frozen=True)
class Chunk:
    """What row kernels read of some rows besides their logits. Every tensor is contiguous and of the logits' dtype."""

    targets: Tensor  # [M] int64
    row_ptr: Tensor | None  # [C + 1] int64, None = one entry a row
    inv_temperature: Tensor | None  # [C], None = the head's own
    bias: Tensor | None  # [V]
    head: HeadOptions


def policy_numbers(spec: PolicySpec) -> dict[str, float]:
    """The spec as the fields of `csrc/policy.h`'s PolicyParams."""
    kl_value = ESTIMATORS[spec.kl_estimator.rstrip("+")]
    low, high = ratio_bounds(spec)
    tau_pos, tau_neg = spec.sapo_temperatures
    return {
        "objective": OBJECTIVES[spec.objective],
        "kl_value": kl_value,
        "kl_grad": ESTIMATORS["k2"] if spec.kl_estimator.endswith("+") else kl_value,
        "low": low,
        "high": high,
        "dual_clip": spec.dual_clip or 0.0,
        "delta": math.inf if spec.delta is None else spec.delta,
        "tau_pos": tau_pos,
        "tau_neg": tau_neg,
        "kl_coef": spec.kl_coef,
        "entropy_coef": spec.entropy_coef,
        "z_loss_coef": spec.z_loss_coef,
        "kl_unbiased": spec.kl_unbiased,
        "dro_beta": spec.dro_beta or 0.0,
    }
