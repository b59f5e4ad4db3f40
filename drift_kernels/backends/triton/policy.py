"""Pointwise policy arithmetic in Triton: one token's log-prob in, its loss and d(loss)/d(log-prob) out.

The only place in Triton where a policy loss is written; `drift_kernels/formulas.py` is the same in torch, `csrc/policy.h` in
C++. Which loss it is compiles to one branch; its numbers are arguments, so that changing them compiles nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from drift_kernels.backends.params import ESTIMATORS
from drift_kernels.spec import OBJECTIVES

CLIP = tl.constexpr(OBJECTIVES["clip"].number)
CISPO = tl.constexpr(OBJECTIVES["cispo"].number)
REINFORCE = tl.constexpr(OBJECTIVES["reinforce"].number)
SAPO = tl.constexpr(OBJECTIVES["sapo"].number)
DPPO_TV = tl.constexpr(OBJECTIVES["dppo_tv"].number)
DRO = tl.constexpr(OBJECTIVES["dro"].number)
GPPO = tl.constexpr(OBJECTIVES["gppo"].number)
K1 = tl.constexpr(ESTIMATORS["k1"])
K2 = tl.constexpr(ESTIMATORS["k2"])
K3 = tl.constexpr(ESTIMATORS["k3"])
LOG_RATIO_BOUND = tl.constexpr(20.0)
TINY = tl.constexpr(1e-8)  # keeps the complement of a probability away from 0


@triton.jit
def kl_term(d, KIND: tl.constexpr):
    """The estimate of the KL from d = logp − ref."""
    if KIND == K1:
        value = d
    elif KIND == K2:
        value = 0.5 * d * d
    elif KIND == K3:
        value = tl.exp(-d) + d - 1.0
    else:
        value = tl.abs(d)
    return value


@triton.jit
def kl_slope(d, KIND: tl.constexpr):
    """Its derivative."""
    if KIND == K1:
        value = d * 0.0 + 1.0
    elif KIND == K2:
        value = d
    elif KIND == K3:
        value = 1.0 - tl.exp(-d)
    else:
        value = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, 0.0))
    return value


@triton.jit
def clip_token(r, clip, below, above, slope, A, dual_clip, delta):
    """(loss, d/dlogp, clipped) of "clip"; `slope` is dr/dlogp."""
    capped = r > delta
    free, bound = tl.where(capped, delta, r) * A, clip * A
    unbound = (free <= bound) | (free != free)
    loss = -tl.where(unbound, free, bound)
    dlogp = tl.where(tl.where(unbound, capped, below | above), 0.0, -slope * A)
    dlogp = tl.where(free != free, free, dlogp)
    clipped = tl.where(unbound, 0.0, tl.where(below, -1.0, tl.where(above, 1.0, 0.0)))
    worst = -dual_clip * A
    cut = (dual_clip > 0) & (A < 0) & (loss > worst)
    return tl.where(cut, worst, loss), tl.where(cut, 0.0, dlogp), clipped


@triton.jit
def beyond_region(logp, old, A, low, high, OBJECTIVE: tl.constexpr):
    """Whether DPPO's trust region ends here for the move that the advantage asks for."""
    p, q = tl.exp(logp), tl.exp(old)
    move = tl.where(A > 0, p - q, q - p)
    bound = tl.where(A > 0, high, low)
    if OBJECTIVE == DPPO_TV:
        beyond = move > bound
    else:
        kl = q * (old - logp) + (1.0 - q) * tl.log((1.0 - q + TINY) / (1.0 - p + TINY))
        beyond = (move > 0) & (kl > bound)
    return beyond


@triton.jit
def policy_token(
    logp,
    A,
    old,
    ref,
    p,
    OBJECTIVE: tl.constexpr,
    KL_VALUE: tl.constexpr,
    KL_GRAD: tl.constexpr,
    KL_UNBIASED: tl.constexpr,
):
    """(loss, d(loss)/dlogp, ratio, kl, clipped) of tokens by the numbers `p`; `old` None is on-policy, `ref` None has no KL."""
    low, high, delta = p.low, p.high, p.delta
    before = logp if old is None else old
    raw = logp - before  # on-policy 0, but NaN if logp is
    bounded = tl.where(raw > LOG_RATIO_BOUND, LOG_RATIO_BOUND, tl.where(raw < -LOG_RATIO_BOUND, -LOG_RATIO_BOUND, raw))
    r = tl.exp(bounded)
    slope = tl.where((bounded == raw) | (raw != raw), r, 0.0)  # the clamp has none outside; NaN stays NaN
    below, above = r < low, r > high
    clip = tl.where(below, low, tl.where(above, high, r))
    clipped = logp * 0.0
    if OBJECTIVE == CLIP:
        loss, dlogp, clipped = clip_token(r, clip, below, above, slope, A, p.dual_clip, delta)
    elif OBJECTIVE == CISPO:
        loss, dlogp = -clip * A * logp, -clip * A
        clipped = tl.where(A == 0, 0.0, tl.where(below, -1.0, tl.where(above, 1.0, 0.0)))
    elif OBJECTIVE == SAPO:
        tau = tl.where(A > 0, p.tau_pos, p.tau_neg)
        s = 1.0 / (1.0 + tl.exp(-tau * (r - 1.0)))
        loss, dlogp = -(4.0 / tau) * s * A, -4.0 * s * (1.0 - s) * slope * A
    elif OBJECTIVE == DRO:
        loss, dlogp = -A * logp + 0.5 * p.dro_beta * raw * raw, -A + p.dro_beta * raw
    elif OBJECTIVE == GPPO:
        clipped = tl.where(below & (A < 0), -1.0, tl.where(above & (A > 0), 1.0, 0.0))
        held = tl.where(clipped < 0, p.gppo_low * low, p.gppo_high * high)
        loss, dlogp = -tl.where(clipped == 0, r, held) * A, -tl.where(clipped == 0, slope, held) * A
    elif OBJECTIVE == REINFORCE:
        loss, dlogp = -A * logp, -A
    else:
        kept = tl.where(r > delta, delta, r)
        beyond = beyond_region(logp, before, A, low, high, OBJECTIVE)
        loss, dlogp = tl.where(beyond, 0.0, -kept * A * logp), tl.where(beyond, 0.0, -kept * A)
        clipped = tl.where(beyond, tl.where(A > 0, 1.0, tl.where(A < 0, -1.0, 0.0)), 0.0)
    kl = logp * 0.0
    if ref is not None:
        d = logp - ref
        kl = kl_term(d, KL_VALUE)
        change = kl_slope(d, KL_GRAD)
        if KL_UNBIASED:
            change = change * r + kl * slope
            kl *= r
        loss += tl.where(p.kl_coef != 0, p.kl_coef * kl, 0.0)
        dlogp += tl.where(p.kl_coef != 0, p.kl_coef * change, 0.0)
    return loss, dlogp, r, kl, clipped
