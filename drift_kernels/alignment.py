"""Whether old log-probs are aligned with targets, looked at on a few rows of a process's first call.

Samplers give a log-prob per token. The losses take one per target: entry i is about token i + 1. Log-probs that were not
shifted have the right shape, raise nothing and train on noise. If the policy is near the sampler's, the mistake shows:
entry i + 1 agrees with the model's log-prob of target i, and entry i does not.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from torch import Tensor

from drift_kernels.autograd import logprobs_of
from drift_kernels.calls import Call
from drift_kernels.inputs import Flat
from drift_kernels.spec import PolicySpec

ROWS = 64  # looked at, of those that train
LEAST = 8  # rows below which a mean says nothing
FACTOR = 5.0  # how much closer the shifted log-probs must be
CLOSE = 0.5  # nats, how close they must be

_checked = False


def check_old_logprobs(flat: Flat, mask: Tensor, old: Tensor | None, call: Call) -> None:
    """Warns, on the first call with eager CPU tensors, if `old` [N] would agree with the policy after a shift by one.

    Checked on CPU only; on a GPU, reading the values would synchronise. Left out: calls with `rows`, whose entries need not
    follow each other, and those with a temperature per row. `mask` [N]: entries that train.
    """
    global _checked
    if torch.compiler.is_compiling():  # first: a graph that had read `_checked` would be traced again once it changes
        return
    if _checked or old is None or flat.temperature is not None or flat.rows is not None:
        return
    if old.device.type != "cpu" or type(old) is not Tensor:
        return
    _checked = True
    has_next = torch.ones(flat.shape, dtype=torch.bool)
    has_next[..., -1:] = False
    entries = (mask & has_next.reshape(-1)).nonzero().squeeze(1)[:ROWS]
    if entries.numel() < LEAST:
        return
    with torch.no_grad():
        picked = replace(flat, hidden=flat.hidden[entries], targets=flat.targets[entries], active=None)
        scoring = replace(call.scoring(("logprobs",)), spec=PolicySpec())
        logprobs, _, _ = logprobs_of(picked, scoring)
        as_passed = (logprobs - old[entries]).abs().mean().item()
        shifted = (logprobs - old[entries + 1]).abs().mean().item()
    if shifted < CLOSE and as_passed > FACTOR * shifted and as_passed > 1e-3:
        warnings.warn(
            "old_logprobs look as if they were aligned with tokens: they must be aligned with targets, entry i about token "
            f"i + 1. Over {entries.numel()} rows the policy's log-probs differ from them by {as_passed:.3g} nats on average, and "
            f"by {shifted:.3g} after a shift by one: pass dk.shift(old_logprobs, cu_seqlens)",
            stacklevel=3,
        )
