"""The options of a call from its tensors: which gradients it makes, on which backend; and the combinations that are refused."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from drift_kernels import backends
from drift_kernels.calls import Call, KernelConfig
from drift_kernels.inputs import Flat
from drift_kernels.spec import PolicySpec
from drift_kernels.tensors import compute_dtype


def call_of(flat: Flat, spec: PolicySpec, config: KernelConfig, outputs: tuple[str, ...]) -> Call:
    """The call, with its gradients and its backend by name. Inside a Function requires_grad stays True, so it is read here."""
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in flat.operands()]
    lora = flat.head.lora
    call = Call(spec, flat.head.options, config, outputs, *needs, lora_scale=1.0 if lora is None else float(lora.scale))
    backend = backends.resolve(config.backend, flat.hidden.device)
    check_share(call, backend)
    if config.accumulate_into_grad is not None and call.need_weight:
        check_accumulation(flat.head.weight)
        call = replace(call, accumulate_scale=config.accumulate_into_grad)
    return replace(call, config=replace(config, backend=backend))


def check_share(call: Call, backend: str) -> None:
    """Raises NotImplementedError naming the option that a head with `parallel` does not have."""
    share = call.head.share
    if share is None:
        return
    kind, refused = "GatherHidden" if share.gather else "VocabParallel", None
    if backend != "cpu":
        refused = f"backend={backend!r}; the backend that takes shares of a vocabulary is 'cpu'"
    elif call.config.accumulate_into_grad is not None:
        refused = "accumulate_into_grad; leave it None"
    elif call.spec.objective == "clip_cov":
        refused = "objective='clip_cov', whose random choice would differ between ranks; 'kl_cov' needs none"
    elif share.gather and call.spec.scope == "batch":
        refused = f"objective={call.spec.objective!r}, which selects over one rank's call; use VocabParallel"
    if refused:
        raise NotImplementedError(f"a head with parallel={kind} does not take {refused}")


def check_accumulation(weight: Tensor) -> None:
    """Raises RuntimeError unless dW may be added to `weight.grad` behind autograd's back; makes `weight.grad` if it is None.

    Refused: a weight that is not a leaf (its gradient belongs to another tensor) or not in its compute dtype (.grad would round
    every sum); hooks on the gradient; a forward that may run twice (activation checkpointing); several processes (DDP and FSDP
    reduce gradients in hooks that cannot be seen from here); a compiled graph.
    """
    reason = None
    if torch.compiler.is_compiling():
        reason = "a compiled graph may move or repeat it"
    elif not weight.is_leaf:
        reason = "weight is not a leaf (under autocast it is a cast copy): pass the parameter itself"
    elif weight.dtype != compute_dtype(weight.dtype):
        reason = f"weight is {weight.dtype}, and sums would be rounded to it: pass an fp32 master weight"
    elif weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None):
        reason = "hooks on weight wait for its gradient, and would not see this one"
    elif torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:  # pyright: ignore[reportAttributeAccessIssue]
        reason = (
            "hooks on saved tensors are in force, as under activation checkpointing, which would run this forward again and "
            "add it twice: keep the loss outside of that"
        )
    elif (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    ):
        reason = "several processes run, and DDP or FSDP would not see this gradient"
    elif weight.grad is not None and (weight.grad.dtype != weight.dtype or not weight.grad.is_contiguous()):
        reason = (
            f"weight.grad is {weight.grad.dtype} with strides {weight.grad.stride()}; it must be a plain {weight.dtype}"
        )
    if reason:
        raise RuntimeError(f"accumulate_into_grad cannot be used here: {reason}")
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
