"""`adapters.trl.enable`: TRL's trainers with and without it, and the swapped function against TRL's own."""

from __future__ import annotations

import math

import peers
import pytest
import tiny
import torch
import trl
import trl.trainer.utils as utils
from peft import LoraConfig

from drift_kernels.adapters import trl as adapter

ORIGINAL = utils._ChunkedLogProbFunction
ALL = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@pytest.fixture(autouse=True)
def _restored():
    yield
    adapter.disable()
    assert utils._ChunkedLogProbFunction is ORIGINAL


def common(path, **changes) -> dict:
    settings = dict(
        output_dir=str(path),
        max_steps=10,
        learning_rate=1e-3,
        adam_epsilon=1e-4,  # some gradients are zero but for rounding, which Adam would blow up
        per_device_train_batch_size=4,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        bf16=False,
        seed=7,
        dataloader_pin_memory=False,
        activation_checkpointing=False,
    )
    return settings | changes


def lora(**changes) -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **changes)


def sft(path, model=None, peft_config=None, dataset=None, **changes):
    return trl.SFTTrainer(
        model=model or tiny.model(),
        args=trl.SFTConfig(**common(path, **({"max_length": 32} | changes))),
        train_dataset=dataset or tiny.completions(),
        processing_class=tiny.tokenizer(),
        peft_config=peft_config,
    )


def grpo(path, model=None, peft_config=None, cls=trl.GRPOTrainer, **changes):
    settings = dict(num_generations=4, max_completion_length=8, temperature=0.9, beta=0.0, learning_rate=1e-3)
    return cls(
        model=model or tiny.model(),
        reward_funcs=tiny.reward,
        args=trl.GRPOConfig(**common(path, **(settings | changes))),
        train_dataset=tiny.prompts(),
        processing_class=tiny.tokenizer(),
        peft_config=peft_config,
    )


def rloo(path, **changes):
    settings = dict(num_generations=4, max_completion_length=8, beta=0.0)
    return trl.RLOOTrainer(
        model=tiny.model(),
        reward_funcs=tiny.reward,
        args=trl.RLOOConfig(**common(path, **(settings | changes))),
        train_dataset=tiny.prompts(),
        processing_class=tiny.tokenizer(),
    )


def dpo(path, model=None, peft_config=None, **changes):
    return trl.DPOTrainer(
        model=model or tiny.model(),
        ref_model=None if peft_config else tiny.model(1),
        args=trl.DPOConfig(**common(path, **({"max_length": 32} | changes))),
        train_dataset=tiny.preferences(),
        processing_class=tiny.tokenizer(),
        peft_config=peft_config,
    )


def kto(path, **changes):
    return trl.KTOTrainer(
        model=tiny.model(),
        ref_model=tiny.model(1),
        args=trl.KTOConfig(**common(path, **({"max_length": 32} | changes))),
        train_dataset=tiny.preferences().map(
            lambda row, i: {"completion": row["chosen"] if i % 2 else row["rejected"], "label": bool(i % 2)},
            with_indices=True,
            remove_columns=["chosen", "rejected"],
        ),
        processing_class=tiny.tokenizer(),
    )


RUNS = {
    "sft": lambda p: sft(p),
    "sft-tied": lambda p: sft(p, tiny.model(tied=True)),
    "sft-lora": lambda p: sft(p, peft_config=lora()),
    "sft-lora-whole-head": lambda p: sft(p, peft_config=lora(modules_to_save=["lm_head"])),
    "sft-accumulation": lambda p: sft(p, gradient_accumulation_steps=2, max_steps=5),
    "sft-checkpointing": lambda p: sft(p, activation_checkpointing=True),
    "sft-dft": lambda p: sft(p, loss_type="dft"),
    "sft-packing": lambda p: sft(p, dataset=tiny.texts(), packing=True, max_length=24, packing_strategy="wrapped"),
    "grpo": lambda p: grpo(p),
    "grpo-beta": lambda p: grpo(p, beta=0.1, max_steps=5, model=None, peft_config=lora()),
    "grpo-accumulation": lambda p: grpo(p, gradient_accumulation_steps=2, max_steps=4, num_iterations=2),
    "grpo-sequence": lambda p: grpo(p, importance_sampling_level="sequence", loss_type="grpo", num_iterations=2),
    "grpo-checkpointing": lambda p: grpo(p, activation_checkpointing=True, max_steps=4),
    "rloo": lambda p: rloo(p),
    "dpo": lambda p: dpo(p),
    "dpo-weighting": lambda p: dpo(p, use_weighting=True, max_steps=5),
    "dpo-lora": lambda p: dpo(p, peft_config=lora(), max_steps=5),
    "kto": lambda p: kto(p),
}


def run(make, path) -> tuple[list[dict], dict, dict]:
    trainer = make(path)
    grads: dict[str, torch.Tensor] = {}
    inner = trainer.training_step

    def step(model, *args, **kwargs):
        loss = inner(model, *args, **kwargs)
        if not grads:
            grads.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        return loss

    trainer.training_step = step
    torch.manual_seed(3)
    trainer.train()
    return trainer.state.log_history, grads, tiny.weights_of(trainer.model)


TIMES = {"step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos"}


def compare(without, with_it, tolerance=1e-4):
    (logs, grads, weights), (logs2, grads2, weights2) = without, with_it
    assert len(logs) == len(logs2) >= 4
    for a, b in zip(logs, logs2):
        assert a.keys() == b.keys()
        for key in a.keys() - TIMES:
            if isinstance(a[key], (int, float)) and not isinstance(a[key], bool):
                both_nan = math.isnan(a[key]) and math.isnan(b[key])
                assert both_nan or abs(a[key] - b[key]) <= tolerance * max(1, abs(a[key])), (key, a[key], b[key])
    assert grads
    assert tiny.differences(grads, grads2) < tolerance
    assert tiny.differences(weights, weights2) < 5 * tolerance


@pytest.mark.parametrize("name", RUNS)
def test_a_trainer_gives_the_same_run(name, tmp_path):
    without = run(RUNS[name], tmp_path / "a")
    calls = []
    with adapter.enable():
        inner = utils._ChunkedLogProbFunction.apply
        utils._ChunkedLogProbFunction.apply = lambda *args: calls.append(1) or inner(*args)
        with_it = run(RUNS[name], tmp_path / "b")
    assert utils._ChunkedLogProbFunction is ORIGINAL
    assert len(calls) >= 4, "the trainer does not go through the seam"
    compare(without, with_it)


def arguments(dtype=torch.float32, bias=True, n=37, d=16, v=53):
    torch.manual_seed(0)
    hidden = torch.randn(n, d, dtype=dtype).requires_grad_()
    weight = torch.randn(v, d, dtype=dtype).requires_grad_()
    b = torch.randn(v, dtype=dtype).requires_grad_() if bias else None
    return hidden, weight, b, torch.randint(v, (n,))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("softcap", "scale", "temperature"), [(None, 1.0, 1.0), (None, 0.5, 0.7), (5.0, 2.0, 1.3)])
@pytest.mark.parametrize("outputs", [("log_probs",), ("log_probs", "entropy"), ALL])
def test_nine_arguments_and_five_results(bias, softcap, scale, temperature, outputs):
    adapter.enable()
    results = []
    for function in (ORIGINAL, utils._ChunkedLogProbFunction):
        hidden, weight, b, targets = arguments(bias=bias)
        found = function.apply(hidden, weight, b, targets, temperature, 16, softcap, scale, outputs)
        loss = (found[0] * torch.linspace(-1, 1, 37)).sum()
        if found[1] is not None:
            loss = loss + (found[1] * torch.linspace(0, 1, 37)).sum()
        loss.backward()
        results.append((found, [t.grad for t in (hidden, weight, b) if t is not None]))
    (theirs, their_grads), (ours, our_grads) = results
    for a, b in zip(theirs, ours):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
    for a, b in zip(their_grads, our_grads):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5)
    for statistic in ours[2:]:
        assert statistic is None or not statistic.requires_grad


@pytest.mark.parametrize(
    ("hidden_type", "weight_type", "autocast"),
    [
        (torch.bfloat16, torch.bfloat16, False),
        (torch.bfloat16, torch.float32, False),
        (torch.float32, torch.bfloat16, False),
        (torch.float32, torch.float32, True),
        (torch.float64, torch.float64, False),
    ],
)
def test_mixed_types_come_back_as_trl_gives_them(hidden_type, weight_type, autocast):
    adapter.enable()
    results = []
    for function in (ORIGINAL, utils._ChunkedLogProbFunction):
        hidden, weight, bias, targets = arguments(torch.float32)
        hidden = hidden.detach().to(hidden_type).requires_grad_()
        weight, bias = (t.detach().to(weight_type).requires_grad_() for t in (weight, bias))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = function.apply(hidden, weight, bias, targets, 0.9, 16, None, 1.0, ALL)
        (found[0].sum() + found[1].sum()).backward()
        results.append((found, [hidden.grad, weight.grad, bias.grad]))
    (theirs, their_grads), (ours, our_grads) = results
    assert [t.dtype for t in theirs] == [t.dtype for t in ours]
    assert [t.dtype for t in their_grads] == [t.dtype for t in our_grads]
    coarse = dict(rtol=0.05, atol=0.1) if hidden_type != torch.float64 else dict(rtol=2e-4, atol=2e-5)
    for a, b in zip((*theirs[:4], *their_grads), (*ours[:4], *our_grads)):
        torch.testing.assert_close(a, b, **coarse)


def test_no_row_at_all_is_a_differentiable_nothing():
    adapter.enable()
    hidden, weight, bias, _ = arguments()
    empty = hidden[:0]
    found = utils._ChunkedLogProbFunction.apply(
        empty, weight, bias, torch.zeros(0, dtype=torch.int64), 1.0, 16, None, 1.0, ALL
    )
    assert all(t.shape == (0,) for t in found)
    found[0].sum().backward()
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_enable_and_disable_restore_exactly():
    adapter.disable()
    assert utils._ChunkedLogProbFunction is ORIGINAL
    adapter.enable()
    adapter.enable()
    assert utils._ChunkedLogProbFunction is not ORIGINAL
    adapter.disable()
    assert utils._ChunkedLogProbFunction is ORIGINAL
    outer = adapter.enable()
    inside = utils._ChunkedLogProbFunction
    with adapter.enable():
        assert utils._ChunkedLogProbFunction is not inside
    assert utils._ChunkedLogProbFunction is inside
    with outer:
        pass
    assert utils._ChunkedLogProbFunction is ORIGINAL


def test_what_is_not_there_is_said(monkeypatch):
    import importlib.metadata

    from drift_kernels.adapters._common import Support

    with pytest.raises(ImportError, match=r'pip install "no-such-trainer>=1,<2"'):
        Support("no-such-trainer", "1", "2").check()
    for version in ("1.9.0", "2.0", "1.16.0rc1.post0.dev3"):
        monkeypatch.setattr(importlib.metadata, "version", lambda _, found=version: found)
        if version.startswith("1.16"):
            assert adapter.SUPPORTED.check() == version
        else:
            with pytest.raises(ImportError, match=r"trl >= 1\.16, < 2: pip install"):
                adapter.enable()
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "1.100.0")  # later than 1.16, though less as text
    adapter.enable()
    adapter.disable()
    monkeypatch.undo()
    with monkeypatch.context() as patch:
        patch.delattr(utils, "_ChunkedLogProbFunction")
        with pytest.raises(RuntimeError, match=r"has no trl\.trainer\.utils\._ChunkedLogProbFunction"):
            adapter.enable()
    with monkeypatch.context() as patch:

        class Other(torch.autograd.Function):
            @staticmethod
            def forward(ctx, hidden, weight, targets):
                return hidden

        patch.setattr(utils, "_ChunkedLogProbFunction", Other)
        with pytest.raises(RuntimeError, match="takes"):
            adapter.enable()


def test_zero3_is_refused(monkeypatch):
    adapter.enable()
    monkeypatch.setattr("drift_kernels.adapters.trl.swap.is_zero3", lambda: True)
    with pytest.raises(NotImplementedError, match="ZeRO-3"):
        utils._ChunkedLogProbFunction.apply(*arguments(), 1.0, 16, None, 1.0, ALL)


def test_the_backend_can_be_chosen():
    import drift_kernels as dk

    adapter.enable(dk.KernelConfig(backend="triton"))
    with pytest.raises(RuntimeError, match="triton"):
        utils._ChunkedLogProbFunction.apply(*arguments(), 1.0, 16, None, 1.0, ALL)


@pytest.mark.peers
def test_trls_own_tests_of_the_function(tmp_path):
    """Not in its sdist so far; said here, so that tests/adapters/ran.txt tells when they come."""
    peers.test_module("trl==1.16.0", "tests/test_chunked_logprob.py", tmp_path)
