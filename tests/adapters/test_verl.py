"""`adapters.verl` on verl's own forward, losses and plugin loader."""

from __future__ import annotations

import importlib.metadata
import os
import runpy
import subprocess
import sys
from importlib.metadata import entry_points

import peers
import pytest
import tiny
import torch
import verl
from verl.models.transformers.monkey_patch import patch_forward_with_backends
from verl.trainer.ppo import core_algos
from verl.utils.experimental import torch_functional
from verl.utils.kernel import linear_cross_entropy as kernel
from verl.workers.config import ActorConfig

import drift_kernels as dk
from drift_kernels.adapters import verl as adapter
from drift_kernels.adapters.verl.losses import LOSSES

ORIGINAL = (kernel.linear_cross_entropy, torch_functional.FusedLinearForPPO)


@pytest.fixture(autouse=True)
def _restored():
    registry = dict(core_algos.POLICY_LOSS_REGISTRY)
    yield
    adapter.disable()
    core_algos.POLICY_LOSS_REGISTRY.clear()
    core_algos.POLICY_LOSS_REGISTRY.update(registry)
    assert (kernel.linear_cross_entropy, torch_functional.FusedLinearForPPO) == ORIGINAL


def step(model, temperature: float, entropy_too: bool):
    ids = torch.randint(2, 64, (1, 23), generator=torch.Generator().manual_seed(1))
    out = model(input_ids=ids, position_ids=torch.arange(23)[None], temperature=temperature, return_dict=True)
    noise = torch.linspace(-1, 1, 23)
    loss = (out.log_probs.reshape(-1) * noise).sum()
    if entropy_too:
        loss = loss - 0.1 * out.entropy.reshape(-1).sum()
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return out.log_probs.detach().reshape(-1), out.entropy.detach().reshape(-1), grads


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("entropy_too", [False, True])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_fused_forward_of_a_model(backend, temperature, entropy_too, tied):
    """Against verl's torch implementation; its triton one needs a GPU, and the call to it is what "triton" replaces."""
    plain = type(tiny.model()).forward
    model = tiny.model(tied=tied).train()
    try:
        patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend="torch")
        expected = step(model, temperature, entropy_too)
        patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend=backend)
        with adapter.enable():
            actual = step(model, temperature, entropy_too)
    finally:
        type(model).forward = plain
    for a, b in zip(expected[:2], actual[:2]):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert tiny.differences(expected[2], actual[2]) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 9), (17,)])
def test_shapes_and_types_are_those_of_verl(dtype, shape):
    torch.manual_seed(0)
    weight, labels = torch.randn(64, 32, dtype=dtype), torch.randint(64, shape)
    results = []
    for enabled in (False, True):
        hidden = torch.randn(*shape, 32, dtype=dtype, generator=torch.Generator().manual_seed(2)).requires_grad_()
        head = weight.clone().requires_grad_()
        if enabled:
            adapter.enable()
        found = torch_functional.FusedLinearForPPO()(hidden, head, labels.int(), 0.9)
        found[0].sum().backward()
        results.append((*found, hidden.grad, head.grad))
    for a, b in zip(*results):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        torch.testing.assert_close(a.detach(), b.detach(), rtol=0.1, atol=0.3 if dtype == torch.bfloat16 else 1e-4)
    flat = kernel.linear_cross_entropy(hidden.detach(), weight, labels, 0.9, "none")
    assert [t.shape for t in flat] == [(labels.numel(),)] * 2
    assert [t.dtype for t in flat] == [torch.float32] * 2


def test_what_it_refuses():
    adapter.enable()
    arguments = torch.randn(3, 8), torch.randn(5, 8), torch.tensor([0, 1, 2])
    with pytest.raises(NotImplementedError, match="reduction='mean'"):
        kernel.linear_cross_entropy(*arguments, 1.0, "mean")
    with pytest.raises(NotImplementedError, match="temperature per sample"):
        torch_functional.FusedLinearForPPO()(*arguments, torch.ones(3))
    for spec in (dk.PolicySpec(kl_coef=0.1), dk.PolicySpec.preset("clip_cov"), dk.PolicySpec(correction="token_mask")):
        with pytest.raises(ValueError, match="verl adds KL"):
            adapter.register_policy_loss("mine", spec)


def test_a_missing_seam_is_said(monkeypatch):
    monkeypatch.delattr(kernel, "linear_cross_entropy")
    with pytest.raises(RuntimeError, match=r"has no verl\.utils\.kernel\.linear_cross_entropy\.linear_cross_entropy"):
        adapter.enable()
    monkeypatch.undo()
    monkeypatch.setattr("importlib.metadata.version", lambda _: "0.10.1")
    with pytest.raises(ImportError, match=r"verl >= 0\.9\.1, < 0\.10: pip install"):
        adapter.enable()


def config(**changes) -> ActorConfig:
    made = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **changes)
    made.global_batch_info.update(dp_size=1, batch_num_tokens=None, global_batch_size=None, loss_scale_factor=None)
    return made


def padded(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    logp = -torch.rand(4, 9, generator=generator) * 3
    old = logp + 0.3 * torch.randn(4, 9, generator=generator)
    mask = torch.ones(4, 9, dtype=torch.bool)
    mask[1, 4:], mask[2, 7:] = False, False
    advantages = torch.randn(4, 1, generator=generator).expand(4, 9)
    return old, logp, advantages, mask


SAME = {  # a loss of verl, and the spec that is the same
    "vanilla": (dk.PolicySpec(dual_clip=3.0), {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}),
    "gspo": (dk.PolicySpec.preset("gspo_token"), {"clip_ratio_low": 0.01, "clip_ratio_high": 0.02}),
    "cispo": (dk.PolicySpec.preset("cispo"), {"clip_ratio_low": 0.2, "clip_ratio_high": 0.1}),
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"])
@pytest.mark.parametrize("name", SAME)
def test_registered_losses_are_verls_where_verl_has_them(name, mode, weighted):
    spec, numbers = SAME[name]
    adapter.register_policy_loss("mine", spec, clip_from_config=True)
    old, logp, advantages, mask = padded()
    weights = torch.rand(4, 9) if weighted else None
    results = []
    for registered in (name, "mine"):
        leaf = logp.clone().requires_grad_()
        loss, metrics = core_algos.get_policy_loss_fn(registered)(
            old, leaf, advantages, mask, mode, config(**numbers), weights
        )
        loss.backward()
        results.append((loss.detach(), leaf.grad, metrics))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-6)
    assert abs(results[0][2]["actor/ppo_kl"] - results[1][2]["actor/ppo_kl"]) < 1e-5
    assert results[1][2].keys() == {"actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower"}
    if name in ("vanilla", "gspo"):
        assert abs(results[0][2]["actor/pg_clipfrac"] - results[1][2]["actor/pg_clipfrac"]) < 1e-6


@pytest.mark.parametrize("count", [None, 0, 11])
@pytest.mark.parametrize("mode", ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean"])
def test_a_batch_without_a_token_changes_nothing(mode, count):
    """verl's own losses are 0 / 0, and their gradients NaN, if the whole global batch has none."""
    adapter.enable()
    old, logp, advantages, mask = padded()
    actor = config()
    actor.global_batch_info.update(batch_num_tokens=count, global_batch_size=count)
    for name in LOSSES:
        leaf = logp.clone().requires_grad_()
        loss, metrics = core_algos.get_policy_loss_fn(name)(old, leaf, advantages, mask & False, mode, actor)
        loss.backward()
        assert loss.item() == 0.0
        assert not leaf.grad.any()
        assert not any(metrics.values())


def test_enable_registers_what_verl_lacks():
    assert not [name for name in core_algos.POLICY_LOSS_REGISTRY if name.startswith("drift")]
    adapter.enable()
    old, logp, advantages, mask = padded()
    for name in ("drift_vespo", "drift_gspo", "drift_luspo"):
        leaf = logp.clone().requires_grad_()
        loss, _ = core_algos.get_policy_loss_fn(name)(old, leaf, advantages, mask, "token-mean", config())
        loss.backward()
        assert leaf.grad[mask].abs().min() >= 0
        assert not leaf.grad[~mask].any()
        assert leaf.grad.any()


PROBE = (
    "import verl; from verl.utils.kernel import linear_cross_entropy as k; "
    "print('on' if 'drift' in k.linear_cross_entropy.__module__ else 'off')"
)


@pytest.mark.parametrize("asked", [None, "auto", "none", "other, third", "drift", "other, Drift"])
def test_the_plugin_does_nothing_unless_named(asked, monkeypatch):
    named = "drift" in (asked or "").lower()
    monkeypatch.delenv("VERL_USE_EXTERNAL_PLUGINS", raising=False)
    if asked:
        monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", asked)
    sys.modules.pop("drift_kernels.adapters.verl.on", None)
    runpy.run_module("drift_kernels.adapters.verl_plugin")
    assert (kernel.linear_cross_entropy is not ORIGINAL[0]) == named


@pytest.mark.parametrize("asked", [None, "drift"])
def test_verl_finds_the_plugin_by_itself(asked):
    if not [e for e in entry_points(group="verl.plugins") if e.value == "drift_kernels.adapters.verl_plugin"]:
        pytest.skip("cannot run: this package is not installed, so that it has no entry points")
    environment = {k: v for k, v in os.environ.items() if k != "VERL_USE_EXTERNAL_PLUGINS"}
    environment |= {"VERL_USE_EXTERNAL_PLUGINS": asked} if asked else {}
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, env=environment)
    assert done.stdout.split()[-1:] == ["on" if asked else "off"], done.stderr[-2000:]


def test_a_named_plugin_that_fails_ends_the_process(monkeypatch):
    """verl swallows an Exception of a plugin."""
    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", "drift")
    for name in [name for name in sys.modules if name.startswith("drift_kernels.adapters.verl")]:
        monkeypatch.delitem(sys.modules, name)
    old = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.8.0" if name == "verl" else old(name))
    with pytest.raises(SystemExit, match=r"cannot be turned on: verl 0\.8\.0 is not supported"):
        runpy.run_module("drift_kernels.adapters.verl_plugin")


def test_external_lib_turns_it_on():
    code = "from verl.utils.import_utils import import_external_libs; "
    code += "import_external_libs('drift_kernels.adapters.verl.on'); " + PROBE
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split()[-1:] == ["on"], done.stderr[-2000:]
    assert verl.__version__


@pytest.mark.peers
def test_verls_own_tests_of_the_kernel(tmp_path):
    """Not in its sdist so far; said here, so that tests/adapters/ran.txt tells when they come."""
    peers.test_module("verl==0.9.1", "tests/utils/test_linear_cross_entropy.py", tmp_path)


ROLLOUT = """
import pytest
import drift_kernels as dk
from drift_kernels.adapters import verl as adapter
from drift_kernels.adapters.verl.losses import LOSSES
from verl.trainer.ppo import core_algos

adapter.register_policy_loss("vanilla_of_drift", dk.PolicySpec(dual_clip=3.0), clip_from_config=True)
ours = core_algos.get_policy_loss_fn("vanilla_of_drift")
called = []

def counting(**given):
    called.append(1)
    given["config"].global_batch_info.update(dp_size=1, batch_num_tokens=None, global_batch_size=None, loss_scale_factor=None)
    theirs, ours_too = core_algos.compute_policy_loss_vanilla(**given), ours(**given)
    assert abs(theirs[0] - ours_too[0]) < 1e-5 * max(1, abs(theirs[0]))
    return ours_too

@pytest.fixture(autouse=True)
def drifted(request, monkeypatch):
    monkeypatch.setattr(request.module, "compute_policy_loss_vanilla", counting)

def pytest_sessionfinish(session):
    if not called:
        session.exitstatus = 9
"""


@pytest.mark.peers
def test_verls_own_tests_of_rollout_correction(tmp_path):
    """With a registered loss of ours where they call verl's, and the numbers of both compared on the way."""
    file = peers.test_file("verl==0.9.1", "tests/trainer/ppo/test_rollout_corr_integration.py", tmp_path)
    assert peers.passed(file, ROLLOUT) > 2
