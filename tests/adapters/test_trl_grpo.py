"""`DriftGRPOTrainer` against TRL's GRPOTrainer."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
import transformers
import trl
from test_trl_swap import compare, grpo, lora, run

import drift_kernels as dk
from drift_kernels.adapters import trl as adapter
from drift_kernels.adapters.trl import DriftGRPOTrainer

ITERATE = dict(num_iterations=2, max_steps=6, learning_rate=1e-2)  # ratios move away from 1
GRPO = {
    "grpo": dict(loss_type="grpo"),
    "grpo-off-policy": dict(loss_type="grpo", **ITERATE),
    "bnpo": dict(loss_type="bnpo", **ITERATE),
    "dr_grpo": dict(loss_type="dr_grpo", **ITERATE),
    "dapo": dict(loss_type="dapo", epsilon_high=0.28, **ITERATE),
    "dapo-delta": dict(loss_type="dapo", delta=1.5, epsilon=0.05, **ITERATE),
    "cispo": dict(loss_type="cispo", epsilon_high=1.01, **ITERATE),
    "sapo": dict(loss_type="sapo", **ITERATE),
    "vespo": dict(loss_type="vespo", **ITERATE),
    "vespo-beta": dict(loss_type="vespo", beta=0.2, **ITERATE),
    "beta-plain": dict(loss_type="dapo", beta=0.2, use_bias_correction_kl=False, **ITERATE),
    "gspo": dict(loss_type="grpo", importance_sampling_level="sequence", epsilon=3e-3, epsilon_high=4e-3, **ITERATE),
    "luspo": dict(loss_type="luspo", importance_sampling_level="sequence", epsilon=3e-3, **ITERATE),
    "sequence-dapo": dict(loss_type="dapo", importance_sampling_level="sequence", **ITERATE),
    "sequence-cispo": dict(loss_type="cispo", importance_sampling_level="sequence", epsilon_high=1.0002, **ITERATE),
    "sequence-sapo": dict(loss_type="sapo", importance_sampling_level="sequence", **ITERATE),
    "beta": dict(loss_type="dapo", beta=0.2, **ITERATE),
    "beta-bias-correction": dict(loss_type="grpo", beta=0.2, use_bias_correction_kl=True, **ITERATE),
    "beta-sequence-bias-correction": dict(
        loss_type="grpo", importance_sampling_level="sequence", beta=0.2, use_bias_correction_kl=True, **ITERATE
    ),
    "off-policy-mask": dict(loss_type="dapo", off_policy_mask_threshold=0.0005, **ITERATE),
    "high-entropy": dict(loss_type="dapo", top_entropy_quantile=0.4, beta=0.1, **ITERATE),
    "entropy-bonus": dict(
        loss_type="dapo", entropy_coef=0.05, gradient_accumulation_steps=2, **ITERATE | {"max_steps": 4}
    ),
    "entropy-bonus-beta": dict(loss_type="dr_grpo", entropy_coef=0.05, beta=0.2, **ITERATE),
    "entropy-bonus-bnpo": dict(loss_type="bnpo", entropy_coef=0.1, **ITERATE),
    "entropy-bonus-sequence": dict(
        loss_type="luspo", importance_sampling_level="sequence", epsilon=3e-3, entropy_coef=0.1, **ITERATE
    ),
    "entropy-adaptive": dict(  # on and off: the target lies where the entropy is
        loss_type="cispo",
        epsilon_high=1.01,
        use_adaptive_entropy=True,
        entropy_coef=0.05,
        entropy_coef_delta=0.02,
        entropy_target=3.9,
        **ITERATE,
    ),
    "accumulation": dict(loss_type="dapo", gradient_accumulation_steps=2, max_steps=4),
    "accumulation-grpo": dict(loss_type="grpo", gradient_accumulation_steps=2, max_steps=4),
    "checkpointing": dict(loss_type="dapo", activation_checkpointing=True, max_steps=4),
    "fp32-head": dict(loss_type="dapo", cast_lm_head_to_fp32=True, max_steps=4),
    "truncated-masked": dict(loss_type="dapo", mask_truncated_completions=True, max_steps=4),
    "compiled": dict(loss_type="dapo", torch_compile=True, torch_compile_backend="eager", max_steps=4),
}


def reference(path):
    """A reference model is loaded by its name: one lies in a folder."""
    folder = path / "start"
    model = tiny.model()
    model.save_pretrained(folder)
    model.config._name_or_path = str(folder)
    return model


@pytest.mark.parametrize("name", GRPO)
def test_grpo_gives_the_same_run(name, tmp_path):
    changes = GRPO[name]
    needs = changes.get("beta", 0.0) != 0.0
    make = lambda p, cls: grpo(p, reference(tmp_path) if needs else None, cls=cls, **changes)  # noqa: E731
    without = run(lambda p: make(p, trl.GRPOTrainer), tmp_path / "a")
    with_it = run(lambda p: make(p, DriftGRPOTrainer), tmp_path / "b")
    compare(without, with_it)
    logs = [row for row in with_it[0] if "loss" in row]
    if "learning_rate" in changes and name not in ("vespo", "vespo-beta", "sequence-sapo", "sapo", "sequence-dapo"):
        watched = [v for row in logs for k, v in row.items() if k in ("clip_ratio/region_mean", "cispo_clip_ratio")]
        assert not watched or max(watched) > 0 or "beta" in name, "nothing was clipped: the case shows little"


@pytest.mark.parametrize("tied", [False, True])
def test_grpo_with_lora_and_evaluation(tied, tmp_path):
    runs = []
    for cls in (trl.GRPOTrainer, DriftGRPOTrainer):
        trainer = grpo(tmp_path, tiny.model(tied=tied), lora(), cls=cls, max_steps=3, beta=0.1)
        trainer.train()
        torch.manual_seed(1)
        metrics = trainer.evaluate(tiny.prompts(8))
        runs.append((tiny.weights_of(trainer.model), metrics))
    assert tiny.differences(runs[0][0], runs[1][0]) < 1e-3
    assert runs[0][1].keys() == runs[1][1].keys()
    assert math.isclose(runs[0][1]["eval_loss"], runs[1][1]["eval_loss"], rel_tol=1e-3, abs_tol=1e-5)


def vllm_inputs(level: str, seed: int = 0) -> dict:
    """As TRL hands on what vLLM sampled: a batch of four, the last tokens padded, a tool's tokens in between."""
    generator = torch.Generator().manual_seed(seed)
    completion = torch.randint(4, 60, (4, 8), generator=generator)
    mask = torch.ones(4, 8, dtype=torch.long)
    mask[1, 5:], mask[3, 3:] = 0, 0
    old = -torch.rand(4, 8, generator=generator) * 2 - 3
    ratio = torch.exp(torch.randn(4, 1 if level == "sequence" else 8, generator=generator) * 0.5)
    ratio[2, :1] = 0.0  # masked by its bounds
    tool = torch.ones(4, 8, dtype=torch.long)
    tool[0, 2:5] = 0
    return {
        "prompt_ids": torch.randint(4, 60, (4, 5), generator=generator),
        "prompt_mask": torch.ones(4, 5, dtype=torch.long),
        "completion_ids": completion,
        "completion_mask": mask,
        "tool_mask": tool,
        "advantages": torch.randn(4, generator=generator),
        "num_items_in_batch": torch.tensor(27.0),
        "old_per_token_logps": old,
        "sampling_per_token_logps": old + 0.1 * torch.randn(4, 8, generator=generator),
        "importance_sampling_ratio": ratio if level == "sequence" else torch.where(mask * tool > 0, ratio, 1.0),
    }


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"])
@pytest.mark.parametrize("threshold", [None, 0.05])
def test_grpo_takes_vllms_corrections_and_tool_masks(level, loss_type, threshold, tmp_path):
    if loss_type == "vespo" and level == "sequence":
        pytest.skip("TRL refuses it")
    losses = []
    for cls in (trl.GRPOTrainer, DriftGRPOTrainer):
        high = {"epsilon_high": 3.0} if loss_type == "cispo" else {}
        trainer = grpo(tmp_path, cls=cls, loss_type=loss_type, off_policy_mask_threshold=threshold, **high)
        trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
        trainer.current_gradient_accumulation_steps = 2
        trainer.model.train()
        inputs = vllm_inputs(level)
        if cls is DriftGRPOTrainer and loss_type == "vespo" and threshold is not None:
            with pytest.raises(ValueError, match="not mapped under vLLM"):
                trainer._compute_loss(trainer.model, inputs)
            return
        loss = trainer._compute_loss(trainer.model, inputs)
        loss.backward()
        grads = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
        losses.append((loss.detach(), grads, {k: v[-1] for k, v in trainer._metrics["train"].items()}))
    (theirs, their_grads, metrics), (ours, our_grads, metrics2) = losses
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert tiny.differences(their_grads, our_grads) < 2e-4
    assert metrics.keys() == metrics2.keys()
    for key, value in metrics.items():
        assert math.isclose(value, metrics2[key], rel_tol=1e-4, abs_tol=1e-5), key


def absolute():
    """GPT-2, whose positions are learned."""
    torch.manual_seed(0)
    shape = dict(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3)
    off = dict(
        attn_pdrop=0,
        embd_pdrop=0,
        resid_pdrop=0,
        summary_first_dropout=0,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    made = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, **off))
    made.config._name_or_path = "tiny"
    return made


def test_grpo_counts_absolute_positions_from_the_prompts_first_token(tmp_path):
    """Each row's log-probs, with padding on its left and in a pass for old log-probs, are those of the row alone."""
    trainer = grpo(tmp_path, absolute(), cls=DriftGRPOTrainer)
    inputs = vllm_inputs("token")
    inputs["prompt_mask"] = (torch.arange(5) >= torch.tensor([[0], [2], [3], [4]])).long()
    inputs["prompt_ids"] = inputs["prompt_ids"] * inputs["prompt_mask"]
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    found = trainer._one_pass(trainer.model, inputs)["logprobs"]
    ids, attended = (torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], 1) for x in ("ids", "mask"))
    scored, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, attended, 8)
    for i, keep in enumerate(attended.bool()):
        alone = (trainer.model(ids[i : i + 1, keep]).logits[0] / trainer.temperature).log_softmax(-1)
        count, last = int(inputs["completion_mask"][i].sum()), int(keep.sum())
        expected = alone[last - count - 1 : -1].gather(1, inputs["completion_ids"][i, :count, None])[:, 0]
        trained = inputs["tool_mask"][i, :count].bool()
        torch.testing.assert_close(found[i, :count][trained], expected[trained], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(scored[i, :count], expected, rtol=1e-4, atol=1e-5)


def test_grpo_samples_from_the_policy_that_it_trains(tmp_path):
    """On-policy log-probs of a model of absolute positions: those that generation gave to rows padded on the left."""
    trainer = grpo(tmp_path, absolute(), cls=DriftGRPOTrainer, num_iterations=2, max_steps=2, learning_rate=0.0)
    trainer.train()
    logs = [row for row in trainer.state.log_history if "clip_ratio/region_mean" in row]
    assert logs
    assert all(row["clip_ratio/region_mean"] == 0.0 for row in logs)


EMPTY = [name for name, changes in GRPO.items() if not changes.get("torch_compile")]


@pytest.mark.parametrize("name", EMPTY)
def test_grpo_without_a_token_to_train_changes_nothing(name, tmp_path):
    """As TRL: every completion was cut and is masked, in a window of two micro-batches."""
    changes = {k: v for k, v in GRPO[name].items() if k not in ITERATE and k != "gradient_accumulation_steps"}
    found = []
    for cls in (trl.GRPOTrainer, DriftGRPOTrainer):
        trainer = grpo(tmp_path, reference(tmp_path) if changes.get("beta") else None, cls=cls, **changes)
        trainer.current_gradient_accumulation_steps = 2
        trainer.model.train()
        inputs = vllm_inputs("token")
        inputs |= {"completion_mask": torch.zeros(4, 8, dtype=torch.long), "num_items_in_batch": torch.tensor(0.0)}
        loss = trainer._compute_loss(trainer.model, inputs | {"ref_per_token_logps": inputs["old_per_token_logps"]})
        loss.backward()
        assert loss.item() == 0.0
        assert not any(p.grad is not None and p.grad.any() for p in trainer.model.parameters())
        found.append({key: values[-1] for key, values in trainer._metrics["train"].items()})
    torch.testing.assert_close(found[0], found[1], equal_nan=True)


def test_grpo_refuses_by_name(tmp_path):
    for message, changes in {
        "loss_type='grpo', which averages": dict(entropy_coef=0.01, loss_type="grpo"),
        "loss_type='sapo', which averages": dict(use_adaptive_entropy=True, loss_type="sapo"),
        "top_entropy_quantile=0.5": dict(entropy_coef=0.01, top_entropy_quantile=0.5),
        "entropy_coef=-0.1, less than 0": dict(entropy_coef=-0.1),
        "cap on cispo": dict(loss_type="cispo", epsilon_high=0.5),
        "must exceed 1 . clip_high": dict(delta=1.1),
        "must be at least 0": dict(off_policy_mask_threshold=-0.1),
    }.items():
        with pytest.raises(ValueError, match=message):
            grpo(tmp_path, cls=DriftGRPOTrainer, **changes)
    with pytest.raises(ValueError, match="loss_type='new' is not mapped; DriftGRPOTrainer knows grpo"):
        adapter.policy_spec(trl.GRPOConfig(str(tmp_path), use_cpu=True, loss_type="new"))
    trainer = grpo(tmp_path, cls=DriftGRPOTrainer)
    with pytest.raises(ValueError, match="pixel_values"):
        trainer._compute_loss(trainer.model, vllm_inputs("token") | {"pixel_values": torch.ones(1)})


def test_grpo_makes_one_pass(tmp_path, monkeypatch):
    """Two epochs on a batch: policy_loss once a step, and no row whose gradient is zero is multiplied again."""
    calls = []
    inner = dk.policy_loss
    monkeypatch.setattr(dk, "policy_loss", lambda *a, **k: calls.append(k["spec"]) or inner(*a, **k))
    monkeypatch.setattr("trl.trainer.utils._ChunkedLogProbFunction", None)  # TRL's own head is not asked
    trainer = grpo(tmp_path, cls=DriftGRPOTrainer, loss_type="dapo", max_steps=3)
    trainer.train()
    assert len(calls) == 3
    assert calls[0] == dk.PolicySpec(aggregation="token_sum", sapo_temperatures=(1.0, 1.05))
