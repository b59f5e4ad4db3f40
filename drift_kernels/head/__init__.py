"""A language model's output projection as one value, the same in every op."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from drift_kernels.calls import HeadOptions
from drift_kernels.parallel import GatherHidden, VocabParallel
from drift_kernels.tensors import LoRAHead


@dataclass(frozen=True, eq=False)
class Head:
    """An lm_head: logits z = softcap(logit_scale·(h·Wᵀ + b)) / temperature, with softcap(u) = c·tanh(u/c).

    `Head.of(model)` reads one off a transformers or PEFT model. Every op takes a `Head`, or the bare weight [V, D].
    Raises TypeError or ValueError that names the field.
    """

    weight: Tensor  # [V, D]
    bias: Tensor | None = None  # [V]
    lora: LoRAHead | None = None  # adds scale·B·A to the weight, which is never formed
    softcap: float | None = None  # c; None = no cap
    logit_scale: float = 1.0
    temperature: float | Tensor = 1.0  # a number, or a tensor of the leading shape of `hidden`, one a row
    parallel: VocabParallel | GatherHidden | None = None  # the tensors with a V are this rank's share of them

    def __post_init__(self) -> None:
        if not isinstance(self.weight, Tensor):
            raise TypeError(f"head.weight is a {type(self.weight).__name__}; it must be a tensor [V, D]")
        if self.lora is not None and not isinstance(self.lora, LoRAHead):
            raise TypeError(f"lora is a {type(self.lora).__name__}; it must be LoRAHead(A, B, scale)")
        if self.parallel is not None and not isinstance(self.parallel, (VocabParallel, GatherHidden)):
            kind = type(self.parallel).__name__
            raise TypeError(f"head.parallel is a {kind}; it must be a VocabParallel, a GatherHidden or None")
        if self.parallel is not None and self.weight.dim():
            self.parallel.check_rows(self.weight.shape[0])
        self.options  # noqa: B018  # raises for numbers out of range

    @property
    def options(self) -> HeadOptions:
        """The numbers between a product and a logit, without a temperature per row."""
        temperature = 1.0 if isinstance(self.temperature, Tensor) else self.temperature
        share = None if self.parallel is None else self.parallel.share
        return HeadOptions(temperature, self.softcap, self.logit_scale, share=share)

    @property
    def vocabulary(self) -> int:
        """V, the number of tokens, of all shares together."""
        return self.weight.shape[0] if self.parallel is None else self.parallel.vocabulary

    def at(self, temperature: float | Tensor) -> Head:
        """The same head at another temperature."""
        return replace(self, temperature=temperature)

    def detach(self) -> Head:
        """The same head without gradients."""
        bias = None if self.bias is None else self.bias.detach()
        lora = self.lora and LoRAHead(self.lora.A.detach(), self.lora.B.detach(), self.lora.scale)
        return replace(self, weight=self.weight.detach(), bias=bias, lora=lora)

    def clone(self) -> Head:
        """A copy that later updates of the weight do not reach, without gradients."""
        bias = None if self.bias is None else self.bias.detach().clone()
        lora = self.lora and LoRAHead(self.lora.A.detach().clone(), self.lora.B.detach().clone(), self.lora.scale)
        return replace(self, weight=self.weight.detach().clone(), bias=bias, lora=lora)

    @staticmethod
    def of(model: Any, temperature: float | Tensor = 1.0) -> Head:
        """The head of a transformers or PEFT causal LM: weight, bias, LoRA, softcap and scale under whatever name.

        The result is checked against the model's own logits the first time, and again when the configuration or the head
        module has changed; a check runs the model on four tokens. Raises TypeError for a model without a head, and
        NotImplementedError with the reason for a head that is not of this form.
        """
        from drift_kernels.head import models

        return models.read(model, temperature)


def as_head(head: object) -> Head:
    """`head` itself, or a bare weight as a head. Raises TypeError for anything else."""
    if isinstance(head, Head):
        return head
    if isinstance(head, Tensor):
        return Head(head)
    raise TypeError(f"head is a {type(head).__name__}; it must be a Head, or the weight [V, D] alone")
