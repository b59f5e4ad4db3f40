"""The GPU's whole path at full size on tensors without memory: any read by the host raises there, and what would be
allocated at once is counted.
"""

import dataclasses

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import drift_kernels as dk
from drift_kernels import distill_driver, driver
from drift_kernels.calls import Call, DistillCall, HeadOptions
from drift_kernels.divergences import DistillTokens, TeacherTensors
from drift_kernels.formulas import Tokens
from drift_kernels.tensors import Inputs

T, D, V = 8192, 4096, 151_936
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


class Allocations(TorchDispatchMode):
    """Bytes of the storages that operators made and that are still held, at most."""

    def __init__(self):
        super().__init__()
        self.held, self.peak = {}, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = op(*args, **(kwargs or {}))
        self.held = {key: entry for key, entry in self.held.items() if not entry[0].expired()}
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and (storage := t.untyped_storage())._cdata not in before:
                self.held[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self.held.values()))
        return result


def inputs(dtype, active, lora=False, head=None):
    def make(*shape, kind=dtype):
        return torch.empty(shape, dtype=kind, device="meta")

    def per_token():
        return make(T, kind=torch.float32)

    tokens = Tokens(*(per_token() for _ in range(4)))
    low_rank = dk.LoRAHead(make(16, D), make(V, 16), 2.0) if lora else None
    targets, index = make(T, kind=torch.int64), make(active, kind=torch.int64)
    return Inputs(
        make(T, D), make(V, D, kind=head or dtype), make(V), targets, None, index, per_token(), tokens, low_rank
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("workspace", [1 << 30, 256 << 20])
@pytest.mark.parametrize("active", [T, 3001])
def test_a_policy_loss_reads_nothing_back_and_keeps_to_its_workspace(dtype, workspace, active):
    config = dk.KernelConfig(backend="triton", workspace_bytes=workspace)
    needs = dict.fromkeys(("need_hidden", "need_weight", "need_bias"), True)
    x, call = inputs(dtype, active), Call(config=config, outputs=("logprobs", "clipped"), **needs)
    normalizer = torch.empty((), device="meta")
    with Allocations() as allocations:
        loss, grads, outputs = driver.fused(x, call, normalizer)
    assert loss.shape == ()
    assert outputs.shape == (2, T)
    by_right = sum(g.nbytes for g in grads.flat() if g is not None) + outputs.nbytes
    small = 64 * 4 * (T + V)  # some vectors
    assert workspace // 2 < allocations.peak - by_right < workspace + small


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_read_nothing_back_and_need_no_logits(dtype):
    x, config = inputs(dtype, 3001), dk.KernelConfig(backend="triton")
    with Allocations() as allocations:
        scores = driver.score(x, Call(config=config, outputs=("logprobs", "entropy")))
    assert scores.shape == (2, T)
    assert allocations.peak < 4 * 3001 * D + (32 << 20)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_lora_head_reads_nothing_back(dtype):
    needs = dict.fromkeys(("need_hidden", "need_lora_a", "need_lora_b"), True)
    call = Call(config=dk.KernelConfig(backend="triton"), lora_scale=2.0, **needs)
    _, grads, _ = driver.fused(inputs(dtype, T, lora=True), call, torch.empty((), device="meta"))
    shapes = [None if g is None else tuple(g.shape) for g in grads.flat()]
    assert shapes == [(T, D), None, None, (16, D), (V, 16)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_fp32_head_is_multiplied_in_fp32(dtype):
    needs = dict.fromkeys(("need_hidden", "need_weight", "need_bias"), True)
    call = Call(config=dk.KernelConfig(backend="triton"), outputs=("logprobs",), **needs)
    x = inputs(dtype, 3001, head=torch.float32)
    with Allocations() as allocations:
        _, grads, outputs = driver.fused(x, call, torch.empty((), device="meta"))
    by_right = sum(g.nbytes for g in grads.flat() if g is not None) + outputs.nbytes
    assert allocations.peak - by_right < (1 << 30) + 4 * 3001 * D + 64 * 4 * (T + V)  # hidden rows in both types
    driver.score(x, Call(config=call.config, outputs=("logprobs",)))


EXPLORATION = dk.ExplorationSpec(entropy_warmup=True)
TEACHERS = {
    "JSD": ("head", dk.DistillSpec(0.5), EXPLORATION),
    "KL(t‖s)": ("head", dk.DistillSpec(0.0), None),
    "top k": ("head", dk.DistillSpec(0.5, top_k=100, importance_clip=2.0), EXPLORATION),
    "renormalised": ("head", dk.DistillSpec(1.0, top_k=100, tail=False), None),
    "stored": ("ids", dk.DistillSpec(0.5), None),
    "sampled": ("sampled", dk.DistillSpec(1.0), None),
}


def lessons_and_teacher(dtype, kind, lora=False):
    def make(*shape, kind=torch.float32):
        return torch.empty(shape, dtype=kind, device="meta")

    heads = TeacherTensors(make(T, D, kind=dtype), make(V, D, kind=dtype), make(V), temperature=make(T))
    if lora:
        heads = dataclasses.replace(heads, lora_a=make(16, D, kind=dtype), lora_b=make(V, 16, kind=dtype))
    stored = TeacherTensors(ids=make(T, 100, kind=torch.int64), logprobs=make(T, 100))
    teacher = {"head": heads, "ids": stored, "sampled": TeacherTensors(sampled=make(T))}[kind]
    flags = [make(T, kind=torch.bool) for _ in range(2)]
    return DistillTokens(make(T), *flags, make(T), make(), make()), teacher


@pytest.mark.parametrize(("mode", "dtype"), list(zip(TEACHERS, DTYPES * 2)))
@pytest.mark.parametrize("workspace", [1 << 30, 384 << 20])
def test_a_policy_loss_and_a_distillation_read_nothing_back_and_keep_to_their_workspace(mode, dtype, workspace):
    kind, spec, exploration = TEACHERS[mode]
    config = dk.KernelConfig(backend="triton", workspace_bytes=workspace)
    needs = dict.fromkeys(("need_hidden", "need_weight", "need_bias"), True)
    student = Call(config=config, outputs=("logprobs", "divergence", "clipped"), **needs)
    call = DistillCall(student, spec, HeadOptions(softcap=30.0), 2.0, exploration, policy=True)
    lessons, teacher = lessons_and_teacher(dtype, kind, lora=mode == "JSD")
    x, normalizer = inputs(dtype, 3001), torch.empty((), device="meta")
    with Allocations() as allocations:
        loss, grads, outputs = distill_driver.fused(x, teacher, lessons, call, normalizer)
    assert loss.shape == ()
    assert outputs.shape == (3, T)
    by_right = sum(g.nbytes for g in grads.flat() if g is not None) + outputs.nbytes
    assert workspace // 2 < allocations.peak - by_right < workspace + 128 * 4 * (T + V)


@pytest.mark.parametrize("active", [None, 3001])
def test_a_teachers_top_k_reads_nothing_back(active):
    x = inputs(torch.bfloat16, active or T)
    x = x if active else dataclasses.replace(x, active=None)
    call = Call(config=dk.KernelConfig(backend="triton"))
    with Allocations() as allocations:
        ids, logprobs, rest = distill_driver.top_k(x, 100, call)
    assert (ids.shape, logprobs.shape, rest.shape) == ((T, 100), (T, 100), (T,))
    assert allocations.peak < (1 << 30) + ids.nbytes + logprobs.nbytes + 64 * 4 * (T + V)


def test_the_check_can_fail():
    """Without `active` the rows that count are looked up, which no tensor without memory can tell."""
    x = inputs(torch.bfloat16, T)
    everything = Inputs(x.hidden, x.weight, x.bias, x.targets, None, None, None, x.tokens)
    call = Call(config=dk.KernelConfig(backend="triton"), need_hidden=True)
    with pytest.raises(NotImplementedError):
        driver.fused(everything, call, torch.empty((), device="meta"))
    student = DistillCall(call, dk.DistillSpec(), HeadOptions())
    lessons, teacher = lessons_and_teacher(torch.bfloat16, "head")
    with pytest.raises(NotImplementedError):
        distill_driver.fused(everything, teacher, lessons, student, torch.empty((), device="meta"))
