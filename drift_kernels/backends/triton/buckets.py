"""A few tokens of each row and what remains: the k largest, log-probs of some ids and of all others together, and gradients.

Which of a block's columns are among a row's ids is looked up in the ids sorted, block by block: `edges` [n, blocks + 1] says
where each block's begin. So products stay as they are, and k ids cost k comparisons with a block.
"""

# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportOptionalOperand=false, reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl

from drift_kernels.backends.triton.launch import UNALIGNED
from drift_kernels.backends.triton.online import LOWEST, fold, join, logit_slope
from drift_kernels.backends.triton.rows import (
    block_at,
    log_prob,
    log_sum_exp,
    store_block,
    target_logit,
    write_gradient,
)

HUGE = tl.constexpr(1e38)  # the largest odds of a bucket against the rest
LIST = tl.constexpr(512)  # candidates that a program of `top_k_kernel` looks at together
NO_KEY = tl.constexpr(0)  # smaller than the key of any column


@triton.jit
def log1p(x):
    """log(1 + x) to a few ulp: the rounding of 1 + x is divided out."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def expm1(x):
    """exp(x) − 1 to a few ulp, likewise."""
    u = tl.exp(x)
    log_u = tl.log(u)
    near = (u - 1.0) * (x / tl.where(log_u == 0, 1.0, log_u))
    return tl.where(tl.abs(x) > 0.5, u - 1.0, tl.where(u == 1.0, x, near))


@triton.jit
def ordered(z):
    """Logits as unsigned integers that compare alike; a NaN counts as −inf, and −0 as 0."""
    z = tl.where(z == z, z, float("-inf"))
    bits = tl.where(z == 0, 0.0, z).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def lane_threshold(best, k):
    """The k-th largest of the lanes' maxima: at least k columns of the row are no smaller."""
    threshold = tl.full([], 0, tl.uint32)
    bit = tl.full([], 0x80000000, tl.uint32)
    for _ in range(32):
        candidate = threshold | bit
        enough = tl.sum((best >= candidate).to(tl.int32), axis=0) >= k
        threshold = tl.where(enough, candidate, threshold)
        bit = bit >> 1
    return threshold


@triton.jit
def collect(x, bias, V, scale, cap, inverse, threshold, candidates, k, BLOCK: tl.constexpr):
    """Writes the keys of columns above `threshold`, and of the first k that equal it, to `candidates`; returns their number."""
    lanes = tl.arange(0, BLOCK)
    count = tl.full([], 0, tl.int32)
    equals = tl.full([], 0, tl.int32)
    for start in range(0, V, BLOCK):
        cols = start + lanes
        u = ordered(block_at(x, bias, start, V, scale, cap, inverse, BLOCK))
        there = (cols < V) & (u >= threshold)
        if tl.max(there.to(tl.int32), axis=0) != 0:  # few blocks hold one
            same = (there & (u == threshold)).to(tl.int32)
            take = there & ((same == 0) | (equals + tl.cumsum(same, 0) <= k))
            place = count + tl.cumsum(take.to(tl.int32), 0) - 1
            key = (u.to(tl.int64) << 31) | (V - 1 - cols).to(tl.int64)
            tl.store(candidates + place, key, mask=take)
            count += tl.sum(take.to(tl.int32), axis=0)
            equals += tl.sum(same, axis=0)
    return count


@triton.jit
def key_threshold(candidates, count, k):
    """The k-th largest of `count` different keys. Those of the first LIST stay in registers."""
    entry = tl.arange(0, LIST)
    threshold = tl.full([], NO_KEY, tl.int64)
    first = tl.load(candidates + entry, mask=entry < count, other=NO_KEY)
    half = tl.full([], 1 << 62, tl.int64)  # of the range above the threshold
    for _ in range(63):
        candidate = threshold + half
        larger = tl.sum((first >= candidate).to(tl.int32), axis=0)
        for a in range(LIST, count, LIST):
            key = tl.load(candidates + a + entry, mask=a + entry < count, other=NO_KEY)
            larger += tl.sum((key >= candidate).to(tl.int32), axis=0)
        threshold = tl.where(larger >= k, candidate, threshold)
        half = half >> 1
    return threshold


@triton.jit(do_not_specialize=["rows", "k", "room"], do_not_specialize_on_alignment=UNALIGNED)
def top_k_kernel(
    x, stride, rows, V, bias, inverses, inverse, scale, cap, taught, keys, k, lists, room,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """`keys` [n, k] of each row's k largest logits, in no order: (ordered logit, V − 1 − id), all different. Of equal logits
    the lower ids are taken.

    A first sweep keeps each lane's maximum. The k-th largest of the maxima bounds the row's k-th largest logit from below, so
    that a second sweep collects k columns and few more, into the program's part of `lists` [programs, room]. Lanes hold at
    most ⌈V / BLOCK⌉ columns each, which bounds the number of candidates by `room`. With more than BLOCK ids, all columns are.
    """
    lanes = tl.arange(0, BLOCK)
    entry = tl.arange(0, LIST)
    candidates = lists + tl.program_id(0).to(tl.int64) * room
    for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        j = row if taught is None else tl.load(taught + row)
        at = x + row * stride
        inv = inverse if inverses is None else tl.load(inverses + row)
        if j >= 0:
            threshold = tl.full([], 0, tl.uint32)
            if k <= BLOCK:
                best = tl.zeros([BLOCK], tl.uint32)
                for start in range(0, V, BLOCK):
                    u = ordered(block_at(at, bias, start, V, scale, cap, inv, BLOCK))
                    best = tl.where((start + lanes < V) & (u > best), u, best)
                threshold = lane_threshold(best, k)
            tl.debug_barrier()  # the candidates of the row before have been read
            count = collect(at, bias, V, scale, cap, inv, threshold, candidates, k, BLOCK)
            tl.debug_barrier()  # all candidates are written
            least = tl.full([], NO_KEY, tl.int64)
            if count > k:
                least = key_threshold(candidates, count, k)
            written = tl.full([], 0, tl.int32)
            for a in range(0, count, LIST):
                key = tl.load(candidates + a + entry, mask=a + entry < count, other=NO_KEY)
                take = (a + entry < count) & (key >= least)
                place = written + tl.cumsum(take.to(tl.int32), 0) - 1
                tl.store(keys + j * k + place, key, mask=take)
                written += tl.sum(take.to(tl.int32), axis=0)


@triton.jit
def without(z, cols, ids, begin, end):
    """z, but −inf at ids begin … end."""
    for p in range(begin, end):
        z = tl.where(cols == tl.load(ids + p).to(tl.int32), float("-inf"), z)
    return z


@triton.jit
def rest_lse(x, bias, V, scale, cap, inverse, ids, edges, BLOCK: tl.constexpr):
    """Log-sum-exp of the row at `x` over all columns but its `ids`, and what rounding took from it."""
    lanes = tl.arange(0, BLOCK)
    m = tl.full([BLOCK], LOWEST, tl.float32)
    s0 = tl.zeros([BLOCK], tl.float32)
    nothing = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        z = block_at(x, bias, start, V, scale, cap, inverse, BLOCK)
        block = start // BLOCK
        z = without(z, start + lanes, ids, tl.load(edges + block).to(tl.int32), tl.load(edges + block + 1).to(tl.int32))
        m, s0, _, _ = fold(z, m, s0, nothing, nothing, False, False)
    top, s0, _, _ = join(m, s0, nothing, nothing)
    return log_sum_exp(top, s0)


@triton.jit(do_not_specialize=["k"], do_not_specialize_on_alignment=UNALIGNED)
def bucket_logprobs_kernel(
    x, stride, V, bias, inverses, inverse, scale, cap, taught, lse, lse_low, ids, k, ordered_ids, edges, blocks,
    logprobs, rest, ENTRIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Log-probs of each row's ids, NaN for those outside the vocabulary; and of all other tokens together: by what the ids
    leave, and where that would cancel, summed up."""
    row = tl.program_id(0).to(tl.int64)
    j = row if taught is None else tl.load(taught + row)
    at = x + row * stride
    inv = inverse if inverses is None else tl.load(inverses + row)
    if j >= 0:
        row_lse = tl.load(lse + row)
        row_low = 0.0 if lse_low is None else tl.load(lse_low + row)
        shares = tl.zeros([ENTRIES], tl.float32)
        for a in range(0, k, ENTRIES):
            entry = a + tl.arange(0, ENTRIES)
            inside = entry < k
            id = tl.load(ids + j * k + entry, mask=inside, other=0)
            z = target_logit(at, bias, id, inside, V, scale, cap, inv)
            tl.store(logprobs + j * k + entry, log_prob(z, row_lse, row_low), mask=inside)
            shares += tl.where(inside, tl.exp((z - row_lse) - row_low), 0.0)
        if rest is not None:
            kept = tl.sum(shares, axis=0)
            if kept > 0.5:
                others, others_low = rest_lse(
                    at, bias, V, scale, cap, inv, ordered_ids + j * k, edges + j * (blocks + 1), BLOCK
                )
                others = (others - row_lse) + (others_low - row_low)
                tl.store(rest + j, tl.where(others > 0, 0.0, others))
            else:
                tl.store(rest + j, log1p(-kept))


@triton.jit
def write_buckets(
    x, out, bias, V, scale, cap, inverse, lse, low, P_kept, P_rest, E, H, target, coef, ids, dlogprobs, edges,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """d(loss)/d(product) of the row at `x` into `out`: columns among the ids have P_kept and their own term."""
    lanes = tl.arange(0, BLOCK)
    for start in range(0, V, BLOCK):
        cols = start + lanes
        z = block_at(x, bias, start, V, scale, cap, inverse, BLOCK)
        P = tl.zeros([BLOCK], tl.float32) + P_rest
        own = tl.zeros([BLOCK], tl.float32)
        block = start // BLOCK
        for p in range(tl.load(edges + block).to(tl.int32), tl.load(edges + block + 1).to(tl.int32)):
            hit = cols == tl.load(ids + p).to(tl.int32)
            P = tl.where(hit, P_kept, P)
            own = tl.where(hit, tl.load(dlogprobs + p), own)
        log_s = (z - lse) - low
        s = tl.exp(log_s)
        g = own - P * s
        if E is not None:
            g -= tl.where(s != 0, E * s * (log_s + H), 0.0)
        if target is not None:
            g += tl.where(cols == target, coef, 0.0)
        store_block(out, start, V, g * logit_slope(z, scale, cap, inverse), BLOCK)


@triton.jit(do_not_specialize=["k"], do_not_specialize_on_alignment=UNALIGNED)
def grad_buckets_kernel(
    x, stride, V, targets, bias, inverses, inverse, scale, cap,
    coefs, lse_coefs, lse, lse_low, entropy_coefs, entropy,
    taught, ordered_ids, k, edges, blocks, dlogprobs, rest, drest, out, out_stride, live,
    ENTRIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """d(loss)/d(product) in `out` by the derivatives of what `bucket_logprobs_kernel` gave; `dlogprobs` [n, k] are in the
    order of `ordered_ids`."""
    row = tl.program_id(0).to(tl.int64)
    j = row if taught is None else tl.load(taught + row)
    named = j >= 0
    teacher_row = tl.maximum(j, 0)
    inv = inverse if inverses is None else tl.load(inverses + row)
    P = 0.0 if lse_coefs is None else -tl.load(lse_coefs + row)
    E = None if entropy_coefs is None else tl.load(entropy_coefs + row)
    H = None if entropy_coefs is None else tl.load(entropy + row)
    alive = (P != 0) if E is None else (P != 0) | (E != 0)
    target = None if coefs is None else tl.load(targets + row).to(tl.int32)
    coef = None if coefs is None else tl.where(target >= 0, tl.load(coefs + row), 0.0)
    if coefs is not None:
        P += coef
        alive = alive | (coef != 0)
    slopes = tl.zeros([ENTRIES], tl.float32)
    nonzero = tl.zeros([ENTRIES], tl.int32)
    for a in range(0, tl.where(named, k, 0), ENTRIES):
        entry = a + tl.arange(0, ENTRIES)
        slope = tl.load(dlogprobs + teacher_row * k + entry, mask=entry < k, other=0.0)
        slopes += slope
        nonzero |= (slope != 0).to(tl.int32)
    P_kept = P + tl.sum(slopes, axis=0)
    P_rest = P_kept
    trained = named & (tl.max(nonzero, axis=0) != 0)
    if drest is not None:
        d = tl.load(drest + teacher_row, mask=named, other=0.0)
        trained = trained | (d != 0)
        # A token of the rest gets its share of d, p / rest; d − d / rest in one, since it cancels.
        share = tl.minimum(expm1(-tl.load(rest + teacher_row, mask=named, other=0.0)), HUGE)
        P_rest = tl.where(d != 0, tl.maximum(tl.minimum(P_kept - d * share, HUGE), -HUGE), P_kept)
        P_kept += d
    tl.store(live + row, (alive | trained).to(tl.uint8))
    low = 0.0 if lse_low is None else tl.load(lse_low + row)
    if trained:
        write_buckets(
            x + row * stride, out + row * out_stride, bias, V, scale, cap, inv, tl.load(lse + row), low, P_kept, P_rest,
            E, H, target, coef, ordered_ids + teacher_row * k, dlogprobs + teacher_row * k,
            edges + teacher_row * (blocks + 1), BLOCK,
        )  # fmt: skip
    else:
        write_gradient(
            x + row * stride, out + row * out_stride, bias, V, scale, cap, inv, tl.load(lse + row), low, P, E, H, target,
            coef, targets, coefs, row, row, alive, True, BLOCK,
        )  # fmt: skip
