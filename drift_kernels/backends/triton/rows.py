"""The row kernels. A program takes ROWS rows of fp32 products one after another, each in blocks of BLOCK columns.

Blocks that are whole are read without a mask, so that loads are 16 bytes wide whatever the vocabulary; the last one has a
mask. Rows begin at 64-bit offsets. Pointers that are None are statistics that nobody asked for, or data that a call lacks.

A row's gradient is Σ_j coef_j·(onehot(y_j) − p) − E·p·(log p + H) + L·p, times dz/dx: coefficients of its targets' log-probs,
of its entropy and of its log-sum-exp.
"""

# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false
from __future__ import annotations

import triton
import triton.language as tl

from drift_kernels.backends.triton.launch import UNALIGNED
from drift_kernels.backends.triton.online import LOWEST, fold, join, logit, logit_slope
from drift_kernels.backends.triton.policy import policy_token


@triton.jit
def read(pointer, cols, mask):
    """Some columns, zeros outside `mask`; None reads them all."""
    return tl.load(pointer + cols) if mask is None else tl.load(pointer + cols, mask=mask, other=0.0)


@triton.jit
def logits_at(x, bias, cols, mask, scale, cap, inverse):
    """Logits of some columns of the row at `x`."""
    return logit(read(x, cols, mask), None if bias is None else read(bias, cols, mask), scale, cap, inverse)


@triton.jit
def block_at(x, bias, start, V, scale, cap, inverse, BLOCK: tl.constexpr):
    """Logits of the BLOCK columns from `start` of the row at `x`, −inf behind column V."""
    cols = start + tl.arange(0, BLOCK)
    if start + BLOCK <= V:
        z = logits_at(x, bias, cols, None, scale, cap, inverse)
    else:
        z = tl.where(cols < V, logits_at(x, bias, cols, cols < V, scale, cap, inverse), float("-inf"))
    return z


@triton.jit
def store_block(out, start, V, g, BLOCK: tl.constexpr):
    """Writes g to the BLOCK columns from `start` of the row at `out`, as far as column V."""
    cols = start + tl.arange(0, BLOCK)
    if start + BLOCK <= V:
        tl.store(out + cols, g.to(out.dtype.element_ty))
    else:
        tl.store(out + cols, g.to(out.dtype.element_ty), mask=cols < V)


@triton.jit
def span(row_ptr, row):
    """The entries [begin, end) of a row."""
    begin = row if row_ptr is None else tl.load(row_ptr + row).to(tl.int32)
    end = row + 1 if row_ptr is None else tl.load(row_ptr + row + 1).to(tl.int32)
    return begin, end


@triton.jit
def sweep(x, bias, V, scale, cap, inverse, ENTROPY: tl.constexpr, EXTRA: tl.constexpr, BLOCK: tl.constexpr):
    """(max, Σe, Σe·(z − max), Σe², Σz) of the row that begins at `x`."""
    lanes = tl.arange(0, BLOCK)
    m = tl.full([BLOCK], LOWEST, tl.float32)
    s0 = tl.zeros([BLOCK], tl.float32)
    s1 = tl.zeros([BLOCK], tl.float32)
    s2 = tl.zeros([BLOCK], tl.float32)
    sz = tl.zeros([BLOCK], tl.float32)
    whole = V // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        cols = start + lanes
        z = logits_at(x, bias, cols, None, scale, cap, inverse)
        m, s0, s1, s2 = fold(z, m, s0, s1, s2, ENTROPY, EXTRA)
        if EXTRA:
            sz += z
    if whole < V:
        cols = whole + lanes
        inside = cols < V
        z = logits_at(x, bias, cols, inside, scale, cap, inverse)
        if EXTRA:
            sz += tl.where(inside, z, 0.0)
        m, s0, s1, s2 = fold(tl.where(inside, z, float("-inf")), m, s0, s1, s2, ENTROPY, EXTRA)
    top, s0, s1, s2 = join(m, s0, s1, s2)
    return top, s0, s1, s2, tl.sum(sz, axis=0)


@triton.jit
def target_logit(x, bias, y, valid, V, scale, cap, inverse):
    """Logits of targets y; NaN if a target lies outside the vocabulary."""
    there = valid & (y >= 0) & (y < V)
    b = None if bias is None else tl.load(bias + y, mask=there, other=0.0)
    return logit(tl.load(x + y, mask=there, other=float("nan")), b, scale, cap, inverse)


@triton.jit
def log_sum_exp(top, s0):
    """top + log(s0), and what rounding took from it: 0 if the sum is not finite."""
    log_s0 = tl.log(s0)
    high = top + log_s0
    rounded = high - top  # the part of log_s0 that arrived
    low = (top - (high - rounded)) + (log_s0 - rounded)
    return high, tl.where(low - low == 0, low, 0.0)


@triton.jit
def log_prob(z, lse, low):
    """(z − lse) − low, at most 0: log(sum) ≥ 0 holds in exact arithmetic; rounding must not make a probability above 1."""
    lp = (z - lse) - low
    return tl.where(lp > 0, 0.0, lp)


@triton.jit
def store_row(row, top, s0, s1, s2, sz, V, lse, lse_low, entropy, mean, log_sum_sq):
    """Statistics of a row from its sums; returns (lse, its remainder, entropy)."""
    log_s0 = tl.log(s0)
    high, low = log_sum_exp(top, s0)
    h = log_s0 - s1 / s0
    if lse is not None:
        tl.store(lse + row, high)
    if lse_low is not None:
        tl.store(lse_low + row, low)
    if entropy is not None:
        tl.store(entropy + row, h)
    if mean is not None:
        tl.store(mean + row, sz / V)
    if log_sum_sq is not None:
        tl.store(log_sum_sq + row, tl.log(s2) - 2.0 * log_s0)
    return high, low, h


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=UNALIGNED)
def row_stats_kernel(
    x, stride, rows, V, targets, row_ptr, bias, inverses, inverse, scale, cap,
    logprobs, top1, lse, lse_low, entropy, mean, log_sum_sq, partials, at_target,
    ENTROPY: tl.constexpr, EXTRA: tl.constexpr, ENTRIES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Statistics of each row and its targets; or, where `partials` [5, rows] is given, the sums they are made of and the
    targets' logits, −inf for targets outside these columns."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    for row in range(first, tl.minimum(first + ROWS, rows)):
        at = x + row * stride
        inv = inverse if inverses is None else tl.load(inverses + row)
        top, s0, s1, s2, sz = sweep(at, bias, V, scale, cap, inv, ENTROPY, EXTRA, BLOCK)
        row_lse, row_low, _ = store_row(row, top, s0, s1, s2, sz, V, lse, lse_low, entropy, mean, log_sum_sq)
        if partials is not None:
            tl.store(partials + row, top)
            tl.store(partials + row + rows, s0)
            tl.store(partials + row + 2 * rows, s1)
            tl.store(partials + row + 3 * rows, s2)
            tl.store(partials + row + 4 * rows, sz)
        begin, end = span(row_ptr, row)
        for k in range(begin, end, ENTRIES):
            entry = k + tl.arange(0, ENTRIES)
            valid = entry < end
            y = tl.load(targets + entry, mask=valid, other=-1)
            z = target_logit(at, bias, y, valid, V, scale, cap, inv)
            if at_target is not None:
                tl.store(at_target + entry, tl.where((y >= 0) & (y < V), z, float("-inf")), mask=valid)
            if logprobs is not None:
                tl.store(logprobs + entry, tl.where(y < 0, 0.0, log_prob(z, row_lse, row_low)), mask=valid)
            if top1 is not None:
                tl.store(top1 + entry, tl.where((y >= 0) & (z >= top), 1.0, 0.0), mask=valid)


@triton.jit
def gradient_block(x, bias, cols, mask, scale, cap, inverse, lse, low, P, E, H, RAW: tl.constexpr):
    """dz/dx, and −P·p − E·p·(log p + H), of some columns; E None leaves the entropy term out."""
    z = logits_at(x, bias, cols, mask, scale, cap, inverse) if RAW else read(x, cols, mask)
    lp = (z - lse) - low
    p = tl.exp(lp)
    g = -P * p
    if E is not None:
        g -= tl.where(p != 0, E * p * (lp + H), 0.0)
    return logit_slope(z, scale, cap, inverse), g


@triton.jit
def add_targets(g, cols, y, coef, targets, coefs, begin, end):
    """g with Σ_j coef_j·onehot(y_j): of one target y, or, where y is None, of entries begin … end."""
    if y is not None:
        g += tl.where(cols == y, coef, 0.0)
    elif coefs is not None:
        for k in range(begin, end):
            g += tl.where(cols == tl.load(targets + k).to(tl.int32), tl.load(coefs + k), 0.0)
    return g


@triton.jit
def write_gradient(
    x, out, bias, V, scale, cap, inverse, lse, low, P, E, H, y, coef, targets, coefs, begin, end, alive,
    RAW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """d(loss)/d(product) of the row at `x` into `out`; zeros where it has no coefficient."""
    lanes = tl.arange(0, BLOCK)
    whole = V // BLOCK * BLOCK
    if alive:
        for start in range(0, whole, BLOCK):
            cols = start + lanes
            slope, g = gradient_block(x, bias, cols, None, scale, cap, inverse, lse, low, P, E, H, RAW)
            g = add_targets(g, cols, y, coef, targets, coefs, begin, end)
            tl.store(out + cols, (slope * g).to(out.dtype.element_ty))
        if whole < V:
            cols = whole + lanes
            slope, g = gradient_block(x, bias, cols, cols < V, scale, cap, inverse, lse, low, P, E, H, RAW)
            g = add_targets(g, cols, y, coef, targets, coefs, begin, end)
            tl.store(out + cols, (slope * g).to(out.dtype.element_ty), mask=cols < V)
    else:
        for start in range(0, V, BLOCK):
            tl.store(out + start + lanes, tl.zeros([BLOCK], out.dtype.element_ty), mask=start + lanes < V)


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=UNALIGNED)
def grad_logits_kernel(
    x, stride, rows, V, targets, row_ptr, bias, inverses, inverse, scale, cap,
    coefs, lse_coefs, lse, lse_low, entropy_coefs, entropy, out, out_stride, live,
    RAW: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Products (RAW) or logits to d(loss)/d(product) in `out`; live says which rows have any coefficient."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    for row in range(first, tl.minimum(first + ROWS, rows)):
        inv = inverse if inverses is None else tl.load(inverses + row)
        begin, end = span(row_ptr, row)
        P = 0.0 if lse_coefs is None else -tl.load(lse_coefs + row)
        E = None if entropy_coefs is None else tl.load(entropy_coefs + row)
        H = None if entropy_coefs is None else tl.load(entropy + row)
        alive = (P != 0) if E is None else (P != 0) | (E != 0)
        if coefs is not None:
            for k in range(begin, end):
                coef = tl.where(tl.load(targets + k) >= 0, tl.load(coefs + k), 0.0)
                P += coef
                alive = alive | (coef != 0)
        if row_ptr is None and coefs is not None:
            y = tl.load(targets + row).to(tl.int32)
            coef = tl.load(coefs + row)
        else:
            y = None
            coef = None
        row_lse = tl.load(lse + row)
        row_low = 0.0 if lse_low is None else tl.load(lse_low + row)
        write_gradient(
            x + row * stride, out + row * out_stride, bias, V, scale, cap, inv, row_lse, row_low, P, E, H, y, coef,
            targets, coefs, begin, end, alive, RAW, BLOCK,
        )  # fmt: skip
        tl.store(live + row, alive.to(tl.uint8))


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=UNALIGNED)
def fused_policy_kernel(
    x, stride, rows, V, targets, row_ptr, bias, inverses, inverse, scale, cap,
    logprobs, top1, lse, lse_low, entropy, mean, log_sum_sq,
    advantages, old, ref, weights, loss, ratio, kl, clipped,
    numbers,
    coefs, lse_coefs, entropy_coefs, out, out_stride, live,
    OBJECTIVE: tl.constexpr, KL_VALUE: tl.constexpr, KL_GRAD: tl.constexpr, KL_UNBIASED: tl.constexpr,
    ENTROPY: tl.constexpr, EXTRA: tl.constexpr, GRADIENT: tl.constexpr, WITH_ENTROPY_TERM: tl.constexpr,
    ENTRIES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Statistics, policy arithmetic and, with GRADIENT (one target a row), d(loss)/d(product) in `out`. Without, where
    `coefs` is given, the coefficients that `grad_logits_kernel` makes the gradient of."""
    entropy_coef, z_loss_coef = numbers.entropy_coef, numbers.z_loss_coef
    first = tl.program_id(0).to(tl.int64) * ROWS
    for row in range(first, tl.minimum(first + ROWS, rows)):
        at = x + row * stride
        inv = inverse if inverses is None else tl.load(inverses + row)
        top, s0, s1, s2, sz = sweep(at, bias, V, scale, cap, inv, ENTROPY, EXTRA, BLOCK)
        row_lse, row_low, h = store_row(row, top, s0, s1, s2, sz, V, lse, lse_low, entropy, mean, log_sum_sq)
        begin, end = span(row_ptr, row)
        w_sum = 0.0
        c_sum = 0.0
        alive = w_sum != 0
        for k in range(begin, end, ENTRIES):
            entry = k + tl.arange(0, ENTRIES)
            inside = entry < end
            y = tl.load(targets + entry, mask=inside, other=-1)
            valid = inside & (y >= 0)
            z = target_logit(at, bias, y, valid, V, scale, cap, inv)
            logp = log_prob(z, row_lse, row_low)
            A = tl.full([ENTRIES], 1.0, tl.float32)
            if advantages is not None:
                A = tl.load(advantages + entry, mask=valid, other=0.0)
            w = tl.where(valid, 1.0, 0.0)
            if weights is not None:
                w = tl.load(weights + entry, mask=valid, other=0.0)
            before = None if old is None else tl.load(old + entry, mask=valid, other=0.0)
            reference = None if ref is None else tl.load(ref + entry, mask=valid, other=0.0)
            token, dlogp, r, divergence, cut = policy_token(
                logp, A, before, reference, numbers, OBJECTIVE, KL_VALUE, KL_GRAD, KL_UNBIASED,
            )  # fmt: skip
            if WITH_ENTROPY_TERM:
                token -= entropy_coef * h
            token += tl.where(z_loss_coef != 0, z_loss_coef * row_lse * row_lse, 0.0)
            counts = valid & (w != 0)
            coef = tl.where(counts, w * dlogp, 0.0)
            if logprobs is not None:
                tl.store(logprobs + entry, tl.where(valid, logp, 0.0), mask=inside)
            if top1 is not None:
                tl.store(top1 + entry, tl.where(valid & (z >= top), 1.0, 0.0), mask=inside)
            if loss is not None:
                tl.store(loss + entry, tl.where(counts, w * token, 0.0), mask=inside)
            if ratio is not None:
                tl.store(ratio + entry, tl.where(valid, r, 0.0), mask=inside)
            if kl is not None:
                tl.store(kl + entry, tl.where(valid, divergence, 0.0), mask=inside)
            if clipped is not None:
                tl.store(clipped + entry, tl.where(counts, cut, 0.0), mask=inside)
            if coefs is not None:
                tl.store(coefs + entry, coef, mask=inside)
            w_sum += tl.sum(w, axis=0)
            c_sum += tl.sum(coef, axis=0)
            alive = alive | (tl.max((coef != 0).to(tl.int32), axis=0) != 0)
        E = -entropy_coef * w_sum
        extra = tl.where(z_loss_coef != 0, -2.0 * z_loss_coef * w_sum * row_lse, 0.0)
        if lse_coefs is not None:
            tl.store(lse_coefs + row, -extra)
        if entropy_coefs is not None:
            tl.store(entropy_coefs + row, E)
        if GRADIENT:
            y = tl.load(targets + row).to(tl.int32)
            alive = alive | (extra != 0)
            if WITH_ENTROPY_TERM:
                alive = alive | (E != 0)
                e, H = E, h
            else:
                e, H = None, None
            write_gradient(
                at, out + row * out_stride, bias, V, scale, cap, inv, row_lse, row_low, extra + c_sum, e, H, y, c_sum,
                targets, coefs, begin, end, alive, True, BLOCK,
            )  # fmt: skip
            tl.store(live + row, alive.to(tl.uint8))
