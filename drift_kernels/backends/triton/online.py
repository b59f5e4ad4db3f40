"""Arithmetic of one row: products to logits, and sums over exp(logit) that a running maximum rescales.

Every lane of a block keeps its own maximum m and sums s0 = Σe, s1 = Σe·(z − m), s2 = Σe², e = exp(z − m), over the columns
it meets; lanes meet at the end of the row. So a block costs one exponential an element and no reduction across lanes.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e38)  # a maximum of nothing: finite, so that 0·(LOWEST − m) is 0 and not NaN


@triton.jit
def tanh(a):
    """tanh to a few ulp: the exponential form cancels near 0, where a polynomial takes over."""
    s = a * a
    small = a * (1.0 + s * (-0.333333333 + s * (0.133333333 + s * (-0.0539682540 + s * 0.0218694885))))
    e = tl.exp(-2.0 * tl.abs(a))
    large = (1.0 - e) / (1.0 + e)
    return tl.where(s < 0.0625, small, tl.where(a < 0, -large, large))


@triton.jit
def logit(x, bias, scale, cap, inverse_temperature):
    """z = softcap(scale·(x + bias)) · inverse_temperature; bias and cap may be None."""
    u = x
    if bias is not None:
        u += bias
    u *= scale
    if cap is not None:
        u = cap * tanh(u / cap)
    return u * inverse_temperature


@triton.jit
def logit_slope(z, scale, cap, inverse_temperature):
    """dz/dx, from z."""
    slope = scale * inverse_temperature
    if cap is not None:
        t = z / (inverse_temperature * cap)
        slope = slope * (1.0 - t * t)
    return slope


@triton.jit
def fold(z, m, s0, s1, s2, ENTROPY: tl.constexpr, SQUARES: tl.constexpr):
    """One more logit into each lane's sums. An infinite or NaN logit leaves a NaN in s0."""
    d = z - m
    up = d > 0
    e = tl.exp(-tl.abs(d))  # of the two exponentials exp(m − max), exp(z − max) one is 1, and this is the other
    if ENTROPY:
        s1 = tl.where(up, e * (s1 - d * s0), s1 + tl.where(e != 0, e * d, 0.0))
    if SQUARES:
        s2 = tl.where(up, s2 * e * e + 1.0, s2 + e * e)
    s0 = tl.where(up, s0 * e + 1.0, s0 + e)
    return tl.where(up, z, m), s0, s1, s2


@triton.jit
def join(m, s0, s1, s2):
    """The lanes' sums as the row's."""
    top = tl.max(m, axis=0)
    k = tl.exp(m - top)
    return top, tl.sum(k * s0, axis=0), tl.sum(k * (s1 + (m - top) * s0), axis=0), tl.sum(k * k * s2, axis=0)
