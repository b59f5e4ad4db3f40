"""bfloat16 in Triton's interpreter, which keeps it as the 16 bits it is: sums and products of those bits are nonsense, and
fp32 is cut off where a GPU rounds to the nearest even.

`install` makes casts round, and arithmetic on bf16 go through fp32, as the hardware's does. For tests alone.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def widened(bits: np.ndarray) -> np.ndarray:
    """bf16 bits as fp32 values."""
    return (np.asarray(bits, np.uint16).astype(np.uint32) << 16).view(np.float32)


def rounded(values: np.ndarray) -> np.ndarray:
    """fp32 values as bf16 bits, to the nearest, ties to even; every NaN is the quiet one."""
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, nearest).astype(np.uint16)


def is_bf16(handle) -> bool:
    """Whether an interpreter's value is a (block of) bf16."""
    return getattr(handle.dtype, "scalar", handle.dtype) == tl.bfloat16


def as_fp32(handle):
    """The value widened, where it is bf16."""
    return TensorHandle(widened(handle.data), tl.float32) if is_bf16(handle) else handle


def as_bf16(handle):
    """The value rounded; comparisons stay what they are."""
    return handle if handle.data.dtype == np.bool_ else TensorHandle(rounded(handle.data), tl.bfloat16)


def install() -> None:
    """Replaces the interpreter's casts and arithmetic for this process; a second call changes nothing."""
    builder = InterpreterBuilder
    if getattr(builder, "rounds_bf16", False):
        return
    cast, dot, binary, unary, ternary = (
        getattr(builder, name) for name in ("cast_impl", "create_dot", "binary_op", "unary_op", "ternary_op")
    )

    def cast_impl(self, source, target):
        if is_bf16(source) and target.scalar != tl.bfloat16:
            source = as_fp32(source)
            return source if target.scalar == tl.float32 else cast(self, source, target)
        if target.scalar == tl.bfloat16 and not is_bf16(source):
            return as_bf16(TensorHandle(source.data.astype(np.float32), tl.float32))
        return cast(self, source, target)

    def create_fp_to_fp(self, source, target, rounding_mode):
        return cast_impl(self, source, target)

    def create_dot(self, a, b, d, *rest):
        return dot(self, as_fp32(a), as_fp32(b), d, *rest)

    def binary_op(self, left, right, op):
        if not is_bf16(left):
            return binary(self, left, right, op)
        return as_bf16(binary(self, as_fp32(left), as_fp32(right), op))

    def unary_op(self, value, op):
        return as_bf16(unary(self, as_fp32(value), op)) if is_bf16(value) else unary(self, value, op)

    def ternary_op(self, first, left, right, op):
        if op is np.where or not is_bf16(right):
            return ternary(self, first, left, right, op)
        return as_bf16(ternary(self, as_fp32(first), as_fp32(left), as_fp32(right), op))

    for replacement in (cast_impl, create_fp_to_fp, create_dot, binary_op, unary_op, ternary_op):
        setattr(builder, replacement.__name__, replacement)
    builder.rounds_bf16 = True
