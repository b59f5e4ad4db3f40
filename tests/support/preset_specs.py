"""Every published policy loss as a spec. Parameters without a usual value get one, as the table of objectives asks."""

from typing import Any

import drift_kernels as dk
from drift_kernels.spec import OBJECTIVES, PARAMETERS, PRESETS

REQUIRED = 0.3  # the value of every parameter that has no default


def required(objective: str) -> dict[str, float]:
    """The parameters that `objective` cannot do without."""
    return dict.fromkeys(OBJECTIVES[objective].required, REQUIRED)


def preset(name: str, **changes: Any) -> dk.PolicySpec:
    """The published loss `name`, with those of the `changes` that its objective reads."""
    objective = PRESETS[name].get("objective", "clip")
    foreign = {name for name, (_, owners) in PARAMETERS.items() if objective not in owners}
    read = {name: value for name, value in changes.items() if name not in foreign}
    return dk.PolicySpec.preset(name, **required(objective) | read)


PRESET_SPECS = {name: preset(name) for name in PRESETS}
