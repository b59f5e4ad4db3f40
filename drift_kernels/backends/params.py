"""Names and numbers that row kernels take, the same for every backend."""

from __future__ import annotations

from drift_kernels.formulas import ratio_bounds
from drift_kernels.spec import NUMBERS, OBJECTIVES, PARAMETERS, PolicySpec

ROW_OUTPUTS = {
    "lse": "lse",
    "lse_low": "lse_low",
    "entropy": "entropy",
    "mean_logits": "mean_logits",
    "log_sum_sq_probs": "log_sum_sq",
}
ENTRY_OUTPUTS = {"logprobs": "logprobs", "is_top1": "top1"}
POLICY_OUTPUTS = ("loss", "ratio", "kl", "clipped")
ESTIMATORS = {"k1": 0, "k2": 1, "k3": 2, "abs": 3}
# Fields of PolicySpec that only some objectives read, of those objectives that the kernels have
POINTWISE = tuple(
    name for name, (_, owners) in PARAMETERS.items() if any(OBJECTIVES[o].number is not None for o in owners)
)


def _parameters(spec: PolicySpec) -> dict[str, float]:
    """The parameters of single objectives by their names in the kernels."""
    named = {}
    for name in POINTWISE:
        check, value = NUMBERS[name], getattr(spec, name)
        values = value if check.size else (check.absent if value is None else value,)
        named.update(zip(check.kernels or (name,), values))
    return named


def policy_numbers(spec: PolicySpec) -> dict[str, float]:
    """The spec as the fields of `csrc/policy.h`'s PolicyParams; ValueError for an objective that is not there."""
    if spec.traits.number is None:
        raise ValueError(
            f"objective={spec.objective!r} has no kernel: its loss is computed from log-probs, by formulas.py"
        )
    kl_value = ESTIMATORS[spec.kl_estimator.rstrip("+")]
    low, high = ratio_bounds(spec)
    return {
        "objective": spec.traits.number,
        "kl_value": kl_value,
        "kl_grad": ESTIMATORS["k2"] if spec.kl_estimator.endswith("+") else kl_value,
        "low": low,
        "high": high,
        "kl_coef": spec.kl_coef,
        "entropy_coef": spec.entropy_coef,
        "z_loss_coef": spec.z_loss_coef,
        "kl_unbiased": spec.kl_unbiased,
        **_parameters(spec),
    }
