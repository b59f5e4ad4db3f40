"""What each published name stands for, field by field, as its authors have it."""

from dataclasses import asdict

import pytest
from preset_specs import PRESET_SPECS, REQUIRED

from drift_kernels.spec import PRESETS

PPO = {  # arXiv 1707.06347, the mean over tokens
    "objective": "clip",
    "ratio": "token",
    "clip_low": 0.2,
    "clip_high": 0.2,
    "dual_clip": None,
    "delta": None,
    "sapo_temperatures": (1.0, 1.05),  # arXiv 2511.20347
    "kl_coef": 0.0,
    "kl_estimator": "k3",
    "entropy_coef": 0.0,
    "z_loss_coef": 0.0,
    "aggregation": "token_mean",
    "correction": None,
    "correction_bounds": (0.0, 2.0),
    "kl_unbiased": False,
    "off_policy_threshold": None,
    "dro_beta": None,
    "gppo_weights": (1.0, 1.0),  # arXiv 2508.07629
    "vespo_weights": (2.0, 3.0, 3.0, 2.0),  # TRL's k_pos, lambda_pos, k_neg, lambda_neg
    "cov_share": 2e-4,  # arXiv 2505.22617, with what follows
    "cov_bounds": (1.0, 5.0),
    "cov_kl_coef": 1.0,
}
GSPO = {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4}  # arXiv 2507.18071
PER_SEQUENCE, SUMS = {"aggregation": "sequence_mean_token_mean"}, {"aggregation": "sequence_mean_token_sum"}
PUBLISHED = {
    "ppo": {},
    "dual_clip": {"dual_clip": 3.0},  # arXiv 1912.09729
    "two_sided": {"delta": 4.0},  # INTELLECT-2, arXiv 2505.07291
    "grpo": PER_SEQUENCE,  # arXiv 2402.03300
    "bnpo": {},
    "dapo": {"clip_high": 0.28},  # arXiv 2503.14476
    "dr_grpo": {"aggregation": "token_sum"},  # arXiv 2503.20783
    "cispo": {"objective": "cispo"},  # arXiv 2506.13585
    "sapo": {"objective": "sapo", **PER_SEQUENCE},
    "reinforce": {"objective": "reinforce"},
    "gpg": {"objective": "reinforce"},  # arXiv 2504.02546
    "gspo": {**GSPO, **PER_SEQUENCE},
    "gspo_token": {**GSPO, **PER_SEQUENCE, "ratio": "sequence_token"},
    "luspo": {**GSPO, **SUMS},
    "gmpo": {"objective": "gmpo", "ratio": "sequence", "clip_low": 0.4, "clip_high": 0.4, **PER_SEQUENCE},
    "vespo": {"objective": "vespo"},
    "dppo_tv": {"objective": "dppo_tv", "delta": 20.0},
    "dppo_kl": {"objective": "dppo_kl", "delta": 20.0},
    "dro": {"objective": "dro", "dro_beta": REQUIRED},  # the caller's
    "gppo": {"objective": "gppo"},
    "ce_gppo": {"objective": "gppo", "gppo_weights": (0.75, 1.0)},  # arXiv 2509.20712
    "clip_cov": {"objective": "clip_cov"},
    "kl_cov": {"objective": "kl_cov"},
}


@pytest.mark.parametrize("name", sorted(PRESETS.keys() | PUBLISHED.keys()))
def test_presets(name):
    assert asdict(PRESET_SPECS[name]) == PPO | PUBLISHED[name]
