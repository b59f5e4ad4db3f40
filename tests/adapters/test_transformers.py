"""`adapters.transformers` on transformers' Trainer and on models of several families, with and without it."""

from __future__ import annotations

import copy
import importlib.metadata
import math
import unittest

import peers
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    DataCollatorWithFlattening,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
)

from drift_kernels.adapters import transformers as fused

SMALL = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    initializer_range=0.1,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=1,
)


def family(name: str):
    torch.manual_seed(0)
    match name:
        case "qwen2":
            return tiny.model()
        case "tied":
            return tiny.model(tied=True)
        case "qwen3":
            return Qwen3ForCausalLM(Qwen3Config(**SMALL, tie_word_embeddings=True))
        case "softcap":
            return Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=2.0, attn_implementation="eager"))
        case "scale":
            return CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25))
        case "divisor":
            return GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=3.0))
        case "gpt2":
            return GPT2LMHeadModel(
                GPT2Config(
                    vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=1,
                    attn_pdrop=0, embd_pdrop=0, resid_pdrop=0,
                )
            )  # fmt: skip
    raise AssertionError(name)


FAMILIES = ["qwen2", "tied", "qwen3", "softcap", "scale", "divisor", "gpt2"]


def batch(seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 64, (3, 11), generator=generator)
    labels = ids.clone()
    labels[:, :4] = -100
    labels[2, 8:] = -100
    return {"input_ids": ids, "labels": labels}


def gradients(model) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("items", [None, 40, torch.tensor(13)])
def test_a_family_has_the_same_loss_and_gradients(name, items):
    model = family(name).train()
    more = {} if items is None else {"num_items_in_batch": items}
    expected = model(**batch(), **more)
    expected.loss.backward()
    theirs = gradients(model)
    fused.apply(model)
    actual = model(**batch(), **more)
    assert actual.logits is None
    actual.loss.backward()
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-5, atol=1e-5)
    assert tiny.differences(theirs, gradients(model)) < 1e-4


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("items", [0, torch.tensor(0), torch.tensor(13)])
def test_a_batch_without_a_label_changes_nothing(items, deferred):
    """transformers' own loss is NaN if the whole accumulation window has none."""
    model = family("qwen2").train()
    nothing = torch.full_like(batch()["labels"], -100)
    if deferred:
        loss_of = fused.compute_loss_func(model)
        outputs = model(input_ids=batch()["input_ids"], num_items_in_batch=items)
        loss = loss_of(outputs, nothing, items)
    else:
        fused.apply(model)
        loss = model(input_ids=batch()["input_ids"], labels=nothing, num_items_in_batch=items).loss
    loss.backward()
    assert loss.item() == 0.0
    assert not any(grad.any() for grad in gradients(model).values())


@pytest.mark.parametrize("name", FAMILIES)
def test_apply_leaves_evaluation_generation_and_state_alone(name):
    model = family(name)
    names, keys, before = set(vars(model)), list(model.state_dict()), model.forward
    head_names = set(vars(model.get_output_embeddings()))
    prompt = batch()["input_ids"][:, :5]
    model.train()
    logits = model(prompt).logits
    model.eval()
    evaluated = model(**batch())
    generated = model.generate(prompt, max_new_tokens=6, do_sample=False)
    fused.apply(model)
    fused.apply(model)
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model(**batch()).logits, evaluated.logits, rtol=0, atol=0)
    assert torch.equal(model(**batch()).loss, evaluated.loss)
    assert torch.equal(model.generate(prompt, max_new_tokens=6, do_sample=False), generated)
    model.train()
    assert torch.equal(model(prompt).logits, logits)  # without labels
    assert torch.equal(model.generate(prompt, max_new_tokens=6, do_sample=False), generated)
    model(**batch()).loss.backward()
    assert torch.equal(model.generate(prompt, max_new_tokens=6, do_sample=False), generated)
    fused.remove(model)
    fused.remove(model)
    assert set(vars(model)) == names
    assert set(vars(model.get_output_embeddings())) == head_names
    assert model.forward == before
    assert model(**batch()).logits is not None


def by_hand(model, inputs, weights, items):
    logits = model(inputs["input_ids"]).logits[:, :-1].reshape(-1, 64)
    targets = inputs["labels"][:, 1:].reshape(-1)
    losses = cross_entropy(logits, targets, reduction="none", ignore_index=-100)
    return (losses * weights[:, 1:].reshape(-1)).sum() / items


@pytest.mark.parametrize("training", [True, False])
def test_token_weights_beside_labels(training):
    model = family("qwen2").train(training)
    inputs, weights = batch(), torch.rand(3, 11)
    expected = by_hand(model, inputs, weights, 17)
    expected.backward()
    theirs = gradients(model)
    fused.apply(model)
    actual = model(**inputs, token_weights=weights, num_items_in_batch=17)
    assert (actual.logits is None) == training
    actual.loss.backward()
    torch.testing.assert_close(actual.loss, expected, rtol=1e-5, atol=1e-6)
    assert tiny.differences(theirs, gradients(model)) < 1e-4
    with pytest.raises(ValueError, match="token_weights came without labels"):
        model(inputs["input_ids"], token_weights=weights)


def test_shift_labels_are_not_shifted_again():
    model = family("qwen2").train()
    inputs = batch()
    shift = torch.full_like(inputs["labels"], -100)
    shift[:, :-1] = inputs["labels"][:, 1:]
    expected = model(**inputs).loss
    fused.apply(model)
    torch.testing.assert_close(model(**inputs, shift_labels=shift).loss, expected)


def test_a_copy_of_an_applied_model_trains_itself():
    model = fused.apply(family("qwen2").train())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.5)
    plain = family("qwen2").train()
    plain.load_state_dict(twin.state_dict())
    loss = twin(**batch()).loss
    torch.testing.assert_close(loss, plain(**batch()).loss)
    loss.backward()
    assert all(p.grad is None for p in model.parameters())
    fused.remove(twin)
    assert twin(**batch()).logits is not None
    assert model(**batch()).logits is None


def test_flattened_batches_have_the_loss_of_their_rows():
    model = family("qwen2").train()
    rows = [{"input_ids": torch.randint(2, 64, (n,)).tolist()} for n in (5, 9, 3)]
    losses, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        losses = losses + cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum")
        count += ids.numel() - 1
    (losses / count).backward()
    theirs = gradients(model)
    fused.apply(model)
    for flash in (False, True):
        flat = DataCollatorWithFlattening(return_flash_attn_kwargs=flash)(rows)
        assert "attention_mask" not in flat
        flat = {k: v for k, v in flat.items() if k in ("input_ids", "labels", "position_ids")} if not flash else flat
        out = model(**flat, use_cache=False)
        torch.testing.assert_close(out.loss, losses / count, rtol=1e-5, atol=1e-5)
        out.loss.backward()
        assert tiny.differences(theirs, gradients(model)) < 1e-4


class Rows(torch.utils.data.Dataset):
    """Tokenised rows of unequal length, with weights."""

    def __init__(self, weighted: bool, count: int = 40):
        torch.manual_seed(5)
        self.rows = []
        for _ in range(count):
            n = int(torch.randint(5, 14, ()))
            ids = torch.randint(2, 64, (n,)).tolist()
            row = {"input_ids": ids, "labels": [-100, -100, *ids[2:]]}
            if weighted:
                row |= {"token_weights": torch.rand(n).tolist(), "weight": float(torch.rand(()))}
            self.rows.append(row)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


def pad(rows: list[dict]) -> dict[str, torch.Tensor]:
    longest = max(len(r["input_ids"]) for r in rows)
    out = {
        key: torch.tensor([r[key] + [fill] * (longest - len(r[key])) for r in rows])
        for key, fill in (("input_ids", 0), ("labels", -100))
    }
    lengths = torch.tensor([[len(r["input_ids"])] for r in rows])
    return out | {"attention_mask": (torch.arange(longest) < lengths).long()}


def train(model, path, collator=pad, weighted=False, loss=None, **changes):
    settings = dict(
        output_dir=str(path),
        max_steps=10,
        learning_rate=2e-3,
        adam_epsilon=1e-4,  # some gradients are zero but for rounding, which Adam would blow up
        per_device_train_batch_size=4,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**(settings | changes)),
        train_dataset=Rows(weighted),
        eval_dataset=Rows(weighted, 6),
        data_collator=collator,
        compute_loss_func=loss,
    )
    trainer.train()
    return trainer, [row for row in trainer.state.log_history if "loss" in row]


def agree(a, b, tolerance=1e-4):
    (one, logs), (two, logs2) = a, b
    assert len(logs) == len(logs2) > 0
    for x, y in zip(logs, logs2):
        assert x.keys() == y.keys()
        assert abs(x["loss"] - y["loss"]) < tolerance
        assert abs(x["grad_norm"] - y["grad_norm"]) < 10 * tolerance * max(1, x["grad_norm"])
    if not one.args.bf16:  # there gradients that should be zero are not
        assert tiny.differences(tiny.weights_of(one.model), tiny.weights_of(two.model)) < 5 * tolerance


def lora(targets=("q_proj", "v_proj"), **changes):
    def wrap(model):
        torch.manual_seed(9)
        return get_peft_model(model, LoraConfig(r=4, target_modules=list(targets), **changes))

    return wrap


CASES = {
    "plain": (lambda m: m, {}),
    "accumulation": (lambda m: m, {"gradient_accumulation_steps": 3, "max_steps": 4}),
    "checkpointing": (lambda m: m, {"activation_checkpointing": True}),
    "lora": (lora(), {}),
    "lora-whole-head": (lora(modules_to_save=["lm_head"]), {"max_steps": 5}),
    "lora-on-the-head": (lora(["q_proj", "lm_head"]), {"max_steps": 5}),
    "bf16": (lambda m: m, {"bf16": True, "max_steps": 5}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("through", ["model", "compute_loss_func"])
def test_trainer_gives_the_same_run(case, tied, through, tmp_path):
    wrap, changes = CASES[case]
    tied = tied and "head" not in case  # PEFT unties those itself
    without = train(wrap(tiny.model(tied=tied)), tmp_path, **changes)
    model = wrap(tiny.model(tied=tied))
    loss = fused.compute_loss_func(model) if through == "compute_loss_func" else None
    fused.apply(model)
    agree(without, train(model, tmp_path, loss=loss, **changes), 2e-2 if case == "bf16" else 1e-4)
    fused.remove(model)  # beneath what accelerate put around the model's forward for bf16
    rows = pad(Rows(False).rows[:2])
    plain = model.train()(**rows)
    assert plain.logits is not None
    fused.apply(model)
    again = model(**rows)
    assert again.logits is None
    torch.testing.assert_close(again.loss, plain.loss, rtol=1e-2 if case == "bf16" else 1e-5, atol=1e-5)


@pytest.mark.parametrize("through", ["model", "compute_loss_func"])
def test_weights_do_not_depend_on_how_a_batch_is_split(through, tmp_path):
    """Against a loop written here; then micro-batches of 6, of 3 and of 2 rows."""
    collator = fused.WeightedCollator(pad)
    runs = []
    for size, steps in ((6, 1), (3, 2), (2, 3)):
        model = fused.apply(tiny.model())
        loss = fused.compute_loss_func(model) if through == "compute_loss_func" else None
        changes = dict(
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=4,
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            optim="sgd",
            learning_rate=0.1,
            train_sampling_strategy="sequential",
        )
        runs.append(train(model, tmp_path, collator, True, loss, **changes))
    for other in runs[1:]:
        agree(runs[0], other)

    model, rows = tiny.model(), Rows(True).rows
    for step in range(4):
        chunk = rows[6 * step : 6 * step + 6]
        total, count = torch.zeros(()), 0
        for row in chunk:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
            logp = torch.log_softmax(model(ids).logits[0, :-1], -1)
            weights = torch.tensor(row["token_weights"])[1:] * row["weight"]
            keep = labels[1:] != -100
            total = total - (logp.gather(1, labels[1:].clamp(min=0)[:, None])[:, 0] * weights)[keep].sum()
            count += int(keep.sum())
        (total / count).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
        model.zero_grad()
        assert abs(runs[0][1][step]["loss"] - float(total) / count) < 1e-4
    assert tiny.differences(tiny.weights_of(model), tiny.weights_of(runs[0][0].model)) < 1e-4


def test_evaluation_has_logits_and_the_same_loss(tmp_path):
    seen = {}

    def metrics(prediction):
        seen["shape"] = prediction.predictions.shape
        return {}

    results = []
    for applied in (None, "model", "compute_loss_func"):
        model = tiny.model()
        loss = fused.compute_loss_func(model) if applied == "compute_loss_func" else None
        if applied:
            fused.apply(model)
        trainer = Trainer(
            model=model,
            args=TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True),
            eval_dataset=Rows(False, 6),
            data_collator=pad,
            compute_loss_func=loss,
            compute_metrics=metrics,
        )
        results.append(trainer.evaluate()["eval_loss"])
        assert seen.pop("shape")[-1] == 64
    assert math.isclose(results[0], results[1], rel_tol=1e-6)
    assert math.isclose(results[0], results[2], rel_tol=1e-5)


def test_the_collator_puts_weights_beside_labels():
    rows = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "token_weights": [1.0, 2.0, 3.0], "weight": 2.0},
        {"input_ids": [8, 9], "labels": [8, 9], "token_weights": [4.0, 5.0], "weight": 0.5},
    ]
    assert fused.WeightedCollator(pad)(rows)["token_weights"].tolist() == [[2, 4, 6], [2, 2.5, 0]]
    flat = fused.WeightedCollator(DataCollatorWithFlattening())(rows)
    assert flat["token_weights"].tolist() == [[2, 4, 6, 2, 2.5]]
    assert flat["labels"].tolist() == [[-100, 6, 7, -100, 9]]
    left = fused.WeightedCollator(lambda r: {k: v.flip(1) for k, v in pad(r).items()})(rows)
    assert left["token_weights"].tolist() == [[2, 4, 6], [0, 2, 2.5]]
    with pytest.raises(ValueError, match=r"token_weights has shape \(1,\) for 3 tokens"):
        fused.WeightedCollator(pad)([rows[0] | {"token_weights": [1.0]}])
    with pytest.raises(ValueError, match="finite and at least 0"):
        fused.WeightedCollator(pad)([rows[0] | {"weight": float("nan")}])


def test_dropped_weights_are_missed(tmp_path):
    """Trainer drops columns of a Dataset that the model does not name; rows would count the same, and nobody would know."""
    rows = tiny.dataset({key: [row[key] for row in Rows(True).rows] for key in Rows(True).rows[0]})
    for keeps in (False, True):
        args = TrainingArguments(
            str(tmp_path),
            max_steps=1,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=not keeps,
        )
        model = fused.apply(tiny.model())
        trainer = Trainer(model, args, train_dataset=rows, data_collator=fused.WeightedCollator(pad))
        if keeps:
            trainer.train()
        else:
            with pytest.raises(ValueError, match=r"'token_weights' or 'weight', but .*remove_unused_columns=False"):
                trainer.train()
    plain = fused.WeightedCollator(pad, required=False)([{"input_ids": [5, 6], "labels": [5, 6]}])
    assert plain["token_weights"].tolist() == [[1, 1]]


@pytest.mark.peers
def test_transformers_own_test_that_a_model_overfits(tmp_path, monkeypatch):
    """Of its source distribution: loss and gradients fall by nine tenths, then `generate` repeats what was learnt."""
    monkeypatch.setenv("RUN_TRAINING_TESTS", "1")
    requirement = f"transformers=={importlib.metadata.version('transformers')}"
    module = peers.test_module(requirement, "tests/test_training_mixin.py", tmp_path)
    steps = []

    class Applied(Qwen2ForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            fused.apply(self)
            self.register_forward_hook(lambda _, args, out: steps.append(1) if out.logits is None else None)

    class Tester:
        causal_lm_class = Applied

        def get_config(self):
            return tiny.model().config

        def prepare_config_and_inputs_for_common(self):
            return self.get_config(), batch()

    class Overfit(module.TrainingTesterMixin, unittest.TestCase):
        model_tester = Tester()

    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(Overfit).run(result)
    assert result.testsRun == 1
    assert not result.errors + result.failures, (result.errors + result.failures)[0][1]
    assert not result.skipped, result.skipped
    assert len(steps) == Overfit.training_overfit_steps
