"""`Head.of(model)` against the model's own logits, for families that scale, cap or multiply them under different names."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import drift_kernels as dk
from drift_kernels.head.models import transformed

SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
SHAPE |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES = {  # (config class, what scales or caps its logits) → (softcap, scale)
    "qwen3": ("Qwen3Config", {}, (None, 1.0)),
    "granite": ("GraniteConfig", {"logits_scaling": 2.5}, (None, 0.4)),
    "granitemoe": ("GraniteMoeConfig", {"logits_scaling": 2.5}, (None, 0.4)),
    "cohere": ("CohereConfig", {"logit_scale": 2.5}, (None, 2.5)),
    "cohere2": ("Cohere2Config", {"logit_scale": 2.5}, (None, 2.5)),
    "gemma2": ("Gemma2Config", {"final_logit_softcapping": 3.0}, (3.0, 1.0)),
    "gemma3": ("Gemma3TextConfig", {"final_logit_softcapping": 3.0}, (3.0, 1.0)),
    "falcon_h1": ("FalconH1Config", {"lm_head_multiplier": 2.5}, (None, 2.5)),
    "hyperclovax": ("HyperCLOVAXConfig", {"logits_scaling": 2.5}, (None, 2.5)),
}


def made(name, **changes):
    kind, numbers, expected = FAMILIES[name]
    if not hasattr(transformers, kind):
        pytest.skip(f"this transformers has no {kind}")
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**SHAPE, **numbers, **changes)
    return AutoModelForCausalLM.from_config(config).eval(), expected


def close(model, head):
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        hidden = base.base_model(input_ids=ids, use_cache=False).last_hidden_state
        products = F.linear(hidden, head.weight, head.bias)
        if head.lora is not None:
            products = products + head.lora.scale * (hidden @ head.lora.A.T @ head.lora.B.T)
    torch.testing.assert_close(transformed(products, head.softcap, head.logit_scale), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_head_gives_the_models_own_logits(name):
    model, expected = made(name)
    head = dk.Head.of(model)
    assert (head.softcap, pytest.approx(head.logit_scale)) == expected
    close(model, head)


def test_a_head_with_layers_of_its_own_is_refused_by_name():
    config = transformers.ModernBertDecoderConfig(**SHAPE)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(NotImplementedError, match="ModernBertDecoderForCausalLM changes its backbone's hidden states"):
        dk.Head.of(model)


def test_a_configuration_that_changes_later_is_read_again():
    model, _ = made("granite")
    assert dk.Head.of(model).logit_scale == pytest.approx(0.4)
    model.config.logits_scaling = model.logits_scaling = 4.0
    assert dk.Head.of(model).logit_scale == pytest.approx(0.25)


def test_a_linear_with_another_forward_is_refused():
    class Twice(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model, _ = made("qwen3", tie_word_embeddings=False)
    model.set_output_embeddings(Twice(32, 64, bias=False))
    with pytest.raises(NotImplementedError, match="the head is a Twice, whose forward is not nn"):
        dk.Head.of(model)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_heads_and_a_lora_on_the_head(tied):
    model, _ = made("qwen3", tie_word_embeddings=tied)
    assert (dk.Head.of(model).weight is model.get_input_embeddings().weight) == tied
    if tied:
        return
    adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=6, target_modules=["lm_head"], init_lora_weights=False))
    head = dk.Head.of(adapted.eval())
    assert head.lora is not None
    assert head.lora.scale == 3.0
    close(adapted, head)


def test_a_check_inside_autocast_leaves_the_training_step_its_gradients():
    model, _ = made("qwen3", tie_word_embeddings=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dk.Head.of(model)
        model(input_ids=torch.arange(3, 9)[None], use_cache=False).logits.float().square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_model_without_a_head_is_refused():
    with pytest.raises(TypeError, match="has no output embeddings"):
        dk.Head.of(torch.nn.Linear(3, 3))
