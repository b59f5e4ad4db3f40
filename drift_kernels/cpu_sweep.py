"""A pass on a CPU: logits in one block of at most `workspace_bytes`, a row's gradient written over its logits.

Rows whose gradient turns out to be zero (clipped ones) are squeezed out before the two gradient products. Logits and sums are
fp32 for half-precision inputs too; see `products`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from drift_kernels import products
from drift_kernels.backends import cpu
from drift_kernels.backends.contract import RowKernels
from drift_kernels.calls import Call
from drift_kernels.pieces import Piece, chunk_of, hidden_rows, sum_in_fp64
from drift_kernels.plan import Plan, check_targets, check_temperature, chunk_rows, even_spans
from drift_kernels.products import LowRank
from drift_kernels.tensors import Grads, Inputs, compute_dtype

WORKSPACE_BYTES = 256 << 20


def workspace_of(call: Call) -> int:
    """Bytes that a pass may take."""
    return call.config.workspace_bytes or WORKSPACE_BYTES


class CpuSweep:
    """`pieces.Sweep` on a CPU."""

    kernels: RowKernels = cpu

    def __init__(self, x: Inputs, call: Call, plan: Plan, reserved: tuple[int, int] = (0, 0)) -> None:
        """`reserved`: bytes of the workspace that the caller takes, once and for each row of a chunk."""
        self.x, self.call, self.plan = x, call, plan
        self.dtype = compute_dtype(x.hidden.dtype)
        V, D = x.weight.shape
        self.vocabulary = call.head.vocabulary(V)
        check_targets(plan.take_entries(x.targets), self.vocabulary, call.head.ignore_index)
        check_temperature(plan.take_rows(x.temperature))
        workspace = workspace_of(call)
        self.products = products.choose(x.hidden, x.weight, self.dtype, workspace)
        self.low_rank = None if x.lora is None else LowRank(x.lora, self.dtype)
        width = products.row_stride(V, self.dtype) + (D if call.need_grad else 0)
        row_bytes = width * self.dtype.itemsize + self.products.row_bytes + reserved[1]
        self.limit = self._agreed(max(1, int((workspace - self.products.bytes - reserved[0]) // row_bytes)))
        largest = min(self.limit, plan.count)
        self.products.reserve(largest)
        self.logits = products.block_of_rows("logits", largest, V, self.dtype)
        self.bias = None if x.bias is None else x.bias.to(self.dtype).contiguous()
        self.inverse_temperature = None if x.temperature is None else 1 / x.temperature.to(self.dtype)
        self.grads = self._empty_grads()
        scale = 1.0 if call.accumulate_scale is None else call.accumulate_scale
        self.dweight = products.WeightGradient(self.products, x.weight_grad, scale) if call.need_weight else None

    def _agreed(self, limit: int) -> int:
        """The limit; a subclass may lower it."""
        return limit

    def _empty_grads(self) -> Grads:
        x, call = self.x, self.call
        every_row_written = self.plan.index is None and call.spec.scope == "token"  # a second pass leaves rows out
        make = torch.empty if every_row_written else torch.zeros
        hidden = make(x.hidden.shape, dtype=self.dtype) if call.need_hidden else None
        bias = torch.zeros(x.weight.shape[0], dtype=self.dtype) if call.need_bias else None
        lora_a = torch.zeros(x.lora.A.shape, dtype=self.dtype) if x.lora is not None and call.need_lora_a else None
        lora_b = torch.zeros(x.lora.B.shape, dtype=self.dtype) if x.lora is not None and call.need_lora_b else None
        return Grads(hidden, None, bias, lora_a, lora_b)

    def pieces(self, plan: Plan, spans: Sequence[tuple[int, int]], *, final: bool = True) -> Iterator[Piece]:
        """As `pieces.Sweep.pieces`."""
        targets, inverse = plan.take_entries(self.x.targets), plan.take_rows(self.inverse_temperature)
        for start, stop in spans:
            hidden = hidden_rows(self.x.hidden, plan, start, stop).to(self.products.operand)
            logits = self.logits[: stop - start]
            self.products.logits(hidden, logits)
            if self.low_rank is not None:
                self.low_rank.add_logits(hidden, logits)
            first, last, chunk = chunk_of(plan, start, stop, targets, inverse, self.bias, self.call.head)
            out, ends = logits if self.call.need_grad else None, final and (start, stop) == spans[-1]
            yield Piece(self.kernels, plan, start, stop, first, last, hidden, logits, chunk, out, ends)

    def chunks(self, start: int, stop: int) -> list[tuple[int, int]]:
        """As `pieces.Sweep.chunks`."""
        return [(start + a, start + b) for a, b in even_spans(stop - start, self.aim(stop - start))]

    def aim(self, count: int) -> int:
        """As `pieces.Sweep.aim`."""
        return chunk_rows(count, self.x.hidden.shape[1], self.limit)

    def add_gradients(self, piece: Piece, live: Tensor) -> None:
        """As `pieces.Sweep.add_gradients`."""
        count, order = cpu.compact(piece.logits, live)
        dlogits = piece.logits[:count]
        hidden = piece.hidden if order is None else piece.hidden[order]
        dhidden = self._dhidden(piece, dlogits, order)
        if self.low_rank is not None:
            self.low_rank.add_gradients(dlogits, hidden, dhidden, self.grads.lora_a, self.grads.lora_b)
        if dhidden is not None:
            self._store(piece, dhidden, order)
        if count == 0:
            return
        if self.dweight is not None:
            self.dweight.add(dlogits, hidden, final=piece.final)
        if self.grads.bias is not None:
            self.grads.bias += dlogits.sum(0)

    def _dhidden(self, piece: Piece, dlogits: Tensor, order: Tensor | None) -> Tensor | None:
        """dlogits · weight [count, D]; written straight to its place if all rows are live and lie together."""
        if self.grads.hidden is None:
            return None
        if order is None and piece.plan.index is None:
            dhidden = self.grads.hidden[piece.start : piece.stop]
        else:
            dhidden = torch.empty((dlogits.shape[0], piece.hidden.shape[1]), dtype=self.dtype)
        self.products.dhidden(dlogits, dhidden)
        return dhidden

    def _store(self, piece: Piece, dhidden: Tensor, order: Tensor | None) -> None:
        """Puts the live rows' gradients where they belong, unless they were written there."""
        grads, index = self.grads.hidden, piece.plan.index
        assert grads is not None
        if index is not None:
            index = index[piece.start : piece.stop]
        elif order is None:
            return
        else:
            grads[piece.start : piece.stop] = 0
            index = torch.arange(piece.start, piece.stop)
        grads[index if order is None else index[order]] = dhidden

    def divisor(self, normalizer: Tensor) -> Tensor:
        """The normaliser: gradients come out final."""
        return normalizer

    def total(self, parts: list[Tensor]) -> Tensor:
        """As `pieces.Sweep.total`."""
        return sum_in_fp64(parts, self)

    def finish(self) -> Grads:
        """As `pieces.Sweep.finish`."""
        if self.dweight is not None:
            self.grads.weight = self.dweight.result()
        return self.grads

    def scatter(self, collected: dict[str, list[Tensor]], names: tuple[str, ...]) -> Tensor:
        """As `pieces.Sweep.scatter`."""
        out = torch.zeros((len(names), self.x.targets.numel()), dtype=self.dtype)
        entries = slice(None) if self.plan.entries is None else self.plan.entries
        for k, name in enumerate(names):
            if collected.get(name):
                out[k, entries] = torch.cat(collected[name])
        return out

    def score(self) -> None:
        """None: scores are made of logits here."""

    def check_temperature(self, temperature: Tensor | None) -> None:
        """As `plan.check_temperature`."""
        check_temperature(temperature)

    def checked_ids(self, ids: Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor]:
        """As given; IndexError for an id outside the vocabulary."""
        V = self.vocabulary
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < V:
            raise IndexError(
                f"the teacher's ids hold {int(ids.min())}…{int(ids.max())}, but the vocabulary is [0, {V})"
            )
        return ids, logprobs
