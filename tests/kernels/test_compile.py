"""torch.compile with shapes that vary: one graph for batches of any size, or two with an op that no graph takes between them."""

import pytest
import torch
from torch._dynamo.exc import Unsupported
from torch._dynamo.utils import counters

import drift_kernels as dk
from drift_kernels.testing import make_case

D, V = 6, 19
WITH_SEQUENCES = dk.PolicySpec.preset("gspo", kl_coef=0.1)
pytestmark = [  # of torch's own tracer, which reads .grad of whatever goes from one graph to the next
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


def batch(count):
    """Leaves that require grad (hidden, weight, bias), and per-token data."""
    case = make_case(count, D, V, seed=count)
    weights = torch.linspace(0, 1.5, count)
    return [t.float().requires_grad_() for t in (case.hidden, case.weight, case.bias)], (case.targets, weights)


def cross_entropy(h, head, targets, weights):
    out = dk.weighted_cross_entropy(h, head, targets, weights, outputs=("logprobs",))
    return out.loss + out.outputs["logprobs"].sum()


def policy(h, head, targets, weights):
    old, segments = torch.full(targets.shape, -3.0), torch.arange(len(targets)) // 4
    token = dk.policy_loss(h, head, targets, weights - 0.5, old_logprobs=old, spec=dk.PolicySpec(entropy_coef=0.1))
    data = {"old_logprobs": old, "ref_logprobs": old, "segment_ids": segments, "spec": WITH_SEQUENCES}
    return token.loss + dk.policy_loss(h, head, targets, weights - 0.5, **data).loss


def distill(h, head, targets, weights):
    teacher = dk.Teacher(h.detach() * 0.5, head)
    whole = dk.distill_loss(h, head, teacher, weights, targets=targets, spec=dk.DistillSpec(0.3))
    kept = dk.topk_logprobs(h.detach() * 2, head, 4)
    return whole.loss + dk.distill_loss(h, head, kept, weights).loss


def self_distill(h, head, targets, weights):
    out = dk.self_distill_loss(
        h,
        head,
        targets,
        dk.Teacher(h.detach() * 0.5, head),
        weights - 0.5,
        distill_weights=weights,
        policy_weights=1.5 - weights,
        distill_coef=0.7,
        old_logprobs=torch.full(targets.shape, -3.0),
        exploration=dk.Exploration(dk.ExplorationSpec(), turn_ids=torch.arange(len(targets)) // 4),
    )
    return out.loss + out.metrics["difference"][0]


def pointwise(h, head, targets, weights):
    return dk.pointwise_loss(torch.tanh(h), head, targets, lambda logp, w: w * logp.square(), weights).loss * 2


def results(fn, count):
    """The loss and the leaves' gradients."""
    leaves, data = batch(count)
    loss = fn(leaves[0], dk.Head(leaves[1], bias=leaves[2]), *data)
    loss.backward()
    return loss.detach(), *(leaf.grad for leaf in leaves)


def compiled(fn, fullgraph):
    torch._dynamo.reset()
    counters.clear()
    return torch.compile(fn, dynamic=True, fullgraph=fullgraph, backend="aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("fn", [cross_entropy, policy, distill, self_distill])
def test_one_graph_serves_batches_of_any_size(fn):
    """Two sizes after that of the trace, without a second trace of it."""
    graph = compiled(fn, True)
    for count in (12, 17, 9):
        torch.testing.assert_close(results(graph, count), results(fn, count))
    assert counters["stats"]["unique_graphs"] == 1


def test_a_pointwise_loss_runs_between_two_graphs_or_is_refused():
    part = compiled(pointwise, False)
    for count in (12, 17, 9):
        torch.testing.assert_close(results(part, count), results(pointwise, count))
    assert 0 < sum(counters["graph_break"].values()) <= 2  # the call, and it alone
    with pytest.raises(Unsupported, match="pointwise_loss calls fn, a Python function"):
        results(compiled(pointwise, True), 12)
