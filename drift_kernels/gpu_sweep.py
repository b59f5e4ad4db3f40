"""A pass on a GPU, `cpu_sweep`'s sibling.

Logits come out of the product in fp32 into a block of some 512 rows. Gradients are written out of place, in the inputs'
type, into a buffer of more rows, and the products of dhidden and dweight run once for each full buffer: adding to an fp32
dweight reads and writes 8 bytes an element, whatever the number of rows. Block and buffer share the workspace.

Nothing here waits for the GPU. Rows that turn out to have no gradient stay in as zeros (squeezing them out would have to
wait for their number). Targets are not checked on the host: one that is out of range makes its log-prob NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from drift_kernels import backends
from drift_kernels.calls import Call
from drift_kernels.pieces import Piece, chunk_of, hidden_rows, sum_in_fp64
from drift_kernels.plan import Plan, even_spans
from drift_kernels.products import gradient_dtype
from drift_kernels.tensors import Grads, Inputs, LoRAHead, compute_dtype

WORKSPACE_BYTES = 1 << 30  # at least, unless the caller names a number
FREE_SHARE = 4  # else one part in so many of the free memory
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
    """out [C, V] fp32 = hidden [C, D] · weightᵀ, with a low-rank part if there is one."""
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


def workspace_share(free: int) -> int:
    """Bytes of workspace on a GPU with `free` bytes: the largest power of two in a quarter of them, at least 1 GiB.

    A power of two, so that small changes of the free memory change neither the blocks nor the order of the sums.
    """
    return max(WORKSPACE_BYTES, 1 << max(free // FREE_SHARE, 1).bit_length() - 1)


def workspace_of(call: Call, device: torch.device) -> int:
    """Bytes of workspace of `call`: its own number, else a share of the free memory of the GPU.

    The memory that torch keeps without using it is free too. Asking for it is a query of the driver and of torch's own
    counters: no stream is waited for. While a graph is captured, nothing is asked and the least is taken.
    """
    if call.config.workspace_bytes is not None:
        return call.config.workspace_bytes
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return WORKSPACE_BYTES
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return workspace_share(torch.cuda.mem_get_info(device)[0] + kept)


def flushes(count: int, staged: int, room: int) -> int:
    """How often the gradients of `count` rows go into dweight, by the rows of the block and of the buffer."""
    return -(-count // (room // staged * staged))


def even_room(count: int, staged: int, room: int) -> int:
    """Rows of a buffer for `count` rows, at most `room`: as many buffers as `room` needs, and all about equally full.

    Whole blocks of `staged` rows, so 2,048 + 2,048 rows instead of 2,560 + 1,536: a short product fills a GPU badly.
    """
    each = -(-count // flushes(count, staged, room))
    return min(count, -(-each // staged) * staged)


def capacity(workspace: int, V: int, D: int, itemsize: int, need_grad: bool, reserved: int = 0) -> tuple[int, int]:
    """(rows of fp32 logits, rows of gradients) that fit in `workspace` bytes, at least one each.

    A row of logits comes with its gathered hidden row and the bytes that the caller has `reserved`; a gradient row with its
    gathered hidden row and its row of dhidden in fp32.
    """
    gathered = D * itemsize
    logits = 4 * padded(V) + gathered + reserved
    if not need_grad:
        return _whole_tiles(min(SCORED_ROWS, workspace // logits)), 0
    row = itemsize * padded(V) + gathered + 4 * D
    staged = _whole_tiles(min(STAGED_ROWS, workspace // (logits + 4 * row)))
    return staged, max(staged, (workspace - staged * logits) // row)


def _whole_tiles(count: int) -> int:
    return max(1, count // TILE_ROWS * TILE_ROWS or count)


class GpuBlock:
    """`pieces.LogitsBlock` on a GPU."""

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


class GpuSweep:
    """`pieces.Sweep` on a GPU."""

    def __init__(self, x: Inputs, call: Call, plan: Plan, backend: str, reserved: tuple[int, int] = (0, 0)) -> None:
        """`reserved`: bytes of the workspace that the caller takes, once and for each row of a chunk."""
        if x.hidden.dtype == torch.float64:
            raise TypeError(f"backend={backend!r} computes in float32, and hidden is float64; 'reference' takes it")
        self.x, self.call, self.plan, self.backend = x, call, plan, backend
        self.dtype, self.device = compute_dtype(x.hidden.dtype), x.hidden.device
        self.kernels = backends.load(backend)
        # In fp16 a gradient that is divided by the normaliser first would underflow: `finish` and `total` divide by this.
        self.pending_divisor: Tensor | None = None
        V, D = x.weight.shape
        self.workspace = workspace_of(call, self.device)
        self.operand = torch.promote_types(x.hidden.dtype, x.weight.dtype)  # of products, and of the gradients in them
        once, each = reserved
        self.limit, self.room = capacity(self.workspace - once, V, D, self.operand.itemsize, call.need_grad, each)
        self.limit = min(self.limit, max(plan.count, 1))
        if call.need_grad:
            self.room = even_room(max(plan.count, 1), self.limit, self.room)
        self.logits: Tensor | None = None
        self.gradients: Tensor | None = None
        out_of_range = x.targets.masked_fill(x.targets < 0, V)  # a log-prob of NaN, except for
        self.targets = out_of_range.masked_fill(x.targets == call.head.ignore_index, -1)
        self.bias = None if x.bias is None else x.bias.to(self.dtype).contiguous()
        self.inverse_temperature = None if x.temperature is None else 1 / x.temperature.to(self.dtype)
        self.filled: list[tuple[int, int, Tensor | None]] = []  # spans of hidden rows, or their indices, in the buffer
        self.used = 0
        self._begin_gradients()

    def _begin_gradients(self) -> None:
        x, call = self.x, self.call
        if not call.need_grad:
            self.grads = Grads(None, None, None)
            return
        self.gradients = aligned(self.room, x.weight.shape[0], self.operand, self.device)
        every_row_written = self.plan.index is None and call.spec.scope == "token"
        make = torch.empty if every_row_written else torch.zeros
        sums = {"bias": (x.bias, call.need_bias)}
        sums |= {"lora_a": (x.lora and x.lora.A, call.need_lora_a), "lora_b": (x.lora and x.lora.B, call.need_lora_b)}
        hidden = make(x.hidden.shape, dtype=self.dtype, device=self.device) if call.need_hidden else None
        zeros = {
            name: torch.zeros(t.shape, dtype=self.dtype, device=self.device) if t is not None and needed else None
            for name, (t, needed) in sums.items()
        }
        weight = x.weight_grad
        if weight is None and call.need_weight:
            weight = torch.empty(x.weight.shape, dtype=self.dtype, device=self.device)
        self.grads = Grads(hidden, weight if call.need_weight else None, **zeros)
        self.weight_started = x.weight_grad is not None

    def divisor(self, normalizer: Tensor) -> Tensor:
        """The normaliser, or in fp16 one: see `pending_divisor`."""
        if self.x.hidden.dtype != torch.float16 or not self.call.need_grad:
            return normalizer
        self.pending_divisor = normalizer
        return torch.ones_like(normalizer)

    def total(self, parts: list[Tensor]) -> Tensor:
        """As `pieces.Sweep.total`."""
        total = sum_in_fp64(parts, self)
        return total if self.pending_divisor is None else total / self.pending_divisor

    def chunks(self, start: int, stop: int) -> list[tuple[int, int]]:
        """As `pieces.Sweep.chunks`: about equally long, and of whole tiles."""
        count = stop - start
        if count <= 0:
            return []
        size = -(-count // -(-count // self.limit))
        size = min(self.limit, -(-size // TILE_ROWS) * TILE_ROWS)
        return [(a, min(a + size, stop)) for a in range(start, stop, size)]

    def aim(self, count: int) -> int:
        """As many as fit: a larger block costs a GPU nothing."""
        return self.limit

    def pieces(self, plan: Plan, spans: Sequence[tuple[int, int]], *, final: bool = True) -> Iterator[Piece]:
        """As `pieces.Sweep.pieces`."""
        x = self.x
        if self.logits is None and spans:
            self.logits = aligned(self.limit, x.weight.shape[0], self.dtype, self.device)
        targets, inverse = plan.take_entries(self.targets), plan.take_rows(self.inverse_temperature)
        for start, stop in spans:
            hidden = hidden_rows(x.hidden, plan, start, stop)
            assert self.logits is not None
            logits = project(hidden, x.weight, x.lora, self.logits[: stop - start])
            first, last, chunk = chunk_of(plan, start, stop, targets, inverse, self.bias, self.call.head)
            out, ends = self._room_for(stop - start), final and (start, stop) == spans[-1]
            yield Piece(self.kernels, plan, start, stop, first, last, hidden, logits, chunk, out, ends)

    def _room_for(self, count: int) -> Tensor | None:
        """The buffer's next `count` rows; None without gradients."""
        if self.gradients is None:
            return None
        if self.used + count > self.room:
            self._flush()
        return self.gradients[self.used : self.used + count]

    def add_gradients(self, piece: Piece, live: Tensor) -> None:
        """Keeps the buffer's rows that a kernel wrote for a chunk; rows that are not `live` are zeros."""
        index = None if piece.plan.index is None else piece.plan.index[piece.start : piece.stop]
        self.filled.append((piece.start, piece.stop, index))
        self.used += piece.stop - piece.start

    def _flush(self) -> None:
        """Takes the buffer into the gradients: the two products, once for all of it."""
        if not self.used:
            return
        assert self.gradients is not None
        x, grads, dlogits = self.x, self.grads, self.gradients[: self.used]
        index = self._index()
        hidden = x.hidden[index]
        dhidden = None
        if grads.hidden is not None:
            together = isinstance(index, slice)
            dhidden = (
                grads.hidden[index] if together else torch.empty(hidden.shape, dtype=self.dtype, device=self.device)
            )
            multiply(dlogits, x.weight, dhidden)
        if x.lora is not None:
            self._add_lora(dlogits, hidden, dhidden)
        if grads.hidden is not None and dhidden is not None and not isinstance(index, slice):
            grads.hidden.index_copy_(0, index, dhidden)
        if grads.weight is not None:
            scale = 1.0 if self.call.accumulate_scale is None else self.call.accumulate_scale
            multiply(dlogits.t(), hidden, grads.weight, add=self.weight_started, scale=scale)
            self.weight_started = True
        if grads.bias is not None:
            grads.bias += dlogits.sum(0, dtype=self.dtype)
        self.filled, self.used = [], 0

    def _index(self) -> slice | Tensor:
        """The hidden rows in the buffer: a slice if they lie together."""
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
        """As `pieces.Sweep.finish`."""
        self._flush()
        grads, self.logits, self.gradients = self.grads, None, None
        if grads.weight is not None and not self.weight_started:
            grads.weight.zero_()
        if self.pending_divisor is not None:
            weight = None if self.x.weight_grad is not None else grads.weight
            for gradient in (grads.hidden, weight, grads.bias, grads.lora_a, grads.lora_b):
                if gradient is not None:
                    gradient.div_(self.pending_divisor)
        if grads.weight is not None and self.x.weight_grad is None:
            grads.weight = grads.weight.to(gradient_dtype(self.x.weight.dtype, self.dtype, self.device))
        return grads

    def scatter(self, collected: dict[str, list[Tensor]], names: tuple[str, ...]) -> Tensor:
        """As `pieces.Sweep.scatter`."""
        out = torch.zeros((len(names), self.targets.numel()), dtype=self.dtype, device=self.device)
        for k, name in enumerate(names):
            if collected.get(name):
                values = torch.cat(collected[name])
                out[k] = values if self.plan.entries is None else out[k].index_copy(0, self.plan.entries, values)
        return out.masked_fill_(self.targets < 0, 0.0)

    def score(self) -> dict[str, list[Tensor]] | None:
        """As `pieces.Sweep.score`: tile by tile. Not possible if

        - the backend has no such kernel;
        - hidden states and head are of two types;
        - a row has several targets, or the head a low-rank part: the kernel takes neither;
        - the elements of a row do not lie side by side.
        """
        x, plan, collected = self.x, self.plan, {name: [] for name in self.call.outputs}
        adjacent = x.hidden.stride(1) == x.weight.stride(1) == 1
        if plan.row_ptr is not None or x.lora is not None or x.hidden.dtype != x.weight.dtype or not adjacent:
            return None
        kernels = backends.scorer(self.call.config.backend, self.backend)
        targets, inverse = plan.take_entries(self.targets), plan.take_rows(self.inverse_temperature)
        for start, stop in even_spans(plan.count, self.workspace // (2 * x.hidden[:1].nbytes)):
            hidden = hidden_rows(x.hidden, plan, start, stop)
            *_, chunk = chunk_of(plan, start, stop, targets, inverse, self.bias, self.call.head)
            scores = kernels.score(hidden, x.weight, chunk, self.call.outputs)
            if scores is None:
                return None
            for name, values in scores.items():
                collected[name].append(values)
        return collected

    def check_temperature(self, temperature: Tensor | None) -> None:
        """Nothing: reading it would wait for the GPU."""

    def checked_ids(self, ids: Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor]:
        """Ids within the vocabulary; the log-prob of one that was outside is NaN."""
        outside = (ids < 0) | (ids >= self.x.weight.shape[0])
        return ids.masked_fill(outside, 0), logprobs.masked_fill(outside, math.nan)
