"""What must not change a policy loss: how a batch is split, ordered, packed, padded or chunked. Every preset, random shapes.

The objectives that select over a batch ("clip_cov", "kl_cov") are excepted from splitting: their scope is the call.
Other ops: `test_every_op_invariances`.
"""

from dataclasses import dataclass, replace
from itertools import pairwise

import loose
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from preset_specs import PRESET_SPECS
from torch import Tensor

import drift_kernels as dk

SPECS = PRESET_SPECS | {
    "terms": dk.PolicySpec(kl_coef=0.1, kl_estimator="k3+", entropy_coef=0.05, z_loss_coef=0.01),
    "sequence_terms": dk.PolicySpec.preset("gspo", kl_coef=0.1, kl_unbiased=True, entropy_coef=0.05, z_loss_coef=0.01),
    "corrected": dk.PolicySpec(correction="sequence_truncate", correction_bounds=(0.5, 2.0)),
    "vespo_corrected": dk.PolicySpec.preset("vespo", correction="token_mask", correction_bounds=(0.5, 2.0)),
    "off_policy": dk.PolicySpec(off_policy_threshold=0.02),
}
for name in ("gspo", "gspo_token", "luspo", "sequence_terms"):
    SPECS[name] = replace(SPECS[name], clip_low=0.1, clip_high=0.1)
SPECS["clip_cov"] = replace(SPECS["clip_cov"], cov_share=0.3, cov_bounds=(0.01, 5.0))
SPECS["kl_cov"] = replace(SPECS["kl_cov"], cov_share=0.3)
SPECS["clip_cov_all"] = replace(SPECS["clip_cov"], cov_share=1.0)  # takes every candidate, and so none by chance
SPLITS = [name for name, spec in SPECS.items() if spec.scope != "batch"]
RANDOM = [name for name in SPECS if name != "clip_cov"]  # whose choice depends on the order of the tokens
# where neither a ratio nor a mean is taken over a sequence, which would count tokens of weight 0
ALONE = [
    name
    for name in SPLITS
    if SPECS[name].scope == "token"
    and SPECS[name].aggregation != "sequence_mean_token_mean"
    and not (SPECS[name].correction or "").startswith("sequence")
]
D, V = 5, 23


@dataclass
class Batch:
    """S packed sequences; everything per token [T] but `lengths` [S]."""

    lengths: list[int]
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    tokens: dict[str, Tensor]

    @property
    def cu(self) -> Tensor:
        return torch.tensor([0, *self.lengths]).cumsum(0)

    @property
    def owner(self) -> Tensor:
        return torch.repeat_interleave(torch.arange(len(self.lengths)), torch.tensor(self.lengths))

    def take(self, index: Tensor, lengths: list[int]) -> "Batch":
        tokens = {name: v[index] for name, v in self.tokens.items()}
        return Batch(lengths, self.hidden[index], self.weight, self.targets[index], tokens)


def make(lengths: list[int], seed: int) -> Batch:
    g = torch.Generator().manual_seed(seed)
    T = sum(lengths)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    hidden, weight = randn(T, D), randn(V, D)
    targets = torch.randint(0, V, (T,), generator=g)
    targets[torch.rand(T, generator=g) < 0.25] = -100
    own = torch.log_softmax(hidden @ weight.t(), -1).gather(1, targets.clamp(min=0)[:, None])[:, 0]
    advantages = randn(len(lengths))
    advantages[torch.rand(len(lengths), generator=g) < 0.3] = 0
    weights = torch.rand(T, generator=g, dtype=torch.float64)
    weights[weights < 0.2] = 0
    old = own + 0.2 * randn(T)
    tokens = {
        "advantages": torch.repeat_interleave(advantages, torch.tensor(lengths)),
        "old_logprobs": old,
        "ref_logprobs": own + 0.3 * randn(T),
        "rollout_logprobs": old + 0.1 * randn(T),
        "token_weights": weights,
    }
    return Batch(lengths, hidden, weight, targets, tokens)


def assume_no_ties(batch: Batch, name: str) -> None:
    """Which of two tokens of equal covariance "kl_cov" takes depends on their order: of two there are, or of one sequence."""
    where = batch.targets >= 0
    if name != "kl_cov" or not where.any():
        return
    own = dk.linear_logprob(batch.hidden, batch.weight, batch.targets).logprobs[where]
    advantages = batch.tokens["advantages"][where]
    covariance = (advantages - advantages.mean()) * (own - own.mean())
    count = max(int(SPECS[name].cov_share * len(own)), 1)
    largest = covariance.sort(descending=True).values
    assume(count == len(own) or largest[count - 1] - largest[count] > 1e-9)


def run(batch: Batch, spec: dk.PolicySpec, normalizer: float | None = 7.0, sampler: bool = False, **options):
    """(loss, d hidden, d weight); with `sampler` rollout log-probs are passed wherever there are any."""
    h, w = batch.hidden.clone().requires_grad_(), batch.weight.clone().requires_grad_()
    tokens = {name: v for name, v in batch.tokens.items() if name != "rollout_logprobs" or spec.correction or sampler}
    if spec.kl_coef == 0:
        del tokens["ref_logprobs"]
    advantages = tokens.pop("advantages")
    if "segment_ids" not in options and batch.hidden.dim() == 2:
        options["cu_seqlens"] = batch.cu
    options.setdefault("generator", torch.Generator().manual_seed(0))
    loss = loose.policy_loss(
        h, w, batch.targets, advantages, spec=spec, normalizer=normalizer, **tokens, **options
    ).loss
    return loss.detach(), *torch.autograd.grad(loss, (h, w))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def workspace(rows: int) -> dk.KernelConfig:
    return dk.KernelConfig(workspace_bytes=8 * (V + 2 * D) * rows)


batches = st.builds(make, st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 2**20))
quick = settings(
    max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)


@pytest.mark.parametrize("name", SPECS)
@given(batch=batches, rows=st.integers(1, 60))
@quick
def test_chunk_size(name, batch, rows):
    """One pass, two passes, one row a chunk: the same numbers."""
    close(run(batch, SPECS[name], config=workspace(rows)), run(batch, SPECS[name]))


@pytest.mark.parametrize("name", SPLITS)
@given(batch=batches, cut=st.integers(0, 6))
@quick
def test_splitting_into_micro_batches_with_a_global_normalizer(name, batch, cut):
    whole = run(batch, SPECS[name])
    cut = min(cut, len(batch.lengths))
    edge = sum(batch.lengths[:cut])
    T = len(batch.targets)
    parts = [
        run(batch.take(torch.arange(a, b), lengths), SPECS[name])
        for a, b, lengths in ((0, edge, batch.lengths[:cut]), (edge, T, batch.lengths[cut:]))
    ]
    close(parts[0][0] + parts[1][0], whole[0])
    close(torch.cat([parts[0][1], parts[1][1]]), whole[1])
    close(parts[0][2] + parts[1][2], whole[2])


@pytest.mark.parametrize("name", RANDOM)
@given(batch=batches, seed=st.integers(0, 99))
@quick
def test_packing_order(name, batch, seed):
    assume_no_ties(batch, name)
    order = torch.randperm(len(batch.lengths), generator=torch.Generator().manual_seed(seed)).tolist()
    spans = [torch.arange(int(batch.cu[i]), int(batch.cu[i + 1])) for i in order]
    index = torch.cat(spans)
    loss, dh, dw = run(batch, SPECS[name], None)
    other = run(batch.take(index, [batch.lengths[i] for i in order]), SPECS[name], None)
    close((loss, dh[index], dw), other)


@pytest.mark.parametrize("name", RANDOM)
@given(batch=batches, seed=st.integers(0, 99), rows=st.integers(2, 60))
@quick
def test_permuting_tokens(name, batch, seed, rows):
    """Interleaved sequences, told apart by segment_ids."""
    assume_no_ties(batch, name)
    index = torch.randperm(len(batch.targets), generator=torch.Generator().manual_seed(seed))
    loss, dh, dw = run(batch, SPECS[name], None)
    other = run(
        batch.take(index, batch.lengths), SPECS[name], None, segment_ids=batch.owner[index], config=workspace(rows)
    )
    close((loss, dh[index], dw), other)


@pytest.mark.parametrize("name", RANDOM)
@given(batch=batches)
@quick
def test_padding_against_packing(name, batch):
    L = max(batch.lengths)
    row = batch.owner
    column = torch.arange(len(row)) - batch.cu[row]

    def pad(v: Tensor, fill: float = 0.0) -> Tensor:
        out = torch.full((len(batch.lengths), L, *v.shape[1:]), fill, dtype=v.dtype)
        out[row, column] = v
        return out

    tokens = {name: pad(v, 3.0) for name, v in batch.tokens.items()}
    padded = Batch(batch.lengths, pad(batch.hidden, 1.0), batch.weight, pad(batch.targets, -100), tokens)
    loss, dh, dw = run(padded, SPECS[name], None)
    close((loss, dh[row, column], dw), run(batch, SPECS[name], None))


@pytest.mark.parametrize("name", SPLITS)
@given(batch=batches)
@quick
def test_dropping_sequences_without_advantage(name, batch):
    """Where no other term reads them, they may as well not be there, given the denominator."""
    spec = SPECS[name]
    if not spec.vanishes:
        pytest.skip("another term reads every token")
    keep = [i for i in range(len(batch.lengths)) if batch.tokens["advantages"][batch.cu[i]] != 0]
    index = torch.cat([torch.arange(0), *(torch.arange(int(batch.cu[i]), int(batch.cu[i + 1])) for i in keep)])
    loss, dh, dw = run(batch, spec)
    close((loss, dh[index], dw), run(batch.take(index, [batch.lengths[i] for i in keep]), spec))
    dropped = torch.ones(len(batch.targets), dtype=torch.bool).index_fill(0, index, False)
    assert not dh[dropped].any()


@pytest.mark.parametrize("name", RANDOM)
@given(batch=batches)
@quick
def test_dropping_masked_tokens(name, batch):
    """They may as well not be there, in any loss and given no denominator; and no gradient reaches them."""
    keep = batch.targets >= 0
    lengths = torch.zeros(len(batch.lengths), dtype=torch.int64).index_add(0, batch.owner, keep.long()).tolist()
    loss, dh, dw = run(batch, SPECS[name], None)
    close((loss, dh[keep], dw), run(batch.take(keep.nonzero()[:, 0], lengths), SPECS[name], None))
    assert not dh[~keep].any()


@pytest.mark.parametrize("name", ALONE)
@given(batch=batches, rows=st.integers(1, 60))
@quick
def test_dropping_tokens_without_a_coefficient(name, batch, rows):
    """Tokens of weight 0, and of advantage 0 where no other term reads them."""
    spec = SPECS[name]
    keep = batch.tokens["token_weights"] != 0
    if spec.vanishes:
        keep &= batch.tokens["advantages"] != 0
    lengths = torch.zeros(len(batch.lengths), dtype=torch.int64).index_add(0, batch.owner, keep.long()).tolist()
    loss, dh, dw = run(batch, spec)
    fewer = batch.take(keep.nonzero()[:, 0], lengths)
    close((loss, dh[keep], dw), run(fewer, spec, config=workspace(rows)))
    assert not dh[~keep].any()


@pytest.mark.parametrize("name", SPLITS)
@given(batch=batches)
@quick
def test_a_batch_of_one(name, batch):
    """Calls with one sequence each add up to the whole."""
    ends = batch.cu.tolist()
    parts = [run(batch.take(torch.arange(a, b), [b - a]), SPECS[name]) for a, b in pairwise(ends)]
    loss, dh, dw = zip(*parts)
    close((torch.stack(loss).sum(), torch.cat(dh), torch.stack(dw).sum(0)), run(batch, SPECS[name]))


@pytest.mark.parametrize("name", SPECS)
@given(batch=batches)
@quick
def test_on_policy_is_a_ratio_of_one(name, batch):
    """No old log-probs, or the policy's own: the same loss and gradients."""
    spec = replace(SPECS[name], correction=None)  # which needs old ones
    if spec.objective == "kl_cov":
        spec = replace(spec, cov_kl_coef=0)  # its term has a kink there
    tokens = dict(batch.tokens)
    del tokens["old_logprobs"]
    if spec.off_policy_threshold is None:
        del tokens["rollout_logprobs"]
    without = Batch(batch.lengths, batch.hidden, batch.weight, batch.targets, tokens)
    own = dk.linear_logprob(batch.hidden, batch.weight, batch.targets).logprobs
    given_old = replace(without, tokens=tokens | {"old_logprobs": own})
    close(run(without, spec, sampler=True), run(given_old, spec, sampler=True))


@pytest.mark.parametrize("name", ["clip_cov", "clip_cov_all", "kl_cov"])
def test_a_selection_over_a_call_is_another_in_its_parts(name):
    """Why these are excepted from splitting, batches of one and dropping what does not count."""
    differences = []
    for seed in range(10):
        batch = make([6, 6], seed)
        whole, *halves = (
            run(batch, SPECS[name])[0],
            *(run(batch.take(torch.arange(a, a + 6), [6]), SPECS[name])[0] for a in (0, 6)),
        )
        differences.append(abs(sum(halves) - whole))
    assert max(differences) > 1e-3


@pytest.mark.parametrize("name", [n for n, s in SPECS.items() if s.scope == "sequence"])
def test_a_sequence_split_over_two_calls_would_differ(name):
    """What the other tests rely on: these losses do read whole sequences (so that the tests can fail)."""
    differences = []
    for seed in range(10):
        batch = make([8], seed)
        batch.tokens["advantages"].fill_(-1.0)
        halves = [run(batch.take(torch.arange(a, a + 4), [4]), SPECS[name])[0] for a in (0, 4)]
        differences.append(abs(sum(halves) - run(batch, SPECS[name])[0]))
    assert max(differences) > 1e-6
