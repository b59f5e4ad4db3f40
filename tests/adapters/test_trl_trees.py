"""Prefix trees under TRL's and transformers' trainers: the same numbers, and each shared token through the model once."""

from __future__ import annotations

from functools import partial

import pytest
import tiny
import torch
import trl
from test_trl_grpo import GRPO, absolute, reference
from test_trl_sft import drift_sft, of_family
from test_trl_swap import common, compare, grpo, lora, run
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from drift_kernels.adapters import transformers as fused
from drift_kernels.adapters.transformers import share_prefixes
from drift_kernels.adapters.trl import DriftGRPOTrainer, DriftSFTTrainer

CASES = ["grpo", "bnpo", "dapo-delta", "cispo", "vespo", "gspo", "beta", "off-policy-mask", "high-entropy"]
CASES += ["entropy-bonus", "accumulation", "checkpointing", "truncated-masked"]


def shares(logs: list[dict]) -> list[float]:
    """`tokens_shared` of each step, taken out of the logs."""
    return [row.pop("tokens_shared") for row in logs if "tokens_shared" in row]


@pytest.mark.parametrize("name", [*CASES, "lora", "absolute positions"])
def test_grpo_gives_the_same_run(name, tmp_path):
    def make(path, tree):
        model = reference(tmp_path) if GRPO.get(name, {}).get("beta") else None
        model, peft = absolute() if name.startswith("absolute") else model, lora() if name == "lora" else None
        changes = GRPO.get(name, dict(beta=0.1 if peft else 0.0, num_iterations=2, max_steps=4))
        return grpo(path, model, peft, cls=partial(DriftGRPOTrainer, tree=tree), **changes)

    plain, treed = (run(partial(make, tree=tree), tmp_path / str(tree)) for tree in (False, True))
    saved = shares(treed[0])
    compare(plain, treed)
    print(f"{name}: {saved[-1]:.0%} of the tokens saved")
    assert min(saved) > 0.15


def siblings(count: int = 24):
    """Rows of ids, four of which begin alike; the second half of each four goes on together for three tokens more."""
    generator = torch.Generator().manual_seed(5)
    draw = lambda low, high: torch.randint(  # noqa: E731
        4, 60, (int(torch.randint(low, high, (), generator=generator)),), generator=generator
    ).tolist()
    rows: dict[str, list] = {"input_ids": [], "labels": [], "attention_mask": [], "weight": []}
    for i in range(count):
        if i % 4 == 0:
            begin = draw(5, 9)
        if i % 4 == 2:
            begin = begin + draw(3, 4)
        ids = begin + draw(1, 7)
        rows["input_ids"].append(ids)
        rows["labels"].append([-100] * 2 + ids[2:])
        rows["attention_mask"].append([1] * len(ids))
        rows["weight"].append(1.0 + i % 3)
    return tiny.dataset(rows)


def distinct(rows) -> int:
    """Prefixes of sequences: the tokens that a model has to see, by definition."""
    return len({tuple(ids[:stop]) for ids in rows for stop in range(1, len(ids) + 1)})


IN_ORDER = dict(train_sampling_strategy="sequential", max_steps=4)


def trainer_of(kind: str, path, tree: bool):
    data, model = siblings(), tiny.model()
    if kind.startswith("sft"):
        cls = partial(DriftSFTTrainer, tree=tree) if kind.startswith("sft-drift") else trl.SFTTrainer
        changes = IN_ORDER | dict(shuffle_dataset=False, gradient_accumulation_steps=1 + kind.endswith("accumulated"))
        made = drift_sft(path, data, model, cls=cls, **changes)
    else:
        args = TrainingArguments(**common(path, **IN_ORDER))
        loss = fused.compute_loss_func(model) if kind == "compute_loss_func" else None
        if kind == "apply":
            fused.apply(model)
        collator = DataCollatorForSeq2Seq(tiny.tokenizer(), padding=True)
        rows = data.remove_columns("weight")
        made = Trainer(model, args, train_dataset=rows, data_collator=collator, compute_loss_func=loss)
    if tree:
        share_prefixes(model)
    return made


@pytest.mark.parametrize("kind", ["sft", "sft-drift", "sft-drift-accumulated", "trainer", "apply", "compute_loss_func"])
def test_fine_tuning_gives_the_same_run(kind, tmp_path):
    """The stock collators pad, on either side; the backbone sees as many tokens as there are prefixes, not one more."""
    seen: list[int] = []

    def make(path, tree):
        trainer = trainer_of(kind, path, tree)
        if tree:
            trainer.model.get_input_embeddings().register_forward_hook(
                lambda _, args, out: seen.append(args[0].numel())
            )
        return trainer

    plain, treed = (run(partial(make, tree=tree), tmp_path / str(tree)) for tree in (False, True))
    shares(treed[0])
    compare(plain, treed)
    rows = siblings()["input_ids"]
    batches = [rows[i : i + 4] for i in range(0, 24, 4)]
    expected = [distinct(batch) for batch in batches] * 2
    assert seen == expected[: len(seen)]
    assert len(seen) >= 4
    tokens = sum(len(ids) for batch in batches[:4] for ids in batch)
    print(f"{kind}: {sum(expected[:4])} of {tokens} tokens, 1 - ratio {1 - sum(expected[:4]) / tokens:.0%}")
    assert sum(expected[:4]) < 0.75 * tokens


def test_evaluation_and_generation_run_as_before(tmp_path):
    model = tiny.model().eval()
    ids = torch.randint(4, 60, (3, 7), generator=torch.Generator().manual_seed(0))
    ids[1, :4] = ids[0, :4]
    logits, generated = model(ids).logits, model.generate(ids, max_new_tokens=5, do_sample=False)
    sharing = share_prefixes(model)
    torch.testing.assert_close(model(ids).logits, logits)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), generated)
    assert sharing.rows == 0
    torch.testing.assert_close(model(ids, use_cache=False).logits, logits, rtol=1e-4, atol=1e-5)  # a scoring pass
    assert (sharing.tokens, sharing.rows) == (21, 17)
    assert share_prefixes(model) is sharing


def test_what_cannot_share_is_refused(tmp_path):
    """A convolution over neighbours, dropout, and arguments that a tree has no place for."""
    with pytest.raises(ValueError, match=r"Inkling.*leave tree=False"):
        drift_sft(tmp_path, siblings(), of_family("Inkling"), cls=partial(DriftSFTTrainer, tree=True))
    with pytest.raises(ValueError, match=r"has dropout \(attention_dropout\).*leave tree=False"):
        grpo(tmp_path, tiny.model(attention_dropout=0.1), cls=partial(DriftGRPOTrainer, tree=True))
    model = tiny.model().train()
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match="dropout"):
        share_prefixes(tiny.model(attention_dropout=0.1))
    assert model.config._attn_implementation == before
    share_prefixes(model)
    ids = torch.ones(2, 3, dtype=torch.long)
    for given in (dict(output_hidden_states=True), dict(attention_mask=torch.ones(2, 1, 3, 3, dtype=torch.bool))):
        with pytest.raises(ValueError, match=r"output_hidden_states|shape \(2, 1, 3, 3\)"):
            model(ids, **given)


def test_without_drift_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "drift.training.layout", None)
    with pytest.raises(ImportError, match="extra 'train'"):
        share_prefixes(tiny.model())
