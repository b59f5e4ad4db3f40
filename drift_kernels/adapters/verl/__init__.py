"""verl: fused log-probs and entropies under `use_fused_kernels`, and policy losses that verl lacks.

    actor_rollout_ref.model.external_lib=drift_kernels.adapters.verl.on     # the one line; every process reads it
    actor_rollout_ref.model.use_fused_kernels=True

or VERL_USE_EXTERNAL_PLUGINS=drift in the environment of every process, or `enable()` in a script. `disable()`, or leaving
the line out, turns it off. verl looks both functions up on each forward, so that models patched before are switched too.

Left out: `ppo_loss` as a whole in one pass; the engine hands out padded log-probs, and its losses begin there.
"""

from drift_kernels.adapters.verl.swap import SUPPORTED, disable, enable  # isort: skip  (says how to get verl, so first)
from drift_kernels.adapters.verl.losses import register_policy_loss

__all__ = ["SUPPORTED", "disable", "enable", "register_policy_loss"]
