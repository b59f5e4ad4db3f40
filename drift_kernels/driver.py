"""The chunk loops, once for every backend: rows → drop → chunk by workspace → product → row kernels → two products.

`fused` is one pass for losses that read one token at a time. `scoped` is for those that read a sequence or the whole call:
one pass if a chunk holds all that a loss reads together, else one for the statistics and one for the gradients.

The normaliser is folded into the token weights, so gradients come out final. Nothing here is differentiable; see `autograd`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from drift_kernels.backends.contract import Chunk, Coefs
from drift_kernels.backends.params import ROW_OUTPUTS
from drift_kernels.calls import Call
from drift_kernels.formulas import Tokens
from drift_kernels.pieces import Piece, Sweep
from drift_kernels.plan import Plan, sequence_spans, unmasked
from drift_kernels.sweeps import open_sweep, sweep_of_counting
from drift_kernels.tensors import Grads, Inputs
from drift_kernels.token_terms import differentiate, policy_loss, policy_outputs, weights_of

Collected = dict[str, list[Tensor]]  # outputs by name, chunk by chunk


def _collect(collected: Collected, outputs: dict[str, Tensor], chunk: Chunk | None = None) -> None:
    """Adds a chunk's outputs, those of rows repeated for each of the row's entries."""
    for name, values in outputs.items():
        if chunk is not None and chunk.row_ptr is not None and name in ROW_OUTPUTS:
            values = values.repeat_interleave(chunk.row_ptr.diff(), output_size=chunk.targets.numel())
        collected.setdefault(name, []).append(values)


def results(sweep: Sweep, collected: Collected) -> tuple[Tensor, Grads, Tensor]:
    """The loss (0-d), the gradients, and `call.outputs` [K, N]."""
    total = sweep.total(collected.get("loss", []))
    return total, sweep.finish(), sweep.scatter(collected, sweep.call.outputs)


def fused(x: Inputs, call: Call, normalizer: Tensor) -> tuple[Tensor, Grads, Tensor]:
    """Σ weight·loss over the entries / normalizer (0-d), its gradients, and `call.outputs` [K, N]."""
    if call.spec.scope != "token":
        return scoped(x, call, normalizer)
    sweep, tokens = sweep_of_counting(x, call)
    weights = weights_of(tokens, sweep.plan.take_entries(x.targets), sweep.divisor(normalizer))
    tokens = Tokens(tokens.advantages, tokens.old, tokens.ref, weights)
    want = tuple(dict.fromkeys((*call.outputs, "loss")))
    collected: Collected = {}
    for piece in sweep.pieces(sweep.plan, sweep.chunks(0, sweep.plan.count)):
        outputs, live = piece.fused_policy(call.spec, tokens.pick(slice(piece.first, piece.last)), want)
        _collect(collected, outputs, piece.chunk)
        if live is not None:
            sweep.add_gradients(piece, live)
    return results(sweep, collected)


def scoped(x: Inputs, call: Call, normalizer: Tensor) -> tuple[Tensor, Grads, Tensor]:
    """As `fused`, for a loss that reads several tokens: its arithmetic in torch, its derivatives by autograd.

    It reads together a sequence, or everything (`PolicySpec.scope`). If that fits one chunk, gradients are made from its
    logits; else the logits of rows with a gradient are computed again.
    """
    sweep, tokens = sweep_of_counting(x, call)
    plan = sweep.plan
    weights = weights_of(tokens, plan.take_entries(x.targets), sweep.divisor(normalizer))
    tokens = replace(tokens, weights=weights)
    segments = tokens.segments if call.spec.scope == "sequence" else None
    collected: Collected = {}
    shared, aim = plan.row_ptr is not None, sweep.aim(plan.count)
    for start, stop in sequence_spans(segments, plan.count, aim, sweep.limit, shared=shared):
        _scoped_span(sweep, start, stop, tokens, collected)
    return results(sweep, collected)


def _scoped_span(sweep: Sweep, start: int, stop: int, tokens: Tokens, collected: Collected) -> None:
    """The rows [start, stop) of the plan, which hold all that their losses read; `tokens` are those of the whole plan."""
    call, final = sweep.call, stop == sweep.plan.count
    spans = [(start, stop)] if stop - start <= sweep.limit else sweep.chunks(start, stop)
    read = ("logprobs", "lse", "entropy") if call.spec.entropy_coef else ("logprobs", "lse")
    want = tuple(dict.fromkeys((*call.outputs, *read, "lse_low")))
    by_chunk: Collected = {}
    piece = None
    for piece in sweep.pieces(sweep.plan, spans, final=final):
        _collect(by_chunk, piece.row_stats(want), piece.chunk)
    stats = {name: torch.cat(values) for name, values in by_chunk.items()}
    entries = slice(*sweep.plan.entries_of(start, stop))
    tokens = tokens.pick(entries)
    weights = tokens.weights
    assert weights is not None

    def weighted(logprobs: Tensor, lse: Tensor, entropy: Tensor | None = None) -> Tensor:
        return policy_loss(logprobs, lse, entropy, tokens, weights, call)

    loss, slopes = differentiate(weighted, {name: stats[name] for name in read})
    _collect(collected, stats | policy_outputs(stats["logprobs"], tokens, weights, call) | {"loss": loss})
    if not (call.need_grad and slopes):
        return
    if len(spans) == 1 and piece is not None:
        _add_from_logits(sweep, piece, stats, slopes)
    else:
        _add_again(sweep, entries, stats, slopes, final=final)


def _add_from_logits(sweep: Sweep, piece: Piece, stats: dict[str, Tensor], slopes: dict[str, Tensor]) -> None:
    """Gradients of one chunk whose logits are still there; `stats` and `slopes` hold its entries' values."""
    dentropy = piece.sum_by_row(slopes.get("entropy"))
    coefs = Coefs(
        piece.first_of_row(stats["lse"]),
        slopes["logprobs"].contiguous() if "logprobs" in slopes else None,
        dentropy,
        None if dentropy is None else piece.first_of_row(stats["entropy"]),
        piece.sum_by_row(slopes.get("lse")),
        piece.first_of_row(stats["lse_low"]),
    )
    sweep.add_gradients(piece, piece.grad_logits(coefs))


def _add_again(sweep: Sweep, span: slice, stats: dict[str, Tensor], slopes: dict[str, Tensor], *, final: bool) -> None:
    """Gradients of a span of the plan's entries (its `stats` and `slopes`), without those that have none."""
    targets, plan = sweep.x.targets, sweep.plan
    every = torch.arange(targets.numel(), device=targets.device) if plan.entries is None else plan.entries
    entries = every[span]

    def everywhere(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.new_zeros(targets.shape).index_copy_(0, entries, values)

    lse = everywhere(stats["lse"])
    assert lse is not None
    dlogprobs, dentropy, dlse = (everywhere(slopes.get(name)) for name in ("logprobs", "entropy", "lse"))
    coefs = Coefs(lse, dlogprobs, dentropy, everywhere(stats.get("entropy")), dlse, everywhere(stats["lse_low"]))
    _add_gradients_of(sweep, coefs, final=final)


def score(x: Inputs, call: Call) -> Tensor:
    """`call.outputs` [K, N] without any gradient: one product over the rows that count."""
    sweep, _ = sweep_of_counting(x, call)
    collected = sweep.score()
    if collected is None:
        collected = {}
        for piece in sweep.pieces(sweep.plan, sweep.chunks(0, sweep.plan.count)):
            _collect(collected, piece.row_stats(call.outputs), piece.chunk)
    return sweep.scatter(collected, call.outputs)


def backward(x: Inputs, call: Call, coefs: Coefs) -> Grads:
    """Gradients of Σ dlogprobs·logp + dentropy·H; every tensor of `coefs` is [N], its statistics as `score` gave them.

    Rows whose incoming gradients are all zero are not computed again.
    """
    mask = unmasked(x.targets, x.active, call.head.ignore_index)
    dlogprobs, dentropy = (None if d is None else torch.where(mask, d, 0.0) for d in (coefs.dlogprobs, coefs.dentropy))
    coefs = replace(coefs, dlogprobs=dlogprobs, dentropy=dentropy)
    sweep = open_sweep(x, call, Plan.of(any_nonzero(coefs), x.rows))
    _add_gradients_of(sweep, coefs, final=True)
    return sweep.finish()


def any_nonzero(coefs: Coefs) -> Tensor:
    """Entries with a derivative that is not 0 [N] bool."""
    return torch.stack([d != 0 for d in (coefs.dlogprobs, coefs.dentropy, coefs.dlse) if d is not None]).any(0)


def _add_gradients_of(sweep: Sweep, coefs: Coefs, *, final: bool) -> None:
    """Computes logits again for entries with a derivative that is not 0; every tensor of `coefs` is [N]."""
    plan = Plan.of(any_nonzero(coefs), sweep.x.rows)
    lse, logprobs = plan.take_entries(coefs.lse), plan.take_entries(coefs.dlogprobs)
    dentropy, dlse = plan.take_entries(coefs.dentropy), plan.take_entries(coefs.dlse)
    entropy = None if dentropy is None else plan.take_entries(coefs.entropy)
    low = plan.take_entries(coefs.lse_low)
    for piece in sweep.pieces(plan, sweep.chunks(0, plan.count), final=final):
        of_chunk = Coefs(
            piece.first_of_row(piece.entries(lse)).contiguous(),
            None if logprobs is None else piece.entries(logprobs),
            None if dentropy is None else piece.sum_by_row(piece.entries(dentropy)),
            None if entropy is None else piece.first_of_row(piece.entries(entropy)).contiguous(),
            None if dlse is None else piece.sum_by_row(piece.entries(dlse)),
            None if low is None else piece.first_of_row(piece.entries(low)).contiguous(),
        )
        sweep.add_gradients(piece, piece.grad_logits(of_chunk))


def pointwise(
    x: Inputs, call: Call, fn: Callable[..., Tensor], tensors: tuple[Tensor, ...], normalizer: Tensor
) -> tuple[Tensor, Grads, Tensor]:
    """As `fused`, for a token loss fn(logprobs, *tensors) in torch: its derivative by autograd, chunk by chunk."""
    sweep, _ = sweep_of_counting(x, call)
    divisor = sweep.divisor(normalizer)
    tensors = tuple(sweep.plan.take_entries(t) for t in tensors)
    want = tuple(dict.fromkeys((*call.outputs, "logprobs", "lse", "lse_low")))
    collected: Collected = {}
    for piece in sweep.pieces(sweep.plan, sweep.chunks(0, sweep.plan.count)):
        stats = piece.row_stats(want)
        data = tuple(piece.entries(t) for t in tensors)
        loss, slopes = differentiate(
            lambda logprobs, data=data: fn(logprobs, *data) / divisor, {"logprobs": stats["logprobs"]}
        )
        _collect(collected, stats | {"loss": loss}, piece.chunk)
        if call.need_grad:
            slope = slopes.get("logprobs", torch.zeros_like(loss)).to(sweep.dtype).contiguous()
            sweep.add_gradients(piece, piece.grad_logits(Coefs(stats["lse"], slope, lse_low=stats["lse_low"])))
    return results(sweep, collected)
