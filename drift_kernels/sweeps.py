"""Which pass an op gets: the CPU's or a GPU's, over which rows."""

from __future__ import annotations

from torch import Tensor

from drift_kernels import backends
from drift_kernels.calls import Call
from drift_kernels.cpu_sweep import CpuSweep, workspace_of
from drift_kernels.formulas import Tokens
from drift_kernels.gpu_sweep import GpuBlock, GpuSweep
from drift_kernels.pieces import LogitsBlock, Sweep
from drift_kernels.plan import Plan, can_use_active_as_plan, check_finite, counting
from drift_kernels.products import CpuBlock
from drift_kernels.shares import ShareSweep
from drift_kernels.tensors import Inputs, LoRAHead, compute_dtype


def backend_of(x: Inputs, call: Call) -> str:
    """The backend's name for an op's tensors; raises as `backends.resolve`."""
    return backends.resolve(call.config.backend, x.hidden.device)


def open_sweep(x: Inputs, call: Call, plan: Plan, reserved: tuple[int, int] = (0, 0)) -> Sweep:
    """The pass over a plan's rows. `reserved`: bytes of the workspace for the caller, once and for each row of a chunk."""
    backend = backend_of(x, call)
    if call.head.share is not None:
        return ShareSweep(x, call, plan, reserved)
    return CpuSweep(x, call, plan, reserved) if backend == "cpu" else GpuSweep(x, call, plan, backend, reserved)


def open_block(x: Inputs, call: Call, hidden: Tensor, weight: Tensor, lora: LoRAHead | None) -> LogitsBlock:
    """The products of another head's hidden rows, by the backend of `x`."""
    if backend_of(x, call) != "cpu":
        return GpuBlock(hidden, weight, lora)
    return CpuBlock(hidden, weight, lora, compute_dtype(x.hidden.dtype), workspace_of(call))


def active_plan(x: Inputs, call: Call) -> Plan | None:
    """`active` as the plan, if that spares a GPU the wait for one; else None."""
    if x.active is None or not can_use_active_as_plan(x.rows, call, backend_of(x, call)):
        return None
    return Plan(x.active.numel(), x.active, x.active, None)


def sweep_of_counting(x: Inputs, call: Call) -> tuple[Sweep, Tokens]:
    """The pass over the rows that count, and the per-token data of their entries."""
    plan = active_plan(x, call) or Plan.of(counting(x.targets, x.active, x.tokens, call), x.rows)
    tokens = x.tokens if plan.entries is None else x.tokens.pick(plan.entries)
    if call.config.check_finite:
        check_finite(tokens)
    return open_sweep(x, call, plan), tokens
