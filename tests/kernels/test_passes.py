"""What each loss costs, by counting the rows that go through each matrix product: the table of docs/losses.md."""

import loose
import pytest
import torch
from count_products import clear, room_for, watch_products
from preset_specs import PRESET_SPECS

import drift_kernels as dk
from drift_kernels.testing import make_case

T, D, V = 40, 9, 61
CASE = make_case(T, D, V, seed=2)
CU = torch.tensor([0, 12, 13, 30, 40])
SEGMENTS = torch.repeat_interleave(torch.arange(4), CU.diff())
MASK, WEIGHTS = CASE.targets >= 0, CASE.token_weights
ADVANTAGES = CASE.advantages.clone()
ADVANTAGES[12] = 0  # of a sequence of one token
OLD = torch.full((T,), -4.2, dtype=torch.float64)
TEACHER = [torch.randn(n, 5, generator=torch.Generator().manual_seed(n)).double() for n in (T, V)]
TAUGHT = torch.arange(T) % 4 != 0
TURNS = torch.arange(T) // 5

SPECS = PRESET_SPECS | {
    "terms": dk.PolicySpec(kl_coef=0.1, entropy_coef=0.05, z_loss_coef=0.01),
    "dppo, tight": dk.PolicySpec.preset("dppo_tv", clip_low=1e-3, clip_high=1e-3),
    "token correction": dk.PolicySpec(correction="token_truncate"),
    "sequence correction": dk.PolicySpec(correction="sequence_truncate"),
    "gspo, corrected": dk.PolicySpec.preset("gspo", correction="sequence_truncate"),
    "off-policy": dk.PolicySpec(off_policy_threshold=0.1),
}
FUNCTIONS = {
    "square": lambda logp, A: A * logp.square(),
    "focal": lambda logp, A: -A * logp * (1 - logp.exp()) ** 2,
    "hinge": lambda logp, A: torch.where(A > 0, (-4 - logp).clamp(min=0), 0.0),
}


@pytest.fixture
def seen(monkeypatch):
    return watch_products(monkeypatch)


def leaves(dtype=torch.float64, frozen=False):
    h, w, _ = CASE.leaves(dtype)
    return h, w.requires_grad_(not frozen)


def policy_loss(h, w, spec, config, **options):
    data = {"old_logprobs": OLD, "ref_logprobs": OLD, "rollout_logprobs": OLD + CASE.noise, "token_weights": WEIGHTS}
    data |= {"cu_seqlens": CU, "config": config, "generator": torch.Generator().manual_seed(0)}
    return loose.policy_loss(h, w, CASE.targets, ADVANTAGES, spec=spec, **data, **options).loss


LORA = dk.LoRAHead(torch.ones(2, D).double().requires_grad_(), torch.ones(V, 2).double().requires_grad_(), 0.1)


def live_rows(loss, h, w, *args, **options):
    """Rows with a gradient, as autograd through full logits finds them."""
    config = dk.KernelConfig(backend="reference")
    out = loss(h, w, *args, **options | {"config": config})
    (dhidden,) = torch.autograd.grad(out if isinstance(out, torch.Tensor) else out.loss, h)
    return int((dhidden != 0).any(1).sum())


def read_rows(spec):
    """Rows that a policy loss reads, of `policy_loss` above."""
    counts = MASK & (WEIGHTS != 0)
    if spec.vanishes:
        counts &= ADVANTAGES != 0
    if spec.scope == "token":
        return int(counts.sum())
    if spec.scope == "sequence":
        return int((MASK & torch.isin(SEGMENTS, SEGMENTS[counts])).sum())
    return int(MASK.sum())


def costs(read, live, frozen, passes=1):
    again = live if passes == 2 else 0
    return {"logits": read + again, "teacher": 0, "dhidden": live, "dweight": 0 if frozen else live}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])  # torch's products and ours
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_policy_losses(name, frozen, dtype, seen):
    """Chunks for all rows, for the longest sequence, and for less than any that counts."""
    spec = SPECS[name]
    read, live = read_rows(spec), live_rows(policy_loss, *leaves(), spec)
    assert live > 0
    for rows, passes in zip((T, 17, 3), {"token": (1, 1, 1), "sequence": (1, 1, 2), "batch": (1, 2, 2)}[spec.scope]):
        h, w = leaves(dtype, frozen)
        clear(seen)
        loss = policy_loss(h, w, spec, room_for(rows, h, w))
        assert seen == costs(read, live, frozen, passes), f"chunks of {rows} rows"
    clear(seen)
    torch.autograd.grad(loss, h)
    with torch.no_grad():
        policy_loss(h, w, spec, room_for(T, h, w))
    assert seen == costs(read, 0, frozen), "backward makes no product, nor does evaluation for a gradient"


@pytest.mark.parametrize("name", ["ppo", "gspo", "kl_cov"])
def test_a_lora_head_costs_what_its_frozen_weight_does(name, seen):
    h, w = leaves(frozen=True)
    policy_loss(h, dk.Head(w, lora=LORA), SPECS[name], room_for(T, h, w)).backward()
    assert LORA.B.grad is not None
    assert seen == costs(read_rows(SPECS[name]), live_rows(policy_loss, h, w, SPECS[name], lora=LORA), frozen=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ["weighted_cross_entropy", *FUNCTIONS])
def test_losses_of_single_tokens(name, frozen, dtype, seen):
    h, w = leaves(dtype, frozen)
    if name in FUNCTIONS:
        loss, read, data = dk.pointwise_loss, MASK, (CASE.targets, FUNCTIONS[name], ADVANTAGES)
    else:
        loss, read, data = dk.weighted_cross_entropy, MASK & (WEIGHTS != 0), (CASE.targets, WEIGHTS)
    loss(h, w, *data, config=room_for(5, h, w))
    read, live = int(read.sum()), live_rows(loss, h, w, *data)
    assert (0 < live < read) == (name in FUNCTIONS)  # which have no gradient where A = 0
    assert seen == costs(read, live, frozen)


def sequence_ratio(logprobs):
    means = torch.zeros(4).double().index_add(0, SEGMENTS, logprobs - OLD) / CU.diff()
    return (means.exp() * torch.tensor([1.0, 2.0, -1.0, 0.0])).sum()


def test_linear_logprob_makes_logits_again_for_rows_with_a_gradient(seen):
    h, w = leaves()
    loss = sequence_ratio(dk.linear_logprob(h, w, CASE.targets, config=room_for(5, h, w)).logprobs)
    assert seen == costs(int(MASK.sum()), 0, False)
    live = int((MASK & (SEGMENTS < 3)).sum())
    torch.autograd.grad(loss, (h, w))
    assert seen == costs(int(MASK.sum()), live, False, passes=2)


ACTIVE = {"active": torch.arange(0, T, 2), "temperature": torch.linspace(0.5, 2, T)}


@pytest.mark.parametrize(
    ("options", "keeps"),
    [
        pytest.param({}, True, id="plain"),
        pytest.param(ACTIVE, True, id="some rows"),
        pytest.param({"entropy_gradient": True}, False, id="entropy"),
        pytest.param({"rows": torch.arange(T)}, False, id="rows"),
        pytest.param({"lora": LORA}, False, id="lora that is trained"),
    ],
)
def test_linear_logprob_on_a_frozen_head(options, keeps, seen):
    """It keeps ∂logp/∂hidden, and then backward makes no product whatever the loss; else it makes logits again."""
    h, w = leaves(frozen=True)
    read = MASK if "active" not in options else MASK & (torch.arange(T) % 2 == 0)
    read, live = int(read.sum()), int((read & (SEGMENTS < 3)).sum())
    logprobs = loose.linear_logprob(h, w, CASE.targets, config=room_for(5, h, w), **options).logprobs
    assert seen == costs(read, read if keeps else 0, frozen=True)
    torch.autograd.grad(sequence_ratio(logprobs), h)
    assert seen == (costs(read, read, True) if keeps else costs(read, live, True, passes=2))


STORED = dk.topk_logprobs(*TEACHER, 6)
LESSONS = {
    "full": (dk.Teacher(*TEACHER), dk.DistillSpec(0.3)),
    "forward": (dk.Teacher(*TEACHER), dk.DistillSpec(0.0)),
    "top_k": (dk.Teacher(*TEACHER), dk.DistillSpec(1.0, 5)),
    "stored": (STORED, dk.DistillSpec(0.3, tail=False)),
    "sampled": (dk.TeacherLogprobs(OLD), dk.DistillSpec(1.0)),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", LESSONS)
def test_distillation(name, frozen, seen):
    h, w = leaves(frozen=frozen)
    teacher, spec = LESSONS[name]
    options = {"targets": CASE.targets, "spec": spec, "config": room_for(9, h, w)}
    loose.distill_loss(h, w, teacher, WEIGHTS, **options)
    read = int((MASK & (WEIGHTS != 0)).sum())
    assert live_rows(dk.distill_loss, h, w, teacher, WEIGHTS, **options) == read
    assert seen == costs(read, read, frozen) | {"teacher": read if isinstance(teacher, dk.Teacher) else 0}


EXPLORED = {"exploration": dk.ExplorationSpec(entropy_warmup=True), "turn_ids": TURNS, "mean_difference": 0.2}
EXPLORED |= {"rebellious_weights": torch.ones(T).double(), "mean_entropy": 3.0}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", [*LESSONS, "full, explored", "top_k, explored"])
def test_policy_and_distillation_together(name, dtype, seen):
    """Where every row has both terms: student's logits, teacher's, dhidden and dweight once a row, which is 8 units."""
    (teacher, spec), options = LESSONS[name.split(",")[0]], EXPLORED if "explored" in name else {}
    h, w = leaves(dtype)
    if isinstance(teacher, dk.Teacher):
        teacher = dk.Teacher(*(t.to(dtype) for t in TEACHER))
    data = (CASE.targets.abs() % V, teacher, torch.ones(T).double())
    weights = {"distill_weights": None, "policy_weights": None}
    common = {**weights, "distill": spec, "config": room_for(9, h, w), **options}
    with_head = T if isinstance(teacher, dk.Teacher) else 0
    loose.self_distill_loss(h, w, *data, **common)
    assert live_rows(loose.self_distill_loss, h, w, *data, **common) == T
    assert seen == costs(T, T, False) | {"teacher": with_head}
    clear(seen)
    loose.self_distill_loss(h, w.detach(), *data, **common)
    assert seen == costs(T, T, True) | {"teacher": with_head}


@pytest.mark.parametrize("options", [{}, EXPLORED], ids=["plain", "explored"])
def test_policy_and_distillation_apart(options, seen):
    """A row goes through the products of what reads it: the teacher's where it is taught, gradients where there is one."""
    h, w = leaves()
    distill_weights, policy_weights = WEIGHTS.roll(3), WEIGHTS
    common = {"old_logprobs": OLD, "has_teacher": TAUGHT, "config": room_for(9, h, w), **options}
    common |= {"distill_weights": distill_weights, "policy_weights": policy_weights}
    data = (CASE.targets, dk.Teacher(*TEACHER), ADVANTAGES)
    loose.self_distill_loss(h, w, *data, **common)
    taught = MASK & TAUGHT & ((distill_weights != 0) | bool(options))
    read = taught | (MASK & (policy_weights != 0) & (ADVANTAGES != 0))
    live = live_rows(loose.self_distill_loss, h, w, *data, **common)
    assert 0 < taught.sum() < read.sum() < MASK.sum()
    assert live < read.sum()
    assert seen == costs(int(read.sum()), live, False) | {"teacher": int(taught.sum())}
