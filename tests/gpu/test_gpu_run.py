"""How ops run on a GPU: what repeats, what waits, what memory they take, on which stream, in a graph, and compiled."""

import loose
import pytest
import torch
from small_ops import D, T, V, case_on, config, leaves, policy_data

import drift_kernels as dk

MIB = 1 << 20


def inputs_of(device, dtype=torch.bfloat16, seed=0, shape=(T, D, V)):
    """A policy loss's tensors, all on `device`: (leaves, everything else by name, `active` included)."""
    case = case_on(device, *shape, dtype=dtype, seed=seed)
    data = {"targets": case.targets, "advantages": case.advantages.float(), "token_weights": case.token_weights.float()}
    if shape == (T, D, V):
        data["old_logprobs"] = policy_data(case, dtype)["old_logprobs"].float()
    data["active"] = (case.targets >= 0).nonzero().squeeze(1)
    return leaves(case, dtype), data


def step(inputs, data, chosen):
    """(loss, gradients) of PPO with an entropy bonus."""
    h, w, b = inputs
    out = loose.policy_loss(h, dk.Head(w, bias=b), spec=dk.PolicySpec(entropy_coef=0.01), config=chosen, **data)
    return (out.loss, *torch.autograd.grad(out.loss, inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_results_repeat_bitwise(backend, device, dtype):
    inputs, data = inputs_of(device, dtype)
    first = step(inputs, data, config(backend, dtype))
    for _ in range(3):
        again = step(inputs, data, config(backend, dtype))
        assert all(torch.equal(a, b) for a, b in zip(first, again))


def test_scores_repeat_bitwise(backend, device):
    (h, w, b), data = inputs_of(device)
    with torch.no_grad():
        scores = [
            dk.linear_logprob(h, dk.Head(w, bias=b), data["targets"], config=config(backend)).logprobs for _ in range(3)
        ]
    assert torch.equal(scores[0], scores[1])
    assert torch.equal(scores[0], scores[2])


def test_active_reads_nothing_back(backend, device, cuda):
    inputs, data = inputs_of(device)
    chosen = config(backend, torch.bfloat16)
    wanted = step(inputs, data, chosen)  # and compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = step(inputs, data, chosen)
        with torch.no_grad():
            dk.linear_logprob(*inputs[:2], data["targets"], active=data["active"], config=chosen)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(wanted, found))


@pytest.mark.parametrize("workspace", [32 * MIB, 128 * MIB])
def test_the_workspace_is_kept(backend, device, cuda, workspace):
    """Beyond it there are the gradients, dhidden and dweight in fp32 and as they leave, and what is a number a token."""
    tokens, width, vocabulary = 4096, 512, 32_768  # 512 MiB of fp32 logits
    inputs, data = inputs_of(device, shape=(tokens, width, vocabulary))
    chosen = dk.KernelConfig(backend=backend, workspace_bytes=workspace)
    step(inputs, data, chosen)  # kernels, and cuBLAS's own workspace
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(inputs, data, chosen)
    peak = torch.cuda.max_memory_allocated() - before
    gradients = (4 + 2) * (tokens * width + vocabulary * width + vocabulary)
    assert peak <= workspace + gradients + 64 * 8 * tokens + 2 * MIB


def test_work_is_done_on_the_current_stream(backend, device, cuda):
    inputs, data = inputs_of(device)
    chosen = config(backend, torch.bfloat16)
    wanted = step(inputs, data, chosen)
    late = [torch.zeros_like(t).requires_grad_() for t in inputs]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # what does not wait for this stream finds zeros
        with torch.no_grad():
            for t, given in zip(late, inputs):
                t.copy_(given)
        found = step(late, data, chosen)
    side.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(wanted, found))


def test_work_is_done_on_the_inputs_device(backend, cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    results = []
    for device in ("cuda:0", "cuda:1"):  # the current one is 0
        inputs, data = inputs_of(device)
        results.append([t.cpu() for t in step(inputs, data, config(backend, torch.bfloat16))])
    torch.testing.assert_close(*results)


def test_a_cuda_graph_replays_the_same_numbers(backend, device, cuda):
    inputs, data = inputs_of(device)
    others, _ = inputs_of(device, seed=1)
    chosen = config(backend, torch.bfloat16)
    wanted = [step(some, data, chosen) for some in (inputs, others)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(inputs, data, chosen)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = step(inputs, data, chosen)
    own = [t.detach().clone() for t in inputs]
    for given, want in ((others, wanted[1]), (own, wanted[0])):
        with torch.no_grad():
            for t, values in zip(inputs, given):
                t.copy_(values)
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(made, want))


def test_a_step_compiles_as_one_graph(backend, device, cuda):
    (h, w, b), data = inputs_of(device, torch.float32)
    projection = torch.eye(D, device=device).requires_grad_()

    def whole(h, projection):
        hidden = torch.tanh(h @ projection)
        loss = loose.policy_loss(hidden, dk.Head(w, bias=b), config=config(backend), **data).loss
        logprobs = dk.linear_logprob(hidden, w, data["targets"], config=config(backend)).logprobs
        return loss + logprobs.mean()

    found = []
    for fn in (whole, torch.compile(whole, fullgraph=True)):
        loss = fn(h, projection)
        found.append((loss.detach(), *torch.autograd.grad(loss, (h, projection, w, b))))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_float64_is_refused_by_name(backend, device, cuda):
    case = case_on(device, 10, D, V)
    with pytest.raises(TypeError, match=f"backend='{backend}' computes in float32"):
        dk.weighted_cross_entropy(*leaves(case, torch.float64)[:2], case.targets, config=config(backend))
