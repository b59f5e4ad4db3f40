"""Every shape, dtype and value check, and how padded, packed and per-segment arguments become flat [N] tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd import forward_ad

from drift_kernels import backends
from drift_kernels.calls import Call
from drift_kernels.head import Head, as_head
from drift_kernels.plan import unmasked
from drift_kernels.spec import PolicySpec
from drift_kernels.tensors import LoRAHead, compute_dtype, is_dtensor

IGNORE_INDEX = -100  # a target that takes no part, as in torch's cross_entropy
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Layout:
    """Which hidden row each target belongs to, and which targets count; never differentiated."""

    targets: Tensor  # [N] int64
    rows: Tensor | None
    active: Tensor | None
    temperature: Tensor | None  # [T]

    def flat(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """In the order of the ops' schemas."""
        return self.targets, self.rows, self.active, self.temperature


@dataclass(frozen=True)
class Flat:
    """An op's tensors without their batch shape: hidden [T, D], everything per entry [N]."""

    hidden: Tensor
    head: Head
    targets: Tensor  # [N] int64
    rows: Tensor | None
    active: Tensor | None
    temperature: Tensor | None  # [T]; None = the number in the head's options
    shape: torch.Size  # of `targets` as the caller passed it; per-entry outputs get it back

    def operands(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """The tensors that may need a gradient: hidden, weight, bias, and LoRA's A and B."""
        a, b = (None, None) if self.head.lora is None else (self.head.lora.A, self.head.lora.B)
        return self.hidden, self.head.weight, self.head.bias, a, b

    @property
    def dtype(self) -> torch.dtype:
        """Of logits, losses and sums."""
        return compute_dtype(self.hidden.dtype)

    def per_entry(self, name: str, value: Tensor | None) -> Tensor | None:
        """`value` of the targets' shape as [N] in the compute dtype, without gradient."""
        if value is None:
            return None
        check_data(name, value, self.targets.device)
        if value.shape != self.shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, targets {tuple(self.shape)}; they must agree")
        return value.detach().reshape(-1).to(self.dtype).contiguous()

    def mask(self) -> Tensor:
        """Which entries have a target and lie in `active` [N] bool."""
        return unmasked(self.targets, self.active, IGNORE_INDEX)

    def unflatten(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Per-entry outputs [N] in the shape of the targets."""
        return {name: value.reshape(self.shape) for name, value in values.items()}

    def or_one(self, total: Tensor) -> Tensor:
        """A denominator that is 1 when nothing counts, so that an empty batch has loss 0 and zero gradients."""
        total = total.to(self.dtype)
        return torch.where(total == 0, torch.ones_like(total), total)


def check_tensor(name: str, value: object) -> None:
    """Raises TypeError unless `value` is a dense tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be a tensor")
    if value.layout != torch.strided:
        raise TypeError(f"{name} has layout {value.layout}; it must be dense: pass {name}.to_dense()")


def check_data(name: str, value: Tensor, device: torch.device) -> None:
    """Raises unless `value` is a real tensor on `device` that no gradient is expected for."""
    check_tensor(name, value)
    if value.device != device:
        raise ValueError(f"{name} lies on {value.device}, hidden on {device}; move it")
    if value.is_complex():
        raise TypeError(f"{name} has dtype {value.dtype}; it must be real")
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires grad, and no gradient would reach it; detach it")
    check_no_tangent(name, value)


def check_no_tangent(name: str, value: Tensor) -> None:
    """Raises ValueError where forward-mode autograd would lose what it carries with `value`."""
    if forward_ad.unpack_dual(value).tangent is not None:
        raise ValueError(f"{name} has a tangent, and it would get no further; detach it")


def check_off_policy(spec: PolicySpec, old: Tensor | None, rollout: Tensor | None) -> None:
    """Raises ValueError where nothing says how far the sampler was, and the mask would keep everything."""
    if spec.off_policy_threshold is not None and old is None and rollout is None:
        raise ValueError(f"off_policy_threshold={spec.off_policy_threshold} needs rollout_logprobs or old_logprobs")


def flatten(hidden: Tensor, head: Head | Tensor, targets: Tensor, rows: Tensor | None, active: Tensor | None) -> Flat:
    """Checks what every op takes and drops its batch shape; raises TypeError or ValueError naming the argument."""
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "torch.func transforms (grad, vmap, jvp, …) of a fused op are not supported: its gradient is made by kernels that "
            "they cannot look into; use loss.backward() or torch.autograd.grad"
        )
    head = as_head(head)
    for name, value in (("hidden", hidden), ("targets", targets), *_head_tensors(head)):
        _check_plain(name, value)
    for name, value in (("rows", rows), ("active", active)):
        if value is not None:
            _check_plain(name, value)
    hidden, head = _cast_for_autocast(hidden, head)
    _check_head(hidden, head)
    _check_layout(hidden, targets, rows, active)
    per_row = _row_temperature(hidden, head)
    tensors = (hidden, targets, rows, active, per_row, *(value for _, value in _head_tensors(head)))
    devices = {t.device for t in tensors if t is not None}
    if len(devices) > 1:
        raise ValueError(f"tensors lie on different devices: {', '.join(map(str, devices))}")
    flat = hidden.reshape(-1, hidden.shape[-1])
    _check_indices(rows, active, flat.shape[0], targets.numel())
    return Flat(flat, head, targets.reshape(-1).contiguous(), rows, active, per_row, targets.shape)


def _head_tensors(head: Head) -> list[tuple[str, Tensor]]:
    lora = [] if head.lora is None else [("lora.A", head.lora.A), ("lora.B", head.lora.B)]
    bias = [] if head.bias is None else [("bias", head.bias)]
    return [("weight", head.weight), *bias, *lora]


def _check_plain(name: str, value: object) -> None:
    check_tensor(name, value)
    if is_dtensor(value):
        raise NotImplementedError(
            f"{name} is a DTensor, which does not say whether ranks hold the same hidden rows: pass {name}.to_local() with "
            f"Head(parallel=VocabParallel.of({name})) if they do (tensor parallel), with GatherHidden.of({name}) if each has "
            f"its own (data parallel, as under FSDP), or {name}.full_tensor()"
        )


def _check_head(hidden: Tensor, head: Head) -> None:
    if hidden.dtype not in FLOATS:
        raise TypeError(f"hidden has dtype {hidden.dtype}; it must be one of float64, float32, bfloat16, float16")
    for name, value in _head_tensors(head):
        if value.dtype not in (hidden.dtype, compute_dtype(hidden.dtype)):
            raise TypeError(
                f"{name} is {value.dtype} but hidden is {hidden.dtype}; it must be that or {compute_dtype(hidden.dtype)}: "
                "cast one of them, or use torch.autocast"
            )
    weight, lora = head.weight, head.lora
    if weight.dim() != 2 or hidden.dim() < 2 or hidden.shape[-1] != weight.shape[1] or not weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} must be [..., D] and weight {tuple(weight.shape)} [V, D], D at least 1"
        )
    if head.bias is not None and head.bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(head.bias.shape)}; it must be [V] = {tuple(weight.shape[:1])}")
    if lora is not None and (
        lora.A.dim() != 2 or lora.A.shape[1] != weight.shape[1] or lora.B.shape != (weight.shape[0], lora.A.shape[0])
    ):
        raise ValueError(
            f"lora.A {tuple(lora.A.shape)} must be [r, D = {weight.shape[1]}] and lora.B {tuple(lora.B.shape)} "
            f"[V = {weight.shape[0]}, r]"
        )


def _check_layout(hidden: Tensor, targets: Tensor, rows: Tensor | None, active: Tensor | None) -> None:
    if targets.dtype != torch.int64:
        raise TypeError(f"targets has dtype {targets.dtype}; it must be int64")
    if rows is None and targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"targets {tuple(targets.shape)} must have the leading shape of hidden {tuple(hidden.shape[:-1])}"
        )
    if rows is not None and (
        targets.dim() != 1 or hidden.dim() != 2 or rows.shape != targets.shape or rows.dtype != torch.int64
    ):
        raise ValueError(
            f"with rows= targets and rows must be [N] int64 and hidden [T, D]; got {tuple(targets.shape)}, {tuple(rows.shape)}"
        )
    if active is not None and (active.dim() != 1 or active.dtype != torch.int64):
        raise ValueError(f"active must be a 1-d int64 tensor of positions; got {tuple(active.shape)} {active.dtype}")


def _row_temperature(hidden: Tensor, head: Head) -> Tensor | None:
    """A temperature per row [T]; None when it is one number."""
    if not isinstance(head.temperature, Tensor):
        return None
    check_data("temperature", head.temperature, hidden.device)
    if head.temperature.shape != hidden.shape[:-1]:
        raise ValueError(
            f"temperature has shape {tuple(head.temperature.shape)}; it must be a number or {tuple(hidden.shape[:-1])}"
        )
    return head.temperature.detach().reshape(-1)


def _check_indices(rows: Tensor | None, active: Tensor | None, hidden_rows: int, entries: int) -> None:
    """Values of `rows` and `active`, on a CPU alone: elsewhere looking costs a wait."""
    if torch.compiler.is_compiling():
        return
    for name, index, size in (("rows", rows, hidden_rows), ("active", active, entries)):
        if index is None or index.device.type != "cpu" or not index.numel():
            continue
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= size:
            raise IndexError(f"{name} holds {low}…{high}; it must lie in [0, {size})")
        if name == "rows" and bool((index.diff() < 0).any()):
            raise ValueError("rows must be sorted, so that the entries of a hidden row lie together")
        if name == "active" and index.unique().numel() < index.numel():
            raise ValueError("active holds a position twice; it must name each once (a mask's .nonzero() does)")


def _cast_for_autocast(hidden: Tensor, head: Head) -> tuple[Tensor, Head]:
    kind = hidden.device.type
    if (
        not torch.amp.is_autocast_available(kind)
        or not torch.is_autocast_enabled(kind)
        or hidden.dtype == torch.float64  # F.linear leaves fp64 alone too
    ):
        return hidden, head
    dtype = torch.get_autocast_dtype(kind)
    lora = head.lora and LoRAHead(head.lora.A.to(dtype), head.lora.B.to(dtype), head.lora.scale)
    bias = None if head.bias is None else head.bias.to(dtype)
    return hidden.to(dtype), replace(head, weight=head.weight.to(dtype), bias=bias, lora=lora)


def segment_ids(
    shape: torch.Size, cu_seqlens: Tensor | None, given: Tensor | None, device: torch.device
) -> tuple[Tensor | None, int]:
    """Which sequence each entry belongs to [N] int64, and how many sequences there are; (None, 0) where nothing says.

    From `segment_ids` as given, from `cu_seqlens` [S + 1] of a packed batch, or from the rows of a padded [B, L] one.
    """
    total = shape.numel()
    if given is not None and cu_seqlens is not None:
        raise ValueError("cu_seqlens and segment_ids both say where sequences end; pass one of them")
    if given is not None:
        check_tensor("segment_ids", given)
        if given.shape != shape or given.dtype != torch.int64:
            raise ValueError(
                f"segment_ids must be int64 of the targets' shape {tuple(shape)}; got {tuple(given.shape)} {given.dtype}"
            )
        if not given.numel():
            return given.reshape(-1), 0
        if torch.compiler.is_compiling():
            return given.reshape(-1), int(given.max()) + 1
        low, high = torch.stack(given.aminmax()).tolist()  # one wait for a GPU
        if low < 0:
            raise ValueError(f"segment_ids holds {low}; sequences are numbered from 0")
        return given.reshape(-1), high + 1
    if cu_seqlens is not None:
        check_tensor("cu_seqlens", cu_seqlens)
        if cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point():
            raise ValueError(
                f"cu_seqlens must be a 1-d integer tensor [S + 1]; got {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}"
            )
        check_cu_seqlens(cu_seqlens, total)
        positions = torch.arange(total, device=device)
        return torch.searchsorted(cu_seqlens.to(torch.int64), positions, right=True) - 1, cu_seqlens.numel() - 1
    if len(shape) == 2:
        return torch.arange(total, device=device) // shape[1], shape[0]
    return None, 0


def check_cu_seqlens(cu_seqlens: Tensor, total: int) -> None:
    """Raises ValueError unless cu_seqlens [S + 1] rises from 0 to `total`. On a CPU alone: elsewhere looking costs a wait."""
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    bounds = cu_seqlens.to(torch.int64)
    ends = bounds.numel() > 0 and int(bounds[0]) == 0 and int(bounds[-1]) == total
    if not ends or bool((bounds.diff() < 0).any()):
        raise ValueError(f"cu_seqlens {cu_seqlens.tolist()[:8]} must rise from 0 to the number of tokens, {total}")


def as_normalizer(value: float | Tensor, like: Tensor) -> Tensor:
    """The denominator as a 0-d tensor of like's dtype and device, without gradient.

    A tensor's value is looked at on a CPU alone: elsewhere looking costs a wait. NaN comes from NaN data, and may pass.
    """
    wrong = "normalizer={} must be positive; it is the global denominator of the loss"
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"normalizer has shape {tuple(value.shape)}; it must be a number or a 0-d tensor")
        if value.device.type == "cpu" and not torch.compiler.is_compiling() and float(value) <= 0:
            raise ValueError(wrong.format(float(value)))
        return value.detach().reshape(()).to(like)
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise TypeError(f"normalizer={value!r} must be a number or a 0-d tensor")
    if not value > 0:
        raise ValueError(wrong.format(value))
    return torch.full((), float(value), dtype=like.dtype, device=like.device)


def layout_of(flat: Flat) -> Layout:
    """The part of an op's tensors that is never differentiated, as the registered ops take it."""
    return Layout(flat.targets, flat.rows, flat.active, flat.temperature)


def with_needs(call: Call, flat: Flat) -> Call:
    """`call` with what has to be differentiated: looked up here, since inside a Function requires_grad stays True."""
    hidden, weight, bias, a, b = (
        torch.is_grad_enabled() and t is not None and t.requires_grad for t in flat.operands()
    )
    lora = flat.head.lora
    check_share(call, flat.hidden.device)
    call = replace(
        call,
        need_hidden=hidden,
        need_weight=weight,
        need_bias=bias,
        need_lora_a=a,
        need_lora_b=b,
        lora_scale=1.0 if lora is None else float(lora.scale),
    )
    scale = call.config.accumulate_into_grad
    if scale is None or not weight:
        return call
    check_accumulation(flat.head.weight)
    return replace(call, accumulate_scale=scale)


def check_share(call: Call, device: torch.device) -> None:
    """Raises NotImplementedError naming the option that a head with `parallel` does not have."""
    share = call.head.share
    if share is None:
        return
    kind, backend = "GatherHidden" if share.gather else "VocabParallel", backends.resolve(call.config.backend, device)
    refused = None
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
    """Raises RuntimeError unless dW may be added to `weight.grad` behind autograd's back, and makes it where there is none.

    It may not where the weight is not a leaf (its gradient belongs to what made it) or not in its compute dtype (.grad would
    round every sum); where hooks wait for the gradient; where the forward may run twice (activation checkpointing); where several
    processes may share it (DDP and FSDP reduce it in hooks of their own, which cannot be seen from here); and in a compiled
    graph.
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
