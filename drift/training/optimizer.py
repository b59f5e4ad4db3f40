"""AdamW over float32 masters of whatever can be trained, and the learning rate of each step.

A step of 5e-6 is lost in bfloat16, whose neighbours lie 0.4 to 0.8 % apart, so half-precision parameters get a
float32 copy that is stepped and written back. Gradients are added up there too, pack by pack. Parameters in float32 are
their own masters.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import nn

from drift.training.sharding import full, like


class OptimizerConfig(Protocol):
    """The part of `drift.config.TrainConfig` that is read here."""

    @property
    def lr(self) -> float: ...
    @property
    def betas(self) -> tuple[float, float]: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def warmup_ratio(self) -> float: ...
    @property
    def warmup_steps(self) -> int | None: ...
    @property
    def schedule(self) -> str: ...


class MasterAdamW:
    """`masters`: name → float32 tensor that is stepped, for each parameter of `model` that requires a gradient.

    Matrices decay, vectors (norms, biases) do not. Raises ValueError if nothing requires a gradient.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig) -> None:
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.trained:
            raise ValueError("model: no parameter requires a gradient, so there is nothing to train")
        self.masters = {name: _master(p) for name, p in self.trained.items()}
        groups = [
            {"params": [m for m in self.masters.values() if m.dim() >= 2], "weight_decay": config.weight_decay},
            {"params": [m for m in self.masters.values() if m.dim() < 2], "weight_decay": 0.0},
        ]
        self._adamw = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=config.lr, betas=config.betas, fused=_fused(self.masters.values())
        )

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The masters, in the model's order; after `collect` their `.grad` holds the step's gradient so far."""
        return list(self.masters.values())

    def collect(self) -> None:
        """Moves the model's gradients to the masters, adding to what is there. After each pack's backward."""
        for parameter, master in zip(self.trained.values(), self.masters.values()):
            if master is parameter or parameter.grad is None:
                continue
            gradient, parameter.grad = parameter.grad.float(), None
            if master.grad is None:
                master.grad = gradient
            else:
                master.grad += gradient

    def clip(self, limit: float) -> torch.Tensor:
        """Scales the gradient to a norm of at most `limit`; returns the norm before, 0-d."""
        return full(nn.utils.clip_grad_norm_(self.parameters, limit))

    def step(self, lr: float) -> None:
        """One AdamW step, written back to the model. A master without a gradient stays as it is."""
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        self.write_back()

    def write_back(self) -> None:
        """Copies the masters into the model, in the model's type."""
        with torch.no_grad():
            for parameter, master in zip(self.trained.values(), self.masters.values()):
                if master is not parameter:
                    parameter.copy_(master)

    def zero(self) -> None:
        """Drops all gradients."""
        for parameter in (*self.trained.values(), *self.masters.values()):
            parameter.grad = None

    def state_dict(self) -> dict[str, torch.Tensor]:
        """AdamW's moments and counts, flat: "NAME/exp_avg", "NAME/exp_avg_sq", "NAME/step"; of shards, shards."""
        return {
            f"{name}/{key}": value
            for name, master in self.masters.items()
            for key, value in self._adamw.state.get(master, {}).items()
        }

    def empty_state(self, key: str) -> torch.Tensor:
        """A place for what `state_dict` has under `key`. Raises ValueError if that parameter is not known here."""
        name, _, field = key.rpartition("/")
        if name not in self.masters:
            raise ValueError(f"optimizer state: {name!r} is not a trained parameter of this model")
        master = self.masters[name]
        if field != "step":
            return torch.zeros_like(master, requires_grad=False)
        return torch.zeros((), device=master.device if _fused([master]) else "cpu")

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Takes up what `state_dict` gave. Raises ValueError if a parameter is not known here."""
        for key, value in state.items():
            place = self.empty_state(key)
            name, _, field = key.rpartition("/")
            self._adamw.state[self.masters[name]][field] = place.copy_(like(value, place))


def learning_rate(step: int, total: int, config: OptimizerConfig) -> float:
    """The rate of step 0 … total - 1: rises in equal parts over the warm-up's steps, then constant, linear or cosine.

    The first step already moves; linear and cosine end above zero, at the last step's own share.
    """
    warmup = math.ceil(config.warmup_ratio * total) if config.warmup_steps is None else config.warmup_steps
    if step < warmup:
        return config.lr * (step + 1) / warmup
    left = (total - step) / max(total - warmup, 1)  # 1 at the first step after the warm-up
    match config.schedule:
        case "constant":
            return config.lr
        case "linear":
            return config.lr * left
        case "cosine":
            return config.lr * 0.5 * (1 - math.cos(math.pi * left))
    raise ValueError(f"schedule {config.schedule!r} should be constant, linear or cosine")


def _master(parameter: nn.Parameter) -> nn.Parameter:
    if parameter.dtype not in (torch.bfloat16, torch.float16):
        return parameter
    return nn.Parameter(parameter.detach().float())


def _fused(tensors) -> bool:
    """torch's one-kernel AdamW, if there is one; its step counts then lie beside the parameters."""
    return all(tensor.device.type in ("cpu", "cuda") for tensor in tensors)
