"""Fused heads and losses of TRL, Liger and Apple, as far as they run on a CPU, against ours."""

import loose
import pytest
import torch
from cut_cross_entropy import linear_cross_entropy
from hypothesis import given
from hypothesis import strategies as st
from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
from liger_kernel.chunked_loss.fused_linear_ppo import _ChunkedSelectiveLogProbFunction
from peer_cases import Batch, Result, assert_same, batches, bounded, gradients, make_batch, ours
from trl.kernels import ChunkedLogProbFunction
from trl_peer import LOSSES, Options, given_of, off_the_edges, spec_of, trl

import drift_kernels as dk
from drift_kernels.testing import make_case

TRL_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 1.7])
@pytest.mark.parametrize(("temperature", "logit_scale"), [(1.0, 1.0), (0.7, 1.3)])
def test_trl_chunked_log_probs(bias, softcap, temperature, logit_scale):
    """All nine arguments, chunks smaller than the vocabulary, the four further outputs, and gradients of two of them."""
    case = make_case(37, 12, 101, masked=0.0, dtype=torch.float32)
    head = {"temperature": temperature, "softcap": softcap, "logit_scale": logit_scale}
    found = []
    for theirs in (True, False):
        hidden, weight, b = case.leaves(torch.float32)
        leaves = (hidden, weight, b) if bias else (hidden, weight)
        if theirs:
            logp, *further = ChunkedLogProbFunction.apply(
                hidden, weight, b if bias else None, case.targets, temperature, 17, softcap, logit_scale, TRL_OUTPUTS
            )
        else:
            out = loose.linear_logprob(
                hidden,
                dk.Head(weight, bias=b if bias else None),
                case.targets,
                entropy_gradient=True,
                outputs=TRL_OUTPUTS[1:],
                config=dk.KernelConfig(backend="cpu", workspace_bytes=10 * (101 + 12) * 4),
                **head,
            )
            logp, further = out.logprobs, [out.entropy, *(out.outputs[name] for name in TRL_OUTPUTS[1:])]
        loss = (logp * case.advantages.float()).sum() + (further[0] * case.token_weights.float()).sum()
        values = [v.detach().double() for v in (logp, *further)]
        found.append((*values, *(g.double() for g in torch.autograd.grad(loss, leaves))))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
    assert 0 < found[0][4].sum() < 37  # is_top1 is not all of one kind


def test_trl_leaves_out_what_is_not_asked_for():
    case = make_case(5, 4, 11, masked=0.0, dtype=torch.float32)
    hidden, weight, _ = case.leaves(torch.float32)
    assert ChunkedLogProbFunction.apply(hidden, weight, None, case.targets, 1.0, 4, None, 1.0, ())[1:] == (None,) * 4
    out = dk.linear_logprob(hidden, weight, case.targets)
    assert (out.entropy, out.outputs) == (None, {})


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_liger_chunked_log_probs(temperature):
    case = make_case(37, 12, 101, masked=0.0, dtype=torch.float32)
    found = []
    for theirs in (True, False):
        hidden, weight, bias = case.leaves(torch.float32)
        if theirs:
            logp = _ChunkedSelectiveLogProbFunction.apply(hidden, weight, case.targets, bias, temperature, 17)
        else:
            logp = dk.linear_logprob(hidden, dk.Head(weight, bias=bias, temperature=temperature), case.targets).logprobs
        loss = (logp * case.advantages.float()).sum()
        found.append((logp.detach(), *torch.autograd.grad(loss, (hidden, weight, bias))))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


def liger(batch: Batch, o: Options) -> Result:
    """Liger's fused GRPO loss, in fp32 as it is; its metrics are (kl, clip ratio) or (clip ratio,)."""
    fused = LigerFusedLinearGRPOLoss(
        beta=o.beta,
        compiled=False,
        use_ref_model=o.beta != 0,
        chunk_size=2,
        epsilon_low=o.epsilon,
        epsilon_high=o.epsilon_high,
        loss_type=o.loss_type,
        max_completion_length=batch.mask.shape[1] if o.horizon is None else o.horizon,
        importance_sampling_level=o.importance_sampling_level,
        delta=o.delta,
        use_bias_correction_kl=o.use_bias_correction_kl,
    )
    loss, metrics = fused(
        batch.hidden,
        batch.weight,
        batch.targets,
        batch.mask.to(batch.hidden.dtype),
        batch.advantages,
        ref_per_token_logps=batch.ref,
        old_per_token_logps=batch.old if o.old else None,
    )
    return gradients(loss, batch, {"region": float(metrics[-1])})


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_liger_grpo(loss_type, level):
    if level == "sequence" and loss_type in ("cispo", "sapo", "vespo"):
        with pytest.raises(ValueError, match="not supported"):
            liger(make_batch(0, 2, 3, False).to(torch.float32), Options(loss_type, level))
        return
    if loss_type == "luspo" and level == "token":
        return  # test_liger_luspo_reads_masked_tokens

    @bounded
    @given(st.data())
    def check(data):
        pick = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
        beta = 0.0 if loss_type == "luspo" else pick(0.0, 0.07)
        o = Options(
            loss_type,
            level,
            epsilon=pick(0.05, 0.2),
            epsilon_high=pick(1.3, 5.0) if loss_type == "cispo" else pick(0.05, 0.28),
            delta=pick(None, 1.6) if loss_type in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo") else None,
            beta=beta,
            use_bias_correction_kl=pick(False, True) if beta else False,
            old=pick(True, False),
        )
        batch = off_the_edges(data.draw(batches(per_token=False)), o)
        theirs = liger(batch.to(torch.float32), o)
        for packed in (False, True):
            mine = ours(batch, spec_of(o), torch.float32, packed, **given_of(batch, o))
            for a, b in zip(mine.flat(), theirs.flat()):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
            if loss_type not in ("sapo", "vespo", "cispo"):
                assert mine.metrics["clip_ratio/region_mean"] == pytest.approx(theirs.metrics["region"], abs=1e-6)

    check()


def test_liger_luspo_reads_masked_tokens():
    """With token ratios it sums masked positions too and weighs tokens by their number; TRL 1.16 and ours do not."""
    o = Options("luspo")
    batch = off_the_edges(make_batch(41, 3, 6, False), o)
    assert_same(batch, lambda b: trl(b, o), spec_of(o), **given_of(batch, o))
    assert not batch.mask.all()
    far = Batch(**{**vars(batch), "old": torch.where(batch.mask, batch.old, batch.old - 1)})
    before, after = (liger(b.to(torch.float32), o).loss for b in (batch, far))
    assert not torch.allclose(before, after, rtol=1e-3)
    mine = [ours(b, spec_of(o), torch.float32, False, old=True).loss for b in (batch, far)]
    assert torch.equal(*mine)


@pytest.mark.parametrize("softcap", [None, 1.7])
def test_apple_cut_cross_entropy(softcap):
    """Its torch implementation; the Triton one needs a GPU."""
    case = make_case(37, 12, 101, dtype=torch.float32)
    found = []
    for theirs in (True, False):
        hidden, weight, _ = case.leaves(torch.float32)
        if theirs:
            with torch.compiler.set_stance("force_eager"):
                nll = linear_cross_entropy(
                    hidden, weight, case.targets, softcap=softcap, reduction="none", impl="torch_compile"
                )
            loss = (nll * case.token_weights.float()).sum()
        else:
            out = dk.weighted_cross_entropy(
                hidden, dk.Head(weight, softcap=softcap), case.targets, case.token_weights.float(), normalizer=1.0
            )
            loss = out.loss
        found.append((loss.detach(), *torch.autograd.grad(loss, (hidden, weight))))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
