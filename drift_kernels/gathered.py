"""The loops of a head with `GatherHidden`: every rank's rows that count are gathered, and each rank computes its share of the
vocabulary for all of them. What comes back is of the own rows; the weight's gradient is complete on its owner.

Normalisers are each rank's own, and go into the weights before these travel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from drift_kernels import collectives, distill_driver, driver
from drift_kernels.backends.contract import Coefs
from drift_kernels.calls import Call, DistillCall, Share
from drift_kernels.divergences import DistillTokens, TeacherTensors
from drift_kernels.formulas import Tokens
from drift_kernels.parallel import as_share_of
from drift_kernels.plan import Plan, counting, distillation_rows, unmasked
from drift_kernels.tensors import Grads, Inputs
from drift_kernels.token_terms import weights_of


def wanted(call: Call) -> bool:
    """Whether the call's head is a `GatherHidden`."""
    return call.head.share is not None and call.head.share.gather


@dataclass(frozen=True)
class Exchange:
    """The own rows among all ranks' rows."""

    share: Share
    plan: Plan  # of the own rows
    rows: list[int]  # hidden rows of each rank
    entries: list[int]  # entries of each rank
    sequences: list[int]  # sequences of each rank
    size: int  # N, entries of the own call

    @staticmethod
    def of(x: Inputs, call: Call, mask: Tensor, others: str = "") -> Exchange:
        """For the entries in `mask` [N]. Raises ValueError unless the ranks' calls agree, also in `others`."""
        share = call.head.share
        assert share is not None
        plan = Plan.of(mask, x.rows)
        own = Plan.of(mask, None).count
        sequences = 0 if x.tokens.lengths is None else x.tokens.lengths.numel()
        text = f"{_text(call)} {_present(x)} {_present(x.tokens)} {others}"
        sizes = collectives.agree([plan.count, own, sequences], text, share)
        rows, entries, sequences = (list(values) for values in zip(*sizes))
        return Exchange(share, plan, rows, entries, sequences, mask.numel())

    @property
    def rank(self) -> int:
        """This rank's place in the group."""
        return collectives.group_of(self.share).rank()

    @property
    def own(self) -> slice:
        """The own entries among all."""
        start = sum(self.entries[: self.rank])
        return slice(start, start + self.entries[self.rank])

    def of_rows(self, values: Tensor | None) -> Tensor | None:
        """[Σ rows, …] of hidden rows' values [T, …]."""
        return None if values is None else collectives.gather_rows(self.plan.take_rows(values), self.rows, self.share)  # pyright: ignore[reportArgumentType]

    def of_entries(self, values: Tensor | None) -> Tensor | None:
        """[Σ entries, …] of entries' values [N, …]."""
        return (
            None
            if values is None
            else collectives.gather_rows(self.plan.take_entries(values), self.entries, self.share)
        )

    def inputs(self, x: Inputs) -> Inputs:
        """All ranks' rows and entries that count, as one call's."""
        index = None
        if x.rows is not None:
            assert self.plan.row_ptr is not None
            own = torch.repeat_interleave(torch.arange(self.plan.count), self.plan.row_ptr.diff())
            index = collectives.gather_rows(own + sum(self.rows[: self.rank]), self.entries, self.share)
        tokens, lengths, segments = x.tokens, x.tokens.lengths, x.tokens.segments
        named = {
            f.name: self.of_entries(getattr(tokens, f.name))
            for f in fields(Tokens)
            if f.name not in ("lengths", "segments")
        }
        if lengths is not None and segments is not None:
            named["lengths"] = collectives.gather_rows(lengths, self.sequences, self.share)
            named["segments"] = self.of_entries(segments + sum(self.sequences[: self.rank]))
        hidden, targets = self.of_rows(x.hidden), self.of_entries(x.targets)
        assert hidden is not None
        assert targets is not None
        temperature = self.of_rows(x.temperature)
        return replace(
            x, hidden=hidden, targets=targets, rows=index, active=None, temperature=temperature, tokens=Tokens(**named)
        )

    def grads(self, grads: Grads, x: Inputs) -> Grads:
        """Summed over the ranks for the own hidden rows; the rest is of the own share."""
        if grads.hidden is None:
            return grads
        own = collectives.reduce_rows(grads.hidden, self.rows, self.share)
        if self.plan.index is not None:
            own = own.new_zeros(x.hidden.shape).index_copy_(0, self.plan.index, own)
        return replace(grads, hidden=own)

    def scatter(self, values: Tensor) -> Tensor:
        """All entries' values [Σ entries, …] as the own call's [N, …], 0 for entries that took no part."""
        own = values[self.own]
        if self.plan.entries is None:
            return own.contiguous()
        return own.new_zeros((self.size, *own.shape[1:])).index_copy_(0, self.plan.entries, own)

    def results(self, x: Inputs, run: tuple[Tensor, Grads, Tensor]) -> tuple[Tensor, Grads, Tensor]:
        """The loss, gradients and outputs of the own rows; the last of the outputs that came is each entry's loss."""
        _, grads, outputs = run
        loss = outputs[-1][self.own].double().sum().to(outputs.dtype)
        return loss, self.grads(grads, x), self.scatter(outputs[:-1].t()).t().contiguous()


def _text(call: Call) -> str:
    """The same on every rank."""
    assert call.head.share is not None
    return replace(call, head=replace(call.head, share=as_share_of(call.head.share, 0))).encode()


def _present(bundle: object) -> str:
    """Which tensors there are, and what must agree of them."""
    seen = []
    for f in fields(bundle):  # pyright: ignore[reportArgumentType]
        value = getattr(bundle, f.name)
        if isinstance(value, Tensor) and f.name not in ("active", "weight", "bias"):
            seen.append(f"{f.name}:{value.dtype}{list(value.shape[1:])}")
    return ",".join(seen)


def _with_loss(call: Call) -> Call:
    return replace(call, outputs=(*call.outputs, "loss"))


def fused(x: Inputs, call: Call, normalizer: Tensor) -> tuple[Tensor, Grads, Tensor]:
    """As `driver.fused`."""
    exchange = Exchange.of(x, call, counting(x.targets, x.active, x.tokens, call))
    x_all = exchange.inputs(_weighted(x, normalizer))
    return exchange.results(x, driver.fused(x_all, _with_loss(call), torch.ones_like(normalizer)))


def _weighted(x: Inputs, normalizer: Tensor) -> Inputs:
    return replace(x, tokens=replace(x.tokens, weights=weights_of(x.tokens, x.targets, normalizer)))


def pointwise(
    x: Inputs, call: Call, fn: Callable[..., Tensor], tensors: tuple[Tensor, ...], normalizer: Tensor
) -> tuple[Tensor, Grads, Tensor]:
    """As `driver.pointwise`; `fn` gets all ranks' tokens, so it must be the same function on all of them."""
    others = ",".join(str(t.dtype) for t in tensors)
    exchange = Exchange.of(x, call, counting(x.targets, x.active, x.tokens, call), others)
    everywhere = [exchange.of_entries(t) for t in (torch.ones_like(x.targets).to(normalizer) / normalizer, *tensors)]
    factor, *data = [t for t in everywhere if t is not None]

    def weighted(logprobs: Tensor, factor: Tensor, *data: Tensor) -> Tensor:
        return fn(logprobs, *data) * factor

    run = driver.pointwise(exchange.inputs(x), _with_loss(call), weighted, (factor, *data), torch.ones_like(normalizer))
    return exchange.results(x, run)


def distill(
    x: Inputs, teacher: TeacherTensors, lessons: DistillTokens, call: DistillCall, normalizer: Tensor
) -> tuple[Tensor, Grads, Tensor]:
    """As `distill_driver.fused`. The teacher's hidden rows travel with the student's."""
    mask, _ = distillation_rows(x, lessons, call)
    others = f"{call.distill} {call.exploration} {call.policy} {call.teach_all} {_present(teacher)} {_present(lessons)}"
    exchange = Exchange.of(x, call.student, mask, others)
    weights = torch.ones_like(x.targets).to(normalizer) if lessons.weights is None else lessons.weights
    rows = {name: exchange.of_rows(getattr(teacher, name)) for name in ("hidden", "temperature", "ids", "logprobs")}
    rows |= {name: exchange.of_rows(getattr(teacher, name)) for name in ("rest", "sampled")}
    tokens = {name: exchange.of_entries(getattr(lessons, name)) for name in ("taught", "continues", "rebellious")}
    lessons = replace(lessons, weights=exchange.of_entries(weights / normalizer), **tokens)
    x_all = exchange.inputs(_weighted(x, normalizer) if call.policy else x)
    call = replace(call, student=_with_loss(call.student))
    run = distill_driver.fused(x_all, replace(teacher, **rows), lessons, call, torch.ones_like(normalizer))
    return exchange.results(x, run)


def score(x: Inputs, call: Call) -> Tensor:
    """As `driver.score`."""
    exchange = Exchange.of(x, call, counting(x.targets, x.active, x.tokens, call))
    return exchange.scatter(driver.score(exchange.inputs(x), call).t()).t().contiguous()


def backward(x: Inputs, call: Call, coefs: Coefs) -> Grads:
    """As `driver.backward`; rows whose incoming gradients are 0 do not travel."""
    mask = driver.any_nonzero(coefs) & unmasked(x.targets, x.active, call.head.ignore_index)
    exchange = Exchange.of(x, call, mask, f"{coefs.dentropy is not None}")
    gathered_coefs = Coefs(*(exchange.of_entries(getattr(coefs, field.name)) for field in fields(Coefs)))  # pyright: ignore[reportArgumentType]
    return exchange.grads(driver.backward(exchange.inputs(x), call, gathered_coefs), x)


def top_k(x: Inputs, k: int, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """As `distill_driver.top_k`."""
    exchange = Exchange.of(x, call, unmasked(x.targets, x.active, call.head.ignore_index), str(k))
    ids, logprobs, rest = distill_driver.top_k(exchange.inputs(x), k, call)
    return exchange.scatter(ids), exchange.scatter(logprobs), exchange.scatter(rest)
