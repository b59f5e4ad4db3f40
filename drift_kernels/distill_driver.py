"""The chunk loop with a teacher beside the student: both logits of a chunk, their statistics, what weighs each token, then
divergence, policy term and both gradients.

The teacher's product is made for those rows of a chunk that need it. What is a few numbers a row (policy terms, exploration
weights, a divergence over a top k) is computed in torch, its derivatives by autograd; what runs over the vocabulary is the
backend's. One target a hidden row: prefixes shared between trajectories (`rows=`) are left to the policy ops.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from drift_kernels import backends, divergences, driver, exploration, formulas, products, rows
from drift_kernels.backends.cpu import Chunk
from drift_kernels.divergences import Lessons, Teacher
from drift_kernels.driver import Grads, Inputs, Piece, Sweep
from drift_kernels.exploration import Side
from drift_kernels.formulas import Tokens
from drift_kernels.products import LoRAHead, LowRank
from drift_kernels.spec import Call, DistillCall

STATS = ("logprobs", "entropy", "lse")


def reads(x: Inputs, lessons: Lessons, call: DistillCall) -> tuple[Tensor, Tensor]:
    """Which rows need the student's logits, and which of them the teacher's too [T] bool each."""
    mask = x.targets != call.call.head.ignore_index
    if x.active is not None:
        mask &= torch.zeros_like(mask).index_fill_(0, x.active, True)
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

    def spread(self, values: Tensor) -> Tensor:
        """[n] values at their rows [C], 0 elsewhere."""
        return values if self.rows is None else values.new_zeros(self.size).index_copy_(0, self.where, values)


class TeacherHead:
    """A teacher's logits, chunk by chunk, in a buffer of their own."""

    def __init__(self, teacher: Teacher, call: DistillCall, dtype: torch.dtype, kernels: Any) -> None:
        assert teacher.hidden is not None
        assert teacher.weight is not None
        self.hidden, self.call, self.dtype, self.kernels = teacher.hidden, call, dtype, kernels
        V, self.stats = teacher.weight.shape[0], {}
        workspace = call.call.config.workspace_bytes or driver.WORKSPACE_BYTES["cpu"]
        self.products = products.choose(teacher.hidden, teacher.weight, dtype, workspace)
        self.bytes, self.row_bytes = self.products.bytes, V * dtype.itemsize + self.products.row_bytes
        self.bias = None if teacher.bias is None else teacher.bias.to(dtype).contiguous()
        self.inverse = None if teacher.temperature is None else 1 / teacher.temperature.to(dtype)
        a, b = teacher.lora_a, teacher.lora_b
        lora = None if a is None or b is None else LoRAHead(a, b, call.teacher_lora_scale)
        self.low_rank = None if lora is None else LowRank(lora, dtype)
        self.shape = V

    def reserve(self, count: int) -> None:
        """Makes room for chunks of at most `count` rows."""
        self.products.reserve(count)
        self.buffer = self.products.empty((count, self.shape), self.dtype)

    def run(self, taught: Taught, targets: Tensor) -> None:
        """Logits of the chunk's taught rows, and their statistics; `targets` [n]."""
        hidden = self.hidden[taught.teacher].to(self.products.operand)
        self.logits = self.buffer[: hidden.shape[0]]
        self.products.logits(hidden, self.logits)
        if self.low_rank is not None:
            self.low_rank.add_logits(hidden, self.logits)
        inverse = None if self.inverse is None else self.inverse[taught.teacher]
        self.chunk = Chunk(targets, None, inverse, self.bias, self.call.teacher)
        self.stats = self.kernels.row_stats(self.logits, self.chunk, STATS)


@dataclass
class Step:
    """One chunk between its statistics and its gradient."""

    piece: Piece
    taught: Taught
    stats: dict[str, Tensor]  # of the student, [C]
    weights: Tensor  # of the divergence, [C]
    slopes: dict[str, Tensor]  # derivatives of all other terms by `stats`, [C]

    def coefs(self) -> tuple[Tensor | None, ...]:
        """What the backend's gradients take after a log-sum-exp."""
        entropy = self.stats["entropy"] if "entropy" in self.slopes else None
        found = (None if name not in self.slopes else self.slopes[name].contiguous() for name in STATS)
        logprobs, of_entropy, lse = found
        return logprobs, of_entropy, entropy, lse


class Divergence:
    """Values and gradients of a chunk's divergences, by what there is of a teacher."""

    def __init__(self, sweep: Sweep, teacher: Teacher, head: TeacherHead | None, call: DistillCall) -> None:
        self.kernels, self.teacher, self.head, self.call = sweep.kernels, teacher, head, call
        self.vocabulary, self.gradient = sweep.x.weight.shape[0], call.call.need_grad

    def __call__(self, step: Step) -> tuple[Tensor, Tensor | None]:
        """Divergences [n] and, where gradients are wanted, live rows [C] of logits that have become their products'."""
        if self.teacher.ids is not None or self.call.distill.top_k is not None:
            return self._of_buckets(step)
        if self.head is not None:
            return self._of_heads(step, self.head)
        values = divergences.sampled(step.stats["logprobs"], self._sampled(step))
        return values[step.taught.where], self._others_alone(step) if self.gradient else None

    def _sampled(self, step: Step) -> Tensor:
        assert self.teacher.sampled is not None
        return step.taught.spread(self.teacher.sampled[step.taught.teacher])

    def of_samples(self, step: Step) -> Callable[[Tensor], Tensor] | None:
        """The divergence of the sampled token as a loss of its log-prob [C], where that is what there is."""
        if self.teacher.sampled is None:
            return None
        teacher, w = self._sampled(step), step.weights
        return lambda logprobs: torch.where(w != 0, w * divergences.sampled(logprobs, teacher), 0.0)

    def _others_alone(self, step: Step) -> Tensor:
        piece = step.piece
        return self.kernels.grad_logits(
            piece.logits, piece.chunk, step.coefs()[0], step.stats["lse"], *step.coefs()[1:], raw=False
        )

    def _of_heads(self, step: Step, head: TeacherHead) -> tuple[Tensor, Tensor | None]:
        divergence, live = self.kernels.fused_distill(
            step.piece.logits,
            step.piece.chunk,
            step.taught.rows,
            head.logits,
            head.stats["lse"],
            step.weights,
            self.call.distill.alpha,
            step.stats["lse"],
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
            step.stats["lse"],
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


class Exploration:
    """Exploration weights chunk by chunk: the entropies of a chunk's last row are carried to the next."""

    def __init__(self, call: DistillCall, dtype: torch.dtype) -> None:
        self.spec, self.last = call.exploration, (torch.zeros(1, dtype=dtype), torch.zeros(1, dtype=dtype))

    def __call__(
        self, student: dict[str, Tensor], teacher: dict[str, Tensor], taught: Tensor, lessons: Lessons
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """As `exploration.explore`, of statistics [C]."""
        assert self.spec is not None
        sides = []
        for stats, last in zip((student, teacher), self.last):
            before = torch.cat((last, stats["entropy"][:-1]))
            sides.append(Side(stats["logprobs"], stats["entropy"], before))
        self.last = (student["entropy"][-1:].clone(), teacher["entropy"][-1:].clone())
        return exploration.explore(sides[0], sides[1], taught, lessons, self.spec)


def fused(
    x: Inputs, teacher: Teacher, lessons: Lessons, call: DistillCall, normalizer: Tensor
) -> tuple[Tensor, Grads, Tensor]:
    """(Σ weight·policy loss + Σ weight·divergence) / normalizer (0-d), its gradients, and the call's outputs [K, T]."""
    needs_student, needs_teacher = reads(x, lessons, call)
    plan = rows.plan(needs_student, None)
    tokens = x.tokens if plan.entries is None else x.tokens.pick(plan.entries)
    per_row = [plan.pick(v) for v in (lessons.weights, lessons.continues, lessons.rebellious)]
    if call.call.config.check_finite:
        rows.check_finite(tokens)
        rows.check_finite(Tokens(weights=per_row[0]))
    dtype, kernels = driver.compute_dtype(x.hidden.dtype), backends.load("cpu")
    head = None if teacher.hidden is None else TeacherHead(teacher, call, dtype, kernels)
    k = call.distill.top_k if teacher.ids is None else teacher.ids.shape[1]
    per_token = (k + 1) * (8 + 12 * dtype.itemsize) if k else 0  # ids, log-probs and what autograd makes of them
    beside = (0, per_token) if head is None else (head.bytes, head.row_bytes + per_token)
    sweep = Sweep(x, call.call, plan, beside)
    if head is not None:
        head.reserve(min(sweep.limit, plan.count))
    policy_weights = driver.weights_of(tokens, plan.pick(x.targets), normalizer) if call.policy else None
    taught_everywhere, absolute = plan.pick(needs_teacher), torch.arange(x.targets.numel())
    absolute = plan.pick(absolute)
    explored = Exploration(call, dtype)
    divergence_of = Divergence(sweep, teacher, head, call)
    collected: dict[str, list[Tensor]] = {}
    known = {**kernels.ROW_OUTPUTS, **kernels.ENTRY_OUTPUTS}
    want = tuple(dict.fromkeys((*STATS, *(name for name in call.call.outputs if name in known))))
    for piece in sweep.pieces(plan, sweep.chunks(0, plan.count)):
        here = slice(piece.start, piece.stop)
        stats = kernels.row_stats(piece.logits, piece.chunk, want)
        taught = _taught(taught_everywhere[here], absolute[here])
        seen = {}
        if head is not None:
            head.run(taught, piece.chunk.targets[taught.where])
            seen = {name: taught.spread(head.stats[name]) for name in ("logprobs", "entropy")}
        some, weights = tokens.pick(here), taught_everywhere[here].to(dtype)
        given, continues, rebellious = (piece.pick(v) for v in per_row)
        if given is not None:
            weights = torch.where(taught_everywhere[here], given, 0.0)
        w_policy, outputs = piece.pick(policy_weights), {}
        if call.exploration is not None:
            means = (lessons.mean_difference, lessons.mean_entropy)
            factor, bonus, outputs = explored(
                stats, seen, taught_everywhere[here], Lessons(None, None, continues, rebellious, *means)
            )
            weights = weights * factor
            w_policy = None if w_policy is None else w_policy * bonus
        if call.distill.importance_clip is not None:
            assert some.old is not None
            weights = weights * divergences.importance(stats["logprobs"], some.old, call.distill.importance_clip)
        step = Step(piece, taught, stats, weights / normalizer, {})
        loss = _other_terms(step, some, w_policy, divergence_of.of_samples(step), call.call)
        divergence, live = divergence_of(step)
        divergence = taught.spread(divergence)
        if teacher.sampled is None:
            loss = loss + torch.where(step.weights != 0, step.weights * divergence, 0.0)
        if w_policy is not None:
            outputs = outputs | driver.terms_of(stats["logprobs"], some, w_policy, call.call)
        outputs |= {f"teacher_{name}": values for name, values in seen.items()}
        for name, values in (stats | outputs | {"divergence": divergence, "loss": loss}).items():
            collected.setdefault(name, []).append(values)
        if live is not None:
            sweep.add_gradients(piece, live)
    total = driver.total_of(collected.get("loss", []), dtype)
    return total, sweep.finish(), sweep.scatter(collected, call.call.outputs)


def _taught(flags: Tensor, absolute: Tensor) -> Taught:
    where = flags.nonzero().squeeze(1)
    if where.numel() == flags.numel():
        return Taught(where, None, absolute, flags.numel())
    inverse = torch.full_like(absolute, -1).index_copy_(0, where, torch.arange(where.numel()))
    return Taught(where, inverse, absolute[where], flags.numel())


def _other_terms(
    step: Step, tokens: Tokens, weights: Tensor | None, sampled: Callable[[Tensor], Tensor] | None, call: Call
) -> Tensor:
    """Weighted losses [C] besides a divergence over the vocabulary; their derivatives become the step's."""
    spec = call.spec
    if weights is None and sampled is None:
        return torch.zeros_like(step.weights)

    def weighted(logprobs: Tensor, entropy: Tensor, lse: Tensor) -> Tensor:
        loss = torch.zeros_like(logprobs) if sampled is None else sampled(logprobs)
        if weights is not None:
            policy = formulas.token_loss(logprobs, tokens, entropy, lse, spec)
            loss = loss + torch.where(weights != 0, weights * policy, 0.0)
        return loss

    loss, step.slopes = driver.differentiate(weighted, {name: step.stats[name] for name in STATS})
    return loss


def top_k(x: Inputs, k: int, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Ids [T, k] int64, log-probs [T, k] and the log-prob of the rest [T] of each row's likeliest tokens; 0 outside `active`."""
    T, dtype = x.targets.numel(), driver.compute_dtype(x.hidden.dtype)
    mask = torch.ones(T, dtype=torch.bool)
    if x.active is not None:
        mask = torch.zeros(T, dtype=torch.bool).index_fill_(0, x.active, True)
    plan = rows.plan(mask, None)
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
