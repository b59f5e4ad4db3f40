"""TRL's chunked log-prob, which SFT, GRPO, RLOO, DPO and KTO all go through, done by `linear_logprob` instead.

    from drift_kernels.adapters import trl
    trl.enable()          # or: with trl.enable(): trainer.train()
    trl.disable()

TRL looks the function up on each call, so that trainers made before are switched as well. Left out: the distillation
trainers, whose divergence is another function.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch
from torch import Tensor

import drift_kernels as dk
from drift_kernels.adapters._common import Support
from drift_kernels.head.models import is_zero3

SUPPORTED = Support("trl", "1.16", "2")
SUPPORTED.check()

MODULE, NAME = "trl.trainer.utils", "_ChunkedLogProbFunction"
PARAMETERS = (
    "hidden",
    "weight",
    "bias",
    "targets",
    "temperature",
    "chunk_size",
    "final_logit_softcapping",
    "logit_scale",
    "outputs",
)
OPTIONAL = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")

PerToken = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class FusedLogProb:
    """Stands in for TRL's autograd.Function: the same nine arguments, five results and dtypes.

    Results are fp32 and `is_top1` bool, whatever the inputs. `chunk_size` is ours to choose and not read. Targets of −100
    give 0 without gradient. Logits are fp32, where TRL rounds them to the inputs' dtype: in bf16 log-probs differ by
    that rounding, and `is_top1` finds no ties among rounded logits.
    """

    config = dk.KernelConfig()
    replaced: Any = None

    @classmethod
    def apply(
        cls,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = OPTIONAL,
    ) -> PerToken:
        """(logprobs, entropy, log_sum_sq_probs, mean_logits, is_top1) [N], None for those that `outputs` does not name."""
        if is_zero3():
            raise NotImplementedError(
                "DeepSpeed ZeRO-3 is not supported: its head is empty outside TRL's own function; use ZeRO-2 or FSDP2, "
                "or drift_kernels.adapters.trl.disable()"
            )
        if not torch.is_autocast_enabled(hidden.device.type):  # else the op casts, as TRL does
            weight = weight.to(hidden.dtype)
            bias = None if bias is None else bias.to(hidden.dtype)
        scores = dk.linear_logprob(
            hidden,
            dk.Head(
                weight, bias=bias, temperature=temperature, softcap=final_logit_softcapping, logit_scale=logit_scale
            ),
            targets,
            entropy_gradient="entropy" in outputs,
            outputs=tuple(name for name in OPTIONAL[1:] if name in outputs),
            config=cls.config,
        )
        entropy = None if scores.entropy is None else scores.entropy.float()
        squares, mean, top = (scores.outputs.get(name) for name in OPTIONAL[1:])
        return (
            scores.logprobs.float(),
            entropy,
            None if squares is None else squares.float(),
            None if mean is None else mean.float(),
            None if top is None else top.bool(),
        )


class Enabled:
    """The result of `enable`: as a context manager it restores the earlier function on exit."""

    def __init__(self, before: Any) -> None:
        self._before = before

    def __enter__(self) -> Enabled:
        return self

    def __exit__(self, *error: object) -> None:
        _set(self._before)


def enable(config: dk.KernelConfig = dk.KernelConfig()) -> Enabled:
    """From here on TRL's trainers take log-probs from `linear_logprob`; the kernel follows the device unless `config` says.

    Usable in a `with` statement. Raises ImportError if TRL is missing or of an unsupported version, RuntimeError
    if it has no such function or one that takes other arguments.
    """
    current = SUPPORTED.seam(MODULE, NAME)
    original = current.replaced if _is_ours(current) else current
    _check_signature(original)
    _set(type("FusedLogProb", (FusedLogProb,), {"config": config, "replaced": original}))
    return Enabled(current)


def disable() -> None:
    """TRL's own function again; no effect if it is there already."""
    current = SUPPORTED.seam(MODULE, NAME)
    if _is_ours(current):
        _set(current.replaced)


def _is_ours(function: Any) -> bool:
    return isinstance(function, type) and issubclass(function, FusedLogProb)


def _set(value: Any) -> None:
    setattr(importlib.import_module(MODULE), NAME, value)


def _check_signature(function: Any) -> None:
    takes = tuple(inspect.signature(function.forward).parameters)[1:] if function is not None else None
    if takes != PARAMETERS:
        raise RuntimeError(
            f"{MODULE}.{NAME} of trl {SUPPORTED.check()} takes {takes}, not {PARAMETERS}; this adapter needs {SUPPORTED}"
        )
