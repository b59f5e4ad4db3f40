"""`torch.library.opcheck` on every registered op, with the arguments that the public ops give it, and all in one graph."""

from dataclasses import fields

import loose
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import drift_kernels as dk
from drift_kernels.calls import Call, DistillCall, HeadOptions, Share
from drift_kernels.spec import OBJECTIVES, PARAMETERS
from drift_kernels.testing import make_case

T, N, D, V = 20, 28, 5, 23
CASE = make_case(T, D, V, seed=1)
RANDOM = torch.Generator().manual_seed(0)
SEEN, HEAD = (torch.randn(n, 4, generator=RANDOM) for n in (T, V))
OLD, CU = torch.full((T,), -3.0), torch.tensor([0, 3, 14, 20])  # the second sequence is longer than a chunk of `FEW`
FEW = dk.KernelConfig(workspace_bytes=4 * 40 * 6)
SOME = {"active": torch.arange(0, T, 2), "temperature": torch.linspace(0.5, 2, T)}
SHARED = {
    "rows": torch.sort(torch.randint(0, T, (N,), generator=RANDOM)).values,
    "active": torch.arange(0, N, 3),
    "temperature": SOME["temperature"],
}
ENTRIES = {
    "targets": torch.randint(0, V, (N,), generator=RANDOM),
    "old_logprobs": torch.full((N,), -3.0),
    "segment_ids": torch.arange(N) // 8,
}


def lora(width, scale=0.5):
    return dk.LoRAHead(torch.randn(2, width, generator=RANDOM), torch.randn(V, 2, generator=RANDOM), scale)


def policy(h, w, b, preset="ppo", targets=CASE.targets, old_logprobs=OLD, **options):
    spec = dk.PolicySpec.preset(preset, kl_coef=0.1, entropy_coef=0.1, z_loss_coef=0.1)
    advantages = torch.ones(targets.shape)
    data = {"old_logprobs": old_logprobs, "ref_logprobs": old_logprobs, "token_weights": advantages, "config": FEW}
    outputs = ("logprobs", "ratio", "kl")
    return loose.policy_loss(
        h, dk.Head(w, bias=b), targets, advantages, spec=spec, outputs=outputs, **data, **options
    ).loss


def scores(h, w, b, targets=CASE.targets, **options):
    out = loose.linear_logprob(h, dk.Head(w, bias=b), targets, config=FEW, outputs=("lse", "is_top1"), **options)
    return out.logprobs.sum() + (0 if out.entropy is None else out.entropy.sum())


def distilled(h, w, b, teacher=None, **options):
    teacher = teacher or dk.Teacher(SEEN, HEAD)
    options = {"targets": CASE.targets, "bias": b, "config": FEW, "outputs": ("entropy", "divergence"), **options}
    return loose.distill_loss(h, w, teacher, CASE.token_weights, **options).loss


def hybrid(h, w, b, teacher=None, **options):
    teacher = teacher or dk.Teacher(SEEN, HEAD)
    data = {"distill_weights": CASE.token_weights, "policy_weights": None, "old_logprobs": OLD, "bias": b}
    return loose.self_distill_loss(h, w, CASE.targets, teacher, CASE.advantages, config=FEW, **data, **options).loss


EXPLORED = {
    "exploration": dk.ExplorationSpec(entropy_warmup=True),
    "turn_ids": torch.arange(T) // 4,
    "rebellious_weights": torch.ones(T),
    "mean_difference": 0.2,
    "mean_entropy": 3.0,
    "has_teacher": torch.arange(T) < 15,
    "outputs": ("rhythm", "gate", "teacher_entropy"),
}
LOW_RANK_TEACHER = dk.Teacher(
    SEEN, dk.Head(HEAD, bias=torch.randn(V, generator=RANDOM), lora=lora(4), temperature=SOME["temperature"])
)
KEPT = dk.topk_logprobs(SEEN, HEAD, 4)
SAMPLED = {"teacher": dk.TeacherLogprobs(OLD), "spec": dk.DistillSpec(1.0)}
CASES = {
    "cross entropy": lambda h, w, b: (
        loose.weighted_cross_entropy(h, dk.Head(w, lora=lora(D)), CASE.targets, **SOME).loss
    ),
    "policy": lambda h, w, b: policy(h, w, b, lora=lora(D)),
    "policy, some": lambda h, w, b: policy(h, w, None, **SOME),
    "policy, shared": lambda h, w, b: policy(h, w, b, **SHARED, **ENTRIES),
    "gspo": lambda h, w, b: policy(h, w, b, "gspo", cu_seqlens=CU),
    "gspo, shared": lambda h, w, b: policy(h, w, b, "gspo", lora=lora(D), **SHARED, **ENTRIES),
    "vespo, some": lambda h, w, b: policy(h, w, b, "vespo", cu_seqlens=CU, rollout_logprobs=OLD - 0.1, **SOME),
    "kl_cov": lambda h, w, b: policy(h, w, b, "kl_cov"),
    "clip_cov, shared": lambda h, w, b: policy(h, w, b, "clip_cov", **SHARED, **ENTRIES),
    "frozen": lambda h, w, b: policy(h, w.detach(), None, lora=lora(D)),
    "scores": lambda h, w, b: scores(h, w, b, entropy_gradient=True, lora=lora(D), **SOME),
    "scores, shared": lambda h, w, b: scores(h, w, b, targets=ENTRIES["targets"], **SHARED),
    "scores, frozen": lambda h, w, b: scores(h, w.detach(), b.detach(), **SOME),
    "distilled": lambda h, w, b: distilled(h, w, b, lora=lora(D), teacher=LOW_RANK_TEACHER, **SOME),
    "distilled, top k": lambda h, w, b: distilled(h, w, b, spec=dk.DistillSpec(0.3, 4, False)),
    "distilled, kept": lambda h, w, b: distilled(h, w, b, teacher=KEPT, **SOME),
    "distilled, sampled": lambda h, w, b: distilled(h, w, b, **SAMPLED),
    "hybrid": lambda h, w, b: hybrid(h, w, b, distill=dk.DistillSpec(0.3, importance_clip=2.0)),
    "hybrid, explored": lambda h, w, b: hybrid(h, w, b, **EXPLORED),
    "hybrid, everything": lambda h, w, b: hybrid(
        h, w, b, LOW_RANK_TEACHER, lora=lora(D), distill=dk.DistillSpec(0.3, 4), **EXPLORED, **SOME
    ),
    "hybrid, kept": lambda h, w, b: hybrid(h, w, None, KEPT, ref_logprobs=OLD, policy=dk.PolicySpec(kl_coef=0.1)),
    "top k": lambda h, w, b: loose.topk_logprobs(h, dk.Head(w, bias=b), 4, config=FEW, **SOME).logprobs,
}


class Recorder(TorchDispatchMode):
    """Calls of registered ops, (op, arguments)."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "drift_kernels":
            arguments = tuple(a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args)
            self.calls.append((func, arguments))
        return func(*args, **(kwargs or {}))


def record(case):
    with Recorder() as recorder:
        out = CASES[case](*CASE.leaves(torch.float32))
        if out.requires_grad:
            out.backward()
    return recorder.calls


@pytest.mark.parametrize("case", CASES)
def test_opcheck(case):
    calls = record(case)
    assert calls
    for op, arguments in calls:
        torch.library.opcheck(op, arguments)


def test_every_registered_op_is_among_them():
    checked = {op.name() for case in ("policy", "scores", "hybrid", "top k") for op, _ in record(case)}
    assert checked == {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("drift_kernels::")}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own tracer
def test_shared_rows_two_passes_and_a_kept_teacher_compile_as_one_graph():
    leaves = [t.double().requires_grad_() for t in (CASE.hidden, CASE.weight, CASE.bias)]

    def step(h, w, b, rows, targets, advantages, cu):
        shared = {"rows": rows, "active": SHARED["active"], "temperature": SHARED["temperature"], "config": FEW}
        old, segments = torch.full(targets.shape, -3.0), torch.arange(targets.numel()) // 8
        data = {"old_logprobs": old, "segment_ids": segments, "bias": b}
        ppo = loose.policy_loss(h, w, targets, advantages, spec=dk.PolicySpec(entropy_coef=0.1), **data, **shared)
        twice = loose.policy_loss(h, w, targets, advantages[:4], spec=dk.PolicySpec.preset("gspo"), **data, **shared)
        scores = loose.linear_logprob(h, w, targets, entropy_gradient=True, **shared)
        long = dk.policy_loss(
            h, w, CASE.targets, CASE.advantages, cu_seqlens=cu, spec=dk.PolicySpec.preset("gmpo"), config=FEW
        )
        kept = dk.topk_logprobs(h.detach() * 2, w.detach(), 4, config=FEW)
        taught = dk.distill_loss(h, dk.Head(w, bias=b), kept, kept.logprobs[:, 0].exp(), targets=kept.ids[:, 0])
        loss = ppo.loss + twice.loss + long.loss + taught.loss + scores.logprobs.square().sum() + scores.entropy.sum()
        return loss, kept.ids, kept.logprobs.exp().sum(-1) + kept.rest.exp()

    results = []
    data = (SHARED["rows"], ENTRIES["targets"], torch.linspace(-1, 1, N).double(), CU)
    for fn in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):  # without code for each part
        loss, *kept = fn(*leaves, *data)
        results.append((loss, *kept, *torch.autograd.grad(loss, leaves)))
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[1][2], torch.ones(T).double())


def other_than(default):
    """A value of its kind that is not the default, and that every check takes."""
    if isinstance(default, tuple):
        return tuple(1.5 * v for v in default)
    return 3.0 if default is None else 1.5 * default


def test_a_call_travels_as_text():
    """Every field of every part, in a value that is not its default."""
    specs = [
        dk.PolicySpec(
            clip_low=None,
            clip_high=0.3,
            kl_coef=0.1,
            kl_estimator="k1+",
            entropy_coef=0.2,
            z_loss_coef=0.3,
            aggregation="token_sum",
            kl_unbiased=True,
            off_policy_threshold=0.4,
        ),
        dk.PolicySpec(ratio="sequence", correction="token_mask", correction_bounds=(0.5, 3.0)),
    ]
    for name, row in OBJECTIVES.items():
        own = {parameter: other_than(PARAMETERS[parameter][0]) for parameter in row.parameters}
        specs.append(dk.PolicySpec(name, row.ratios[0], **own))
    head = HeadOptions(0.5, 3.0, 2.0, -1, Share("tensor", 5, 11, True))
    config = dk.KernelConfig("cpu", 99, True, 0.25)
    call = Call(specs[0], head, config, ("lse",), True, True, True, True, True, 2.0, 0.25)
    explored = dk.ExplorationSpec(3.0, False, False, 0.1, 2.0, 0.3, 2.0, 3.0, True)
    taught = DistillCall(call, dk.DistillSpec(0.3, 4, False, 2.0), head, 2.0, explored, True, True)
    for kind, told in ((Call, call), (DistillCall, taught), *((Call, Call(spec)) for spec in specs)):
        assert kind.decode(told.encode()) == told
    for parts in (specs, (head,), (config,), (call,), (explored,), (taught.distill,), (taught,)):
        for field in fields(parts[0]):
            assert any(getattr(part, field.name) != field.default for part in parts), field.name
