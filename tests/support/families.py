"""Every causal-LM family of the installed transformers at tiny size, as far as a table of small values can build it."""

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

NAMES = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)  # model type -> class name
MOST = 3_000_000  # parameters of what counts as tiny
_SMALL = {
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "vocab_size": 64,
    "sliding_window": 8, "rotary_dim": 4, "first_k_dense_replace": 1, "encoder_layers": 1, "mamba_expand": 2,
}  # fmt: skip
for _value, _names in {
    256: "max_position_embeddings n_positions max_seq_len",
    32: "hidden_size intermediate_size d_model n_embd n_inner ffn_dim decoder_ffn_dim encoder_ffn_dim embedding_size "
    "word_embed_proj_dim lru_width dim_model dim_ff embedding_dim",
    64: "mamba_d_ssm mamba_intermediate",
    16: "moe_intermediate_size shared_expert_intermediate_size q_lora_rank kv_lora_rank qk_head_dim d_conv_inner",
    8: "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim linear_key_head_dim linear_value_head_dim mamba_d_head "
    "mamba_d_state mamba_chunk_size state_size mamba_head_dim chunk_size ssm_state_size attention_head_dim index_head_dim "
    "index_topk dim_head",
    4: "num_hidden_layers num_attention_heads n_layer n_head n_layers n_heads num_layers num_heads decoder_layers "
    "decoder_attention_heads encoder_attention_heads num_decoder_layers num_decoder_attention_heads",
    2: "num_key_value_heads num_experts num_local_experts n_routed_experts linear_num_key_heads linear_num_value_heads "
    "index_n_heads",
    1: "num_experts_per_tok n_shared_experts n_group topk_group moe_topk mamba_n_groups n_groups",
}.items():
    _SMALL |= dict.fromkeys(_names.split(), _value)
_LATENT = {"num_key_value_heads": 4, "head_dim": 8}  # attention through a low rank has a head of keys a head
_ODD = {
    "bamba": {"mamba_n_heads": 8}, "granitemoehybrid": {"mamba_n_heads": 8}, "falcon_h1": {"mamba_n_heads": 8},
    "mamba2": {"num_heads": 8}, "zamba2": {"n_mamba_heads": 8}, 
    "hunyuan_v1_dense": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "nemotron": {"num_key_value_heads": 2}, "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "minimax": {"layer_types": ["linear_attention", "full_attention"] * 2, "block_size": 16},
}  # fmt: skip
_ODD |= dict.fromkeys(
    ["axk1", "axk2", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa"],
    _LATENT,
)
_ODD |= dict.fromkeys(["hy_v4", "minicpm3", "sarvam_mla", "youtu"], _LATENT)


def tiny_config(name: str):
    """Its config with small values for what it has. Raises anything, for families that the table does not fit."""
    config = getattr(transformers, NAMES[name]).config_class()
    text = config.get_text_config()
    for part in [config] if text is config else [config, text]:
        there = part.to_dict()
        for key, value in {**_SMALL, **_ODD.get(name, {})}.items():
            plain = not isinstance(there.get(key), (list, dict)) or key in _ODD.get(name, {})
            if key in there and plain and (there[key] is not None or key.endswith("_id") or key in _ODD.get(name, {})):
                setattr(part, key, value)
        for key in ("layer_types", "mlp_layer_types", "layers_block_type", "block_types"):
            if isinstance(there.get(key), list) and there[key] and key not in _ODD.get(name, {}):
                setattr(part, key, (list(dict.fromkeys(there[key])) * 4)[:4])
    if getattr(config, "is_decoder", None) is False and not getattr(config, "is_encoder_decoder", False):
        config.is_decoder = True
    return config


def tiny_model(name: str, implementation: str | None = None):
    """The family's model with random weights, large enough for state to show; None if the table does not fit it."""
    kind = getattr(transformers, NAMES[name])
    try:
        config = tiny_config(name)
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in kind(config).parameters())
        if size > MOST:
            return None
        torch.manual_seed(0)
        model = kind(config).float().eval()
    except Exception:  # whatever a family says to values that are not for it
        return None
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    if implementation is not None:
        model.set_attn_implementation(implementation)
    return model
