"""The chunk loop's GPU side, a sibling of the driver's `Sweep`.

Logits come out of the product in fp32 into a block of some 512 rows. Gradients are written out of place, in the inputs'
type, into a buffer of more rows, and the products of dhidden and dweight run once for each full buffer: adding to an fp32
dweight reads and writes 8 bytes an element, whatever the number of rows. Block and buffer share `workspace_bytes`.

Nothing here waits for the GPU. Rows that turn out to have no gradient stay in as zeros (squeezing them out would have to
wait for their number). Targets are not checked on the host: one that is out of range makes its log-prob NaN. In fp16 the
normaliser comes last, since a gradient divided by it first would underflow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from drift_kernels import backends
from drift_kernels import plan as rows
from drift_kernels.backends.params import Chunk
from drift_kernels.calls import Call
from drift_kernels.pieces import WORKSPACE_BYTES, Piece
from drift_kernels.products import gradient_dtype
from drift_kernels.tensors import Grads, Inputs, LoRAHead, compute_dtype

STAGED_ROWS = 512  # of fp32 logits, while gradients are made
SCORED_ROWS = 2048  # while none are
TILE_ROWS = 64  # chunks are a multiple of it, as a product's tiles are
ALIGNMENT = 16  # elements that every row begins at a multiple of, so that loads are 16 bytes wide at any vocabulary


def multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False, scale: float = 1.0) -> Tensor:
    """out [M, N] fp32 (+)= scale · a [M, K] · b [K, N], operands as they are and sums in fp32.

    Of two types the narrower is widened (hidden rows, under an fp32 head). A CPU has no such product of 16-bit operands:
    there, under Triton's interpreter, they are widened first.
    """
    if a.device.type == "cpu" or torch.float32 in (a.dtype, b.dtype):
        return torch.addmm(out, a.float(), b.float(), beta=int(add), alpha=scale, out=out)
    if not add and scale == 1.0:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return torch.addmm(out, a, b, beta=int(add), alpha=scale, out_dtype=torch.float32, out=out)


def down(hidden: Tensor, lora: LoRAHead) -> Tensor:
    """hidden · Aᵀ [C, r], rounded to the inputs' type."""
    A = lora.A.to(hidden.dtype)
    out = torch.empty((hidden.shape[0], A.shape[0]), dtype=torch.float32, device=hidden.device)
    return multiply(hidden, A.t(), out).to(hidden.dtype)


def project(hidden: Tensor, weight: Tensor, lora: LoRAHead | None, out: Tensor) -> Tensor:
    """out [C, V] fp32 = hidden [C, D] · weightᵀ, with a low-rank part where there is one."""
    multiply(hidden, weight.t(), out)
    if lora is not None:
        multiply(down(hidden, lora), lora.B.to(hidden.dtype).t(), out, add=True, scale=lora.scale)
    return out


def aligned(count: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised [count, width] whose rows begin at multiples of `ALIGNMENT` elements."""
    return torch.empty((count, padded(width)), dtype=dtype, device=device)[:, :width]


def padded(width: int) -> int:
    """`width` up to the next multiple of `ALIGNMENT`."""
    return -(-width // ALIGNMENT) * ALIGNMENT


def capacity(workspace: int, V: int, D: int, itemsize: int, need_grad: bool, beside: int = 0) -> tuple[int, int]:
    """(rows of fp32 logits, rows of gradients) that fit in `workspace` bytes, at least one each.

    A row of logits comes with its gathered hidden row and what the caller has `beside` it, in bytes; a gradient row with its
    gathered hidden row and its row of dhidden in fp32.
    """
    gathered = D * itemsize
    logits = 4 * padded(V) + gathered + beside
    if not need_grad:
        return _whole_tiles(min(SCORED_ROWS, workspace // logits)), 0
    row = itemsize * padded(V) + gathered + 4 * D
    staged = _whole_tiles(min(STAGED_ROWS, workspace // (logits + 4 * row)))
    return staged, max(staged, (workspace - staged * logits) // row)


def _whole_tiles(count: int) -> int:
    return max(1, count // TILE_ROWS * TILE_ROWS or count)


class StagedBlock:
    """As `products.HeadBlock`, on a GPU."""

    def __init__(self, hidden: Tensor, weight: Tensor, lora: LoRAHead | None) -> None:
        self.weight, self.lora, self.device = weight, lora, hidden.device
        operand = torch.promote_types(hidden.dtype, weight.dtype)
        self.bytes, self.row_bytes = 0, 4 * padded(weight.shape[0]) + hidden.shape[1] * operand.itemsize

    def reserve(self, count: int) -> None:
        """Makes room for `count` rows."""
        self.block = aligned(count, self.weight.shape[0], torch.float32, self.device)

    def products(self, hidden: Tensor) -> Tensor:
        """[n, V] fp32 of hidden rows [n, D]; the next call's take their place."""
        return project(hidden, self.weight, self.lora, self.block[: hidden.shape[0]])


class Staging:
    """Passes over the rows that count, as `driver.Sweep` makes them."""

    overwritten = False  # statistics leave products as they are
    on_host = False  # looking at a value means waiting for the GPU

    def __init__(self, x: Inputs, call: Call, plan: rows.Plan, backend: str, beside: tuple[int, int] = (0, 0)) -> None:
        if x.hidden.dtype == torch.float64:
            raise TypeError(f"backend={backend!r} computes in float32, and hidden is float64; 'reference' takes it")
        self.x, self.call, self.plan, self.backend = x, call, plan, backend
        self.dtype, self.device = compute_dtype(x.hidden.dtype), x.hidden.device
        self.kernels: Any = backends.load(backend)
        self.undivided: Tensor | float = 1.0  # what the loss is yet to be divided by
        V, D = x.weight.shape
        self.workspace = call.config.workspace_bytes or WORKSPACE_BYTES["cuda"]
        self.operand = torch.promote_types(x.hidden.dtype, x.weight.dtype)  # of products, and of the gradients in them
        once, each = beside
        self.limit, self.room = capacity(self.workspace - once, V, D, self.operand.itemsize, call.need_grad, each)
        self.limit = min(self.limit, max(plan.count, 1))
        self.room = min(self.room, max(plan.count, 1))
        self.logits: Tensor | None = None
        self.gradients: Tensor | None = None
        masked = x.targets.masked_fill(x.targets < 0, V)  # out of range, but for the one that says so:
        self.targets = masked.masked_fill(x.targets == call.head.ignore_index, -1)
        self.bias = None if x.bias is None else x.bias.to(self.dtype).contiguous()
        self.inverse_temperature = None if x.temperature is None else 1 / x.temperature.to(self.dtype)
        self.filled: list[tuple[int, int, Tensor | None]] = []  # spans of hidden rows, or their indices, in the buffer
        self.used = 0
        self._begin_gradients()

    def _begin_gradients(self) -> None:
        x, need = self.x, self.call
        if not need.need_grad:
            self.grads = Grads(None, None, None)
            return
        self.gradients = aligned(self.room, x.weight.shape[0], self.operand, self.device)
        written = self.plan.index is None and need.spec.scope == "token"  # all of it
        make = torch.empty if written else torch.zeros
        wants = {"bias": (x.bias, need.need_bias)}
        wants |= {"lora_a": (x.lora and x.lora.A, need.need_lora_a), "lora_b": (x.lora and x.lora.B, need.need_lora_b)}
        hidden = make(x.hidden.shape, dtype=self.dtype, device=self.device) if need.need_hidden else None
        summed = {
            name: torch.zeros(t.shape, dtype=self.dtype, device=self.device) if t is not None and wanted else None
            for name, (t, wanted) in wants.items()
        }
        weight = x.weight_grad
        if weight is None and need.need_weight:
            weight = torch.empty(x.weight.shape, dtype=self.dtype, device=self.device)
        self.grads = Grads(hidden, weight if need.need_weight else None, **summed)
        self.weight_started = x.weight_grad is not None

    def divisor(self, normalizer: Tensor) -> Tensor:
        """What losses are divided by before they are differentiated: in fp16 nothing, and `finish` divides."""
        if self.x.hidden.dtype != torch.float16 or not self.call.need_grad:
            return normalizer
        self.undivided = normalizer
        return torch.ones_like(normalizer)

    def chunks(self, start: int, stop: int) -> list[tuple[int, int]]:
        """[start, stop) of a plan's rows cut into spans that fit the block, about equally long and of whole tiles."""
        count = stop - start
        if count <= 0:
            return []
        size = -(-count // -(-count // self.limit))
        size = min(self.limit, -(-size // TILE_ROWS) * TILE_ROWS)
        return [(a, min(a + size, stop)) for a in range(start, stop, size)]

    def aim(self, count: int) -> int:
        """Rows to a chunk: as many as fit. A larger block costs a GPU nothing."""
        return self.limit

    def pieces(self, plan: rows.Plan, spans: Sequence[tuple[int, int]], *, final: bool = True) -> Iterator[Piece]:
        """The chunks [start, stop) of the plan's rows, each as soon as its logits are there; they share one block."""
        x = self.x
        if self.logits is None and spans:
            self.logits = aligned(self.limit, x.weight.shape[0], self.dtype, self.device)
        targets, inverse = plan.pick(self.targets), plan.pick_rows(self.inverse_temperature)
        for start, stop in spans:
            hidden = x.hidden[start:stop] if plan.index is None else x.hidden[plan.index[start:stop]]
            assert self.logits is not None
            logits = project(hidden, x.weight, x.lora, self.logits[: stop - start])
            first, last = plan.entries_of(start, stop)
            row_ptr = None if plan.row_ptr is None else plan.row_ptr[start : stop + 1] - first
            per_row = None if inverse is None else inverse[start:stop]
            chunk = Chunk(targets[first:last], row_ptr, per_row, self.bias, self.call.head)
            into = {}
            if self.gradients is not None:
                if self.used + stop - start > self.room:
                    self._flush()
                into = {"out": self.gradients[self.used : self.used + stop - start]}
            last_one = final and (start, stop) == spans[-1]
            yield Piece(plan, start, stop, first, last, hidden, logits, chunk, last_one, into)

    def add_gradients(self, piece: Piece, live: Tensor) -> None:
        """Keeps what a kernel has written for a chunk; rows that are not `live` are zeros."""
        index = None if piece.plan.index is None else piece.plan.index[piece.start : piece.stop]
        self.filled.append((piece.start, piece.stop, index))
        self.used += piece.stop - piece.start

    def _flush(self) -> None:
        """Takes the buffer into the gradients: the two products, once for all of it."""
        if not self.used:
            return
        assert self.gradients is not None
        x, grads, dlogits = self.x, self.grads, self.gradients[: self.used]
        where = self._where()
        hidden = x.hidden[where]
        dhidden = None
        if grads.hidden is not None:
            whole = isinstance(where, slice)
            dhidden = grads.hidden[where] if whole else torch.empty(hidden.shape, dtype=self.dtype, device=self.device)
            multiply(dlogits, x.weight, dhidden)
        if x.lora is not None:
            self._add_lora(dlogits, hidden, dhidden)
        if grads.hidden is not None and dhidden is not None and not isinstance(where, slice):
            grads.hidden.index_copy_(0, where, dhidden)
        if grads.weight is not None:
            scale = 1.0 if self.call.accumulate_scale is None else self.call.accumulate_scale
            multiply(dlogits.t(), hidden, grads.weight, add=self.weight_started, scale=scale)
            self.weight_started = True
        if grads.bias is not None:
            grads.bias += dlogits.sum(0, dtype=self.dtype)
        self.filled, self.used = [], 0

    def _where(self) -> slice | Tensor:
        """The hidden rows in the buffer: a slice where they lie together."""
        spans = [(start, stop) for start, stop, index in self.filled if index is None]
        if len(spans) == len(self.filled) and all(a[1] == b[0] for a, b in pairwise(spans)):
            return slice(spans[0][0], spans[-1][1])
        parts = [torch.arange(a, b, device=self.device) if index is None else index for a, b, index in self.filled]
        return torch.cat(parts)

    def _operand(self, matrix: Tensor) -> Tensor:
        return matrix.to(self.x.hidden.dtype)

    def _add_lora(self, dlogits: Tensor, hidden: Tensor, dhidden: Tensor | None) -> None:
        lora, grads = self.x.lora, self.grads
        assert lora is not None
        if grads.lora_b is not None:
            multiply(dlogits.t(), down(hidden, lora), grads.lora_b, add=True, scale=lora.scale)
        if dhidden is None and grads.lora_a is None:
            return
        B = self._operand(lora.B)
        out = torch.empty((hidden.shape[0], B.shape[1]), dtype=self.dtype, device=self.device)
        up = self._operand(multiply(dlogits, B, out, scale=lora.scale))
        if dhidden is not None:
            multiply(up, self._operand(lora.A), dhidden, add=True)
        if grads.lora_a is not None:
            multiply(up.t(), hidden, grads.lora_a, add=True)

    def finish(self) -> Grads:
        """The gradients; zero where no row reached them."""
        self._flush()
        grads, self.logits, self.gradients = self.grads, None, None
        if grads.weight is not None:
            if not self.weight_started:
                grads.weight.zero_()
            if self.x.weight_grad is None:
                grads.weight = self._divided(grads.weight).to(
                    gradient_dtype(self.x.weight.dtype, self.dtype, self.device)
                )
        for name in ("hidden", "bias", "lora_a", "lora_b"):
            setattr(grads, name, self._divided(getattr(grads, name)))
        return grads

    def _divided(self, gradient: Any) -> Any:
        if gradient is None or isinstance(self.undivided, float):
            return gradient
        return gradient.div_(self.undivided)

    def scatter(self, collected: dict[str, list[Tensor]], names: tuple[str, ...]) -> Tensor:
        """Per-chunk outputs as one [len(names), N] tensor, 0 where an entry took no part."""
        out = torch.zeros((len(names), self.targets.numel()), dtype=self.dtype, device=self.device)
        for k, name in enumerate(names):
            if collected.get(name):
                values = torch.cat(collected[name])
                out[k] = values if self.plan.entries is None else out[k].index_copy(0, self.plan.entries, values)
        return out.masked_fill_(self.targets < 0, 0.0)

    def without_logits(self) -> bool:
        """Whether scores are computed tile by tile, without logits in memory. They are not where

        - the backend has no such kernel;
        - hidden states and head are of two types;
        - a row has several targets, or the head a low-rank part: the kernel takes neither;
        - the elements of a row do not lie side by side.
        """
        x = self.x
        plain = self.plan.row_ptr is None and x.lora is None and x.hidden.stride(1) == x.weight.stride(1) == 1
        return hasattr(self.kernels, "score") and plain and x.hidden.dtype == x.weight.dtype

    def score(self) -> dict[str, list[Tensor]]:
        """`call.outputs` of the plan's rows by that kernel, as `scatter` takes them."""
        x, plan, collected = self.x, self.plan, {name: [] for name in self.call.outputs}
        targets, inverse = plan.pick(self.targets), plan.pick_rows(self.inverse_temperature)
        for start, stop in rows.chunks(plan.count, self.workspace // (2 * x.hidden[:1].nbytes)):
            hidden = x.hidden[start:stop] if plan.index is None else x.hidden[plan.index[start:stop]]
            per_row = None if inverse is None else inverse[start:stop]
            chunk = Chunk(targets[start:stop], None, per_row, self.bias, self.call.head)
            for name, values in self.kernels.score(hidden, x.weight, chunk, self.call.outputs).items():
                collected[name].append(values)
        return collected
