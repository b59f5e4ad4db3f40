"""Which models `apply` takes and in what state, against the same models as they were; and what it refuses, in words."""

from __future__ import annotations

import pytest
import tiny
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from test_transformers import FAMILIES, SMALL, batch, family, gradients
from transformers import DataCollatorWithFlattening, DoryConfig, DoryForCausalLM, Qwen3_5ForCausalLM, Qwen3_5TextConfig
from transformers.modeling_outputs import CausalLMOutput

from drift_kernels.adapters import transformers as fused
from drift_kernels.adapters._common import run_inside_forward
from drift_kernels.packs import PackingError

DORY = {k: v for k, v in SMALL.items() if k != "head_dim"}


def test_what_is_refused():
    for unusual in ({"lora_dropout": 0.1}, {"use_dora": True}):
        with pytest.raises(NotImplementedError, match="only one plain LoRA"):
            fused.apply(get_peft_model(tiny.model(), LoraConfig(r=2, target_modules=["lm_head"], **unusual)))
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(NotImplementedError, match="virtual tokens"):
        fused.apply(get_peft_model(tiny.model(), prompt))
    model = tiny.model()
    model.loss_function = lambda logits, labels, **_: logits.sum()
    with pytest.raises(NotImplementedError, match="causal LM loss"):
        fused.apply(model)
    with pytest.raises(TypeError, match="no output embeddings"):
        fused.apply(tiny.model().model)
    with pytest.raises(NotImplementedError, match=r"head is a DoryLMHead, whose forward is not nn\.Linear's"):
        fused.apply(DoryForCausalLM(DoryConfig(**DORY)))  # its logits have a scale each, 1 before training
    model = fused.apply(tiny.model()).train()
    later = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(NotImplementedError, match="another module than at apply"):
        later(**batch())
    with pytest.raises(RuntimeError, match="no hidden states wait"):
        fused.compute_loss_func(tiny.model())({}, batch()["labels"])


class Odd(type(tiny.model())):
    """Does something between its head and its loss that no config speaks of."""

    def step(self, logits):
        return logits**2

    def forward(self, input_ids, labels=None, **kwargs):
        logits = self.step(self.lm_head(self.model(input_ids).last_hidden_state))
        loss = None if labels is None else self.loss_function(logits, labels, logits.shape[-1])
        return CausalLMOutput(loss, logits)


class Written(Odd):
    """Onto the logits themselves, as Chameleon forbids its image tokens."""

    def step(self, logits):
        logits[..., 3] = -10.0
        return logits


class Cut(Odd):
    """As where a head has rows for padding: of hidden states there is nothing to cut off."""

    def step(self, logits):
        return logits[..., :60]


class Upcast(Odd):
    """As some families do; so does FSDP2 with an output_dtype."""

    def step(self, logits):
        return logits.float()


class Twice(type(tiny.model())):
    """Makes its loss without asking for it."""

    def forward(self, input_ids, labels=None, **kwargs):
        logits = self.lm_head(self.model(input_ids).last_hidden_state)
        return CausalLMOutput(logits.sum(), logits)


@pytest.mark.parametrize("through", ["model", "compute_loss_func"])
def test_an_unknown_step_between_head_and_loss_raises(through):
    def step(model):
        inputs = batch()
        if through == "compute_loss_func":
            loss, labels = fused.compute_loss_func(model), inputs.pop("labels")
            return loss(model.train()(**inputs, num_items_in_batch=20), labels, num_items_in_batch=20)
        return fused.apply(model).train()(**inputs).loss

    for kind in (Odd, Written, Cut):
        with pytest.raises(NotImplementedError, match="in another way"):
            step(kind(tiny.model().config))
    if through == "model":
        with pytest.raises(NotImplementedError, match=r"does not go from get_output_embeddings"):
            step(Twice(tiny.model().config))
    model = tiny.model()
    plain = float(step(tiny.model()).detach())
    model.config.logit_scale = 2.0  # the config speaks of a scale that the model does not apply: its logits decide
    assert float(step(model).detach()) == pytest.approx(plain)
    model = tiny.model()
    model.config.unpadded_vocab_size = 60
    with pytest.raises(NotImplementedError, match="cuts 64 logits down to unpadded_vocab_size=60"):
        step(model)


def test_logits_may_be_upcast():
    torch.manual_seed(0)
    model = Upcast(tiny.model().config).to(torch.bfloat16).train()
    expected = model(**batch()).loss
    torch.testing.assert_close(fused.apply(model)(**batch()).loss, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", FAMILIES)
def test_tuples_have_no_logits_either(name):
    model = family(name).train()
    expected = model(**batch(), return_dict=False)
    assert expected[1].shape == (3, 11, 64)
    actual = fused.apply(model)(**batch(), return_dict=False)
    assert len(actual) == len(expected)
    assert actual[1] is None
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_a_resized_vocabulary_is_applied_again(tied):
    model = fused.apply(tiny.model(tied=tied).train())
    old = model.get_output_embeddings()
    model.resize_token_embeddings(80)
    if model.get_output_embeddings() is not old:
        with pytest.raises(NotImplementedError, match="call apply"):
            model(**batch())
    fused.apply(model)
    loss = model(**batch())
    assert loss.logits is None
    fused.remove(model)
    plain = model(**batch())
    assert plain.logits.shape[-1] == 80
    torch.testing.assert_close(loss.loss, plain.loss)
    for module in (model, old, model.get_output_embeddings()):
        assert not {"forward", "_drift_patch"} & set(vars(module))


@pytest.mark.parametrize("name", ["qwen2", "softcap"])
def test_a_compiled_model_trains_the_same(name):
    torch._dynamo.reset()
    model = family(name).train()
    expected = model(**batch())
    expected.loss.backward()
    theirs = gradients(model)
    compiled = torch.compile(fused.apply(model), backend="eager")
    for _ in range(2):
        actual = compiled(**batch())
    assert actual.logits is None
    actual.loss.backward()
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-5, atol=1e-5)
    assert tiny.differences(theirs, gradients(model)) < 1e-4


def test_what_wraps_a_model_comes_after_apply():
    for wrapped in (torch.compile(tiny.model(), backend="eager"), torch.nn.DataParallel(tiny.model())):
        for function in (fused.apply, fused.remove, fused.compute_loss_func):
            with pytest.raises(TypeError, match=r"comes before DDP, FSDP and torch\.compile"):
                function(wrapped)


@pytest.mark.parametrize("tied", [False, True])
def test_an_applied_model_is_saved_as_it_is(tied, tmp_path):
    model = fused.apply(tiny.model(tied=tied).train())
    loss = model(**batch()).loss
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).train()
    assert not {"forward", "_drift_patch"} & set(vars(again))
    assert tiny.differences(tiny.weights_of(model), tiny.weights_of(again)) == 0
    torch.testing.assert_close(again(**batch()).loss, loss)


@pytest.mark.parametrize("flash", [False, True])
def test_a_flattened_batch_is_refused_if_the_model_mixes_its_sequences(flash):
    rows = [{"input_ids": list(range(3, 3 + n)), "labels": list(range(3, 3 + n))} for n in (6, 9)]
    packed = DataCollatorWithFlattening(return_flash_attn_kwargs=flash, return_seq_idx=flash)(rows)
    shape = {**DORY, "num_hidden_layers": 4, "linear_num_key_heads": 1, "linear_num_value_heads": 2}
    shape |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "head_dim": 16}
    torch.manual_seed(0)
    model = fused.apply(Qwen3_5ForCausalLM(Qwen3_5TextConfig(**shape))).train()
    assert model(**batch()).loss.isfinite()  # rows of their own are no pack
    with pytest.raises(PackingError, match="Qwen3_5ForCausalLM does not keep the sequences of a pack apart"):
        model(**packed)
    assert fused.apply(tiny.model()).train()(**packed).loss.isfinite()
    trl_like = Qwen3_5ForCausalLM(model.config)
    run_inside_forward(trl_like)
    with pytest.raises(PackingError, match="Qwen3_5ForCausalLM"):
        trl_like(**packed, drift_inside=lambda hidden, head: hidden)
