"""The chunk loop, once for every backend: rows → drop → chunk by workspace → GEMM → row kernels → two GEMMs.

Logits live in one scratch block of at most `workspace_bytes`; a row's gradient is written over its logits. Rows whose
gradient turns out to be zero (clipped ones) are squeezed out before the two gradient GEMMs. Logits and sums are fp32 for
half-precision inputs too; see `products` for how.

The normaliser is folded into the token weights, so gradients come out final. Nothing here is differentiable; see `autograd`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from drift_kernels import backends, products, rows
from drift_kernels.backends.cpu import Chunk
from drift_kernels.spec import Call

WORKSPACE_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}


@dataclass(frozen=True)
class Inputs:
    """T hidden rows, N entries, vocabulary V, width D. Per-entry floats are in the compute dtype."""

    hidden: Tensor  # [T, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    targets: Tensor  # [N] int64
    rows: Tensor | None  # [N] int64 sorted; None = entry i is of hidden row i
    active: Tensor | None  # [A] int64, the entries that may count
    temperature: Tensor | None  # [T]
    advantages: Tensor | None = None  # [N], None = 1
    old: Tensor | None = None  # [N], None = on-policy
    ref: Tensor | None = None  # [N]
    weights: Tensor | None = None  # [N], None = 1


@dataclass
class Grads:
    """Gradients in the compute dtype; None where nobody asked."""

    hidden: Tensor | None  # [T, D]
    weight: Tensor | None  # [V, D]
    bias: Tensor | None  # [V]


@dataclass(frozen=True)
class Piece:
    """One chunk on its way: `logits` [C, V] of `hidden` [C, D] rows, entries [first, last) of the plan's."""

    start: int
    stop: int
    first: int
    last: int
    hidden: Tensor
    logits: Tensor
    chunk: Chunk

    def pick(self, values: Tensor | None) -> Tensor | None:
        """Of the plan's entries [M] those of this chunk."""
        return None if values is None else values[self.first : self.last]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for the rest: what logits, losses and sums are held in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Sweep:
    """One pass over the rows that count: products chunk by chunk, and gradients back into hidden, weight and bias."""

    def __init__(self, x: Inputs, call: Call, plan: rows.Plan) -> None:
        self.x, self.call, self.plan = x, call, plan
        self.dtype = compute_dtype(x.hidden.dtype)
        self.kernels = backends.load("cpu")
        rows.check_targets(plan.pick(x.targets), x.weight.shape[0], call.head.ignore_index)
        V, D = x.weight.shape
        workspace = call.config.workspace_bytes or WORKSPACE_BYTES["cpu"]
        self.products = products.choose(x.hidden, x.weight, self.dtype, workspace)
        row_bytes = (V + D if call.need_grad else V) * self.dtype.itemsize + self.products.row_bytes
        self.spans = rows.chunks(plan.count, int((workspace - self.products.bytes) // row_bytes))
        largest = max((stop - start for start, stop in self.spans), default=0)
        self.products.reserve(largest)
        self.logits = self.products.empty((largest, V), self.dtype)
        self.bias = None if x.bias is None else x.bias.to(self.dtype).contiguous()
        self.targets = plan.pick(x.targets)
        inverse = None if x.temperature is None else 1 / x.temperature.to(self.dtype)
        self.inverse_temperature = plan.pick_rows(inverse)
        self.row_ptr = None if plan.row_ptr is None else plan.row_ptr.tolist()
        self.grads = self._empty_grads()
        self.weight_started = False

    def _empty_grads(self) -> Grads:
        x, need = self.x, self.call
        everything = self.plan.index is None
        make = torch.empty if everything else torch.zeros
        hidden = make(x.hidden.shape, dtype=self.dtype) if need.need_hidden else None
        weight = self.products.empty(tuple(x.weight.shape), self.dtype) if need.need_weight else None
        bias = torch.zeros(x.weight.shape[0], dtype=self.dtype) if need.need_bias else None
        return Grads(hidden, weight, bias)

    def __iter__(self) -> Iterator[Piece]:
        x, plan = self.x, self.plan
        for start, stop in self.spans:
            hidden = x.hidden[start:stop] if plan.index is None else x.hidden[plan.index[start:stop]]
            hidden = hidden.to(self.products.operand)
            logits = self.logits[: stop - start]
            self.products.logits(hidden, logits)
            first, last = (start, stop) if self.row_ptr is None else (self.row_ptr[start], self.row_ptr[stop])
            row_ptr = None if plan.row_ptr is None else plan.row_ptr[start : stop + 1] - first
            inverse = None if self.inverse_temperature is None else self.inverse_temperature[start:stop]
            chunk = Chunk(self.targets[first:last], row_ptr, inverse, self.bias, self.call.head)
            yield Piece(start, stop, first, last, hidden, logits, chunk)

    def add_gradients(self, piece: Piece, live: Tensor) -> None:
        """Takes d(loss)/d(product) of a chunk, zero rows named in `live` [C], into the gradients."""
        grads, plan = self.grads, self.plan
        count, order = self.kernels.compact(piece.logits, live)
        dlogits, hidden = piece.logits[:count], piece.hidden
        if grads.hidden is not None:
            where = None if plan.index is None else plan.index[piece.start : piece.stop]
            if order is None and where is None:
                dhidden = grads.hidden[piece.start : piece.stop]
            else:
                dhidden = torch.empty((count, hidden.shape[1]), dtype=self.dtype)
            self.products.dhidden(dlogits, dhidden)
            if order is not None:
                if where is None:
                    grads.hidden[piece.start : piece.stop] = 0
                    where = torch.arange(piece.start, piece.stop)
                where = where[order]
            if where is not None:
                grads.hidden[where] = dhidden
        if count == 0:
            return
        if order is not None:
            hidden = hidden[order]
        if grads.weight is not None:
            self.products.dweight(dlogits, hidden, grads.weight, accumulate=self.weight_started)
            self.weight_started = True
        if grads.bias is not None:
            grads.bias += dlogits.sum(0)

    def finish(self) -> Grads:
        """The gradients; zero where no row reached them."""
        if self.grads.weight is not None and not self.weight_started:
            self.grads.weight.zero_()
        return self.grads

    def scatter(self, collected: dict[str, list[Tensor]], names: tuple[str, ...]) -> Tensor:
        """Per-chunk outputs as one [len(names), N] tensor, 0 where an entry took no part."""
        x = self.x
        out = torch.zeros((len(names), x.targets.numel()), dtype=self.dtype)
        where = slice(None) if self.plan.entries is None else self.plan.entries
        for k, name in enumerate(names):
            if collected.get(name):
                out[k, where] = torch.cat(collected[name])
        return out


def _collect(collected: dict[str, list[Tensor]], outputs: dict[str, Tensor], chunk: Chunk) -> None:
    row_outputs = backends.load("cpu").ROW_OUTPUTS
    for name, values in outputs.items():
        if name in row_outputs and chunk.row_ptr is not None:
            values = values.repeat_interleave(chunk.row_ptr.diff())
        collected.setdefault(name, []).append(values)


def _total(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    """The sum of per-chunk losses (0-d), added up in fp64."""
    return sum((part.double().sum() for part in parts), torch.zeros((), dtype=torch.float64)).to(dtype)


def _plan(x: Inputs, call: Call) -> rows.Plan:
    mask = rows.counting(x.targets, x.active, x.advantages, x.weights, x.ref is not None, call)
    return rows.plan(mask, x.rows)


def fused(x: Inputs, call: Call, normalizer: Tensor) -> tuple[Tensor, Grads, Tensor]:
    """Σ weight·loss over the entries / normalizer (0-d), its gradients, and `call.outputs` [K, N], in one pass."""
    sweep = Sweep(x, call, plan := _plan(x, call))
    advantages, old, ref, weights = (plan.pick(v) for v in (x.advantages, x.old, x.ref, x.weights))
    if call.config.check_finite:
        rows.check_finite(
            {"advantages": advantages, "old_logprobs": old, "ref_logprobs": ref, "token_weights": weights}
        )
    weights = sweep.targets.new_ones(sweep.targets.shape, dtype=sweep.dtype) if weights is None else weights
    weights = weights / normalizer
    want = tuple(dict.fromkeys((*call.outputs, "loss")))
    collected: dict[str, list[Tensor]] = {}
    for piece in sweep:
        outputs, live = sweep.kernels.fused_policy(
            piece.logits,
            piece.chunk,
            call.spec,
            *(piece.pick(v) for v in (advantages, old, ref, weights)),
            want,
            gradient=call.need_grad,
        )
        _collect(collected, outputs, piece.chunk)
        if call.need_grad:
            sweep.add_gradients(piece, live)
    return _total(collected.get("loss", []), sweep.dtype), sweep.finish(), sweep.scatter(collected, call.outputs)


def score(x: Inputs, call: Call) -> Tensor:
    """`call.outputs` [K, N] without any gradient: one GEMM over the rows that count."""
    sweep = Sweep(x, call, _plan(x, call))
    collected: dict[str, list[Tensor]] = {}
    for piece in sweep:
        _collect(collected, sweep.kernels.row_stats(piece.logits, piece.chunk, call.outputs), piece.chunk)
    return sweep.scatter(collected, call.outputs)


def backward(
    x: Inputs, call: Call, grad_logprobs: Tensor, grad_entropy: Tensor | None, lse: Tensor, entropy: Tensor | None
) -> Grads:
    """Gradients of Σ grad_logprobs·logp + grad_entropy·H; all [N], `lse` and `entropy` as `score` gave them.

    Rows whose incoming gradients are all zero are not computed again.
    """
    mask = (x.targets != call.head.ignore_index) & (
        grad_logprobs != 0 if grad_entropy is None else (grad_logprobs != 0) | (grad_entropy != 0)
    )
    if x.active is not None:
        mask &= torch.zeros_like(mask).index_fill_(0, x.active, True)
    sweep = Sweep(x, call, plan := rows.plan(mask, x.rows))
    coefs, lse_rows = plan.pick(grad_logprobs), plan.pick(lse)
    entropy_coefs, entropy_rows = plan.pick(grad_entropy), plan.pick(entropy)
    if plan.row_ptr is not None:  # per row what was given per entry
        first = plan.row_ptr[:-1]
        lse_rows = lse_rows[first]
        if entropy_coefs is not None and entropy_rows is not None:
            owner = torch.repeat_interleave(torch.arange(plan.count), plan.row_ptr.diff())
            entropy_coefs = torch.zeros_like(lse_rows).index_add_(0, owner, entropy_coefs)
            entropy_rows = entropy_rows[first]
    for piece in sweep:
        spans = [None if v is None else v[piece.start : piece.stop] for v in (lse_rows, entropy_coefs, entropy_rows)]
        sweep.add_gradients(
            piece, sweep.kernels.grad_logits(piece.logits, piece.chunk, piece.pick(coefs), *spans, raw=True)
        )
    return sweep.finish()


def pointwise(
    x: Inputs, call: Call, fn: Callable[..., Tensor], tensors: tuple[Tensor, ...], normalizer: Tensor
) -> tuple[Tensor, Grads, Tensor]:
    """As `fused`, for a token loss fn(logprobs, *tensors) in torch: its derivative by autograd, chunk by chunk."""
    sweep = Sweep(x, call, plan := _plan(x, call))
    tensors = tuple(plan.pick(t) for t in tensors)
    want = tuple(dict.fromkeys((*call.outputs, "logprobs", "lse")))
    collected: dict[str, list[Tensor]] = {}
    for piece in sweep:
        outputs = sweep.kernels.row_stats(piece.logits, piece.chunk, want)
        with torch.enable_grad():
            logprobs = outputs["logprobs"].detach().requires_grad_()
            token = fn(logprobs, *(piece.pick(t) for t in tensors)) / normalizer
            coefs = torch.autograd.grad(token.sum(), logprobs)[0] if token.requires_grad else torch.zeros_like(logprobs)
        _collect(collected, outputs | {"loss": token.detach()}, piece.chunk)
        if call.need_grad:
            live = sweep.kernels.grad_logits(
                piece.logits, piece.chunk, coefs.to(sweep.dtype).contiguous(), outputs["lse"], raw=False
            )
            sweep.add_gradients(piece, live)
    return _total(collected.get("loss", []), sweep.dtype), sweep.finish(), sweep.scatter(collected, call.outputs)
