"""transformers: `apply(model)` before training and `remove(model)` after; `compute_loss_func(model)` for Trainer.

    from drift_kernels.adapters import transformers as fused
    fused.apply(model)                       # Trainer, accelerate or a loop of your own: model(..., labels=labels).loss
    fused.remove(model)

While training with labels the head hands its input through, the loss is made from hidden states, and `outputs.logits` is
None. In `eval()`, without labels, and in `generate`, the model is what it was. The head's module, its parameters and
their names stay: tied weights, checkpoints and PEFT see no difference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import drift_kernels as dk
from drift_kernels.adapters._common import (
    Support,
    WeightedCollator,
    inside_head,
    not_compiled,
    share_prefixes,
    verify_if_loaded,
    wrap_forward,
)
from drift_kernels.head.models import head_module, transformed, unwrap_peft, verify
from drift_kernels.packs import check_batch

SUPPORTED = Support("transformers", "5.0", "6")
SUPPORTED.check()

__all__ = ["SUPPORTED", "WeightedCollator", "apply", "compute_loss_func", "remove", "share_prefixes"]


def apply(model: Any, config: dk.KernelConfig = dk.KernelConfig()) -> Any:
    """`model` (a causal LM, or a PeftModel around one) with its training loss fused; the same object comes back.

    The model then also takes `token_weights` of the labels' shape, one weight a label, beside `labels`: the loss is
    Σ wᵢ·(−log pᵢ) over `num_items_in_batch` where that is given, else over the number of labels that count.
    Again after `resize_token_embeddings`, which makes another head. Raises TypeError for a model without a language head,
    NotImplementedError for an adapter on the head, a loss function of the model's own or prompt learning, and at the first
    batch for an unknown step between the head and the loss, and for a pack whose sequences the model mixes (PackingError).
    """
    SUPPORTED.check()
    inner = _causal_lm(model)
    patch = _patch_of(inner)
    if patch is None:
        _Patch(inner, config)
        return model
    patch.follow_head()
    if not patch.on:
        patch.config = config
        patch.turn_on()
    return model


def remove(model: Any) -> Any:
    """Undoes `apply`; nothing happens if it was not applied. The same object comes back.

    Where something else has wrapped the model's forward since (accelerate's mixed precision), ours stays beneath it and
    does nothing.
    """
    patch = _patch_of(_causal_lm(model))
    if patch is not None and patch.on:
        patch.undo()
    return model


def compute_loss_func(model: Any, config: dk.KernelConfig = dk.KernelConfig()) -> Callable[..., Tensor]:
    """For `Trainer(compute_loss_func=compute_loss_func(model))`: applies the adapter, and is the loss Trainer asks for.

    Batches may carry `token_weights` of the labels' shape (`WeightedCollator` makes them; `remove_unused_columns=False`);
    the denominator is Trainer's count of labels over the whole accumulated batch and all processes. Evaluation keeps its
    logits.
    """
    patch = _patch_of(_causal_lm(apply(model, config)))
    assert patch is not None
    patch.deferring = True

    def loss(outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        captured, patch.captured = patch.captured, None
        if captured is None or labels is None:
            raise RuntimeError(
                "no hidden states wait for a loss: compute_loss_func(model) works inside Trainer, on batches with labels, "
                "from apply() to remove()"
            )
        return captured.loss(patch.model, labels, None, num_items_in_batch, -100)

    return loss


@dataclass
class _Captured:
    """One forward pass: what went into the head, and what its loss needs beside it."""

    passing: bool  # whether the head hands its input through
    weights: Tensor | None  # of the labels' shape
    config: dk.KernelConfig
    hidden: Tensor | None = None  # [B, L, D]
    version: int = 0  # of hidden, as the head was given it
    head_output: Tensor | None = None  # what the model made of the head's output
    used: bool = False  # whether the model asked for the loss

    def loss(self, model: Any, labels: Any, shift_labels: Any, num_items: Any, ignore_index: int) -> Tensor:
        """As transformers' causal LM loss: labels are shifted here, `shift_labels` (and their weights) are not."""
        assert self.hidden is not None
        place = head_module(model).weight.device
        targets = dk.shift(labels, fill=ignore_index) if shift_labels is None else shift_labels
        targets = targets.to(place).reshape(self.hidden.shape[:-1])
        weights = self.weights
        if weights is not None:
            weights = (dk.shift(weights) if shift_labels is None else weights).to(place).reshape(targets.shape)
        targets = targets.masked_fill(targets == ignore_index, -100)
        if num_items is None:
            num_items = (targets != -100).sum()
        num_items = torch.as_tensor(num_items).clamp(min=1)  # an accumulation window without a label has loss 0

        def inside(hidden: Tensor, head: dk.Head) -> Tensor:
            return dk.weighted_cross_entropy(
                hidden, head, targets, weights, normalizer=num_items, config=self.config
            ).loss

        return inside_head(model, self.hidden, inside, at_head=True)


class _Patch:
    """One applied model: what it sets on the model and its head, and how that is undone."""

    def __init__(self, model: Any, config: dk.KernelConfig) -> None:
        from transformers.loss.loss_utils import ForCausalLMLoss

        if model.loss_function is not ForCausalLMLoss:
            raise NotImplementedError(
                f"{type(model).__name__} has the loss {model.loss_function}; only transformers' causal LM loss is fused"
            )
        self.config = config
        self.ordinary_loss: Callable[..., Tensor] = ForCausalLMLoss
        self.deferring = self.explained = False
        self.call: _Captured | None = None  # under way
        self.captured: _Captured | None = None  # waiting for compute_loss_func
        self.model: Any = model
        self.head: Any = head_module(model)
        self.unknown = _unknown(model)
        self.before = [vars(model).get("_loss_function"), vars(model).get("forward"), None]
        self.ours: list[Any] = [None, None]
        model._drift_patch = self  # where a copy of the model finds the copy of this
        wrap_forward(model, lambda module, *args, **kwargs: module._drift_patch.forward(*args, **kwargs))
        self.ours[0] = model.forward
        self._wrap_head()
        self.turn_on()

    def _wrap_head(self) -> None:
        self.before[2] = vars(self.head).get("forward")
        self.head._drift_patch = self
        wrap_forward(self.head, lambda module, *args: module._drift_patch.project(*args))
        self.ours[1] = self.head.forward

    def follow_head(self) -> None:
        """The model's head as it is now."""
        head = head_module(self.model)
        if head is self.head:
            return
        if vars(self.head).get("forward") == self.ours[1]:
            _restore(self.head, "forward", self.before[2])
            del self.head._drift_patch
        self.head, self.explained = head, False
        self._wrap_head()

    def turn_on(self) -> None:
        """From here on the model's training loss is this one's."""
        self.on = True
        self.model.loss_function = self.loss

    def undo(self) -> None:
        """The model as it was; where others wrapped a forward since, ours stays below and hands on what it gets."""
        self.on = False
        _restore(self.model, "_loss_function", self.before[0])
        if [vars(self.model).get("forward"), vars(self.head).get("forward")] == self.ours:
            _restore(self.model, "forward", self.before[1])
            _restore(self.head, "forward", self.before[2])
            del self.model._drift_patch, self.head._drift_patch

    @not_compiled
    def project(self, before: Any, hidden: Tensor) -> Tensor:
        """Stands for the head's forward."""
        call = self.call
        if call is None:
            return before(hidden)
        if call.hidden is not None:
            raise NotImplementedError(
                "the model calls its head more than once in a forward pass; that is not supported"
            )
        call.hidden, call.version = hidden, _version(hidden)
        return hidden if call.passing else before(hidden)

    @not_compiled(recursive=False)
    def forward(self, before: Any, *args: Any, token_weights: Tensor | None = None, **kwargs: Any) -> Any:
        """Stands for the model's forward."""
        labels = kwargs.get("labels") is not None
        deferred = self.deferring and not labels and (token_weights is not None or "num_items_in_batch" in kwargs)
        if token_weights is not None and not (self.on and (labels or deferred)):
            raise ValueError(
                "token_weights came without labels, or after remove(model); pass labels=, or leave them out"
            )
        if not self.on or not (labels or deferred) or (labels and not self.model.training and token_weights is None):
            return before(*args, **kwargs)
        model = self.model
        if head_module(model) is not self.head:
            raise NotImplementedError(
                "the model's head is another module than at apply(model): PEFT or resize_token_embeddings replaced it; call "
                "apply(model) again"
            )
        check_batch(model, kwargs if args == () else {"input_ids": args[0], **kwargs})
        if self.unknown is None:  # of a copy, a new head or a changed configuration: the check runs the model
            try:
                verify(model)
            except NotImplementedError as error:
                raise NotImplementedError(f"{error}; call remove(model)") from error
        self.call = _Captured(model.training, token_weights, self.config)
        try:
            outputs = before(*args, **kwargs)
            call = self.call
        finally:
            self.call = None
        if call.hidden is None or (labels and not call.used):
            raise NotImplementedError(
                f"{type(model).__name__} does not go from get_output_embeddings() to self.loss_function; call remove(model)"
            )
        if deferred:
            if call.passing:
                self._explain(call, outputs["logits"] if isinstance(outputs, dict) else outputs[0])
            self.captured = call
            if call.passing:
                anchor = _Anchor.apply(call.hidden, *self.head.parameters())
                return {"loss": anchor} if isinstance(outputs, dict) else (anchor,)
        if call.passing and isinstance(outputs, dict):
            return type(outputs)(**{name: value for name, value in outputs.items() if name != "logits"})
        if call.passing:
            return tuple(None if item is call.head_output else item for item in outputs)
        return outputs

    @not_compiled
    def loss(
        self,
        logits: Tensor,
        labels: Tensor | None = None,
        vocab_size: int | None = None,
        num_items_in_batch: Any = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Stands for the model's loss function."""
        call = self.call
        if call is None:
            return self.ordinary_loss(
                logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs
            )
        if call.hidden is None:
            raise NotImplementedError(
                f"{type(self.model).__name__} does not project with get_output_embeddings(); call remove(model)"
            )
        if call.passing:
            self._explain(call, logits)
        call.used = True
        return call.loss(self.model, labels, shift_labels, num_items_in_batch, ignore_index)

    def _explain(self, call: _Captured, output: Tensor) -> None:
        """Raises unless what the model made of the head's output is the softcap and scale its config speaks of.

        With the head handing through, that function was applied to the hidden states, where it can be looked at. A view of
        them is refused: cutting off a vocabulary's end leaves all of what is narrower.
        """
        if isinstance(self.unknown, NotImplementedError):
            raise NotImplementedError(f"{self.unknown}; call remove(model)") from self.unknown
        hidden, reading = call.hidden, verify(self.model)
        softcap, scale = reading.softcap, reading.logit_scale
        assert hidden is not None
        call.head_output = output
        if output.shape != hidden.shape or _version(hidden) != call.version:
            accepted = False
        elif output is hidden:
            accepted = softcap is None and scale == 1.0
        elif output.data_ptr() == hidden.data_ptr():
            accepted = False
        elif not self.explained:
            expected = transformed(hidden.detach(), softcap, scale)
            accepted = self.explained = torch.allclose(expected, output.detach().float(), rtol=2e-2, atol=1e-3)
        else:
            accepted = True
        if not accepted:
            raise NotImplementedError(
                f"{type(self.model).__name__} changes its logits in another way than softcap {softcap} and scale "
                f"{scale} of its config: that is not supported; call remove(model)"
            )


def _unknown(model: Any) -> NotImplementedError | None:
    """Why the model's logits cannot be reproduced, found before FSDP or DDP wrap it; said at its first training batch."""
    try:
        verify_if_loaded(model, at_head=True)
    except NotImplementedError as error:
        return error
    return None


class _Anchor(torch.autograd.Function):
    """A zero that hangs on all that a loss made later will: DDP looks through a forward's outputs for unused parameters."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *head: Tensor) -> Tensor:
        ctx.count = 1 + len(head)
        return hidden.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return (None,) * ctx.count


def _version(tensor: Tensor) -> int:
    """How often it was written to; inference tensors do not count."""
    return 0 if tensor.is_inference() else tensor._version


def _restore(owner: Any, name: str, before: Any) -> None:
    delattr(owner, name)
    if before is not None:
        setattr(owner, name, before)


def _causal_lm(model: Any) -> Any:
    """The transformers model that is patched; TypeError for what wraps it in another way than PEFT."""
    inner = unwrap_peft(model)
    if not hasattr(inner, "get_output_embeddings") or hasattr(inner, "_orig_mod"):
        raise TypeError(
            f"{type(model).__name__} is no transformers model: apply(model) comes before DDP, FSDP and torch.compile"
        )
    return inner


def _patch_of(model: Any) -> _Patch | None:
    return vars(model).get("_drift_patch")
