"""The chunk loop with a teacher next to the student: both logits of a chunk, their statistics, the weight of each token, then
divergence, policy term and both gradients.

The teacher's product is made for those rows of a chunk that need it. Arithmetic of a few numbers a row (policy terms,
exploration weights, a divergence over a top k) is done in torch, its derivatives by autograd; the vocabulary is the backend's.
One target a hidden row: prefixes shared between trajectories (`rows=`) are left to the policy ops.

The rows of a chunk that have a teacher are read by the host once for all chunks. If `active` is the plan, nothing is read:
the teacher's products are then made for all rows of `active`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from drift_kernels import divergences, exploration
from drift_kernels.backends.contract import BucketSlopes, Chunk, Coefs, TeacherChunk
from drift_kernels.backends.params import ENTRY_OUTPUTS, ROW_OUTPUTS
from drift_kernels.calls import Call, DistillCall
from drift_kernels.divergences import DistillTokens, TeacherTensors
from drift_kernels.driver import Collected, results
from drift_kernels.exploration import TokenStats
from drift_kernels.formulas import Tokens
from drift_kernels.pieces import LogitsBlock, Piece, Sweep
from drift_kernels.plan import Plan, check_finite, distillation_rows, unmasked
from drift_kernels.sweeps import active_plan, backend_of, open_block, open_sweep
from drift_kernels.tensors import Grads, Inputs, LoRAHead, compute_dtype
from drift_kernels.token_terms import differentiate, policy_loss, policy_outputs, weights_of

STATS = ("logprobs", "entropy", "lse")
ID_BYTES = 8
SORTED_IDS = 8  # a GPU holds of each id: keys and ids, in order and as they came


@dataclass(frozen=True)
class TeacherIndex:
    """The n teacher rows of a chunk of C: one for each row with a teacher, or C if the host does not know these."""

    flags: Tensor  # [C] bool, the row has a teacher
    index: Tensor | None  # [n] int64, the chunk's rows with a teacher; None: all of them, in order
    rows: Tensor | None  # [C] int64, index of each row's teacher row, −1 if none; None: row i has teacher row i
    teacher: Tensor  # [n] int64, rows of the teacher's tensors

    @staticmethod
    def of(flags: Tensor, positions: Tensor, spans: Sequence[tuple[int, int]], *, read: bool) -> list[TeacherIndex]:
        """One for each of `spans`, from flags [R] bool and the rows' positions among all T [R] int64.

        `read`: the host reads the flags, which is one wait for a GPU.
        """
        if not read:
            return [TeacherIndex._in_place(flags[a:b], positions[a:b]) for a, b in spans]
        on_host = flags.cpu()
        index = on_host.nonzero().squeeze(1).to(flags.device, non_blocking=True)
        chunks, start = [], 0
        for a, b in spans:
            count = int(on_host[a:b].sum())
            chunks.append(TeacherIndex._packed(flags[a:b], index[start : start + count] - a, positions[a:b]))
            start += count
        return chunks

    @staticmethod
    def _packed(flags: Tensor, index: Tensor, positions: Tensor) -> TeacherIndex:
        n = index.numel()
        if n == flags.numel():
            return TeacherIndex(flags, None, None, positions)
        rows = torch.full_like(positions, -1).index_copy_(0, index, torch.arange(n, device=index.device))
        return TeacherIndex(flags, index, rows, positions[index])

    @staticmethod
    def _in_place(flags: Tensor, positions: Tensor) -> TeacherIndex:
        rows = torch.where(flags, torch.arange(flags.numel(), device=flags.device), -1)
        return TeacherIndex(flags, None, rows, positions)

    @property
    def rows_of_teacher(self) -> Tensor | None:
        """`rows` for kernels over the teacher's logits."""
        return self.rows if self.index is None else None

    def gather(self, values: Tensor) -> Tensor:
        """The teacher's rows [n] of values [C]."""
        return values if self.index is None else values[self.index]

    def scatter(self, values: Tensor) -> Tensor:
        """Values [n] at their rows [C], 0 without a teacher."""
        if self.rows is None:
            return values
        if self.index is None:
            return torch.where(self.flags, values, 0.0)
        return values.new_zeros(self.rows.numel()).index_copy_(0, self.index, values)


class TeacherLogits:
    """A teacher's logits (or products, if the backend leaves them), chunk by chunk, in a block of their own."""

    def __init__(self, x: Inputs, teacher: TeacherTensors, call: DistillCall) -> None:
        assert teacher.hidden is not None
        assert teacher.weight is not None
        a, b = teacher.lora_a, teacher.lora_b
        lora = None if a is None or b is None else LoRAHead(a, b, call.teacher_lora_scale)
        self.block: LogitsBlock = open_block(x, call.student, teacher.hidden, teacher.weight, lora)
        dtype = compute_dtype(x.hidden.dtype)
        self.hidden, self.head = teacher.hidden, call.teacher
        self.bias = None if teacher.bias is None else teacher.bias.to(dtype).contiguous()
        self.temperature = None if teacher.temperature is None else teacher.temperature.to(dtype)

    def run(self, sweep: Sweep, index: TeacherIndex, targets: Tensor) -> dict[str, Tensor]:
        """Makes the logits [n, V] of a chunk; `targets` [C] are its own. Returns log-probs and entropies [C]."""
        logits = self.block.products(self.hidden[index.teacher])
        temperature = None if self.temperature is None else self.temperature[index.teacher]
        sweep.check_temperature(temperature)
        inverse = None if temperature is None else 1 / temperature
        chunk = Chunk(index.gather(targets), None, inverse, self.bias, self.head)
        stats = sweep.kernels.row_stats(logits, chunk, (*STATS, "lse_low"))
        self.rows = TeacherChunk(logits, chunk, stats["lse"], index.rows, stats["lse_low"])
        return {name: index.scatter(stats[name]) for name in ("logprobs", "entropy")}


@dataclass
class StudentChunk:
    """One chunk between its statistics and its gradient."""

    piece: Piece
    index: TeacherIndex
    stats: dict[str, Tensor]  # [C]
    weights: Tensor  # of the divergence, [C]
    slopes: dict[str, Tensor] = field(default_factory=dict)  # derivatives of all other terms by `stats`, [C]

    def differentiate_others(
        self, tokens: Tokens, weights: Tensor | None, sampled: Tensor | None, call: Call
    ) -> Tensor:
        """Weighted policy losses [C], 0 without weights; their derivatives become `slopes`.

        So do those of a divergence from the teacher's log-probs of the targets alone, `sampled` [C].
        """
        distill_weights = self.weights
        if weights is None and sampled is None:
            return torch.zeros_like(distill_weights)

        def weighted(logprobs: Tensor, entropy: Tensor, lse: Tensor) -> Tensor:
            policy, divergence = torch.zeros_like(logprobs), torch.zeros_like(logprobs)
            if weights is not None:
                policy = policy_loss(logprobs, lse, entropy, tokens, weights, call)
            if sampled is not None:
                terms = distill_weights * divergences.sampled(logprobs, sampled)
                divergence = torch.where(distill_weights != 0, terms, 0.0)
            return torch.stack((policy, divergence))

        losses, self.slopes = differentiate(weighted, {name: self.stats[name] for name in STATS})
        return losses[0]

    def coefs(self) -> Coefs:
        """The derivatives of the other terms, as the backend's gradients take them."""
        logprobs, entropy, lse = (None if name not in self.slopes else self.slopes[name].contiguous() for name in STATS)
        of_entropy = None if entropy is None else self.stats["entropy"]
        return Coefs(self.stats["lse"], logprobs, entropy, of_entropy, lse, self.stats["lse_low"])


class Divergence:
    """Values and gradients of a chunk's divergences: from a teacher's head, its likeliest tokens, or its log-probs."""

    def __init__(self, sweep: Sweep, teacher: TeacherTensors, head: TeacherLogits | None, call: DistillCall) -> None:
        self.sweep, self.teacher, self.head, self.call = sweep, teacher, head, call
        self.vocabulary = call.student.head.vocabulary(sweep.x.weight.shape[0])
        self.gradient = call.student.need_grad

    def __call__(self, student: StudentChunk) -> tuple[Tensor, Tensor | None]:
        """Divergences [n], and live rows [C] if a gradient is wanted."""
        if self.teacher.ids is not None or self.call.distill.top_k is not None:
            return self._of_buckets(student)
        if self.head is not None:
            alpha = self.call.distill.alpha
            return student.piece.fused_distill(student.coefs(), self.head.rows, student.weights, alpha)
        teacher = self.sampled(student.index)
        assert teacher is not None
        values = student.index.gather(divergences.sampled(student.stats["logprobs"], teacher))
        return values, student.piece.grad_logits(student.coefs()) if self.gradient else None

    def sampled(self, index: TeacherIndex) -> Tensor | None:
        """The teacher's log-probs of the targets [C], if it is given by them."""
        return None if self.teacher.sampled is None else index.scatter(self.teacher.sampled[index.teacher])

    def _of_buckets(self, student: StudentChunk) -> tuple[Tensor, Tensor | None]:
        piece, index, spec = student.piece, student.index, self.call.distill
        ids, stored = self._ids(piece, index)
        lse, low = student.stats["lse"], student.stats["lse_low"]
        make = self.sweep.kernels.bucket_logprobs
        logprobs, rest = make(piece.logits, piece.chunk, index.rows, lse, ids, spec.tail, low)
        teacher = self._teacher_buckets(ids, stored, index)
        weights = index.gather(student.weights)

        def weighted(logprobs: Tensor, rest: Tensor | None = None) -> Tensor:
            values = divergences.divergence(divergences.buckets(logprobs, rest), teacher, spec.alpha)
            return torch.stack((values.detach(), torch.where(weights != 0, weights * values, 0.0)))

        leaves = {"logprobs": logprobs} | ({} if rest is None else {"rest": rest})
        values, slopes = differentiate(weighted, leaves)
        if not self.gradient:
            return values[0], None
        drest = slopes["rest"].contiguous() if "rest" in slopes else None
        by_bucket = BucketSlopes(ids, slopes["logprobs"].contiguous(), rest, drest)
        return values[0], piece.grad_buckets(student.coefs(), index.rows, by_bucket)

    def _ids(self, piece: Piece, index: TeacherIndex) -> tuple[Tensor, Tensor | None]:
        """The tokens to compare [n, k], and the teacher's log-probs of them if it is given by these."""
        if self.teacher.ids is None:
            assert self.call.distill.top_k is not None
            n = len(index.teacher)
            return self.sweep.kernels.top_k(piece.logits, piece.chunk, index.rows, n, self.call.distill.top_k), None
        assert self.teacher.logprobs is not None
        ids, logprobs = self.teacher.ids[index.teacher].contiguous(), self.teacher.logprobs[index.teacher]
        return self.sweep.checked_ids(ids, logprobs)

    def _teacher_buckets(self, ids: Tensor, stored: Tensor | None, index: TeacherIndex) -> Tensor:
        tail = self.call.distill.tail
        if stored is not None:
            rest = None if self.teacher.rest is None else self.teacher.rest[index.teacher]
            rest = divergences.stored_rest(stored, self.vocabulary) if rest is None else rest
            return divergences.buckets(stored, rest if tail else None)
        assert self.head is not None
        rows = self.head.rows
        logprobs, rest = self.sweep.kernels.bucket_logprobs(
            rows.logits, rows.chunk, index.rows_of_teacher, rows.lse, ids, tail, rows.lse_low
        )
        return divergences.buckets(logprobs, rest)


def weigh(
    student: dict[str, Tensor],
    teacher: dict[str, Tensor],
    before: tuple[Tensor, Tensor],
    tokens: Tokens,
    lessons: DistillTokens,
    call: DistillCall,
) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """Weights of the divergences [n], factors on the policy's weights (None: 1), and the outputs of exploration.

    `student` and `teacher` are statistics [n], `before` their entropies [1] in the row before the first. All are 0 if
    `lessons.taught` is false.
    """
    assert lessons.taught is not None
    weights = lessons.taught.to(student["entropy"].dtype)
    if lessons.weights is not None:
        weights = torch.where(lessons.taught, lessons.weights, 0.0)
    factor, outputs = None, {}
    if call.exploration is not None:
        sides = TokenStats.of(student, before[0]), TokenStats.of(teacher, before[1])
        on_divergence, factor, outputs = exploration.explore(sides[0], sides[1], lessons, call.exploration)
        weights = weights * on_divergence
    if call.distill.importance_clip is not None:
        assert tokens.old is not None
        ratio = divergences.importance(student["logprobs"], tokens.old, call.distill.importance_clip)
        weights = torch.where(weights != 0, weights * ratio, 0.0)
    return weights, factor, outputs


class DistillLoop:
    """The chunks of one call: the tensors that they share, and the entropies of the row before the next chunk."""

    def __init__(
        self, x: Inputs, teacher: TeacherTensors, lessons: DistillTokens, call: DistillCall, normalizer: Tensor
    ) -> None:
        self.call, self.student_call = call, call.student
        if call.exploration is not None and x.active is not None:  # neighbours are compared
            x = replace(x, active=x.active.sort().values)
        needs_student, needs_teacher = distillation_rows(x, lessons, call)
        as_given = active_plan(x, self.student_call)
        self.plan = as_given or Plan.of(needs_student, None)
        self._select(x, replace(lessons, taught=needs_teacher))
        self.head = None if teacher.hidden is None else TeacherLogits(x, teacher, call)
        self.sweep = open_sweep(x, self.student_call, self.plan, _reserved(x, teacher, self.head, call))
        if self.head is not None:
            self.head.block.reserve(min(self.sweep.limit, self.plan.count))
        self.divergence = Divergence(self.sweep, teacher, self.head, call)
        self.normalizer = self.sweep.divisor(normalizer)
        # Rows of `active` that nothing reads: a plan made from masks has none.
        self.unread = None if as_given is None else ~self.plan.take_entries(needs_student)
        policy_weights = None
        if call.policy:
            policy_weights = weights_of(self.tokens, self.plan.take_entries(x.targets), self.normalizer)
            if self.unread is not None:
                policy_weights = policy_weights.masked_fill(self.unread, 0.0)
        self.policy_weights = policy_weights
        outputs = (name for name in self.student_call.outputs if name in ROW_OUTPUTS or name in ENTRY_OUTPUTS)
        self.want = tuple(dict.fromkeys((*STATS, "lse_low", *outputs)))
        self.before = (x.targets.new_zeros(1, dtype=self.sweep.dtype), x.targets.new_zeros(1, dtype=self.sweep.dtype))
        self.spans = self.sweep.chunks(0, self.plan.count)
        assert self.lessons.taught is not None
        self.indices = TeacherIndex.of(self.lessons.taught, self.positions, self.spans, read=as_given is None)

    def _select(self, x: Inputs, lessons: DistillTokens) -> None:
        """The per-token data of the plan's rows, and their positions among all T."""
        tokens, entries = x.tokens, self.plan.entries
        positions = torch.arange(x.targets.numel(), device=x.targets.device)
        if entries is not None:
            tokens, lessons, positions = tokens.pick(entries), lessons.pick(entries), entries
        if self.student_call.config.check_finite:
            check_finite(tokens)
            check_finite(Tokens(weights=lessons.weights))
        self.tokens, self.lessons, self.positions = tokens, lessons, positions

    def run(self) -> tuple[Tensor, Grads, Tensor]:
        """Loss, gradients, and the call's outputs."""
        collected: Collected = {}
        for piece, index in zip(self.sweep.pieces(self.plan, self.spans), self.indices):
            outputs, live = self._chunk(piece, index)
            for name, values in outputs.items():
                collected.setdefault(name, []).append(values)
            if live is not None:
                self.sweep.add_gradients(piece, live)
        return results(self.sweep, collected)

    def _chunk(self, piece: Piece, index: TeacherIndex) -> tuple[dict[str, Tensor], Tensor | None]:
        """One chunk's outputs [C], `divergence` and `loss` among them, and live rows if gradients are wanted."""
        rows = slice(piece.start, piece.stop)
        stats = piece.row_stats(self.want)
        if self.unread is not None:
            stats = {name: values.masked_fill(self.unread[rows], 0.0) for name, values in stats.items()}
        tokens = self.tokens.pick(rows)
        teacher = {} if self.head is None else self.head.run(self.sweep, index, piece.chunk.targets)
        weights, factor, outputs = weigh(stats, teacher, self.before, tokens, self.lessons.pick(rows), self.call)
        if teacher:
            self.before = (stats["entropy"][-1:], teacher["entropy"][-1:])
        policy_weights = None if self.policy_weights is None else self.policy_weights[rows]
        if policy_weights is not None and factor is not None:
            policy_weights = policy_weights * factor
        student = StudentChunk(piece, index, stats, weights / self.normalizer)
        sampled = self.divergence.sampled(index)
        loss = student.differentiate_others(tokens, policy_weights, sampled, self.student_call)
        divergence, live = self.divergence(student)
        divergence = index.scatter(divergence)
        loss = loss + torch.where(student.weights != 0, student.weights * divergence, 0.0)
        if policy_weights is not None:
            outputs |= policy_outputs(stats["logprobs"], tokens, policy_weights, self.student_call)
        outputs |= stats | {f"teacher_{name}": values for name, values in teacher.items()}
        return outputs | {"divergence": divergence, "loss": loss}, live


def fused(
    x: Inputs, teacher: TeacherTensors, lessons: DistillTokens, call: DistillCall, normalizer: Tensor
) -> tuple[Tensor, Grads, Tensor]:
    """(Σ weight·policy loss + Σ weight·divergence) / normalizer (0-d), its gradients, and the call's outputs [K, T]."""
    return DistillLoop(x, teacher, lessons, call, normalizer).run()


def _reserved(x: Inputs, teacher: TeacherTensors, head: TeacherLogits | None, call: DistillCall) -> tuple[int, int]:
    """Bytes of the workspace besides those of the student, once and for each row."""
    k = call.distill.top_k if teacher.ids is None else teacher.ids.shape[1]
    ids = ID_BYTES if backend_of(x, call.student) == "cpu" else ID_BYTES * SORTED_IDS
    itemsize = compute_dtype(x.hidden.dtype).itemsize
    buckets = (k + 1) * (ids + 12 * itemsize) if k else 0  # ids, log-probs, and autograd's copies of them
    return (0, buckets) if head is None else (head.block.bytes, head.block.row_bytes + buckets)


def top_k(x: Inputs, k: int, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Ids [T, k] int64, log-probs [T, k] and the log-prob of the rest [T] of each row's likeliest tokens; 0 outside `active`."""
    T, dtype, device = x.targets.numel(), compute_dtype(x.hidden.dtype), x.hidden.device
    plan = active_plan(x, call) or Plan(T, None, None, None)
    if x.active is not None and plan.entries is None:
        plan = Plan.of(unmasked(x.targets, x.active, call.head.ignore_index), None)
    pairs = 2 * ID_BYTES if backend_of(x, call) == "cpu" else ID_BYTES * SORTED_IDS  # a thread sorts k pairs
    sweep = open_sweep(x, call, plan, (0, (k + 1) * (pairs + dtype.itemsize)))
    ids = torch.zeros((T, k), dtype=torch.int64, device=device)
    logprobs, rest = torch.zeros((T, k), dtype=dtype, device=device), torch.zeros(T, dtype=dtype, device=device)
    for piece in sweep.pieces(plan, sweep.chunks(0, plan.count)):
        stats = piece.row_stats(("lse", "lse_low"))
        lse, low = stats["lse"], stats["lse_low"]
        likeliest = sweep.kernels.top_k(piece.logits, piece.chunk, None, len(lse), k)
        of_ids, of_rest = sweep.kernels.bucket_logprobs(piece.logits, piece.chunk, None, lse, likeliest, True, low)
        assert of_rest is not None
        rows = slice(piece.start, piece.stop) if plan.entries is None else plan.entries[piece.start : piece.stop]
        ids[rows], logprobs[rows], rest[rows] = likeliest, of_ids, of_rest
    return ids, logprobs, rest
