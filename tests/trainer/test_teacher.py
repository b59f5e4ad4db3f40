"""The teacher's weights: averages in float32 under a bf16 policy, put in place and taken away to the bit, and sharded."""

import doctest
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn

from drift.config import ModelConfig, TrainConfig
from drift.model.policy import load_policy
from drift.online import teacher
from drift.online.teacher import Teacher, TeacherConfig
from drift.training.optimizer import MasterAdamW

ROOT = Path(__file__).parent.parent.parent


def made(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3, bias=False)).to(dtype)
    model[0].bias.requires_grad_(False)
    return model


def walk(model, steps, size, follow=lambda: None, seed=1):
    """Random steps; returns the weights after each, as float64."""
    draw, path = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        with torch.no_grad():
            for p in model.parameters():
                p.add_((torch.randn(p.shape, generator=draw) * size).to(p.dtype))
        path.append({name: p.detach().double().clone() for name, p in model.named_parameters()})
        follow()
    return path


def shown(model, made_teacher):
    with made_teacher.weights():
        return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ema_is_the_weighted_sum_of_the_past(dtype):
    """Σ_k rate·(1 − rate)^(n−k)·θ_k + (1 − rate)^n·θ_0, in float64 from the weights themselves."""
    model = made(dtype)
    start = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    average = Teacher(model.named_parameters(), TeacherConfig())
    path = walk(model, 60, 0.01, lambda: average.update(finite=True))
    state = average.state_dict()["shadow"]
    assert set(state) == {"0.weight", "1.weight"}  # what is not trained needs no average
    for name, shadow in state.items():
        expected = 0.95**60 * start[name] + sum(0.05 * 0.95 ** (60 - k) * path[k - 1][name] for k in range(1, 61))
        assert shadow.dtype == torch.float32
        torch.testing.assert_close(shadow.double(), expected, rtol=0, atol=2e-6)
        assert float((path[-1][name] - expected).abs().max()) > 1e-3


def test_a_bf16_shadow_would_stand_still():
    """Steps of 5 % of a small gap are below half the distance of two bf16 neighbours; float32 keeps them."""
    model = nn.Linear(1, 64, bias=False).to(torch.bfloat16)
    nn.init.ones_(model.weight)
    average, low = Teacher(model.named_parameters(), TeacherConfig()), model.weight.detach().clone()
    with torch.no_grad():
        model.weight.fill_(1 + 2**-7)  # the next number
    for _ in range(100):
        average.update(finite=True)
        low.lerp_(model.weight.detach(), 0.05)
    assert torch.equal(low, torch.ones_like(low))
    expected = 1 + 2**-7 * (1 - 0.95**100)
    torch.testing.assert_close(
        average.state_dict()["shadow"]["weight"], torch.full((64, 1), expected), rtol=0, atol=1e-6
    )


def test_masters_are_followed_where_there_are_any():
    """bf16 weights that do not move under tiny steps have float32 masters that do."""
    model = made(torch.bfloat16)
    optimizer = MasterAdamW(model, TrainConfig())
    average = Teacher(model.named_parameters(), TeacherConfig(), optimizer.masters)
    with torch.no_grad():
        for master in optimizer.masters.values():
            master.add_(1e-5)
    before = {name: t.clone() for name, t in average.state_dict()["shadow"].items()}
    average.update(finite=True)
    for name, shadow in average.state_dict()["shadow"].items():
        torch.testing.assert_close(shadow - before[name], torch.full_like(shadow, 5e-7), rtol=0, atol=6e-8)
    with pytest.raises(ValueError, match=r"masters: '2.weight' of shape \[1\]"):
        Teacher(model.named_parameters(), TeacherConfig(), {"2.weight": torch.zeros(1)})


@pytest.mark.parametrize(
    ("settings", "share"),  # of the reference in what is shown, after the policy has moved
    [
        (TeacherConfig(weights="frozen"), 1.0),
        (TeacherConfig(weights="weight_mix", mix=0.25), 0.75),
        (TeacherConfig(weights="policy"), 0.0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_kinds(settings, share, dtype):
    model = made(dtype)
    reference = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    other = Teacher(model.named_parameters(), settings)
    path = walk(model, 5, 0.1, lambda: other.update(finite=True))
    for name, tensor in shown(model, other).items():
        expected = path[-1][name] if name == "0.bias" else share * reference[name] + (1 - share) * path[-1][name]
        torch.testing.assert_close(tensor.double(), expected.to(dtype).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_policy_is_back_to_the_bit_even_after_an_error(dtype):
    model = made(dtype)
    average = Teacher(model.named_parameters(), TeacherConfig())
    path = walk(model, 3, 0.1)
    pointers = [p.data_ptr() for p in model.parameters()]

    class Oops(Exception):
        pass

    def fails():
        assert not torch.equal(model[1].weight.double(), path[-1]["1.weight"])
        raise Oops

    with pytest.raises(Oops), average.weights():
        fails()
    for name, p in model.named_parameters():
        assert torch.equal(p.detach().double(), path[-1][name])
    assert [p.data_ptr() for p in model.parameters()] == pointers  # optimizers hold these


def test_only_a_finite_update_counts():
    model = made()
    average = Teacher(model.named_parameters(), TeacherConfig())
    walk(model, 1, 0.1)
    before = {name: t.clone() for name, t in average.state_dict()["shadow"].items()}
    gap = sum(float((p.detach() - before[n]).square().sum()) for n, p in model.named_parameters() if n in before)
    average.update(finite=False)
    assert all(torch.equal(before[name], t) for name, t in average.state_dict()["shadow"].items())
    measured = average.metrics()
    assert (measured["updates"], measured["skipped"]) == (0, 1)
    assert measured["distance"] == pytest.approx(gap**0.5, rel=1e-5)
    average.update(finite=True)
    assert average.metrics()["distance"] == pytest.approx(0.95 * gap**0.5, rel=1e-5)


def test_state_goes_to_a_new_teacher():
    model = made()
    average = Teacher(model.named_parameters(), TeacherConfig())
    walk(model, 4, 0.1, lambda: average.update(finite=True))
    again = Teacher(model.named_parameters(), TeacherConfig())
    saved = {**average.state_dict(), "shadow": {n: t.clone() for n, t in average.state_dict()["shadow"].items()}}
    again.load_state_dict(saved)
    walk(model, 3, 0.1, lambda: (average.update(finite=True), again.update(finite=True)))
    for name, shadow in average.state_dict()["shadow"].items():
        assert torch.equal(shadow, again.state_dict()["shadow"][name])
    assert average.metrics() == again.metrics()
    with pytest.raises(ValueError, match=r"1 names differ from this policy's, such as '1.weight'"):
        again.load_state_dict({**saved, "shadow": {"0.weight": saved["shadow"]["0.weight"]}})
    own = Teacher(model.named_parameters(), TeacherConfig(weights="policy"))
    assert own.state_dict()["shadow"] == {}
    assert own.metrics() == {"updates": 0, "skipped": 0}


def test_lora_averages_each_factor_and_leaves_the_base():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 6, bias=False))
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=4, target_modules=["0"]))
    average = Teacher(model.named_parameters(), TeacherConfig(rate=0.5))
    assert len(average.state_dict()["shadow"]) == 2
    x, before = torch.randn(3, 6), base[0].base_layer.weight.detach().clone()
    factors = {n: p for n, p in model.named_parameters() if p.requires_grad}
    start = {n: p.detach().clone() for n, p in factors.items()}
    with torch.no_grad():
        for p in factors.values():
            p.add_(torch.randn_like(p))
    average.update(finite=True)
    a, b = (next((start[n] + factors[n].detach()) / 2 for n in factors if key in n) for key in ("lora_A", "lora_B"))
    with average.weights(), torch.no_grad():
        torch.testing.assert_close(model(x), x @ (before + 2.0 * b @ a).T, rtol=1e-4, atol=1e-5)
    assert torch.equal(base[0].base_layer.weight, before)


def test_a_tied_head_teaches_too():
    """The tiny policy's head is its embedding: one parameter, swapped once, restored once."""
    policy = load_policy(ModelConfig(hidden_size=8, layers=1, heads=1))
    frozen = Teacher(policy.model.named_parameters(), TeacherConfig(weights="frozen"))
    first = policy.hash()
    walk(policy.model, 1, 0.1)
    second = policy.hash()
    with frozen.weights():
        assert policy.hash() == first
        assert policy.head().weight is policy.model.get_input_embeddings().weight
    assert policy.hash() == second != first


def main():
    """One of two ranks: parameters sharded over them, one not evenly, against the same in one piece."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    whole, placements = made(), {"0.weight": Shard(0), "1.weight": Shard(1), "0.bias": Replicate()}
    for settings in (TeacherConfig(), TeacherConfig(weights="weight_mix", mix=0.3)):
        pieces = {
            name: nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [placements[name]]), p.requires_grad)
            for name, p in whole.named_parameters()
        }
        ours, theirs = Teacher(pieces.items(), settings), Teacher(whole.named_parameters(), settings)
        for step in range(3):
            walk(whole, 1, 0.1, seed=step)
            with torch.no_grad():
                for name, p in whole.named_parameters():
                    pieces[name].copy_(distribute_tensor(p.detach(), mesh, [placements[name]]))
            ours.update(finite=True)
            theirs.update(finite=True)
        before = {name: p.full_tensor().detach().clone() for name, p in pieces.items()}
        expected = shown(whole, theirs)
        with ours.weights():
            for name, p in pieces.items():
                assert isinstance(p, DTensor)
                torch.testing.assert_close(p.full_tensor().detach(), expected[name], rtol=0, atol=0)
        assert all(torch.equal(p.full_tensor(), before[name]) for name, p in pieces.items())
        assert abs(ours.metrics()["distance"] - theirs.metrics()["distance"]) < 1e-5
    dist.destroy_process_group()
    print("agreed")


def test_sharded_parameters_over_two_ranks():
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'support'}"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("agreed") == 2


def test_the_example_runs():
    torch.manual_seed(0)
    assert doctest.testmod(teacher) == doctest.TestResults(failed=0, attempted=7)


if __name__ == "__main__":
    main()
