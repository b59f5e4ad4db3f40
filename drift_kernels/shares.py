"""A pass over one rank's share of the vocabulary: the CPU's kernels on the own columns, statistics merged over all ranks.

To the loops it is another backend. Statistics of the whole rows are the same bits on every rank, so that each does the same
arithmetic on them and gets the gradient of its own columns; a target in another rank's share counts there alone as a
column, and here as probability. Divergences over the vocabulary are torch, in blocks of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from drift_kernels import collectives, divergences
from drift_kernels.backends import cpu, partials
from drift_kernels.backends.contract import BucketSlopes, Chunk, Coefs, RowKernels, TeacherChunk
from drift_kernels.backends.params import ENTRY_OUTPUTS, ROW_OUTPUTS
from drift_kernels.calls import Call, Share
from drift_kernels.cpu_sweep import CpuSweep
from drift_kernels.formulas import Tokens
from drift_kernels.parallel import as_share_of
from drift_kernels.plan import Plan
from drift_kernels.spec import PolicySpec
from drift_kernels.tensors import Grads, Inputs
from drift_kernels.token_terms import differentiate, policy_loss, policy_outputs

BLOCK_BYTES = 4 << 20  # of logits in a block of rows


class ShareSweep(CpuSweep):
    """`pieces.Sweep` over a share of the vocabulary. All ranks cut the same rows into the same chunks."""

    def __init__(self, x: Inputs, call: Call, plan: Plan, reserved: tuple[int, int] = (0, 0)) -> None:
        assert call.head.share is not None
        self.share = call.head.share
        self.kernels: RowKernels = ShareKernels(self.share, x.weight.shape[0])
        super().__init__(x, call, plan, reserved)

    def _agreed(self, limit: int) -> int:
        call, share, rows = self.call, self.share, self.x.weight.shape[0]
        same = replace(call, head=replace(call.head, share=as_share_of(share, 0)))
        data = collectives.checksum((self.x.targets, self.x.rows, self.x.temperature, *self.x.tokens.flat()))
        text = f"{self.plan.count} rows, data {data:08x}, {same.encode()}"
        parts = collectives.agree([share.first, rows, limit], text, share)
        edge = 0
        for first, size, _ in sorted(parts):
            if first != edge:
                edge = -1
                break
            edge += size
        if edge != share.vocabulary:
            spans = ", ".join(f"{first} … {first + size - 1}" for first, size, _ in parts)
            raise ValueError(
                f"the ranks hold tokens {spans}; together they must be 0 … {share.vocabulary - 1}, each once"
            )
        return min(limit for *_, limit in parts)

    def finish(self) -> Grads:
        """As `pieces.Sweep.finish`; what is whole on every rank is summed, unless the rows are to be given back."""
        grads, plan = super().finish(), self.plan
        if self.share.gather:
            return grads
        if grads.lora_a is not None:
            grads.lora_a = collectives.total(grads.lora_a, self.share)
        if grads.hidden is not None:
            own = collectives.total(grads.hidden if plan.index is None else grads.hidden[plan.index], self.share)
            grads.hidden = own if plan.index is None else grads.hidden.index_copy_(0, plan.index, own)
        return grads


def _log_probs(z: Tensor, lse: Tensor, low: Tensor | None, rows: Tensor | slice) -> Tensor:
    """Logits z [n, size] of some rows minus these rows' log-sum-exps, which are lse + low."""
    log_p = z - lse[rows, None]
    return log_p if low is None else log_p - low[rows, None]


class ShareKernels:
    """`contract.RowKernels` of `size` columns, in place as `backends.cpu`; targets and ids are of the whole vocabulary."""

    def __init__(self, share: Share, size: int) -> None:
        self.share, self.size = share, size

    def _own(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Which ids lie in the share, and all of them as columns of it, −1 elsewhere."""
        columns = ids - self.share.first
        own = (ids >= 0) & (columns >= 0) & (columns < self.size)
        return own, torch.where(own, columns, -1)

    def row_stats(self, logits: Tensor, chunk: Chunk, want: tuple[str, ...]) -> dict[str, Tensor]:
        """As the contract has it; gathers 20 bytes a row and 4 an entry."""
        part = self.partial_stats(logits, chunk, want)
        C, flat = logits.shape[0], torch.cat((part.sums.reshape(-1), part.at_target))
        parts = collectives.gather(flat, self.share)
        sums = parts[:, : partials.SUMS * C].reshape(-1, partials.SUMS, C)
        whole = partials.Partials(sums, parts[:, partials.SUMS * C :])
        return partials.merge(whole, chunk.targets, chunk.row_ptr, self.share.vocabulary, want)

    def partial_stats(self, logits: Tensor, chunk: Chunk, want: tuple[str, ...]) -> partials.Partials:
        """The own columns' part of the statistics; products become logits in place."""
        own, columns = self._own(chunk.targets)
        extra = ("mean_logits", "log_sum_sq_probs") if partials.sweeps(want)["EXTRA"] else ()
        seen = cpu.row_stats(logits, replace(chunk, targets=columns), ("lse", "lse_low", "entropy", *extra))
        lse = seen["lse"]
        top = logits.amax(1) if "is_top1" in want else lse  # any shift would do for the sums
        log_s0 = (lse - top) + seen["lse_low"]
        s0 = log_s0.exp()
        sums = [top, s0, s0 * (log_s0 - seen["entropy"]), torch.zeros_like(lse), torch.zeros_like(lse)]
        if extra:
            sums[3:] = s0 * s0 * seen["log_sum_sq_probs"].exp(), seen["mean_logits"] * self.size
        z = logits[_rows_of_entries(chunk), columns.clamp(min=0)]
        return partials.Partials(torch.stack(sums), torch.where(own, z, -torch.inf))

    def grad_logits(self, logits: Tensor, chunk: Chunk, coefs: Coefs, *, raw: bool, out: Tensor) -> Tensor:
        """As the contract has it. A target elsewhere takes from all probabilities, which is what a slope by −lse does."""
        own, columns = self._own(chunk.targets)
        dlse = coefs.dlse
        if coefs.dlogprobs is not None:
            elsewhere = torch.where(own | (chunk.targets < 0), 0.0, coefs.dlogprobs)
            outside = elsewhere.new_zeros(logits.shape[0]).index_add_(0, _rows_of_entries(chunk), elsewhere)
            dlse = -outside if dlse is None else dlse - outside
        local = replace(chunk, targets=columns)
        return cpu.grad_logits(logits, local, replace(coefs, dlse=dlse), raw=raw, out=out)

    def fused_policy(
        self,
        logits: Tensor,
        chunk: Chunk,
        spec: PolicySpec,
        tokens: Tokens,
        want: tuple[str, ...],
        *,
        out: Tensor | None = None,
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """As the contract has it: the policy's arithmetic in torch, on statistics of whole rows."""
        read = ("logprobs", "lse", "entropy") if spec.entropy_coef else ("logprobs", "lse")
        names = (name for name in want if name in ROW_OUTPUTS or name in ENTRY_OUTPUTS)
        stats = self.row_stats(logits, chunk, tuple(dict.fromkeys((*names, *read, "lse_low"))))
        owner, call = _rows_of_entries(chunk), Call(spec, outputs=want)
        leaves = {name: stats[name] if name == "logprobs" else stats[name][owner] for name in read}
        weights = torch.ones_like(leaves["logprobs"]) if tokens.weights is None else tokens.weights

        def weighted(logprobs: Tensor, lse: Tensor, entropy: Tensor | None = None) -> Tensor:
            return policy_loss(logprobs, lse, entropy, tokens, weights, call)

        loss, slopes = differentiate(weighted, leaves)
        terms = stats | policy_outputs(stats["logprobs"], tokens, weights, call) | {"loss": loss}
        outputs = {name: terms[name] for name in want}
        if out is None:
            return outputs, None

        def by_row(name: str) -> Tensor | None:
            if name not in slopes:
                return None
            return loss.new_zeros(logits.shape[0]).index_add_(0, owner, slopes[name])

        dlogprobs = slopes["logprobs"].contiguous() if "logprobs" in slopes else None
        coefs = Coefs(stats["lse"], dlogprobs, by_row("entropy"), stats.get("entropy"), by_row("lse"), stats["lse_low"])
        return outputs, self.grad_logits(logits, chunk, coefs, raw=False, out=out)

    def fused_distill(
        self,
        logits: Tensor,
        chunk: Chunk,
        coefs: Coefs,
        teacher: TeacherChunk,
        weights: Tensor,
        alpha: float,
        *,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As the contract has it; each rank's part of a divergence is gathered between its value and its gradient."""
        where = _rows_of_teacher(teacher.rows, teacher.logits.shape[0])

        def pair(rows: Tensor, taught: Tensor | slice) -> tuple[Tensor, Tensor]:
            student = _log_probs(logits[rows], coefs.lse, coefs.lse_low, rows)
            return student, _log_probs(teacher.logits[taught], teacher.lse, teacher.lse_low, taught)

        sums = logits.new_zeros((2, len(where)))
        for part in self._blocks(len(where), logits):
            sums[:, part] = torch.stack(_divergence(*pair(where[part], part), alpha))
        divergence, own_kl = collectives.gather(sums, self.share).sum(0)
        if out is None:
            return divergence, None
        by_row = torch.full((len(logits),), -1).index_copy_(0, where, torch.arange(len(where)))

        def slope(part: slice) -> tuple[Tensor, Tensor, Tensor]:
            rows = part.start + (by_row[part] >= 0).nonzero().squeeze(1)
            taught = by_row[rows]
            student, other = pair(rows, taught)
            return rows, weights[rows, None] * _slope(student, other, own_kl[taught, None], alpha), weights[rows] != 0

        return divergence, self._add(logits, chunk, coefs, slope)

    def top_k(self, logits: Tensor, chunk: Chunk, teacher_rows: Tensor | None, n: int, k: int) -> Tensor:
        """As the contract has it: each share's k likeliest, then the likeliest of those; gathers 12·k bytes a row."""
        least = min(k, self.size)
        local = replace(chunk, targets=self._own(chunk.targets)[1])
        columns = cpu.top_k(logits, local, teacher_rows, n, least)
        values = logits.new_full((n, k), -torch.inf)
        values[:, :least] = logits[_rows_of_teacher(teacher_rows, n)].gather(1, columns)
        ids = torch.full((n, k), self.share.vocabulary)  # behind all others
        ids[:, :least] = columns + self.share.first
        ids = collectives.gather(ids, self.share).transpose(0, 1).reshape(n, -1)
        values = collectives.gather(values, self.share).transpose(0, 1).reshape(n, -1)
        ids, order = ids.sort(1)
        values = values.gather(1, order)
        return ids.gather(1, values.sort(dim=1, descending=True, stable=True).indices[:, :k])

    def bucket_logprobs(
        self,
        logits: Tensor,
        chunk: Chunk,
        teacher_rows: Tensor | None,
        lse: Tensor,
        ids: Tensor,
        rest: bool,
        lse_low: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As the contract has it; gathers 4·(k + 1) bytes a row."""
        n, where = len(ids), _rows_of_teacher(teacher_rows, len(ids))
        own, columns = self._own(ids)
        own_part = logits.new_full((n, ids.shape[1] + 1), -torch.inf)
        for part in self._blocks(n, logits):
            rows = _log_probs(logits[where[part]], lse, lse_low, where[part])
            own_part[part, :-1] = torch.where(own[part], rows.gather(1, columns[part].clamp(min=0)), -torch.inf)
            if rest:
                own_part[part, -1] = self._masked(rows, own[part], columns[part], -torch.inf).logsumexp(1)
        parts = collectives.gather(own_part if rest else own_part[:, :-1], self.share)
        if not rest:
            return parts.max(0).values, None
        return parts[..., :-1].max(0).values, parts[..., -1].logsumexp(0)

    def grad_buckets(
        self,
        logits: Tensor,
        chunk: Chunk,
        coefs: Coefs,
        teacher_rows: Tensor | None,
        slopes: BucketSlopes,
        *,
        out: Tensor,
    ) -> Tensor:
        """As the contract has it."""
        where = _rows_of_teacher(teacher_rows, len(slopes.ids))
        by_row = torch.full((len(logits),), -1).index_copy_(0, where, torch.arange(len(where)))
        own, columns = self._own(slopes.ids)

        def slope(part: slice) -> tuple[Tensor, Tensor, Tensor]:
            rows = part.start + (by_row[part] >= 0).nonzero().squeeze(1)
            taught = by_row[rows]
            log_p, dlogprobs = _log_probs(logits[rows], coefs.lse, coefs.lse_low, rows), slopes.dlogprobs[taught]
            total, live = dlogprobs.sum(1), (dlogprobs != 0).any(1)
            dz = torch.zeros_like(log_p)
            if slopes.drest is not None and slopes.rest is not None:
                drest, rest = slopes.drest[taught, None], slopes.rest[taught, None]
                total, live = total + drest[:, 0], live | (drest[:, 0] != 0)
                share = torch.where(torch.isneginf(rest), 0.0, (log_p - rest).exp())
                dz += drest * self._masked(share, own[taught], columns[taught], 0.0)
            dz -= total[:, None] * log_p.exp()
            dz.scatter_add_(1, columns[taught].clamp(min=0), torch.where(own[taught], dlogprobs, 0.0))
            return rows, dz, live

        return self._add(logits, chunk, coefs, slope)

    def score(self, hidden: Tensor, weight: Tensor, chunk: Chunk, want: tuple[str, ...]) -> None:
        """None: scores are made of logits here."""

    def _masked(self, values: Tensor, own: Tensor, columns: Tensor, fill: float) -> Tensor:
        """`values` [b, size] with `fill` in the own columns."""
        wide = torch.cat((values, values[:, :1]), 1)  # one column more, for the ids of other ranks
        return wide.scatter_(1, torch.where(own, columns, self.size), fill)[:, : self.size]

    def _blocks(self, count: int, logits: Tensor) -> Iterator[slice]:
        step = max(1, BLOCK_BYTES // (self.size * logits.element_size()))
        return (slice(start, min(start + step, count)) for start in range(0, count, step))

    def _add(
        self, logits: Tensor, chunk: Chunk, coefs: Coefs, slope: Callable[[slice], tuple[Tensor, Tensor, Tensor]]
    ) -> Tensor:
        """The gradient of `coefs` and of another loss over logits; returns live rows [C].

        `slope(part)` gives rows among `part`, that loss's derivatives by their logits, and which of them are live.
        """
        live = torch.empty(len(logits), dtype=torch.uint8)
        for part in self._blocks(len(logits), logits):
            rows, dz, alive = slope(part)
            dz = dz * self._slope_of_logits(logits[rows], chunk, rows)
            targets = replace(chunk, targets=chunk.targets[part])
            if chunk.inv_temperature is not None:
                targets = replace(targets, inv_temperature=chunk.inv_temperature[part])
            rest = (coefs.dlogprobs, coefs.dentropy, coefs.entropy, coefs.dlse, coefs.lse_low)
            of_part = Coefs(coefs.lse[part], *(None if v is None else v[part] for v in rest))
            block = logits[part]
            flags = self.grad_logits(block, targets, of_part, raw=False, out=block)
            block[flags == 0] = 0
            block.index_add_(0, rows - part.start, dz)
            flags[rows - part.start] |= alive.to(torch.uint8)
            live[part] = flags
        return live

    def _slope_of_logits(self, z: Tensor, chunk: Chunk, rows: Tensor) -> Tensor:
        """d(logit)/d(product) at logits z [b, size]."""
        head = chunk.head
        inverse = 1 / head.temperature if chunk.inv_temperature is None else chunk.inv_temperature[rows, None]
        slope = torch.as_tensor(head.logit_scale * inverse, dtype=z.dtype)
        if head.softcap is None:
            return slope
        return slope * (1 - (z / (inverse * head.softcap)).square())


def _rows_of_entries(chunk: Chunk) -> Tensor:
    """The row [M] of each of the chunk's entries."""
    if chunk.row_ptr is None:
        return torch.arange(len(chunk.targets))
    return torch.repeat_interleave(torch.arange(len(chunk.row_ptr) - 1), chunk.row_ptr.diff())


def _rows_of_teacher(teacher_rows: Tensor | None, n: int) -> Tensor:
    """The chunk's row [n] of each teacher row."""
    return torch.arange(n) if teacher_rows is None else (teacher_rows >= 0).nonzero().squeeze(1)


def _times(p: Tensor, log_ratio: Tensor) -> Tensor:
    return torch.where(p == 0, 0.0, p * log_ratio)


def _mixture(student: Tensor, teacher: Tensor, alpha: float) -> Tensor:
    a = torch.tensor(alpha, dtype=torch.float64)
    return torch.logaddexp(student + float((1 - a).log()), teacher + float(a.log()))


def _divergence(student: Tensor, teacher: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """The own columns' part of `divergences.divergence` [b], and of what its gradient subtracts from every slope."""
    s, t = student.exp(), teacher.exp()
    if alpha == 0:
        value = _times(t, teacher - student).sum(1)
        return value, torch.zeros_like(value)
    if alpha == 1:
        value = _times(s, student - teacher).sum(1)
        return value, value
    student, teacher = student.clamp(min=divergences.NOTHING), teacher.clamp(min=divergences.NOTHING)
    mixture = _mixture(student, teacher, alpha)
    own = _times(s, student - mixture).sum(1)
    return (1 - alpha) * own + alpha * _times(t, teacher - mixture).sum(1), own


def _slope(student: Tensor, teacher: Tensor, own: Tensor, alpha: float) -> Tensor:
    """The divergence's derivatives by the student's logits; `own` as `_divergence` gave it, over all ranks."""
    s = student.exp()
    if alpha == 0:
        return s - teacher.exp()
    if alpha == 1:
        return _times(s, student - teacher - own)
    student, teacher = student.clamp(min=divergences.NOTHING), teacher.clamp(min=divergences.NOTHING)
    return (1 - alpha) * _times(s, student - _mixture(student, teacher, alpha) - own)
