"""Every shape, dtype and value check, and how padded, packed and per-segment arguments become flat [N] tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd import forward_ad

from drift_kernels.formulas import Tokens
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

    @property
    def layout(self) -> Layout:
        """The tensors that are never differentiated."""
        return Layout(self.targets, self.rows, self.active, self.temperature)

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
    """Raises ValueError if forward-mode autograd would lose what it carries with `value`."""
    if forward_ad.unpack_dual(value).tangent is not None:
        raise ValueError(f"{name} has a tangent, and it would get no further; detach it")


def check_off_policy(spec: PolicySpec, old: Tensor | None, rollout: Tensor | None) -> None:
    """Raises ValueError if nothing says how far the sampler was, and the mask would keep everything."""
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


def segments_of(
    shape: torch.Size, cu_seqlens: Tensor | None, segment_ids: Tensor | None, device: torch.device
) -> tuple[Tensor | None, int]:
    """The sequence of each entry [N] int64, and the number of sequences; (None, 0) if they are not known.

    From `segment_ids` itself, from `cu_seqlens` [S + 1] of a packed batch, or from the rows of a padded [B, L] one.
    """
    total = shape.numel()
    if segment_ids is not None and cu_seqlens is not None:
        raise ValueError("cu_seqlens and segment_ids both say where sequences end; pass one of them")
    if segment_ids is not None:
        check_tensor("segment_ids", segment_ids)
        if segment_ids.shape != shape or segment_ids.dtype != torch.int64:
            raise ValueError(
                f"segment_ids must be int64 of the targets' shape {tuple(shape)}; got {tuple(segment_ids.shape)} "
                f"{segment_ids.dtype}"
            )
        if not segment_ids.numel():
            return segment_ids.reshape(-1), 0
        if torch.compiler.is_compiling():
            return segment_ids.reshape(-1), int(segment_ids.max()) + 1
        low, high = torch.stack(segment_ids.aminmax()).tolist()  # one wait for a GPU
        if low < 0:
            raise ValueError(f"segment_ids holds {low}; sequences are numbered from 0")
        return segment_ids.reshape(-1), high + 1
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


def caller_tokens(
    flat: Flat,
    mask: Tensor,
    spec: PolicySpec,
    advantages: Tensor,
    *,
    old: Tensor | None,
    ref: Tensor | None,
    rollout: Tensor | None,
    weights: Tensor | None,
    cu_seqlens: Tensor | None,
    segment_ids: Tensor | None,
    weights_name: str = "token_weights",
) -> Tokens:
    """The caller's data of a policy loss, flat and in the compute dtype, with sequences if they are known.

    Raises TypeError or ValueError naming the argument, also if `spec` needs one that is missing.
    """
    if not isinstance(spec, PolicySpec):
        raise TypeError(f"spec={spec!r} must be a PolicySpec, such as PolicySpec.preset('dapo')")
    check_data("advantages", advantages, flat.targets.device)
    segments, count = segments_of(flat.shape, cu_seqlens, segment_ids, flat.targets.device)
    if segments is None:
        _check_no_sequences(spec, per_segment=advantages.shape != flat.shape)
    elif advantages.shape != flat.shape:
        if advantages.dim() == 1 and torch.compiler.is_compiling():  # a graph may know the count only as it runs
            torch._check(advantages.shape[0] == count, lambda: "advantages must be one a token, or one a segment")
        elif advantages.shape != (count,):
            raise ValueError(
                f"advantages has shape {tuple(advantages.shape)}; it must be {tuple(flat.shape)}, or [{count}], one a segment"
            )
        advantages = advantages.detach()[segments].reshape(flat.shape)
    named = {
        "advantages": advantages,
        "old_logprobs": old,
        "ref_logprobs": ref,
        weights_name: weights,
        "rollout_logprobs": rollout,
    }
    values = [flat.per_entry(name, value) for name, value in named.items()]
    if spec.kl_coef and ref is None:
        raise ValueError(f"kl_coef={spec.kl_coef} needs ref_logprobs")
    if spec.correction and (old is None or rollout is None):
        raise ValueError(f"correction={spec.correction!r} needs old_logprobs and rollout_logprobs")
    check_off_policy(spec, old, rollout)
    if segments is None:
        return Tokens(*values)
    lengths = torch.zeros(count, dtype=torch.int64, device=mask.device).index_add_(0, segments, mask.to(torch.int64))
    return Tokens(*values, segments=segments, lengths=lengths)


def _check_no_sequences(spec: PolicySpec, per_segment: bool) -> None:
    """Raises ValueError if the loss reads sequences; `per_segment`: its advantages are one a segment."""
    correction = spec.correction or ""
    wants = [spec.aggregation] if spec.aggregation.startswith("sequence") else []
    wants += [f"correction={correction!r}"] if correction.startswith("sequence") else []
    wants += [f"objective={spec.objective!r} or ratio={spec.ratio!r}"] if spec.scope == "sequence" else []
    wants += ["off_policy_threshold"] if spec.off_policy_threshold is not None else []
    wants += ["advantages per segment"] if per_segment else []
    if wants:
        raise ValueError(
            f"{', '.join(wants)}: pass cu_seqlens (or segment_ids), since packed tokens alone do not say where sequences end"
        )
