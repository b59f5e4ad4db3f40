"""The whole op path on the Triton backend in the interpreter: the GPU pass, kernels, products, autograd, against float64."""

import math

import loose
import pytest
import torch

import drift_kernels as dk
from drift_kernels import cpu_sweep, gpu_sweep, sweeps
from drift_kernels.calls import Call
from drift_kernels.plan import Plan
from drift_kernels.testing import gradients, make_case, off_the_edges, within_budget

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
T, D, V, BLOCK = 90, 24, 203, 10
OUTPUTS = ("logprobs", "entropy", "lse", "is_top1", "mean_logits", "log_sum_sq_probs")
POLICY_OUTPUTS = (*OUTPUTS, "ratio", "kl", "clipped")


def config(dtype: torch.dtype = torch.float32, **options) -> dk.KernelConfig:
    """A workspace of ten rows of logits and a gradient buffer of forty."""
    size, width = dtype.itemsize, gpu_sweep.padded(V)
    row = size * width + D * (size + 4)
    return dk.KernelConfig(
        backend="triton", workspace_bytes=BLOCK * (4 * width + D * size) + 4 * BLOCK * row, **options
    )


REFERENCE = dk.KernelConfig(backend="reference")
SPECS = {
    "dapo": dk.PolicySpec.preset("dapo"),
    "grpo": dk.PolicySpec.preset("grpo", kl_coef=0.1, entropy_coef=0.05, z_loss_coef=0.01),
    "cispo": dk.PolicySpec.preset("cispo"),
    "dppo": dk.PolicySpec.preset("dppo_tv", clip_low=1e-3, clip_high=1e-3),
    "gspo": dk.PolicySpec.preset("gspo", clip_low=0.2, clip_high=0.2),
    "gmpo": dk.PolicySpec.preset("gmpo", entropy_coef=0.02),
    "kl_cov": dk.PolicySpec.preset("kl_cov", cov_share=0.05),
    "corrected": dk.PolicySpec(correction="sequence_mask", correction_bounds=(0.5, 2.0)),
}


def close(names, actual, own, exact, dtype, scale=1.0):
    for name, a, o, e in zip(names, actual, own, exact):
        loose = name == "loss"
        bounds = (torch.float32, max(scale, math.log(V))) if loose else (dtype, None)
        ok, line = within_budget(a, o, e, *bounds)
        assert ok, f"{name}: {line}"


def three(loss, case, dtype):
    """(loss, gradients) by Triton, by torch in the same dtype, and exactly."""
    own, exact = (gradients(lambda h, w, b: loss(h, w, b, REFERENCE), case.leaves(d)) for d in (dtype, torch.float64))
    return gradients(lambda h, w, b: loss(h, w, b, config(dtype)), case.leaves(dtype)), own, exact


NAMES = ("loss", "hidden", "weight", "bias")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [0.0, 0.4])
def test_weighted_cross_entropy(dtype, masked):
    case = make_case(T, D, V, dtype=dtype, masked=masked)
    weights = case.token_weights + (0.1 if masked == 0 else 0.0)

    def loss(h, w, b, config):
        options = {"bias": b, "softcap": 2.0, "temperature": 0.7, "config": config}
        return loose.weighted_cross_entropy(h, w, case.targets, weights, **options).loss

    close(NAMES, *three(loss, case, dtype), dtype)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_policy_loss(name, dtype):
    spec, case = SPECS[name], make_case(T, D, V, dtype=dtype, seed=1)
    with torch.no_grad():
        exact = dk.linear_logprob(
            case.hidden, dk.Head(case.weight, bias=case.bias), case.targets, config=REFERENCE
        ).logprobs
    margin = 1e-3 if dtype == torch.float32 else 0.05
    data = {
        "old_logprobs": off_the_edges(exact + case.noise, exact, (0.8, 1.2, 1.28), margin),
        "ref_logprobs": exact + 0.5 * case.noise.roll(1),
        "rollout_logprobs": exact + 0.9 * case.noise,
        "cu_seqlens": torch.tensor([0, 9, 10, 40, T]),
        "token_weights": case.token_weights,
    }
    if not spec.correction:
        del data["rollout_logprobs"]

    def loss(h, w, b, config):
        return loose.policy_loss(
            h, dk.Head(w, bias=b), case.targets, case.advantages, spec=spec, config=config, **data
        ).loss

    actual, own, exact = three(loss, case, dtype)
    close(NAMES, actual, own, exact, dtype, scale=max(1.0, float(exact[0].abs())))


@pytest.mark.parametrize("head", [{}, {"softcap": 3.0, "logit_scale": 1.3, "temperature": 0.6}, {"temperature": "row"}])
def test_every_output(head):
    case = make_case(T, D, V, seed=2)
    if head:
        head = {"temperature": torch.linspace(0.5, 2.0, T)} if head["temperature"] == "row" else head
    data = {"old_logprobs": torch.full((T,), -5.0), "ref_logprobs": torch.full((T,), -5.2)}
    found = []
    for dtype, chosen in ((torch.float32, config()), (torch.float64, REFERENCE)):
        h, w, b = case.leaves(dtype)
        options = {"bias": b, "outputs": POLICY_OUTPUTS, "config": chosen, **data, **head}
        found.append(loose.policy_loss(h, w, case.targets, case.advantages.to(dtype), **options))
    for name in POLICY_OUTPUTS:
        torch.testing.assert_close(found[0].outputs[name].double(), found[1].outputs[name], rtol=3e-5, atol=3e-5)
    for name, (total, count) in found[0].metrics.items():
        torch.testing.assert_close(total.double(), found[1].metrics[name][0].double(), rtol=1e-4, atol=1e-4)
        assert count == found[1].metrics[name][1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entropy", [False, True])
def test_linear_logprob_under_a_loss_of_ones_own(dtype, entropy):
    case = make_case(T, D, V, dtype=dtype, seed=3)

    def loss(h, w, b, config):
        out = dk.linear_logprob(h, dk.Head(w, bias=b), case.targets, entropy_gradient=entropy, config=config)
        total = (out.logprobs * case.advantages.to(out.logprobs.dtype)).sum()
        return total + 0.1 * out.entropy.square().sum() if entropy else total

    actual, own, exact = three(loss, case, dtype)
    close(NAMES, actual, own, exact, dtype, scale=float(T))


def test_a_frozen_head_keeps_the_jacobian():
    case = make_case(T, D, V, seed=4)

    def run(dtype, chosen):
        h, w, b = case.leaves(dtype)
        out = dk.linear_logprob(h, dk.Head(w.detach(), bias=b.detach()), case.targets, config=chosen).logprobs
        return torch.autograd.grad((out * case.advantages.to(dtype)).sum(), h)[0]

    torch.testing.assert_close(
        run(torch.float32, config()).double(), run(torch.float64, REFERENCE), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_pointwise_loss(dtype):
    case = make_case(T, D, V, dtype=dtype, seed=5)

    def loss(h, w, b, config):
        def focal(logp, advantages):
            return -advantages * logp * (1 - logp.exp()) ** 2

        data = case.advantages.to(torch.float64 if h.dtype == torch.float64 else torch.float32)
        return dk.pointwise_loss(h, dk.Head(w, bias=b, softcap=4.0), case.targets, focal, data, config=config).loss

    close(NAMES, *three(loss, case, dtype), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_targets_a_row(dtype):
    case = make_case(50, D, V, dtype=dtype, seed=6)
    g = torch.Generator().manual_seed(0)
    owner = torch.sort(torch.randint(0, 50, (120,), generator=g)).values
    targets = torch.randint(0, V, (120,), generator=g)
    targets[::7] = -100
    advantages = torch.randn(120, generator=g)
    spec = dk.PolicySpec(entropy_coef=0.05, z_loss_coef=0.01)

    def loss(h, w, b, config):
        options = {"rows": owner, "bias": b, "spec": spec, "config": config, "temperature": 0.8}
        policy = loose.policy_loss(h, w, targets, advantages.to(h.dtype), **options).loss
        logprobs = dk.linear_logprob(h, dk.Head(w, bias=b), targets, rows=owner, entropy_gradient=True, config=config)
        return policy + logprobs.logprobs.mean() + logprobs.entropy.square().mean()

    close(NAMES, *three(loss, case, dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_lora_head(dtype):
    case = make_case(T, D, V, dtype=dtype, seed=7)
    g = torch.Generator().manual_seed(0)
    A, B = (torch.randn(*size, generator=g).to(dtype) * 0.2 for size in ((4, D), (V, 4)))

    def run(kind, chosen):
        h, w = (t.to(kind) for t in (case.hidden, case.weight))
        leaves = [t.to(kind).clone().requires_grad_() for t in (h, A, B)]
        lora = dk.LoRAHead(leaves[1], leaves[2], 0.5)
        out = dk.weighted_cross_entropy(leaves[0], dk.Head(w, lora=lora), case.targets, config=chosen)
        return (out.loss.detach(), *torch.autograd.grad(out.loss, leaves))

    actual, own, exact = run(dtype, config(dtype)), run(dtype, REFERENCE), run(torch.float64, REFERENCE)
    for name, a, o, e in zip(("loss", "hidden", "A", "B"), actual, own, exact):
        # the low-rank part passes through one more rounding to the inputs' type
        ok, line = within_budget(a, o, e, dtype, 4 * float(e.abs().max()))
        assert ok, f"{name}: {line}"


def test_fp16_gradients_do_not_underflow_before_they_are_summed():
    """Most of a gradient row is smaller than fp16's least number once a large normaliser divides it."""
    case = make_case(T, D, V, dtype=torch.float16, seed=8, masked=0.0)

    def loss(h, w, b, config):
        return dk.weighted_cross_entropy(h, dk.Head(w, bias=b), case.targets, normalizer=1e6, config=config).loss * 1e6

    actual, own, exact = three(loss, case, torch.float16)
    close(NAMES, actual, own, exact, torch.float16, scale=float(exact[0]))


@pytest.mark.parametrize("entries", ["rows", "one each"])
def test_active_rows_are_taken_without_reading_the_targets(entries, monkeypatch):
    case = make_case(T, D, V, seed=9)
    active = (case.targets >= 0).nonzero().squeeze(1)[::2]
    active = torch.cat([active, torch.tensor([t for t in range(T) if case.targets[t] < 0][:5])]).sort().values
    planned = []
    monkeypatch.setattr(Plan, "of", lambda *args: planned.append(args))
    monkeypatch.setattr(cpu_sweep, "check_targets", lambda *args: planned.append(args))
    h, w, b = case.leaves(torch.float32)
    out = dk.policy_loss(
        h, dk.Head(w, bias=b), case.targets, case.advantages, active=active, outputs=OUTPUTS, config=config()
    )
    grads = torch.autograd.grad(out.loss, (h, w, b))
    assert not planned
    monkeypatch.undo()
    leaves = case.leaves(torch.float64)
    exact = dk.policy_loss(
        leaves[0],
        dk.Head(leaves[1], bias=leaves[2]),
        case.targets,
        case.advantages,
        active=active,
        outputs=OUTPUTS,
        config=REFERENCE,
    )
    wanted = torch.autograd.grad(exact.loss, leaves)
    for name in OUTPUTS:
        torch.testing.assert_close(out.outputs[name].double(), exact.outputs[name], rtol=3e-5, atol=3e-5)
    for a, e in zip(grads, wanted):
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-5)


def test_an_ignored_index_inside_the_vocabulary_takes_no_part():
    case = make_case(T, D, V, seed=10, masked=0.0)
    targets = case.targets.clone()
    targets[::3] = 7
    active = torch.arange(0, T, 2)
    results = []
    for dtype, chosen in ((torch.float32, config()), (torch.float64, REFERENCE)):
        h, w, b = case.leaves(dtype)
        loss = dk.weighted_cross_entropy(h, dk.Head(w, bias=b), targets, active=active, config=chosen).loss
        results.append((loss, *torch.autograd.grad(loss, (h, w, b))))
    for a, e in zip(*results):
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-5)


def test_a_target_outside_the_vocabulary_is_nan():
    case = make_case(T, D, V, seed=11, masked=0.0)
    for bad in (V, -7):
        targets = case.targets.clone()
        targets[5] = bad
        h, w, b = case.leaves(torch.float32)
        assert bool(dk.weighted_cross_entropy(h, dk.Head(w, bias=b), targets, config=config()).loss.isnan())


def test_nothing_active_is_zero():
    case = make_case(10, D, V, seed=12)
    h, w, b = case.leaves(torch.bfloat16)
    out = dk.weighted_cross_entropy(h, dk.Head(w, bias=b), torch.full((10,), -100), config=config(torch.bfloat16))
    grads = torch.autograd.grad(out.loss, (h, w, b))
    assert float(out.loss.detach()) == 0
    assert all(bool((g == 0).all()) for g in grads)


def test_accumulating_into_grad_adds_to_what_is_there():
    case = make_case(T, D, V, seed=13)
    results = []
    for dtype, chosen in ((torch.float32, config(accumulate_into_grad=2.0)), (torch.float64, REFERENCE)):
        h, w, b = case.leaves(dtype)
        w.grad = torch.ones_like(w)
        loss = dk.weighted_cross_entropy(h, dk.Head(w, bias=b), case.targets, config=chosen).loss
        (2.0 * loss).backward()
        results.append((h.grad, w.grad, b.grad))
    for a, e in zip(*results):
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-5)


def test_results_repeat_bitwise_and_evaluation_needs_no_gradient_buffer():
    case = make_case(T, D, V, dtype=torch.bfloat16, seed=14)

    def run():
        h, w, b = case.leaves(torch.bfloat16)
        loss = dk.weighted_cross_entropy(h, dk.Head(w, bias=b), case.targets, config=config(torch.bfloat16)).loss
        return (loss, *torch.autograd.grad(loss, (h, w, b)))

    assert all(torch.equal(a, b) for a, b in zip(run(), run()))
    with torch.no_grad():
        h, w, b = case.leaves(torch.bfloat16)
        loss = dk.weighted_cross_entropy(h, dk.Head(w, bias=b), case.targets, config=config(torch.bfloat16)).loss
    torch.testing.assert_close(loss, run()[0])


def test_float64_is_refused_by_name():
    case = make_case(10, D, V)
    with pytest.raises(TypeError, match=r"backend='triton' computes in float32.*float64"):
        dk.weighted_cross_entropy(*case.leaves(torch.float64)[:2], case.targets, config=config())


def test_the_registered_op_passes_opcheck():
    case = make_case(20, D, V, seed=15)
    h, w, b = case.leaves(torch.float32)
    call = Call(config=config(), outputs=("logprobs",))
    torch.library.opcheck(
        torch.ops.drift_kernels.score,
        (h.detach(), w.detach(), b.detach(), None, None, case.targets, None, None, None, call.encode()),
        test_utils=("test_schema", "test_faketensor"),
    )
    for op in ("fused", "score", "logprob_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"drift_kernels::{op}", "CUDA")


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("workspace", [1, 1 << 20, 64 << 20, 1 << 30, 4 << 30])
@pytest.mark.parametrize("need_grad", [False, True])
def test_block_and_buffer_fit_the_workspace(workspace, itemsize, need_grad):
    V, D = 151_936, 4096
    staged, room = gpu_sweep.capacity(workspace, V, D, itemsize, need_grad)
    used = staged * (4 * gpu_sweep.padded(V) + D * itemsize) + room * (
        itemsize * gpu_sweep.padded(V) + D * (itemsize + 4)
    )
    assert staged >= 1
    assert used <= workspace or staged == 1
    if workspace == 1 << 30 and need_grad and itemsize == 2:
        assert staged == 512
        assert room >= 2048


def test_products_run_once_a_buffer(monkeypatch):
    """T rows, and room for forty: dweight is added to as often as that takes, and no more, by equal buffers."""
    case, calls = make_case(T, D, V, seed=16, masked=0.0), []
    original = gpu_sweep.multiply
    monkeypatch.setattr(
        gpu_sweep, "multiply", lambda a, b, out, **k: calls.append((*a.shape, k)) or original(a, b, out, **k)
    )
    h, w, b = case.leaves(torch.float32)
    dk.weighted_cross_entropy(h, dk.Head(w, bias=b), case.targets, config=config()).loss.backward()
    weight = [shape for shape in calls if shape[0] == V]
    assert [shape[1] for shape in weight] == [30, 30, 30]
    assert sweeps.GpuSweep is gpu_sweep.GpuSweep


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_fp32_head_under_narrower_hidden_states(dtype):
    """Master weights: products and gradients in fp32."""
    case = make_case(T, D, V, seed=17)

    def run(kinds, chosen):
        h, w = (t.to(dtype).to(kind).requires_grad_() for t, kind in zip((case.hidden, case.weight), kinds))
        loss = dk.weighted_cross_entropy(h, dk.Head(w, softcap=3.0), case.targets, config=chosen).loss
        scores = dk.linear_logprob(h, w, case.targets, config=chosen).logprobs
        return (loss.detach(), *torch.autograd.grad(loss - scores.mean(), (h, w)))

    exact = run((torch.float64, torch.float64), REFERENCE)
    found = run((dtype, torch.float32), config(dtype))
    for a, e in zip(found, exact):
        tolerance = torch.finfo(a.dtype).eps if a.dtype == dtype else 1e-5
        torch.testing.assert_close(a.double(), e, rtol=tolerance, atol=tolerance * float(e.abs().max()))
