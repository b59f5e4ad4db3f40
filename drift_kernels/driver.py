"""The chunk loop, once for every backend: rows → drop → chunk by workspace → GEMM → row kernels → two GEMMs.

`fused` is one pass for losses that read one token at a time. `scoped` is for those that read a sequence or the whole call:
one pass where a chunk holds all that a loss reads together, else one for the statistics and one for the gradients.

Logits live in one scratch block of at most `workspace_bytes`; a row's gradient is written over its logits. Rows whose
gradient turns out to be zero (clipped ones) are squeezed out before the two gradient GEMMs. Logits and sums are fp32 for
half-precision inputs too; see `products` for how.

The normaliser is folded into the token weights, so gradients come out final. Nothing here is differentiable; see `autograd`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from drift_kernels import backends, formulas, products
from drift_kernels import plan as rows
from drift_kernels.backends.params import ROW_OUTPUTS, Chunk
from drift_kernels.calls import Call
from drift_kernels.formulas import Tokens
from drift_kernels.pieces import WORKSPACE_BYTES, Piece
from drift_kernels.products import HeadBlock, LowRank
from drift_kernels.staging import StagedBlock, Staging
from drift_kernels.tensors import Grads, Inputs, LoRAHead, compute_dtype


class Sweep:
    """Passes over the rows that count: products chunk by chunk, and gradients back into hidden, weight and bias.

    `Staging` is the same on a GPU.
    """

    overwritten = True  # statistics leave logits where products were
    on_host = True  # looking at a value costs nothing
    undivided = 1.0  # what the loss is yet to be divided by

    def __init__(self, x: Inputs, call: Call, plan: rows.Plan, beside: tuple[int, int] = (0, 0)) -> None:
        """`beside`: bytes of the workspace that the caller takes once and for each row of a chunk."""
        self.x, self.call, self.plan = x, call, plan
        self.dtype = compute_dtype(x.hidden.dtype)
        self.kernels = backends.load("cpu")
        rows.check_targets(plan.pick(x.targets), x.weight.shape[0], call.head.ignore_index)
        rows.check_temperature(plan.pick_rows(x.temperature))
        V, D = x.weight.shape
        workspace = workspace_of(call)
        self.products = products.choose(x.hidden, x.weight, self.dtype, workspace)
        self.low_rank = None if x.lora is None else LowRank(x.lora, self.dtype)
        width = products.row_stride(V, self.dtype) + (D if call.need_grad else 0)
        row_bytes = width * self.dtype.itemsize + self.products.row_bytes + beside[1]
        self.limit = max(1, int((workspace - self.products.bytes - beside[0]) // row_bytes))
        largest = min(self.limit, plan.count)
        self.products.reserve(largest)
        self.logits = products.block_of_rows("logits", largest, V, self.dtype)
        self.bias = None if x.bias is None else x.bias.to(self.dtype).contiguous()
        self.inverse_temperature = None if x.temperature is None else 1 / x.temperature.to(self.dtype)
        self.grads = self._empty_grads()
        scale = 1.0 if call.accumulate_scale is None else call.accumulate_scale
        self.dweight = products.WeightGradient(self.products, x.weight_grad, scale) if call.need_weight else None

    def _empty_grads(self) -> Grads:
        x, need = self.x, self.call
        written = (
            self.plan.index is None and self.call.spec.scope == "token"
        )  # all of it: a second pass leaves rows out
        make = torch.empty if written else torch.zeros
        hidden = make(x.hidden.shape, dtype=self.dtype) if need.need_hidden else None
        bias = torch.zeros(x.weight.shape[0], dtype=self.dtype) if need.need_bias else None
        lora_a = torch.zeros(x.lora.A.shape, dtype=self.dtype) if x.lora is not None and need.need_lora_a else None
        lora_b = torch.zeros(x.lora.B.shape, dtype=self.dtype) if x.lora is not None and need.need_lora_b else None
        return Grads(hidden, None, bias, lora_a, lora_b)

    def pieces(self, plan: rows.Plan, spans: Sequence[tuple[int, int]], *, final: bool = True) -> Iterator[Piece]:
        """The chunks [start, stop) of the plan's rows, each as soon as its logits are there; they share one buffer.

        `final`: no gradients are added after those of the last chunk.
        """
        targets, inverse = plan.pick(self.x.targets), plan.pick_rows(self.inverse_temperature)
        for start, stop in spans:
            hidden = self.x.hidden[start:stop] if plan.index is None else self.x.hidden[plan.index[start:stop]]
            hidden = hidden.to(self.products.operand)
            logits = self.logits[: stop - start]
            self.products.logits(hidden, logits)
            if self.low_rank is not None:
                self.low_rank.add_logits(hidden, logits)
            first, last = plan.entries_of(start, stop)
            row_ptr = None if plan.row_ptr is None else plan.row_ptr[start : stop + 1] - first
            per_row = None if inverse is None else inverse[start:stop]
            chunk = Chunk(targets[first:last], row_ptr, per_row, self.bias, self.call.head)
            yield Piece(plan, start, stop, first, last, hidden, logits, chunk, final and (start, stop) == spans[-1])

    def chunks(self, start: int, stop: int) -> list[tuple[int, int]]:
        """[start, stop) of a plan's rows cut into spans that fit the buffer."""
        return [(start + a, start + b) for a, b in rows.chunks(stop - start, self.aim(stop - start))]

    def aim(self, count: int) -> int:
        """Rows to a chunk of the best time for `count` of them."""
        return rows.chunk_rows(count, self.x.hidden.shape[1], self.limit)

    def add_gradients(self, piece: Piece, live: Tensor) -> None:
        """Takes d(loss)/d(product) of a chunk, zero rows named in `live` [C], into the gradients."""
        grads, plan = self.grads, piece.plan
        count, order = self.kernels.compact(piece.logits, live)
        dlogits, hidden = piece.logits[:count], piece.hidden
        dhidden = None
        if grads.hidden is not None:
            where = None if plan.index is None else plan.index[piece.start : piece.stop]
            if order is None and where is None:
                dhidden = grads.hidden[piece.start : piece.stop]
            else:
                dhidden = torch.empty((count, hidden.shape[1]), dtype=self.dtype)
            self.products.dhidden(dlogits, dhidden)
        if order is not None:
            hidden = hidden[order]
        if self.low_rank is not None:
            self.low_rank.add_gradients(dlogits, hidden, dhidden, grads.lora_a, grads.lora_b)
        if grads.hidden is not None and dhidden is not None:
            if order is not None:
                if where is None:
                    grads.hidden[piece.start : piece.stop] = 0
                    where = torch.arange(piece.start, piece.stop)
                where = where[order]
            if where is not None:
                grads.hidden[where] = dhidden
        if count == 0:
            return
        if self.dweight is not None:
            self.dweight.add(dlogits, hidden, final=piece.final)
        if grads.bias is not None:
            grads.bias += dlogits.sum(0)

    def finish(self) -> Grads:
        """The gradients; zero where no row reached them."""
        if self.dweight is not None:
            self.grads.weight = self.dweight.result()
        return self.grads

    def divisor(self, normalizer: Tensor) -> Tensor:
        """What losses are divided by before they are differentiated."""
        return normalizer

    def scatter(self, collected: dict[str, list[Tensor]], names: tuple[str, ...]) -> Tensor:
        """Per-chunk outputs as one [len(names), N] tensor, 0 where an entry took no part."""
        x = self.x
        out = torch.zeros((len(names), x.targets.numel()), dtype=self.dtype)
        where = slice(None) if self.plan.entries is None else self.plan.entries
        for k, name in enumerate(names):
            if collected.get(name):
                out[k, where] = torch.cat(collected[name])
        return out


def _collect(collected: dict[str, list[Tensor]], outputs: dict[str, Tensor], chunk: Chunk) -> None:
    """Adds a chunk's outputs, those of rows repeated for each of the row's entries."""
    for name, values in outputs.items():
        if name in ROW_OUTPUTS and chunk.row_ptr is not None:
            values = values.repeat_interleave(chunk.row_ptr.diff(), output_size=chunk.targets.numel())
        collected.setdefault(name, []).append(values)


def total_of(parts: list[Tensor], sweep: Sweep | Staging) -> Tensor:
    """The sum of per-chunk losses (0-d), added up in fp64."""
    total = torch.zeros((), dtype=torch.float64, device=sweep.x.hidden.device)
    for part in parts:
        total += part.double().sum()
    return total.to(sweep.dtype) / sweep.undivided


def workspace_of(call: Call) -> int:
    """Bytes that a CPU's pass may take."""
    return call.config.workspace_bytes or WORKSPACE_BYTES["cpu"]


def backend_of(x: Inputs, call: Call) -> str:
    """The backend's name for an op's tensors; raises as `backends.resolve`."""
    return backends.resolve(call.config.backend, x.hidden.device)


def sweep_over(x: Inputs, call: Call, plan: rows.Plan, beside: tuple[int, int] = (0, 0)) -> Sweep | Staging:
    """The backend's pass over a plan's rows."""
    backend = backend_of(x, call)
    return Sweep(x, call, plan, beside) if backend == "cpu" else Staging(x, call, plan, backend, beside)


def head_block(x: Inputs, call: Call, hidden: Tensor, weight: Tensor, lora: LoRAHead | None) -> HeadBlock | StagedBlock:
    """The products of another head's hidden rows, by the backend of `x`."""
    if backend_of(x, call) != "cpu":
        return StagedBlock(hidden, weight, lora)
    return HeadBlock(hidden, weight, lora, compute_dtype(x.hidden.dtype), workspace_of(call))


def given_plan(x: Inputs, call: Call) -> rows.Plan | None:
    """`active` as the plan, where that spares a GPU the wait for one; else None."""
    if x.active is None or not rows.can_use_active_as_plan(x.rows, call, backend_of(x, call)):
        return None
    return rows.Plan(x.active.numel(), x.active, x.active, None)


def _start(x: Inputs, call: Call) -> tuple[Sweep | Staging, Tokens]:
    """The pass over the rows that count, and the per-token data of their entries."""
    plan = given_plan(x, call) or rows.plan(rows.counting(x.targets, x.active, x.tokens, call), x.rows)
    tokens = x.tokens if plan.entries is None else x.tokens.pick(plan.entries)
    if call.config.check_finite:
        rows.check_finite(tokens)
    return sweep_over(x, call, plan), tokens


def fused(x: Inputs, call: Call, normalizer: Tensor) -> tuple[Tensor, Grads, Tensor]:
    """Σ weight·loss over the entries / normalizer (0-d), its gradients, and `call.outputs` [K, N]."""
    if call.spec.scope != "token":
        return scoped(x, call, normalizer)
    sweep, tokens = _start(x, call)
    weights = weights_of(tokens, sweep.plan.pick(x.targets), sweep.divisor(normalizer))
    want = tuple(dict.fromkeys((*call.outputs, "loss")))
    collected: dict[str, list[Tensor]] = {}
    for piece in sweep.pieces(sweep.plan, sweep.chunks(0, sweep.plan.count)):
        outputs, live = sweep.kernels.fused_policy(
            piece.logits,
            piece.chunk,
            call.spec,
            *(piece.pick(v) for v in (tokens.advantages, tokens.old, tokens.ref, weights)),
            want,
            gradient=call.need_grad,
            **piece.into,
        )
        _collect(collected, outputs, piece.chunk)
        if call.need_grad:
            sweep.add_gradients(piece, live)
    return total_of(collected.get("loss", []), sweep), sweep.finish(), sweep.scatter(collected, call.outputs)


def weights_of(tokens: Tokens, targets: Tensor, normalizer: Tensor) -> Tensor:
    """What each entry's loss is multiplied by [M]."""
    weights = normalizer.new_ones(targets.shape) if tokens.weights is None else tokens.weights
    return weights / normalizer


def scoped(x: Inputs, call: Call, normalizer: Tensor) -> tuple[Tensor, Grads, Tensor]:
    """As `fused`, for a loss that reads several tokens: its arithmetic in torch, its derivatives by autograd.

    What is read together is a sequence, or everything (`PolicySpec.scope`). Where it fits one chunk, gradients are made
    from the logits that are there; else those of rows with a gradient are computed again.
    """
    sweep, tokens = _start(x, call)
    plan, weights = sweep.plan, weights_of(tokens, sweep.plan.pick(x.targets), sweep.divisor(normalizer))
    segments = tokens.segments if call.spec.scope == "sequence" else None
    spec = call.spec
    read = ("logprobs", "lse", "entropy") if spec.entropy_coef else ("logprobs", "lse")
    want = tuple(dict.fromkeys((*call.outputs, *read)))
    collected: dict[str, list[Tensor]] = {}
    shared, aim = plan.row_ptr is not None, sweep.aim(plan.count)
    for start, stop in rows.whole(segments, plan.count, aim, sweep.limit, shared=shared):
        spans = [(start, stop)] if stop - start <= sweep.limit else sweep.chunks(start, stop)
        stats, piece, final = {}, None, stop == plan.count
        for piece in sweep.pieces(plan, spans, final=final):
            _collect(stats, sweep.kernels.row_stats(piece.logits, piece.chunk, want), piece.chunk)
        stats = {name: torch.cat(values) for name, values in stats.items()}
        first, last = plan.entries_of(start, stop)
        some = tokens.pick(slice(first, last))
        leaves = {name: stats[name] for name in read}

        def weighted(logprobs: Tensor, lse: Tensor, entropy: Tensor | None = None, some=some, w=weights[first:last]):
            return torch.where(w != 0, w * formulas.token_loss(logprobs, some, entropy, lse, spec), 0.0)

        loss, slopes = differentiate(weighted, leaves)
        terms = terms_of(stats["logprobs"], some, weights[first:last], call)
        for name, values in (stats | terms | {"loss": loss}).items():
            collected.setdefault(name, []).append(values)
        if not (call.need_grad and slopes):
            continue
        if len(spans) == 1 and piece is not None:
            _add_from_logits(sweep, piece, stats, slopes)
        else:
            _add_again(sweep, slice(first, last), stats, slopes, final=final)
    return total_of(collected.get("loss", []), sweep), sweep.finish(), sweep.scatter(collected, call.outputs)


def without_saved_hooks() -> torch.autograd.graph.saved_tensors_hooks:
    """For an op's own small graphs: hooks on saved tensors are not meant for them.

    Those of a checkpoint would compute its whole region again each time that one is differentiated.
    """
    return torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved)


def differentiate(fn: Callable[..., Tensor], leaves: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """fn(**leaves) [M] and the derivatives of its sum by those leaves that it depends on.

    Autograd is switched on whatever surrounds: a compiled graph calls operators below it.
    """
    tls, nothing = torch._C._dispatch_tls_local_include_set(), torch._C.DispatchKeySet(torch._C.DispatchKey.Undefined)
    with torch._C._ForceDispatchKeyGuard(tls, nothing), torch.enable_grad(), without_saved_hooks():
        inputs = {name: values.detach().requires_grad_() for name, values in leaves.items()}
        result = fn(**inputs)
        if not result.requires_grad:
            return result, {}
        found = torch.autograd.grad(result.sum(), tuple(inputs.values()), allow_unused=True)
    return result.detach(), {name: slope for name, slope in zip(inputs, found) if slope is not None}


def terms_of(logprobs: Tensor, tokens: Tokens, weights: Tensor, call: Call) -> dict[str, Tensor]:
    """The policy's own per-token outputs, of those asked for; `clipped` is 0 where the weight is."""
    out = {}
    if "ratio" in call.outputs:
        out["ratio"] = formulas.ratio_of(logprobs, tokens, call.spec)
    if "clipped" in call.outputs:
        out["clipped"] = torch.where(weights != 0, formulas.clipped(logprobs, tokens, call.spec), 0.0)
    if "kl" in call.outputs:
        out["kl"] = torch.zeros_like(logprobs) if tokens.ref is None else formulas.kl_term(logprobs, tokens, call.spec)
    return out


def _add_from_logits(sweep: Sweep | Staging, piece: Piece, stats: dict[str, Tensor], slopes: dict[str, Tensor]) -> None:
    """Gradients of one chunk whose logits are still there; `stats` and `slopes` hold its entries' values."""
    per_row = {name: piece.per_row(slopes.get(name)) for name in ("entropy", "lse")}
    row = slice(None) if piece.chunk.row_ptr is None else piece.chunk.row_ptr[:-1]
    live = sweep.kernels.grad_logits(
        piece.logits,
        piece.chunk,
        slopes["logprobs"].contiguous() if "logprobs" in slopes else None,
        stats["lse"][row],
        per_row["entropy"],
        stats["entropy"][row] if per_row["entropy"] is not None else None,
        per_row["lse"],
        raw=not sweep.overwritten,
        **piece.into,
    )
    sweep.add_gradients(piece, live)


def _add_again(
    sweep: Sweep | Staging, where: slice, stats: dict[str, Tensor], slopes: dict[str, Tensor], *, final: bool
) -> None:
    """Gradients of the plan's entries at `where` (their `stats` and `slopes`), of which those without any are dropped."""
    x, plan = sweep.x, sweep.plan
    everywhere = {}
    entries = (
        torch.arange(x.targets.numel(), device=x.targets.device)[where] if plan.entries is None else plan.entries[where]
    )
    for name, values in (
        *slopes.items(),
        *((f"at {name}", stats[name]) for name in ("lse", "entropy") if name in stats),
    ):
        everywhere[name] = values.new_zeros(x.targets.shape).index_copy_(0, entries, values)
    _add_gradients_of(
        sweep,
        everywhere.get("logprobs"),
        everywhere.get("entropy"),
        everywhere.get("lse"),
        everywhere["at lse"],
        everywhere.get("at entropy"),
        final=final,
    )


def score(x: Inputs, call: Call) -> Tensor:
    """`call.outputs` [K, N] without any gradient: one GEMM over the rows that count."""
    sweep, _ = _start(x, call)
    if isinstance(sweep, Staging) and sweep.without_logits():
        return sweep.scatter(sweep.score(), call.outputs)
    collected: dict[str, list[Tensor]] = {}
    for piece in sweep.pieces(sweep.plan, sweep.chunks(0, sweep.plan.count)):
        _collect(collected, sweep.kernels.row_stats(piece.logits, piece.chunk, call.outputs), piece.chunk)
    return sweep.scatter(collected, call.outputs)


def backward(
    x: Inputs, call: Call, grad_logprobs: Tensor, grad_entropy: Tensor | None, lse: Tensor, entropy: Tensor | None
) -> Grads:
    """Gradients of Σ grad_logprobs·logp + grad_entropy·H; all [N], `lse` and `entropy` as `score` gave them.

    Rows whose incoming gradients are all zero are not computed again.
    """
    mask = rows.unmasked(x.targets, x.active, call.head.ignore_index)
    grad_logprobs = torch.where(mask, grad_logprobs, 0.0)
    grad_entropy = None if grad_entropy is None else torch.where(mask, grad_entropy, 0.0)
    nonzero = _any_nonzero(grad_logprobs, grad_entropy)
    sweep = sweep_over(x, call, rows.plan(nonzero, x.rows))
    _add_gradients_of(sweep, grad_logprobs, grad_entropy, None, lse, entropy, final=True)
    return sweep.finish()


def _any_nonzero(*values: Tensor | None) -> Tensor:
    masks = [v != 0 for v in values if v is not None]
    return torch.stack(masks).any(0)


def _add_gradients_of(
    sweep: Sweep | Staging,
    logprobs: Tensor | None,
    entropy: Tensor | None,
    lse: Tensor | None,
    at_lse: Tensor,
    at_entropy: Tensor | None,
    *,
    final: bool,
) -> None:
    """Computes logits again where any incoming gradient (of log-probs, entropies, log-sum-exps; [N]) is not 0."""
    plan = rows.plan(_any_nonzero(logprobs, entropy, lse), sweep.x.rows)
    coefs, entropy, lse, at_entropy = (plan.pick(v) for v in (logprobs, entropy, lse, at_entropy))
    at_lse = plan.pick(at_lse)
    for piece in sweep.pieces(plan, sweep.chunks(0, plan.count), final=final):
        row = slice(None) if piece.chunk.row_ptr is None else piece.chunk.row_ptr[:-1]
        of_rows = [None if v is None else v[piece.first : piece.last][row].contiguous() for v in (at_lse, at_entropy)]
        live = sweep.kernels.grad_logits(
            piece.logits,
            piece.chunk,
            piece.pick(coefs),
            of_rows[0],
            piece.per_row(piece.pick(entropy)),
            None if entropy is None else of_rows[1],
            piece.per_row(piece.pick(lse)),
            raw=True,
            **piece.into,
        )
        sweep.add_gradients(piece, live)


def pointwise(
    x: Inputs, call: Call, fn: Callable[..., Tensor], tensors: tuple[Tensor, ...], normalizer: Tensor
) -> tuple[Tensor, Grads, Tensor]:
    """As `fused`, for a token loss fn(logprobs, *tensors) in torch: its derivative by autograd, chunk by chunk."""
    sweep, _ = _start(x, call)
    divisor = sweep.divisor(normalizer)
    tensors = tuple(sweep.plan.pick(t) for t in tensors)
    want = tuple(dict.fromkeys((*call.outputs, "logprobs", "lse")))
    collected: dict[str, list[Tensor]] = {}
    for piece in sweep.pieces(sweep.plan, sweep.chunks(0, sweep.plan.count)):
        outputs = sweep.kernels.row_stats(piece.logits, piece.chunk, want)
        some = tuple(piece.pick(t) for t in tensors)
        token, slopes = differentiate(
            lambda logprobs, some=some: fn(logprobs, *some) / divisor, {"logprobs": outputs["logprobs"]}
        )
        coefs = slopes.get("logprobs", torch.zeros_like(token))
        _collect(collected, outputs | {"loss": token}, piece.chunk)
        if call.need_grad:
            coefs, raw = coefs.to(sweep.dtype).contiguous(), not sweep.overwritten
            live = sweep.kernels.grad_logits(piece.logits, piece.chunk, coefs, outputs["lse"], raw=raw, **piece.into)
            sweep.add_gradients(piece, live)
    return total_of(collected.get("loss", []), sweep), sweep.finish(), sweep.scatter(collected, call.outputs)
