"""verl's two fused heads, done by `linear_logprob` instead.

`linear_cross_entropy` (impl_backend="triton") and `FusedLinearForPPO` ("torch", "liger") both give log-probs and entropies
of sampled tokens; which one a model calls is verl's to choose, and both are replaced.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

import drift_kernels as dk
from drift_kernels.adapters._common import Support

SUPPORTED = Support("verl", "0.9.1", "0.10")
SUPPORTED.check()

SEAMS = {
    "triton": ("verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy"),
    "torch": ("verl.utils.experimental.torch_functional", "FusedLinearForPPO"),
}


def _score(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float | Tensor, config: dk.KernelConfig
) -> tuple[Tensor, Tensor]:
    if isinstance(temperature, Tensor) and temperature.numel() > 1:
        raise NotImplementedError("a temperature per sample is not supported by verl's fused kernels, nor here")
    if isinstance(weight, DTensor):
        weight = _gathered(weight)
    scores = dk.linear_logprob(
        hidden,
        dk.Head(
            weight.to(hidden.dtype) if not torch.is_autocast_enabled(hidden.device.type) else weight,
            temperature=float(temperature),
        ),
        labels.to(torch.int64),
        entropy_gradient=True,
        config=config,
    )
    assert scores.entropy is not None
    return scores.logprobs, scores.entropy


def _gathered(weight: DTensor) -> Tensor:
    """A head that FSDP2 sharded by itself (verl does where embeddings are not tied), whole, outside its module's forward.

    No hook of FSDP's sees it then, so that its gradient is averaged over ranks here, as FSDP averages all others.
    """
    mesh = weight.device_mesh
    whole: Tensor = weight.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda grad: grad / mesh.size())
    return whole


def _linear_cross_entropy(config: dk.KernelConfig) -> Any:
    def linear_cross_entropy(
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        temperature: float = 1.0,
        reduction: str = "none",
        dist_process_group: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """(logprobs, entropy), both flat [N] fp32, of hidden [..., D] and labels [...]."""
        if reduction != "none":
            raise NotImplementedError(f"reduction={reduction!r} is not supported; verl's engines ask for 'none'")
        if dist_process_group is not None and torch.distributed.get_world_size(dist_process_group) > 1:
            raise NotImplementedError(
                "a vocabulary split over tensor-parallel ranks (Megatron) is not supported; use the FSDP engine, or "
                "use_fused_kernels=False"
            )
        return _score(hidden.reshape(-1, hidden.shape[-1]), weight, labels.reshape(-1), temperature, config)

    return linear_cross_entropy


def _fused_linear(config: dk.KernelConfig) -> Any:
    class FusedLinearForPPO(torch.nn.Module):
        """(log_probs fp32, entropy of hidden's dtype), both of the shape of input_ids."""

        def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
            super().__init__()
            self.chunk_size, self.impl_backend = chunk_size, impl_backend  # chunks are ours to choose

        def forward(
            self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
        ) -> tuple[Tensor, Tensor]:
            logprobs, entropy = _score(hidden_states, vocab_weights, input_ids, temperature, config)
            return logprobs.float(), entropy.to(hidden_states.dtype)

    return FusedLinearForPPO


class Enabled:
    """Of `enable`: as a context manager it puts back on exit what was there before."""

    def __init__(self, before: dict[str, Any]) -> None:
        self._before = before

    def __enter__(self) -> Enabled:
        return self

    def __exit__(self, *error: object) -> None:
        _set(self._before)


_original: dict[str, Any] = {}


def enable(config: dk.KernelConfig = dk.KernelConfig()) -> Enabled:
    """From here on verl's fused heads are `linear_logprob`, and its policy losses have `LOSSES` of `losses.py` beside them.

    Usable in a `with` statement. Raises ImportError if verl is missing or of an unsupported version, RuntimeError if
    it lacks one of the two functions.
    """
    from drift_kernels.adapters.verl.losses import register_all

    current = {name: SUPPORTED.seam(*seam) for name, seam in SEAMS.items()}
    if not _original:
        _original.update(current)
    _set({"triton": _linear_cross_entropy(config), "torch": _fused_linear(config)})
    register_all()
    return Enabled(current)


def disable() -> None:
    """verl's own functions again; nothing happens if they are there already. Registered losses stay: nobody asks them."""
    _set(_original)


def _set(values: dict[str, Any]) -> None:
    for name, value in values.items():
        module, attribute = SEAMS[name]
        setattr(importlib.import_module(module), attribute, value)
