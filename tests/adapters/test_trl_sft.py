"""`DriftSFTTrainer` against a loss written by hand and against TRL's SFTTrainer, and what TRL's trainers train."""

from __future__ import annotations

import math

import peft
import pytest
import tiny
import torch
import transformers
import trl
from datasets import concatenate_datasets
from test_trl_swap import common, compare, grpo, lora, run, sft
from torch.nn.functional import cross_entropy

from drift_kernels.adapters._common import run_inside_forward
from drift_kernels.adapters.trl import DriftGRPOTrainer, DriftSFTTrainer
from drift_kernels.conversation import check_trained, role_markers


def weighted(count: int = 48, per_token: bool = False):
    """Rows of ids with labels and weights; some rows of weight 0."""
    generator = torch.Generator().manual_seed(11)
    rows = {"input_ids": [], "labels": [], "weight": []}
    if per_token:
        rows["token_weights"] = []
    for i in range(count):
        n = int(torch.randint(5, 14, (), generator=generator))
        ids = torch.randint(4, 60, (n,), generator=generator).tolist()
        rows["input_ids"].append(ids)
        rows["labels"].append([-100] * (2 + i % 2) + ids[2 + i % 2 :])
        rows["weight"].append(0.0 if i % 7 == 3 else float(torch.rand((), generator=generator)))
        if per_token:
            rows["token_weights"].append(torch.rand(n, generator=generator).tolist())
    return tiny.dataset(rows)


def drift_sft(path, dataset, model=None, peft_config=None, normalize="weights", cls=DriftSFTTrainer, **changes):
    more = {"normalize": normalize} if cls is DriftSFTTrainer else {}
    return cls(
        model=model or tiny.model(),
        args=trl.SFTConfig(**common(path, **({"max_length": 32} | changes))),
        train_dataset=dataset,
        processing_class=tiny.tokenizer(),
        peft_config=peft_config,
        **more,
    )


SGD = dict(
    optim="sgd", learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=0.0, max_steps=4,
    train_sampling_strategy="sequential", shuffle_dataset=False,
)  # fmt: skip


def by_hand(dataset, normalize: str, start: int, stop: int, model) -> torch.Tensor:
    """The loss of rows [start, stop) as the class documents it, row by row."""
    total, denominator = torch.zeros(()), 0.0
    for row in [dataset[i] for i in range(start, stop)]:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        keep = labels != -100
        weights = torch.full(labels.shape, row["weight"])
        if "token_weights" in row:
            weights = weights * torch.tensor(row["token_weights"])[1:]
        losses = cross_entropy(model(ids).logits[0, :-1], labels.clamp(min=0), reduction="none")
        losses, weights, n = losses[keep], weights[keep], int(keep.sum())
        if normalize in ("tokens", "weights"):
            total = total + (losses * weights).sum()
            denominator += n if normalize == "tokens" else float(weights.sum())
        else:
            total = total + (losses * weights).sum() / n
            denominator += 1 if normalize == "samples" else float(weights.sum()) / n
    return total / denominator


@pytest.mark.parametrize("normalize", ["tokens", "weights", "samples", "sample_weights"])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("padding_free", [False, True])
def test_sft_weights_against_a_loss_by_hand_however_it_is_split(normalize, per_token, padding_free, tmp_path):
    dataset = weighted(per_token=per_token)
    logs, ends = [], []
    for size, steps in ((6, 1), (3, 2), (2, 3)):
        changes = SGD | dict(per_device_train_batch_size=size, gradient_accumulation_steps=steps)
        if padding_free:
            changes |= dict(padding_free=True, max_length=None)
        trainer = drift_sft(tmp_path, dataset, normalize=normalize, **changes)
        trainer.train()
        logs.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
        ends.append(tiny.weights_of(trainer.model))
    model = tiny.model()
    for step in range(4):
        loss = by_hand(dataset, normalize, 6 * step, 6 * step + 6, model)
        loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
        model.zero_grad()
        assert all(abs(run[step] - loss.item()) < 1e-4 for run in logs)
    assert all(tiny.differences(tiny.weights_of(model), end) < 2e-4 for end in ends)


CASES = {
    "plain": {},
    "accumulation": dict(gradient_accumulation_steps=2, max_steps=5),
    "checkpointing": dict(activation_checkpointing=True, max_steps=4),
    "compiled": dict(torch_compile=True, torch_compile_backend="eager", max_steps=4),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["full", "tied", "lora"])
def test_sft_with_weights_of_one_is_trls(case, kind, tmp_path):
    model = lambda: tiny.model(tied=kind == "tied")  # noqa: E731
    peft = lora() if kind == "lora" else None
    rows = weighted()
    ones = rows.map(lambda row: {"weight": 1.0})
    make = lambda cls: lambda p: drift_sft(p, ones, model(), peft, cls=cls, **CASES[case])  # noqa: E731
    compare(run(make(trl.SFTTrainer), tmp_path / "a"), run(make(DriftSFTTrainer), tmp_path / "b"))


def test_sft_weights_ride_along_with_text_and_evaluation_needs_none(tmp_path):
    """Prompt and completion as text, tokenised by TRL; evaluation data without weights has TRL's loss."""
    data = tiny.completions()
    with_weights = data.add_column("weight", [1.0] * len(data))
    ends = []
    for cls, dataset in ((trl.SFTTrainer, data), (DriftSFTTrainer, with_weights)):
        trainer = drift_sft(tmp_path, dataset, cls=cls, max_steps=4)
        trainer.train()
        ends.append((tiny.weights_of(trainer.model), trainer.evaluate(tiny.completions(10))))
    assert tiny.differences(ends[0][0], ends[1][0]) < 1e-4
    assert ends[0][1].keys() == ends[1][1].keys()
    for key in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy", "eval_num_tokens"):
        assert math.isclose(ends[0][1][key], ends[1][1][key], rel_tol=1e-4), key


@pytest.mark.parametrize("normalize", ["tokens", "weights", "samples", "sample_weights"])
@pytest.mark.parametrize("padding_free", [False, True])
def test_sft_goes_on_after_a_window_without_a_label(normalize, padding_free, tmp_path):
    """The window changes no weight, and the ones around it are those of a run without it."""
    rows = weighted(12)
    nothing = rows.select(range(4, 8)).map(lambda row: {"labels": [-100] * len(row["labels"])})
    changes = SGD | dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, max_length=None)
    ends, losses = [], []
    for parts in ([rows.select(range(4)), nothing, rows.select(range(8, 12))],
                  [rows.select(range(4)), rows.select(range(8, 12))]):  # fmt: skip
        changes["max_steps"] = len(parts)
        trainer = drift_sft(tmp_path, rows, normalize=normalize, padding_free=padding_free, **changes)
        trainer.train_dataset = concatenate_datasets(parts)  # TRL would drop rows without labels
        trainer.train()
        ends.append(tiny.weights_of(trainer.model))
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert losses[0] == [losses[1][0], 0.0, losses[1][1]]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_sft_cuts_weights_with_their_tokens(mode, tmp_path):
    dataset = weighted(per_token=True)
    trainer = drift_sft(tmp_path, dataset, max_length=7, truncation_mode=mode, shuffle_dataset=False)
    kept = slice(None, 7) if mode == "keep_start" else slice(-7, None)
    assert trainer.train_dataset[0]["input_ids"] == dataset[0]["input_ids"][kept]
    assert trainer.train_dataset[0]["token_weights"] == dataset[0]["token_weights"][kept]
    batch = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[1]])
    first = torch.tensor(dataset[0]["token_weights"][kept]) * dataset[0]["weight"]
    torch.testing.assert_close(batch["token_weights"][0, : len(first)], first)


def test_sft_refuses_by_name(tmp_path):
    data = weighted()
    for message, changes in {
        "loss_type='dft'": dict(loss_type="dft"),
        "packing=True": dict(packing=True),
    }.items():
        with pytest.raises(ValueError, match=message):
            drift_sft(tmp_path, data, **changes)
    with pytest.warns(FutureWarning), pytest.raises(ValueError, match=r"label_smoothing_factor=0\.1"):
        drift_sft(tmp_path, data, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="neither 'weight' nor 'token_weights'"):
        drift_sft(tmp_path, tiny.completions())
    with pytest.raises(ValueError, match="needs a dataset that is tokenised"):
        drift_sft(tmp_path, tiny.texts(8).add_column("token_weights", [[1.0]] * 8))
    short = data.map(lambda row: {"token_weights": [1.0]})
    with pytest.raises(ValueError, match="one a token"):
        drift_sft(tmp_path, short)
    with pytest.raises(ValueError, match="normalize='mean' is not known"):
        drift_sft(tmp_path, data, normalize="mean")
    model = sft(tmp_path).model  # untouched
    assert not hasattr(model, "_drift_patch")


FAMILIES = {
    "MiniCPM3": dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16),
    "Inkling": dict(head_dim=16),
    "Dory": {},
    "Gemma2": dict(head_dim=16, final_logit_softcapping=2.0),
}


def of_family(name: str):
    torch.manual_seed(0)
    shape = dict(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.1, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    kind = getattr(transformers, f"{name}ForCausalLM")
    made = kind(kind.config_class(**shape | FAMILIES[name]))
    made.config._name_or_path = "tiny"
    return made


@pytest.mark.parametrize("name", ["MiniCPM3", "Gemma2", "Inkling"])
def test_families_that_change_hidden_states_or_logits_train_the_same(name, tmp_path):
    """Inkling's logits are h·Wᵀ / logits_mup_width_multiplier. TRL 1.16 does not know that name, and takes h·Wᵀ.

    It is told the factor as `logit_scale`, which neither the model nor the run with ours has.
    """
    ones = weighted().map(lambda row: {"weight": 1.0})

    def make(path, cls):
        model = of_family(name)
        if name == "Inkling" and cls is trl.SFTTrainer:
            model.config.logit_scale = 1 / model.config.logits_mup_width_multiplier
        return drift_sft(path, ones, model, cls=cls, max_steps=4)

    runs = [run(lambda p, cls=cls: make(p, cls), tmp_path / cls.__name__) for cls in (trl.SFTTrainer, DriftSFTTrainer)]
    compare(*runs)


def test_inklings_loss_is_that_of_its_own_logits(tmp_path):
    trainer = drift_sft(tmp_path, weighted().map(lambda row: {"weight": 1.0}), of_family("Inkling"))
    batch = next(iter(trainer.get_train_dataloader()))
    ours = trainer.compute_loss(trainer.model, dict(batch))
    logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    theirs = cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "message"), [("Dory", "is a DoryLMHead")])
def test_a_family_whose_logits_are_not_its_heads_is_refused(name, message, tmp_path):
    """Dory learns a scale of each logit."""
    for make in (
        lambda model: drift_sft(tmp_path, weighted(), model),
        lambda model: grpo(tmp_path, model, cls=DriftGRPOTrainer),
    ):
        model = of_family(name)
        modes = [module.training for module in model.modules()]
        with pytest.raises(NotImplementedError, match=message):
            make(model)
        assert [module.training for module in model.modules()] == modes


def test_a_trained_adapter_on_the_head_makes_logits_too():
    """TRL refuses one, our check of a model's logits does not."""
    model = peft.get_peft_model(tiny.model(), peft.LoraConfig(r=4, target_modules=["lm_head"])).base_model.model
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.5)
    run_inside_forward(model)


# --- what is trained, as docs/adapters.md checks it ---

SPEAKERS = dict(zip(("user", "assistant"), tiny.WORDS[-2:]))  # a turn begins with one of these words


def conversations(count: int = 12):
    """{"messages"}: four turns of words that begin none."""
    texts = iter(tiny.sentences(4 * count))
    ordinary = lambda: " ".join(word for word in next(texts).split() if word not in SPEAKERS.values()) + " ba"  # noqa: E731
    return [[{"role": role, "content": ordinary()} for role in (*SPEAKERS, *SPEAKERS)] for _ in range(count)]


def chat_tokenizer():
    made = tiny.tokenizer()
    user, assistant = SPEAKERS.values()
    made.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}" + assistant
        + " {% generation %}{{ m['content'] + ' <eos> ' }}{% endgeneration %}"
        "{% else %}" + user + " {{ m['content'] + ' <eos> ' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}" + assistant + " {% endif %}"
    )  # fmt: skip
    return made


def checked(trainer, tokenizer) -> str:
    batch = next(iter(trainer.get_train_dataloader()))
    return check_trained(
        batch["input_ids"],
        batch.get("labels", batch.get("completion_mask")),
        tokenizer.decode,
        attention_mask=batch.get("attention_mask"),
        cu_seqlens=batch.get("cu_seq_lens_q"),
        markers=role_markers(tokenizer),
        eos=tokenizer.eos_token_id,
        colour=False,
    )


@pytest.mark.parametrize(
    ("changes", "trained", "shown"),
    [
        (dict(assistant_only_loss=True), 2, 4),
        (dict(assistant_only_loss=True, padding_free=True, max_length=None), 2, 4),
        (dict(assistant_only_loss=True, packing=True, max_length=128), 2, None),
        ({}, None, 4),
    ],
)
def test_what_sft_trains_is_shown_and_checked(changes, trained, shown, tmp_path):
    tokenizer = chat_tokenizer()
    args = trl.SFTConfig(**common(tmp_path, **({"max_length": 128} | changes)))
    data = tiny.dataset({"messages": conversations()})
    trainer = trl.SFTTrainer(tiny.model(), args, train_dataset=data, processing_class=tokenizer)
    if trained is None:  # TRL's default trains every turn
        with pytest.raises(ValueError, match=r"(?s)4 of 4 conversations.*trained tokens are in a turn of user"):
            checked(trainer, tokenizer)
        return
    rows = checked(trainer, tokenizer).splitlines()
    assert shown in (None, len(rows))
    assert len(rows) > 1
    assert all(row.count("⟦") == row.count("<eos>⟧") == trained for row in rows)


def test_what_dpo_trains_is_shown_and_checked(tmp_path):
    tokenizer, turns = chat_tokenizer(), conversations()
    data = {"prompt": [t[:1] for t in turns], "chosen": [t[1:2] for t in turns], "rejected": [t[3:] for t in turns]}
    args = trl.DPOConfig(**common(tmp_path, max_length=64))
    trainer = trl.DPOTrainer(
        tiny.model(), ref_model=tiny.model(1), args=args, train_dataset=tiny.dataset(data), processing_class=tokenizer
    )
    rows = checked(trainer, tokenizer).splitlines()
    assert len(rows) == 8
    assert all(row.count("⟦") == row.count("<eos>⟧") == 1 for row in rows)
