"""Policy losses in plain torch: (logp, old, advantage, …) → loss per token. The oracle for `csrc/policy.h`, and what losses
that read several tokens (`PolicySpec.scope`) are computed by: they need a few numbers a token, not the logits.

All tensors are [N], one entry a token. Differentiable in `logprobs`; everything else is data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from drift_kernels.spec import PolicySpec

LOG_RATIO_BOUND = 20.0
LOG_WEIGHT_FLOOR = math.log(1e-8)  # of vespo's sequence weight, as its authors have it
TINY = 1e-8  # keeps the complement of a probability away from 0 in dppo_kl, as its authors have it


@dataclass(frozen=True)
class Tokens:
    """Per-token data of a loss [N] in the compute dtype; None if not given."""

    advantages: Tensor | None = None  # None = 1
    old: Tensor | None = None  # log-probs under the policy that is improved on; None = on-policy
    ref: Tensor | None = None  # log-probs under the reference
    weights: Tensor | None = None  # factors on each token's whole loss; None = 1
    rollout: Tensor | None = None  # log-probs of the sampler, where the loss itself reads them
    segments: Tensor | None = None  # int64, which sequence a token is of, where the loss reads other tokens
    lengths: Tensor | None = None  # [S] int64, tokens of each sequence that take part
    noise: Tensor | None = None  # uniform, which of several tokens "clip_cov" picks

    def flat(self) -> tuple[Tensor | None, ...]:
        """In the order of the fields."""
        lists = (self.advantages, self.old, self.ref, self.weights, self.rollout, self.segments)
        return (*lists, self.lengths, self.noise)

    def pick(self, index: Tensor | slice) -> Tokens:
        """The tokens at `index`; `lengths` stays, since it counts whole sequences."""
        picked = Tokens(*(None if v is None or v is self.lengths else v[index] for v in self.flat()))
        return replace(picked, lengths=self.lengths)


NO_TOKENS = Tokens()


def sequence_sum(values: Tensor, tokens: Tokens) -> Tensor:
    """Σ of `values` over each token's sequence [N]."""
    assert tokens.segments is not None
    assert tokens.lengths is not None
    total = values.new_zeros(tokens.lengths.shape).index_add(0, tokens.segments, values)
    return total[tokens.segments]


def sequence_mean(values: Tensor, tokens: Tokens) -> Tensor:
    """Mean of `values` over each token's sequence [N]."""
    assert tokens.segments is not None
    assert tokens.lengths is not None
    return sequence_sum(values, tokens) / tokens.lengths[tokens.segments].to(values.dtype)


def difference(logprobs: Tensor, old_logprobs: Tensor | None) -> Tensor:
    """logp − old [N]; without `old_logprobs` zero in value (on-policy), with the gradient of logp."""
    return logprobs - (logprobs.detach() if old_logprobs is None else old_logprobs)


def bounded(log_ratio: Tensor) -> Tensor:
    """A log-ratio clamped to ±20."""
    return log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def ratio_of(logprobs: Tensor, tokens: Tokens, spec: PolicySpec) -> Tensor:
    """The importance ratio of each token, or of its sequence [N], by `spec.ratio`."""
    log_ratio = difference(logprobs, tokens.old)
    if spec.ratio != "token":
        log_ratio = sequence_mean(log_ratio, tokens)
    if spec.ratio == "sequence_token":
        log_ratio = log_ratio.detach() + (logprobs - logprobs.detach())
    return bounded(log_ratio).exp()


def ratio_bounds(spec: PolicySpec) -> tuple[float, float]:
    """Lower and upper bound of the ratio, 0 below where the spec leaves it open; of the divergence for the DPPO forms."""
    if spec.traits.bounds == "divergence":
        return (math.inf if spec.clip_low is None else spec.clip_low), spec.clip_high
    return (0.0 if spec.clip_low is None else 1 - spec.clip_low), 1 + spec.clip_high


def _clip(ratio: Tensor, advantages: Tensor, spec: PolicySpec) -> Tensor:
    free = (ratio if spec.delta is None else ratio.clamp(max=spec.delta)) * advantages
    loss = -torch.minimum(free, ratio.clamp(*ratio_bounds(spec)) * advantages)
    if spec.dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -spec.dual_clip * advantages), loss)
    return loss


def _beyond(logprobs: Tensor, advantages: Tensor, old: Tensor | None, spec: PolicySpec) -> Tensor:
    """Where DPPO's trust region ends for the move that the advantage asks for [N] bool; no gradient."""
    low, high = ratio_bounds(spec)
    logp = logprobs.detach()
    before = logp if old is None else old
    p, q = logp.exp(), before.exp()
    if spec.objective == "dppo_tv":
        return torch.where(advantages > 0, p - q > high, q - p > low)
    kl = q * (before - logp) + (1 - q) * torch.log((1 - q + TINY) / (1 - p + TINY))
    return torch.where(advantages > 0, (kl > high) & (p > q), (kl > low) & (p < q))


def _gmpo(logprobs: Tensor, advantages: Tensor, tokens: Tokens, spec: PolicySpec) -> Tensor:
    log_ratio, sign = difference(logprobs, tokens.old), advantages.sign()
    low = -math.inf if spec.clip_low is None else -spec.clip_low
    kept = sign * torch.minimum(sign * log_ratio, sign * log_ratio.clamp(low, spec.clip_high))
    return -sequence_mean(advantages, tokens) * bounded(sequence_mean(kept, tokens)).exp()


def _vespo(logprobs: Tensor, advantages: Tensor, tokens: Tokens, spec: PolicySpec) -> Tensor:
    log_w = sequence_sum(bounded(difference(logprobs.detach(), tokens.old)), tokens)
    if spec.correction is not None and tokens.old is not None and tokens.rollout is not None:
        log_c = correction(tokens, spec).log().clamp(LOG_WEIGHT_FLOOR, LOG_RATIO_BOUND)
        log_w = log_w + (log_c if spec.correction.startswith("sequence") else sequence_sum(log_c, tokens))
    log_w = log_w.clamp(LOG_WEIGHT_FLOOR, LOG_RATIO_BOUND)
    k_pos, lambda_pos, k_neg, lambda_neg = spec.vespo_weights
    k, scale = ((advantages >= 0) * (a - b) + b for a, b in ((k_pos, k_neg), (lambda_pos, lambda_neg)))
    phi = (scale + k * log_w - scale * log_w.exp()).exp()
    return -phi * advantages * logprobs


def picked(logprobs: Tensor, advantages: Tensor, tokens: Tokens, spec: PolicySpec) -> Tensor:
    """Which tokens a covariance objective selects [N] bool; no gradient. Non-finite data at a weight of 0 takes no part."""
    logp, counts = logprobs.detach(), torch.ones_like(logprobs, dtype=torch.bool)
    if tokens.weights is not None:
        finite = logp.isfinite() & advantages.isfinite()
        finite = finite if tokens.old is None else finite & tokens.old.isfinite()
        counts = (tokens.weights != 0) | finite
    number = int(counts.sum())
    if not number:
        return torch.zeros_like(counts)
    covariance = _centred(advantages, counts, number) * _centred(logp, counts, number)
    count = max(int(spec.cov_share * number), 1)
    if spec.objective == "kl_cov":
        chosen = torch.where(counts, covariance, -math.inf).topk(count).indices
    else:
        assert tokens.noise is not None
        low, high = spec.cov_bounds
        candidate = counts & (covariance > low) & (covariance < high)
        candidate &= clipped_sign(ratio_of(logp, tokens, spec), advantages, spec) == 0
        order = torch.where(candidate, tokens.noise, math.inf)
        values, chosen = order.topk(min(count, order.numel()), largest=False)
        chosen = chosen[values.isfinite()]
    return torch.zeros_like(logp, dtype=torch.bool).index_fill_(0, chosen, True)


def _centred(values: Tensor, counts: Tensor, number: int) -> Tensor:
    """`values` minus their mean over `counts`."""
    values = torch.where(counts, values, 0.0)
    return values - values.sum() / number


def objective(logprobs: Tensor, tokens: Tokens, spec: PolicySpec) -> Tensor:
    """The policy term of each token [N] (see `PolicySpec`), without KL and entropy."""
    A = torch.ones_like(logprobs) if tokens.advantages is None else tokens.advantages
    match spec.objective:
        case "clip":
            return _clip(ratio_of(logprobs, tokens, spec), A, spec)
        case "cispo":
            return -ratio_of(logprobs, tokens, spec).clamp(*ratio_bounds(spec)).detach() * A * logprobs
        case "sapo":
            positive, negative = spec.sapo_temperatures
            tau = torch.full_like(logprobs, negative).masked_fill(A > 0, positive)
            return -(4 / tau) * torch.sigmoid(tau * (ratio_of(logprobs, tokens, spec) - 1)) * A
        case "reinforce":
            return -A * logprobs
        case "dppo_tv" | "dppo_kl":
            ratio = ratio_of(logprobs, tokens, spec).detach()
            loss = -ratio.clamp(max=spec.delta) * A * logprobs if spec.delta else -ratio * A * logprobs
            return torch.where(_beyond(logprobs, A, tokens.old, spec), 0.0, loss)
        case "dro":
            assert spec.dro_beta is not None
            return -A * logprobs + spec.dro_beta / 2 * difference(logprobs, tokens.old).square()
        case "gppo":
            ratio, (low, high), (below, above) = ratio_of(logprobs, tokens, spec), ratio_bounds(spec), spec.gppo_weights
            side = clipped_sign(ratio, A, spec)
            bound = torch.full_like(logprobs, above * high).masked_fill(side < 0, below * low)
            return -torch.where(side == 0, ratio, bound * (1 + difference(logprobs, None))) * A
        case "gmpo":
            return _gmpo(logprobs, A, tokens, spec)
        case "vespo":
            return _vespo(logprobs, A, tokens, spec)
        case "clip_cov":
            loss = _clip(ratio_of(logprobs, tokens, spec), A, spec)
            return torch.where(picked(logprobs, A, tokens, spec), 0.0, loss)
        case "kl_cov":
            extra = spec.cov_kl_coef * difference(logprobs, tokens.old).abs()
            loss = -ratio_of(logprobs, tokens, spec) * A
            return torch.where(picked(logprobs, A, tokens, spec), loss + extra, loss)
    raise AssertionError(spec.objective)


def kl(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """Estimate of KL(policy‖reference) from the sampled token [N]; a trailing "+" takes its gradient from k2."""
    d = logprobs - ref_logprobs
    match estimator.rstrip("+"):
        case "k1":
            value = d
        case "k2":
            value = d * d / 2
        case "k3":
            value = torch.exp(-d) + d - 1
        case _:
            value = d.abs()
    if estimator.endswith("+"):
        straight = d * d / 2
        return straight - straight.detach() + value.detach()
    return value


def kl_term(logprobs: Tensor, tokens: Tokens, spec: PolicySpec) -> Tensor:
    """The estimate that the loss adds, times the ratio with `kl_unbiased` [N]."""
    assert tokens.ref is not None
    value = kl(logprobs, tokens.ref, spec.kl_estimator)
    return value * ratio_of(logprobs, tokens, spec) if spec.kl_unbiased else value


def clipped_sign(ratio: Tensor, advantages: Tensor, spec: PolicySpec) -> Tensor:
    """−1 where the lower bound of a clipped ratio is what counts, +1 where the upper one does, else 0 (and for A = 0) [N]."""
    low, high = ratio_bounds(spec)
    return ((ratio > high) & (advantages > 0)).to(ratio.dtype) - ((ratio < low) & (advantages < 0)).to(ratio.dtype)


def clipped(logprobs: Tensor, tokens: Tokens, spec: PolicySpec) -> Tensor:
    """−1 where the objective's lower bound takes the gradient away or holds it, +1 where the upper one does, else 0 [N]."""
    A = torch.ones_like(logprobs) if tokens.advantages is None else tokens.advantages
    match spec.objective:
        case "clip" | "clip_cov" | "gppo":
            return clipped_sign(ratio_of(logprobs, tokens, spec), A, spec)
        case "cispo":
            ratio, (low, high) = ratio_of(logprobs, tokens, spec), ratio_bounds(spec)
            return ((ratio > high).to(A.dtype) - (ratio < low).to(A.dtype)) * (A != 0)
        case "dppo_tv" | "dppo_kl":
            return _beyond(logprobs, A, tokens.old, spec) * A.sign()
        case "gmpo":
            log_ratio = difference(logprobs, tokens.old)
            low = -math.inf if spec.clip_low is None else -spec.clip_low
            above, below = (log_ratio > spec.clip_high) & (A > 0), (log_ratio < low) & (A < 0)
            return above.to(A.dtype) - below.to(A.dtype)
    return torch.zeros_like(logprobs)


def token_loss(
    logprobs: Tensor, tokens: Tokens, entropy: Tensor | None, lse: Tensor | None, spec: PolicySpec
) -> Tensor:
    """Objective + KL − entropy bonus + z-loss of each token [N], before weights and aggregation."""
    loss = objective(logprobs, tokens, spec)
    if spec.off_policy_threshold is not None:
        loss = torch.where(_off_policy(logprobs, tokens, spec.off_policy_threshold), 0.0, loss)
    if spec.kl_coef and tokens.ref is not None:
        loss = loss + spec.kl_coef * kl_term(logprobs, tokens, spec)
    if spec.entropy_coef and entropy is not None:
        loss = loss - spec.entropy_coef * entropy
    if spec.z_loss_coef and lse is not None:
        loss = loss + spec.z_loss_coef * lse * lse
    return loss


def _off_policy(logprobs: Tensor, tokens: Tokens, threshold: float) -> Tensor:
    """Tokens of A < 0 in sequences that have moved away from their sampler by more than `threshold` [N] bool."""
    sampler = tokens.old if tokens.rollout is None else tokens.rollout
    distance = -sequence_mean(difference(logprobs.detach(), sampler), tokens)
    negative = torch.zeros_like(distance, dtype=torch.bool) if tokens.advantages is None else tokens.advantages < 0
    return negative & (distance > threshold)


def correction(tokens: Tokens, spec: PolicySpec) -> Tensor:
    """Factor exp(old − rollout) on each token's objective [N], truncated or masked per token or per sequence.

    The sequence ratio is the product over its tokens. No gradient.
    """
    assert spec.correction is not None
    assert tokens.old is not None
    assert tokens.rollout is not None
    delta = (tokens.old - tokens.rollout).detach()
    if spec.correction.startswith("sequence"):
        delta = sequence_sum(delta, tokens)
    ratio = bounded(delta).exp()
    low, high = spec.correction_bounds
    if spec.correction.endswith("truncate"):
        return ratio.clamp(low, high)
    return torch.where((ratio < low) | (ratio > high), 0.0, ratio)


def corrected(tokens: Tokens, factor: Tensor, spec: PolicySpec) -> Tokens:
    """`tokens` with the correction's `factor` [N] where the objective takes it.

    On the advantages where it is linear in them, else on the weights; "vespo" reads the log-probs themselves.
    """
    if spec.objective == "vespo":
        return tokens
    if not spec.traits.linear:
        weights = tokens.weights
        return replace(tokens, weights=factor if weights is None else torch.where(weights != 0, weights * factor, 0.0))
    return replace(tokens, advantages=factor if tokens.advantages is None else tokens.advantages * factor)


def read_at(weights: Tensor, tokens: Tokens, spec: PolicySpec) -> Tokens:
    """`tokens` with 0 at a weight of 0 in the data that a token's own loss alone reads; such a NaN must reach no gradient."""
    own = {"ref": tokens.ref}
    if not spec.traits.mean_advantage:
        own["advantages"] = tokens.advantages
    if not spec.reads_sequences:
        own |= {"old": tokens.old, "rollout": tokens.rollout}
    batch = spec.scope == "batch"  # whose selection reads finite data of every token
    kept = {
        name: torch.where((weights != 0) | (value.isfinite() & batch), value, 0.0)
        for name, value in own.items()
        if value is not None
    }
    return replace(tokens, **kept)
