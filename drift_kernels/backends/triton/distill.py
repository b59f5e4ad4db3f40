"""The divergence of two rows of products, a student's and its teacher's, and its gradient by the student's.

As `csrc/cpu/distill.cpp` has it, out of place. A first sweep over both rows sums the divergence, a second one writes the
gradient. The gradient of KL(s‖t) or KL(s‖M) by a logit holds the whole row's divergence, so that one sweep cannot do.
"""

# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportOptionalOperand=false, reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl

from drift_kernels.backends.triton.launch import UNALIGNED
from drift_kernels.backends.triton.online import logit_slope
from drift_kernels.backends.triton.rows import block_at, store_block, write_gradient

FORWARD = tl.constexpr(0)  # KL(t‖s)
REVERSE = tl.constexpr(1)  # KL(s‖t)
MIXED = tl.constexpr(2)  # between


@triton.jit
def against_mixture(log_s, log_t, alpha):
    """(log(s/M), log(t/M)) of M = (1 − α)s + αt. No exponential overflows, and where one of s and t is 0 the other's ratio
    is finite."""
    u = log_t - log_s
    more = u > 0
    own = tl.where(more, alpha, 1.0 - alpha)
    r = tl.log(own + (1.0 - own) * tl.exp(-tl.abs(u)))  # log(M / max(s, t))
    return tl.where(more, -u, 0.0) - r, tl.where(more, 0.0, u) - r


@triton.jit
def kl_terms(log_s, log_t, alpha, KIND: tl.constexpr):
    """What an element adds to KL(s‖t) or KL(s‖M), and to KL(t‖s) or KL(t‖M); 0 for the one that KIND has no use for."""
    s = tl.exp(log_s)
    t = tl.exp(log_t)
    if KIND == FORWARD:
        of_student, of_teacher = tl.zeros_like(s), tl.where(t != 0, t * (log_t - log_s), 0.0)
    elif KIND == REVERSE:
        of_student, of_teacher = tl.where(s != 0, s * (log_s - log_t), 0.0), tl.zeros_like(s)
    else:
        of_s, of_t = against_mixture(log_s, log_t, alpha)
        of_student, of_teacher = tl.where(s != 0, s * of_s, 0.0), tl.where(t != 0, t * of_t, 0.0)
    return of_student, of_teacher


@triton.jit
def divergences(
    x, y, bias, y_bias, V, scale, cap, inverse, lse, low, y_scale, y_cap, y_inverse, y_lse, y_low, alpha,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sums of `kl_terms` over the first V columns of the rows at `x` and `y`."""
    a = tl.zeros([BLOCK], tl.float32)
    b = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        log_s = (block_at(x, bias, start, V, scale, cap, inverse, BLOCK) - lse) - low
        log_t = (block_at(y, y_bias, start, V, y_scale, y_cap, y_inverse, BLOCK) - y_lse) - y_low
        of_student, of_teacher = kl_terms(log_s, log_t, alpha, KIND)
        a += of_student
        b += of_teacher
    return tl.sum(a, axis=0), tl.sum(b, axis=0)


@triton.jit
def write_taught(
    x, y, out, bias, y_bias, V, scale, cap, inverse, lse, low, y_scale, y_cap, y_inverse, y_lse, y_low, weight, kl, alpha,
    P, E, H, target, coef, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """d(loss)/d(product) of the row at `x` into `out`; `kl` is its KL(s‖t) or KL(s‖M), the rest as in `write_gradient`."""
    for start in range(0, V, BLOCK):
        z = block_at(x, bias, start, V, scale, cap, inverse, BLOCK)
        log_s = (z - lse) - low
        log_t = (block_at(y, y_bias, start, V, y_scale, y_cap, y_inverse, BLOCK) - y_lse) - y_low
        s = tl.exp(log_s)
        g = -P * s
        if E is not None:
            g -= tl.where(s != 0, E * s * (log_s + H), 0.0)
        if KIND == FORWARD:
            g += weight * (s - tl.exp(log_t))
        elif KIND == REVERSE:
            g += tl.where(s != 0, weight * s * (log_s - log_t - kl), 0.0)
        else:
            of_s, _ = against_mixture(log_s, log_t, alpha)
            g += tl.where(s != 0, weight * (1.0 - alpha) * s * (of_s - kl), 0.0)
        if target is not None:
            g += tl.where(start + tl.arange(0, BLOCK) == target, coef, 0.0)
        store_block(out, start, V, g * logit_slope(z, scale, cap, inverse), BLOCK)


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def fused_distill_kernel(
    x, stride, V, targets, bias, inverses, inverse, scale, cap,
    coefs, lse_coefs, lse, lse_low, entropy_coefs, entropy,
    taught, y, y_stride, y_bias, y_inverses, y_inverse, y_scale, y_cap, y_lse, y_lse_low, weights, alpha, divergence,
    out, out_stride, live,
    KIND: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Divergences of student rows from their teacher rows, and, with GRADIENT, d(loss)/d(product) in `out`. A teacher's row
    is read only where a student's row has one."""
    row = tl.program_id(0).to(tl.int64)
    j = row if taught is None else tl.load(taught + row)
    named = j >= 0
    teacher_row = tl.maximum(j, 0)
    at, at_y = x + row * stride, y + teacher_row * y_stride
    inv = inverse if inverses is None else tl.load(inverses + row)
    y_inv = y_inverse if y_inverses is None else tl.load(y_inverses + teacher_row, mask=named, other=1.0)
    row_lse = tl.load(lse + row)
    row_low = 0.0 if lse_low is None else tl.load(lse_low + row)
    teacher_lse = tl.load(y_lse + teacher_row, mask=named, other=0.0)
    teacher_low = 0.0 if y_lse_low is None else tl.load(y_lse_low + teacher_row, mask=named, other=0.0)
    kl, kl_t = divergences(
        at, at_y, bias, y_bias, tl.where(named, V, 0), scale, cap, inv, row_lse, row_low, y_scale, y_cap, y_inv,
        teacher_lse, teacher_low, alpha, KIND, BLOCK,
    )  # fmt: skip
    if KIND == FORWARD:
        value = kl_t
    elif KIND == REVERSE:
        value = kl
    else:
        value = (1.0 - alpha) * kl + alpha * kl_t
    tl.store(divergence + teacher_row, value, mask=named)
    if GRADIENT:
        weight = tl.where(named, tl.load(weights + row), 0.0)
        P = 0.0 if lse_coefs is None else -tl.load(lse_coefs + row)
        E = None if entropy_coefs is None else tl.load(entropy_coefs + row)
        H = None if entropy_coefs is None else tl.load(entropy + row)
        alive = (P != 0) if E is None else (P != 0) | (E != 0)
        target = None if coefs is None else tl.load(targets + row).to(tl.int32)
        coef = None if coefs is None else tl.where(target >= 0, tl.load(coefs + row), 0.0)
        if coefs is not None:
            P += coef
            alive = alive | (coef != 0)
        tl.store(live + row, (alive | (weight != 0)).to(tl.uint8))
        if weight != 0:
            write_taught(
                at, at_y, out + row * out_stride, bias, y_bias, V, scale, cap, inv, row_lse, row_low,
                y_scale, y_cap, y_inv, teacher_lse, teacher_low, weight, kl, alpha, P, E, H, target, coef, KIND, BLOCK,
            )  # fmt: skip
        else:
            write_gradient(
                at, out + row * out_stride, bias, V, scale, cap, inv, row_lse, row_low, P, E, H, target, coef,
                targets, coefs, row, row, alive, True, BLOCK,
            )  # fmt: skip
