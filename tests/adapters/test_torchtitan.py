"""`adapters.torchtitan` against torchtitan's ChunkedLossWrapper, inside its decoder, and under its own tests."""

from __future__ import annotations

import unittest

import peers
import pytest
import torch
from torch import nn
from torchtitan.components.loss import IGNORE_INDEX, BaseLoss, ChunkedLossWrapper, CrossEntropyLoss, MSELoss
from torchtitan.models.common.linear import Linear

from drift_kernels.adapters.torchtitan import DriftLoss


def case(bias: bool = False, dtype=torch.float32):
    torch.manual_seed(0)
    head = Linear(Linear.Config(in_features=16, out_features=50, bias=bias))
    with torch.no_grad():
        for p in head.parameters():
            p.normal_()
    body = nn.Linear(16, 16)
    labels = torch.randint(50, (2, 16))
    labels[0, :5], labels[1, 12:] = IGNORE_INDEX, IGNORE_INDEX
    return body.to(dtype), head.to(dtype), torch.randn(2, 16, 16, dtype=dtype), labels


def both(config, given, bias=False, dtype=torch.float32, **inputs):
    body, head, x, labels = case(bias, dtype)
    loss_fn = config.build()
    assert isinstance(loss_fn, ChunkedLossWrapper)  # what torchtitan's trainer looks for
    loss_fn.set_lm_head(head)
    loss, metrics = loss_fn(body(x), labels, given, **inputs)
    loss.backward()
    return loss.detach(), metrics, [p.grad for p in (*body.parameters(), *head.parameters())]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("given", [None, torch.tensor(37)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_chunked_cross_entropy(given, bias, dtype):
    theirs = both(ChunkedLossWrapper.Config(num_chunks=4), given, bias, dtype)
    ours = both(DriftLoss.Config(), given, bias, dtype)
    tolerance = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=0.05, atol=0.05)
    torch.testing.assert_close(ours[0], theirs[0], **tolerance)
    assert ours[1] == theirs[1] == {}
    for a, b in zip(ours[2], theirs[2]):
        scale = float(b.float().abs().max())
        torch.testing.assert_close(a / scale, b / scale, **tolerance)


def test_positions_are_no_weights_and_token_weights_are():
    plain = both(DriftLoss.Config(), torch.tensor(9))
    also = both(DriftLoss.Config(), torch.tensor(9), positions=torch.arange(16).expand(2, 16))
    assert torch.equal(plain[0], also[0])
    weights = torch.rand(2, 16)
    weighted = both(DriftLoss.Config(), torch.tensor(9), token_weights=weights)
    body, head, x, labels = case()
    losses = nn.functional.cross_entropy(head(body(x)).flatten(0, 1), labels.flatten(), reduction="none")
    expected = (losses * weights.flatten()).sum() / 9
    expected.backward()
    torch.testing.assert_close(weighted[0], expected.detach())
    torch.testing.assert_close(weighted[2][-1], head.weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("given", [None, torch.tensor(0), torch.tensor(9)])
def test_a_batch_without_a_label_changes_nothing(given):
    """torchtitan's own loss is 0 / 0 for a global count of 0; its gradient is 0."""
    body, head, x, labels = case()
    loss_fn = DriftLoss.Config().build()
    loss_fn.set_lm_head(head)
    loss, _ = loss_fn(body(x), torch.full_like(labels, IGNORE_INDEX), given)
    loss.backward()
    assert loss.item() == 0.0
    assert not any(p.grad.any() for p in (*body.parameters(), *head.parameters()))


def test_validation_has_no_gradient_and_the_head_stays_as_it_was():
    body, head, x, labels = case()
    names = set(vars(head))
    loss_fn = DriftLoss.Config().build()
    with pytest.raises(RuntimeError, match="call set_lm_head"):
        loss_fn(body(x), labels)
    loss_fn.set_lm_head(head)
    hooked = []
    head.register_forward_hook(lambda *_: hooked.append(1))  # FSDP's way in
    with torch.no_grad():
        loss, _ = loss_fn(body(x), labels)
    assert not loss.requires_grad
    assert hooked == [1]
    assert set(vars(head)) == names
    with pytest.raises(IndexError):
        loss_fn(body(x), labels + 50)
    assert set(vars(head)) == names
    assert head(body(x)).shape == (2, 16, 50)


def test_what_it_refuses():
    with pytest.raises(ValueError, match="reads logits"):
        DriftLoss.Config(loss_fn=MSELoss.Config()).build()
    DriftLoss.Config(loss_fn=CrossEntropyLoss.Config(global_vocab_size=50)).build()

    class Scaled(Linear):
        def forward(self, x):
            return super().forward(x) * 2

    with pytest.raises(NotImplementedError, match="Scaled"):
        DriftLoss.Config().build().set_lm_head(Scaled(Linear.Config(in_features=4, out_features=5)))
    assert issubclass(DriftLoss, BaseLoss)


def test_a_split_head_is_refused(monkeypatch):
    body, head, x, labels = case()
    loss_fn = DriftLoss.Config().build()
    loss_fn.set_lm_head(head)
    monkeypatch.setattr("drift_kernels.adapters.torchtitan.get_spmd_backend", lambda: "spmd_types")
    monkeypatch.setattr("drift_kernels.adapters.torchtitan.spmd_mesh_size", lambda _: 2)
    with pytest.raises(NotImplementedError, match="tensor-parallel"):
        loss_fn(body(x), labels)


def test_a_llama_trains_the_same(monkeypatch):
    """torchtitan's own debug model for ten steps, its head skipped as its trainer does; flex attention needs a compiler."""
    from torchtitan.models import llama3
    from torchtitan.models.common.attention import ScaledDotProductAttention

    monkeypatch.setattr(llama3, "get_attention_config", lambda _: ScaledDotProductAttention.Config())
    ends = []
    for config in (ChunkedLossWrapper.Config(num_chunks=4), DriftLoss.Config()):
        torch.manual_seed(0)
        spec = llama3.model_registry("debugmodel")
        model = spec.model.build()
        model.to_empty(device="cpu")
        with torch.no_grad():
            model.init_weights(buffer_device=torch.device("cpu"))
        loss_fn = config.build()
        loss_fn.set_lm_head(model.lm_head)
        model._skip_lm_head = True
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        generator = torch.Generator().manual_seed(1)
        losses = []
        for _ in range(10):
            tokens = torch.randint(256, (2, 17), generator=generator)
            loss, _ = loss_fn(model(tokens[:, :-1]), tokens[:, 1:].contiguous(), torch.tensor(32))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        ends.append((torch.tensor(losses), [p.detach().clone() for p in model.parameters()]))
    torch.testing.assert_close(ends[0][0], ends[1][0], rtol=1e-4, atol=1e-4)
    for a, b in zip(ends[0][1], ends[1][1]):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.peers
def test_torchtitans_own_tests_of_the_wrapper(tmp_path):
    """Its class with parameter gradients is compared with DriftLoss, where the test compares it with ChunkedLossWrapper."""
    path = "torchtitan/experiments/graph_trainer/tests/test_chunked_loss.py"
    try:
        module = peers.test_module("torchtitan==0.3.0", path, tmp_path)
    except ImportError as error:
        pytest.skip(f"cannot run: {error}")
    module.ChunkedLossWrapper = DriftLoss
    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromModule(module).run(result)
    assert result.testsRun > 0
    assert not result.errors + result.failures, (result.errors + result.failures)[0][1]
