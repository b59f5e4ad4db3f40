"""The chunk loop with a teacher beside the student: both logits of a chunk, their statistics, what weighs each token, then
divergence, policy term and both gradients.

The teacher's product is made for those rows of a chunk that need it. What is a few numbers a row (policy terms, exploration
weights, a divergence over a top k) is computed in torch, its derivatives by autograd; what runs over the vocabulary is the
backend's. One target a hidden row: prefixes shared between trajectories (`rows=`) are left to the policy ops.

A CPU and a GPU differ in how products are made and gradients taken in (`driver.Sweep`, `staging.Staging`), and in what is
known on the host: which rows of a chunk have a teacher is one read by the host, or, where `active` says which rows count, none:
the teacher's products are then made for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from drift_kernels import backends, divergences, driver, exploration, formulas
from drift_kernels import plan as rows
from drift_kernels.backends.params import ENTRY_OUTPUTS, ROW_OUTPUTS, Chunk
from drift_kernels.calls import Call, DistillCall
from drift_kernels.divergences import Lessons, Teacher
from drift_kernels.driver import Sweep
from drift_kernels.exploration import Side
from drift_kernels.formulas import Tokens
from drift_kernels.pieces import Piece
from drift_kernels.staging import Staging
from drift_kernels.tensors import Grads, Inputs, LoRAHead, compute_dtype

STATS = ("logprobs", "entropy", "lse")
ID_BYTES = 8
SORTED_IDS = 8  # what a GPU holds of each id: keys and ids, in order and as they came


def reads(x: Inputs, lessons: Lessons, call: DistillCall) -> tuple[Tensor, Tensor]:
    """Which rows need the student's logits, and which of them the teacher's too [T] bool each."""
    mask = rows.unmasked(x.targets, x.active, call.student.head.ignore_index)
    teacher = mask if lessons.taught is None else mask & lessons.taught
    if not (call.teach_all or call.exploration) and lessons.weights is not None:
        teacher = teacher & (lessons.weights != 0)
    if call.policy:
        return teacher | rows.counting(x.targets, x.active, x.tokens, call.student), teacher
    return (mask if rows.DENSE_OUTPUTS.intersection(call.student.outputs) else teacher), teacher


@dataclass(frozen=True)
class Taught:
    """Which rows of a chunk of C have a teacher. The teacher's n rows are those, or, where the host does not know them, all C."""

    flags: Tensor  # [C] bool
    where: Tensor | None  # [n] int64, in the chunk; None = all of it, in order
    rows: Tensor | None  # [C] int64, which of n each row's is; −1 without a teacher; None = all in order
    teacher: Tensor  # [n] int64, rows of the teacher's tensors

    @staticmethod
    def of(flags: Tensor, index: Tensor, spans: Sequence[tuple[int, int]], known: bool) -> list[Taught]:
        """For each of `spans`, from which rows are taught [R] bool, and which rows of all they are [R] int64.

        `known`: to the host, which takes one read.
        """
        if not known:
            return [Taught._in_place(flags[a:b], index[a:b]) for a, b in spans]
        on_host = flags.cpu()
        where = on_host.nonzero().squeeze(1).to(flags.device, non_blocking=True)
        made, start = [], 0
        for a, b in spans:
            count = int(on_host[a:b].sum())
            made.append(Taught._packed(flags[a:b], where[start : start + count] - a, index[a:b]))
            start += count
        return made

    @staticmethod
    def _packed(flags: Tensor, where: Tensor, index: Tensor) -> Taught:
        n = where.numel()
        if n == flags.numel():
            return Taught(flags, None, None, index)
        inverse = torch.full_like(index, -1).index_copy_(0, where, torch.arange(n, device=index.device))
        return Taught(flags, where, inverse, index[where])

    @staticmethod
    def _in_place(flags: Tensor, index: Tensor) -> Taught:
        return Taught(flags, None, torch.where(flags, torch.arange(flags.numel(), device=index.device), -1), index)

    @property
    def its_rows(self) -> Tensor | None:
        """`rows` for kernels over the teacher's logits."""
        return self.rows if self.where is None else None

    def pick(self, values: Tensor) -> Tensor:
        """Of [C] values those of the teacher's rows [n]."""
        return values if self.where is None else values[self.where]

    def spread(self, values: Tensor) -> Tensor:
        """[n] values at their rows [C], 0 where there is no teacher."""
        if self.rows is None:
            return values
        if self.where is None:
            return torch.where(self.flags, values, 0.0)
        return values.new_zeros(self.rows.numel()).index_copy_(0, self.where, values)


class TeacherLogits:
    """A teacher's logits (or products, where the backend leaves them), chunk by chunk, in a block of their own."""

    def __init__(self, x: Inputs, teacher: Teacher, call: DistillCall) -> None:
        assert teacher.hidden is not None
        assert teacher.weight is not None
        a, b = teacher.lora_a, teacher.lora_b
        lora = None if a is None or b is None else LoRAHead(a, b, call.teacher_lora_scale)
        self.block = driver.head_block(x, call.student, teacher.hidden, teacher.weight, lora)
        dtype, self.kernels = compute_dtype(x.hidden.dtype), backends.load(driver.backend_of(x, call.student))
        self.hidden, self.head = teacher.hidden, call.teacher
        self.bias = None if teacher.bias is None else teacher.bias.to(dtype).contiguous()
        self.temperature = None if teacher.temperature is None else teacher.temperature.to(dtype)
        self.on_host = x.hidden.device.type == "cpu"

    def run(self, taught: Taught, targets: Tensor) -> dict[str, Tensor]:
        """Makes logits [n, V] of a chunk's taught rows, whose `targets` are [n]; returns their log-probs and entropies [C]."""
        self.logits = self.block.products(self.hidden[taught.teacher])
        temperature = None if self.temperature is None else self.temperature[taught.teacher]
        if self.on_host:
            rows.check_temperature(temperature)
        inverse = None if temperature is None else 1 / temperature
        self.chunk = Chunk(targets, None, inverse, self.bias, self.head)
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

    def __init__(self, sweep: Sweep | Staging, teacher: Teacher, head: TeacherLogits | None, call: DistillCall) -> None:
        self.kernels, self.teacher, self.head, self.call = sweep.kernels, teacher, head, call
        self.raw, self.on_host = not sweep.overwritten, sweep.on_host
        self.vocabulary, self.gradient = sweep.x.weight.shape[0], call.student.need_grad

    def __call__(self, step: Step) -> tuple[Tensor, Tensor | None]:
        """Divergences [n] and, where gradients are wanted and made, live rows [C]."""
        if self.teacher.ids is not None or self.call.distill.top_k is not None:
            return self._of_buckets(step)
        if self.head is not None:
            return self._of_heads(step, self.head)
        teacher = self.sampled(step.taught)
        assert teacher is not None
        values = step.taught.pick(divergences.sampled(step.stats["logprobs"], teacher))
        if not self.gradient:
            return values, None
        lse, logprobs, *others = step.coefs()
        piece = step.piece
        into = {"raw": self.raw, **piece.into}
        return values, self.kernels.grad_logits(piece.logits, piece.chunk, logprobs, lse, *others, **into)

    def sampled(self, taught: Taught) -> Tensor | None:
        """The teacher's log-probs of the targets [C], where they are what there is."""
        return None if self.teacher.sampled is None else taught.spread(self.teacher.sampled[taught.teacher])

    def _of_heads(self, step: Step, head: TeacherLogits) -> tuple[Tensor, Tensor | None]:
        piece = step.piece
        divergence, live = self.kernels.fused_distill(
            piece.logits,
            piece.chunk,
            step.taught.rows,
            head.logits,
            head.chunk,
            head.stats["lse"],
            step.weights,
            self.call.distill.alpha,
            *step.coefs(),
            gradient=self.gradient,
            **piece.into,
        )
        return divergence, live if self.gradient else None

    def _of_buckets(self, step: Step) -> tuple[Tensor, Tensor | None]:
        piece, taught, spec = step.piece, step.taught, self.call.distill
        stored, n = None, len(taught.teacher)
        if self.teacher.ids is None:
            assert spec.top_k is not None
            ids = self.kernels.top_k(piece.logits, piece.chunk, taught.rows, n, spec.top_k)
        else:
            assert self.teacher.logprobs is not None
            ids, stored = self.teacher.ids[taught.teacher].contiguous(), self.teacher.logprobs[taught.teacher]
            ids, stored = checked_ids(ids, stored, self.vocabulary, self.on_host)
        logprobs, rest = self.kernels.bucket_logprobs(
            piece.logits, piece.chunk, taught.rows, step.stats["lse"], ids, spec.tail
        )
        other = self._teacher_buckets(ids, stored, taught)
        weights = taught.pick(step.weights)

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
            **piece.into,
        )
        return values[0], live

    def _teacher_buckets(self, ids: Tensor, stored: Tensor | None, taught: Taught) -> Tensor:
        tail = self.call.distill.tail
        if stored is not None:
            known = None if self.teacher.rest is None else self.teacher.rest[taught.teacher]
            rest = divergences.stored_rest(stored, self.vocabulary) if known is None else known
            return divergences.buckets(stored, rest if tail else None)
        head = self.head
        assert head is not None
        found = self.kernels.bucket_logprobs(head.logits, head.chunk, taught.its_rows, head.stats["lse"], ids, tail)
        return divergences.buckets(*found)


def checked_ids(ids: Tensor, logprobs: Tensor, vocabulary: int, on_host: bool) -> tuple[Tensor, Tensor]:
    """A teacher's ids and their log-probs. One outside the vocabulary raises IndexError, or, where that would have to be waited
    for, gets a log-prob of NaN."""
    if not on_host:
        outside = (ids < 0) | (ids >= vocabulary)
        return ids.masked_fill(outside, 0), logprobs.masked_fill(outside, math.nan)
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise IndexError(
            f"the teacher's ids hold {int(ids.min())}…{int(ids.max())}, but the vocabulary is [0, {vocabulary})"
        )
    return ids, logprobs


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
    options = call.student
    if call.exploration is not None and x.active is not None:  # which compares neighbours
        x = replace(x, active=x.active.sort().values)
    needs_student, needs_teacher = reads(x, lessons, call)
    given = driver.given_plan(x, options)
    plan = given or rows.plan(needs_student, None)
    tokens, lessons = x.tokens, replace(lessons, taught=needs_teacher)
    index = torch.arange(x.targets.numel(), device=x.targets.device)
    if plan.entries is not None:
        tokens, lessons, index = tokens.pick(plan.entries), lessons.pick(plan.entries), plan.entries
    if options.config.check_finite:
        rows.check_finite(tokens)
        rows.check_finite(Tokens(weights=lessons.weights))
    head = None if teacher.hidden is None else TeacherLogits(x, teacher, call)
    sweep = driver.sweep_over(x, options, plan, _beside(x, teacher, head, call))
    if head is not None:
        head.block.reserve(min(sweep.limit, plan.count))
    normalizer = sweep.divisor(normalizer)
    policy_weights = driver.weights_of(tokens, plan.pick(x.targets), normalizer) if call.policy else None
    unread = None if given is None else ~plan.pick(needs_student)  # rows of `active` that would have been dropped
    if unread is not None and policy_weights is not None:
        policy_weights = policy_weights.masked_fill(unread, 0.0)
    divergence_of = Divergence(sweep, teacher, head, call)
    known = {**ROW_OUTPUTS, **ENTRY_OUTPUTS}
    want = tuple(dict.fromkeys((*STATS, *(name for name in options.outputs if name in known))))
    last = (index.new_zeros(1, dtype=sweep.dtype), index.new_zeros(1, dtype=sweep.dtype))
    collected: dict[str, list[Tensor]] = {}
    spans = sweep.chunks(0, plan.count)
    assert lessons.taught is not None
    lists = Taught.of(lessons.taught, index, spans, given is None)
    for piece, taught in zip(sweep.pieces(plan, spans), lists):
        here = slice(piece.start, piece.stop)
        stats = sweep.kernels.row_stats(piece.logits, piece.chunk, want)
        if unread is not None:
            stats = {name: values.masked_fill(unread[here], 0.0) for name, values in stats.items()}
        some, lesson = tokens.pick(here), lessons.pick(here)
        seen = {} if head is None else head.run(taught, taught.pick(piece.chunk.targets))
        weights, factor, outputs = weigh(stats, seen, last, some, lesson, call)
        if seen:
            last = (stats["entropy"][-1:], seen["entropy"][-1:])
        w_policy = piece.pick(policy_weights)
        if w_policy is not None and factor is not None:
            w_policy = w_policy * factor
        step = Step(piece, taught, stats, weights / normalizer)
        loss = step.differentiate_others(some, w_policy, divergence_of.sampled(taught), options)
        divergence, live = divergence_of(step)
        divergence = taught.spread(divergence)
        loss = loss + torch.where(step.weights != 0, step.weights * divergence, 0.0)
        if w_policy is not None:
            outputs |= driver.terms_of(stats["logprobs"], some, w_policy, options)
        outputs |= stats | {f"teacher_{name}": values for name, values in seen.items()}
        for name, values in (outputs | {"divergence": divergence, "loss": loss}).items():
            collected.setdefault(name, []).append(values)
        if live is not None:
            sweep.add_gradients(piece, live)
    total = driver.total_of(collected.get("loss", []), sweep)
    return total, sweep.finish(), sweep.scatter(collected, options.outputs)


def _beside(x: Inputs, teacher: Teacher, head: TeacherLogits | None, call: DistillCall) -> tuple[int, int]:
    """Bytes of the workspace besides what the student takes, once and for each row."""
    k = call.distill.top_k if teacher.ids is None else teacher.ids.shape[1]
    ids = ID_BYTES if driver.backend_of(x, call.student) == "cpu" else ID_BYTES * SORTED_IDS
    itemsize = compute_dtype(x.hidden.dtype).itemsize
    buckets = (k + 1) * (ids + 12 * itemsize) if k else 0  # ids, log-probs and what autograd makes of them
    return (0, buckets) if head is None else (head.block.bytes, head.block.row_bytes + buckets)


def top_k(x: Inputs, k: int, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Ids [T, k] int64, log-probs [T, k] and the log-prob of the rest [T] of each row's likeliest tokens; 0 outside `active`."""
    T, dtype, device = x.targets.numel(), compute_dtype(x.hidden.dtype), x.hidden.device
    plan = driver.given_plan(x, call) or rows.Plan(T, None, None, None)
    if x.active is not None and plan.entries is None:
        plan = rows.plan(rows.unmasked(x.targets, x.active, call.head.ignore_index), None)
    pairs = 2 * ID_BYTES if driver.backend_of(x, call) == "cpu" else ID_BYTES * SORTED_IDS  # a thread sorts k pairs
    sweep = driver.sweep_over(x, call, plan, (0, (k + 1) * (pairs + dtype.itemsize)))
    ids = torch.zeros((T, k), dtype=torch.int64, device=device)
    logprobs, rest = torch.zeros((T, k), dtype=dtype, device=device), torch.zeros(T, dtype=dtype, device=device)
    for piece in sweep.pieces(plan, sweep.chunks(0, plan.count)):
        lse = sweep.kernels.row_stats(piece.logits, piece.chunk, ("lse",))["lse"]
        some = sweep.kernels.top_k(piece.logits, piece.chunk, None, len(lse), k)
        found = sweep.kernels.bucket_logprobs(piece.logits, piece.chunk, None, lse, some, True)
        where = slice(piece.start, piece.stop) if plan.entries is None else plan.entries[piece.start : piece.stop]
        ids[where], logprobs[where], rest[where] = some, *found
    return ids, logprobs, rest
