"""Whether old log-probs are aligned with targets, looked at on a few rows of a process's first call.

Samplers give a log-prob per token. The losses take one per target: entry i is about token i + 1. Log-probs that were not
shifted have the right shape, raise nothing and train on noise. If the policy is near the sampler's, the mistake shows:
entry i + 1 agrees with the model's log-prob of target i, and entry i does not.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

ROWS = 64  # looked at, of those that train
LEAST = 8  # rows below which a mean says nothing
FACTOR = 5.0  # how much closer the shifted log-probs must be
CLOSE = 0.5  # nats, how close they must be

_checked = False


def check_old_logprobs(old: Tensor, mask: Tensor, shape: torch.Size, logprobs_of: Callable[[Tensor], Tensor]) -> None:
    """Warns, on the first call with eager CPU tensors, if `old` would agree with the policy after a shift by one.

    Checked on CPU only; on a GPU, reading the values would synchronise.
    old      [N] old log-probs, flat
    mask     [N] bool, entries that train
    shape    of the targets, whose last dimension is time
    logprobs_of  entries [n] int64 → the policy's log-probs of their targets [n]
    """
    global _checked
    if _checked or old.device.type != "cpu" or torch.compiler.is_compiling() or type(old) is not Tensor:
        return
    _checked = True
    has_next = torch.ones(shape, dtype=torch.bool)
    has_next[..., -1:] = False
    entries = (mask & has_next.reshape(-1)).nonzero().squeeze(1)[:ROWS]
    if entries.numel() < LEAST:
        return
    with torch.no_grad():
        logprobs = logprobs_of(entries)
        as_passed = (logprobs - old[entries]).abs().mean().item()
        shifted = (logprobs - old[entries + 1]).abs().mean().item()
    if shifted < CLOSE and as_passed > FACTOR * shifted and as_passed > 1e-3:
        warnings.warn(
            "old_logprobs look as if they were aligned with tokens: they must be aligned with targets, entry i about token "
            f"i + 1. Over {entries.numel()} rows the policy's log-probs differ from them by {as_passed:.3g} nats on average, and "
            f"by {shifted:.3g} after a shift by one: pass dk.shift(old_logprobs, cu_seqlens)",
            stacklevel=4,
        )
