"""The chunk loop with a teacher beside the student: both logits of a chunk, their statistics, what weighs each token, then
divergence, policy term and both gradients.

The teacher's product is made for those rows of a chunk that need it. What is a few numbers a row (policy terms, exploration
weights, a divergence over a top k) is computed in torch, its derivatives by autograd; what runs over the vocabulary is the
backend's. One target a hidden row: prefixes shared between trajectories (`rows=`) are left to the policy ops.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from drift_kernels import backends, divergences, driver, exploration, formulas, products, rows
from drift_kernels.backends.params import ENTRY_OUTPUTS, ROW_OUTPUTS, Chunk
from drift_kernels.divergences import Lessons, Teacher
from drift_kernels.driver import Sweep
from drift_kernels.exploration import Side
from drift_kernels.formulas import Tokens
from drift_kernels.pieces import Grads, Inputs, Piece
from drift_kernels.products import LoRAHead, LowRank
from drift_kernels.spec import Call, DistillCall

STATS = ("logprobs", "entropy", "lse")


def reads(x: Inputs, lessons: Lessons, call: DistillCall) -> tuple[Tensor, Tensor]:
    """Which rows need the student's logits, and which of them the teacher's too [T] bool each."""
    mask = rows.unmasked(x.targets, x.active, call.call.head.ignore_index)
    teacher = mask if lessons.taught is None else mask & lessons.taught
    if not (call.teach_all or call.exploration) and lessons.weights is not None:
        teacher = teacher & (lessons.weights != 0)
    if call.policy:
        return teacher | rows.counting(x.targets, x.active, x.tokens, call.call), teacher
    return (mask if rows.DENSE_OUTPUTS.intersection(call.call.outputs) else teacher), teacher


@dataclass(frozen=True)
class Taught:
    """The rows of a chunk that have a teacher: n of C."""

    where: Tensor  # [n] int64, in the chunk
    rows: Tensor | None  # [C] int64, the inverse: −1 without a teacher; None = all of them in order
    teacher: Tensor  # [n] int64, rows of the teacher's tensors
    size: int  # C

    @staticmethod
    def of(flags: Tensor, index: Tensor) -> Taught:
        """From which rows of a chunk are taught [C] bool, and which rows of all they are [C] int64."""
        where = flags.nonzero().squeeze(1)
        if where.numel() == flags.numel():
            return Taught(where, None, index, flags.numel())
        inverse = torch.full_like(index, -1).index_copy_(0, where, torch.arange(where.numel()))
        return Taught(where, inverse, index[where], flags.numel())

    def spread(self, values: Tensor) -> Tensor:
        """[n] values at their rows [C], 0 elsewhere."""
        return values if self.rows is None else values.new_zeros(self.size).index_copy_(0, self.where, values)


class TeacherLogits:
    """A teacher's logits, chunk by chunk, in a buffer of their own."""

    def __init__(self, teacher: Teacher, call: DistillCall, dtype: torch.dtype, kernels: Any) -> None:
        assert teacher.hidden is not None
        assert teacher.weight is not None
        self.hidden, self.call, self.dtype, self.kernels = teacher.hidden, call, dtype, kernels
        self.vocabulary = V = teacher.weight.shape[0]
        workspace = call.call.config.workspace_bytes or driver.WORKSPACE_BYTES["cpu"]
        self.products = products.choose(teacher.hidden, teacher.weight, dtype, workspace)
        self.bytes, self.row_bytes = self.products.bytes, V * dtype.itemsize + self.products.row_bytes
        self.bias = None if teacher.bias is None else teacher.bias.to(dtype).contiguous()
        self.inverse = None if teacher.temperature is None else 1 / teacher.temperature.to(dtype)
        a, b = teacher.lora_a, teacher.lora_b
        lora = None if a is None or b is None else LoRAHead(a, b, call.teacher_lora_scale)
        self.low_rank = None if lora is None else LowRank(lora, dtype)

    def reserve(self, count: int) -> None:
        """Makes room for chunks of at most `count` rows."""
        self.products.reserve(count)
        self.buffer = self.products.empty((count, self.vocabulary), self.dtype)

    def run(self, taught: Taught, targets: Tensor) -> dict[str, Tensor]:
        """Makes logits [n, V] of a chunk's taught rows, whose `targets` are [n]; returns their log-probs and entropies [C]."""
        hidden = self.hidden[taught.teacher].to(self.products.operand)
        self.logits = self.buffer[: hidden.shape[0]]
        self.products.logits(hidden, self.logits)
        if self.low_rank is not None:
            self.low_rank.add_logits(hidden, self.logits)
        inverse = None if self.inverse is None else self.inverse[taught.teacher]
        self.chunk = Chunk(targets, None, inverse, self.bias, self.call.teacher)
        self.stats = self.kernels.row_stats(self.logits, self.chunk, STATS)
        return {name: taught.spread(self.stats[name]) for name in ("logprobs", "entropy")}


@dataclass
class Step:
    """One chunk between its statistics and its gradient."""

    piece: Piece
    taught: Taught
    stats: dict[str, Tensor]  # of the student, [C]
    weights: Tensor  # of the divergence, [C]
    slopes: dict[str, Tensor] = field(default_factory=dict)  # derivatives of all other terms by `stats`, [C]

    def differentiate_others(
        self, tokens: Tokens, weights: Tensor | None, sampled: Tensor | None, call: Call
    ) -> Tensor:
        """Weighted policy losses [C] (0 without weights); their derivatives become `slopes`, and those of a divergence that
        knows the teacher's log-probs of the targets alone, `sampled` [C]."""
        spec, mine = call.spec, self.weights
        if weights is None and sampled is None:
            return torch.zeros_like(mine)

        def weighted(logprobs: Tensor, entropy: Tensor, lse: Tensor) -> Tensor:
            policy, divergence = torch.zeros_like(logprobs), torch.zeros_like(logprobs)
            if weights is not None:
                policy = formulas.token_loss(logprobs, tokens, entropy, lse, spec)
                policy = torch.where(weights != 0, weights * policy, 0.0)
            if sampled is not None:
                divergence = torch.where(mine != 0, mine * divergences.sampled(logprobs, sampled), 0.0)
            return torch.stack((policy, divergence))

        losses, self.slopes = driver.differentiate(weighted, {name: self.stats[name] for name in STATS})
        return losses[0]

    def coefs(self) -> tuple[Tensor | None, ...]:
        """As the backend's gradients take them: log-sum-exps, and the derivatives by log-probs, entropies and log-sum-exps."""
        logprobs, entropy, lse = (None if name not in self.slopes else self.slopes[name].contiguous() for name in STATS)
        return self.stats["lse"], logprobs, entropy, self.stats["entropy"] if entropy is not None else None, lse


class Divergence:
    """Values and gradients of a chunk's divergences, by what there is of a teacher."""

    def __init__(self, sweep: Sweep, teacher: Teacher, head: TeacherLogits | None, call: DistillCall) -> None:
        self.kernels, self.teacher, self.head, self.call = sweep.kernels, teacher, head, call
        self.vocabulary, self.gradient = sweep.x.weight.shape[0], call.call.need_grad

    def __call__(self, step: Step) -> tuple[Tensor, Tensor | None]:
        """Divergences [n] and, where gradients are wanted, live rows [C] of logits that have become their products'."""
        if self.teacher.ids is not None or self.call.distill.top_k is not None:
            return self._of_buckets(step)
        if self.head is not None:
            return self._of_heads(step, self.head)
        teacher = self.sampled(step.taught)
        assert teacher is not None
        values = divergences.sampled(step.stats["logprobs"], teacher)[step.taught.where]
        if not self.gradient:
            return values, None
        lse, logprobs, *others = step.coefs()
        piece = step.piece
        return values, self.kernels.grad_logits(piece.logits, piece.chunk, logprobs, lse, *others, raw=False)

    def sampled(self, taught: Taught) -> Tensor | None:
        """The teacher's log-probs of the targets [C], where they are what there is."""
        return None if self.teacher.sampled is None else taught.spread(self.teacher.sampled[taught.teacher])

    def _of_heads(self, step: Step, head: TeacherLogits) -> tuple[Tensor, Tensor | None]:
        divergence, live = self.kernels.fused_distill(
            step.piece.logits,
            step.piece.chunk,
            step.taught.rows,
            head.logits,
            head.stats["lse"],
            step.weights,
            self.call.distill.alpha,
            *step.coefs(),
            gradient=self.gradient,
        )
        return divergence, live if self.gradient else None

    def _of_buckets(self, step: Step) -> tuple[Tensor, Tensor | None]:
        piece, taught, spec = step.piece, step.taught, self.call.distill
        index = taught.teacher
        if self.teacher.ids is None:
            assert spec.top_k is not None
            ids = self.kernels.top_k(piece.logits, piece.chunk, taught.rows, len(index), spec.top_k)
        else:
            ids = self.teacher.ids[index].contiguous()
            check_ids(ids, self.vocabulary)
        logprobs, rest = self.kernels.bucket_logprobs(
            piece.logits, piece.chunk, taught.rows, step.stats["lse"], ids, spec.tail
        )
        other = self._teacher_buckets(ids, index)
        weights = step.weights[taught.where]

        def weighted(logprobs: Tensor, rest: Tensor | None = None) -> Tensor:
            values = divergences.divergence(divergences.buckets(logprobs, rest), other, spec.alpha)
            return torch.stack((values.detach(), torch.where(weights != 0, weights * values, 0.0)))

        leaves = {"logprobs": logprobs} | ({} if rest is None else {"rest": rest})
        values, slopes = driver.differentiate(weighted, leaves)
        if not self.gradient:
            return values[0], None
        live = self.kernels.grad_buckets(
            piece.logits,
            piece.chunk,
            taught.rows,
            ids,
            rest,
            slopes["logprobs"].contiguous(),
            slopes["rest"].contiguous() if "rest" in slopes else None,
            *step.coefs(),
        )
        return values[0], live

    def _teacher_buckets(self, ids: Tensor, index: Tensor) -> Tensor:
        tail = self.call.distill.tail
        if self.teacher.logprobs is not None:
            logprobs = self.teacher.logprobs[index]
            known = None if self.teacher.rest is None else self.teacher.rest[index]
            rest = divergences.stored_rest(logprobs, self.vocabulary) if known is None else known
            return divergences.buckets(logprobs, rest if tail else None)
        head = self.head
        assert head is not None
        found = self.kernels.bucket_logprobs(head.logits, head.chunk, None, head.stats["lse"], ids, tail)
        return divergences.buckets(*found)


def check_ids(ids: Tensor, vocabulary: int) -> None:
    """IndexError unless all of a teacher's ids lie in the vocabulary."""
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise IndexError(
            f"the teacher's ids hold {int(ids.min())}…{int(ids.max())}, but the vocabulary is [0, {vocabulary})"
        )


def weigh(
    student: dict[str, Tensor],
    teacher: dict[str, Tensor],
    last: tuple[Tensor, Tensor],
    tokens: Tokens,
    lessons: Lessons,
    call: DistillCall,
) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """Weights of the divergences [n], factors on the policy's weights (None = 1), and what of exploration is an output.

    `student` and `teacher` are statistics [n], `last` the entropies [1] of the rows before the first. 0 where `lessons.taught`
    is false.
    """
    assert lessons.taught is not None
    weights = lessons.taught.to(student["entropy"].dtype)
    if lessons.weights is not None:
        weights = torch.where(lessons.taught, lessons.weights, 0.0)
    factor, outputs = None, {}
    if call.exploration is not None:
        mine, its = (Side.of(stats, before) for stats, before in zip((student, teacher), last))
        on_divergence, factor, outputs = exploration.explore(mine, its, lessons, call.exploration)
        weights = weights * on_divergence
    if call.distill.importance_clip is not None:
        assert tokens.old is not None
        ratio = divergences.importance(student["logprobs"], tokens.old, call.distill.importance_clip)
        weights = torch.where(weights != 0, weights * ratio, 0.0)
    return weights, factor, outputs


def fused(
    x: Inputs, teacher: Teacher, lessons: Lessons, call: DistillCall, normalizer: Tensor
) -> tuple[Tensor, Grads, Tensor]:
    """(Σ weight·policy loss + Σ weight·divergence) / normalizer (0-d), its gradients, and the call's outputs [K, T]."""
    needs_student, needs_teacher = reads(x, lessons, call)
    plan, index = rows.plan(needs_student, None), torch.arange(x.targets.numel())
    tokens, lessons = x.tokens, replace(lessons, taught=needs_teacher)
    if plan.entries is not None:
        tokens, lessons, index = tokens.pick(plan.entries), lessons.pick(plan.entries), plan.entries
    if call.call.config.check_finite:
        rows.check_finite(tokens)
        rows.check_finite(Tokens(weights=lessons.weights))
    dtype, kernels = driver.compute_dtype(x.hidden.dtype), backends.load("cpu")
    head = None if teacher.hidden is None else TeacherLogits(teacher, call, dtype, kernels)
    sweep = Sweep(x, call.call, plan, _beside(teacher, head, call, dtype))
    if head is not None:
        head.reserve(min(sweep.limit, plan.count))
    policy_weights = driver.weights_of(tokens, plan.pick(x.targets), normalizer) if call.policy else None
    divergence_of = Divergence(sweep, teacher, head, call)
    known = {**ROW_OUTPUTS, **ENTRY_OUTPUTS}
    want = tuple(dict.fromkeys((*STATS, *(name for name in call.call.outputs if name in known))))
    last = (torch.zeros(1, dtype=dtype), torch.zeros(1, dtype=dtype))
    collected: dict[str, list[Tensor]] = {}
    for piece in sweep.pieces(plan, sweep.chunks(0, plan.count)):
        here = slice(piece.start, piece.stop)
        stats = kernels.row_stats(piece.logits, piece.chunk, want)
        some, lesson = tokens.pick(here), lessons.pick(here)
        assert lesson.taught is not None
        taught = Taught.of(lesson.taught, index[here])
        seen = {} if head is None else head.run(taught, piece.chunk.targets[taught.where])
        weights, factor, outputs = weigh(stats, seen, last, some, lesson, call)
        if seen:
            last = (stats["entropy"][-1:], seen["entropy"][-1:])
        w_policy = piece.pick(policy_weights)
        if w_policy is not None and factor is not None:
            w_policy = w_policy * factor
        step = Step(piece, taught, stats, weights / normalizer)
        loss = step.differentiate_others(some, w_policy, divergence_of.sampled(taught), call.call)
        divergence, live = divergence_of(step)
        divergence = taught.spread(divergence)
        loss = loss + torch.where(step.weights != 0, step.weights * divergence, 0.0)
        if w_policy is not None:
            outputs |= driver.terms_of(stats["logprobs"], some, w_policy, call.call)
        outputs |= stats | {f"teacher_{name}": values for name, values in seen.items()}
        for name, values in (outputs | {"divergence": divergence, "loss": loss}).items():
            collected.setdefault(name, []).append(values)
        if live is not None:
            sweep.add_gradients(piece, live)
    total = driver.total_of(collected.get("loss", []), sweep)
    return total, sweep.finish(), sweep.scatter(collected, call.call.outputs)


def _beside(teacher: Teacher, head: TeacherLogits | None, call: DistillCall, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of the workspace besides what the student takes, once and for each row."""
    k = call.distill.top_k if teacher.ids is None else teacher.ids.shape[1]
    buckets = (k + 1) * (8 + 12 * dtype.itemsize) if k else 0  # ids, log-probs and what autograd makes of them
    return (0, buckets) if head is None else (head.bytes, head.row_bytes + buckets)


def top_k(x: Inputs, k: int, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Ids [T, k] int64, log-probs [T, k] and the log-prob of the rest [T] of each row's likeliest tokens; 0 outside `active`."""
    T, dtype = x.targets.numel(), driver.compute_dtype(x.hidden.dtype)
    plan = rows.plan(rows.unmasked(x.targets, x.active, call.head.ignore_index), None)
    sweep = Sweep(x, call, plan, (0, (k + 1) * (16 + dtype.itemsize)))  # a thread sorts k pairs
    ids = torch.zeros((T, k), dtype=torch.int64)
    logprobs, rest = torch.zeros((T, k), dtype=dtype), torch.zeros(T, dtype=dtype)
    for piece in sweep.pieces(plan, sweep.chunks(0, plan.count)):
        lse = sweep.kernels.row_stats(piece.logits, piece.chunk, ("lse",))["lse"]
        some = sweep.kernels.top_k(piece.logits, piece.chunk, None, len(lse), k)
        found = sweep.kernels.bucket_logprobs(piece.logits, piece.chunk, None, lse, some, True)
        where = slice(piece.start, piece.stop) if plan.entries is None else plan.entries[piece.start : piece.stop]
        ids[where], logprobs[where], rest[where] = some, *found
    return ids, logprobs, rest
