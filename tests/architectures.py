"""Tiny random models of many architectures of transformers, for tests of the head: 97 tokens, logits a few nats wide."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

VOCAB = 97
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = {"head_dim": 8}
GEMMA = {**HEADS, "query_pre_attn_scalar": 8, "sliding_window": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}

# name: (class stem, changes to TEXT)
TEXT_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", HEADS),
    "mixtral": ("Mixtral", LOCAL_EXPERTS),
    "qwen2": ("Qwen2", {}),
    "qwen2-moe": ("Qwen2Moe", {**EXPERTS, "shared_expert_intermediate_size": 24}),
    "qwen3": ("Qwen3", HEADS),
    "qwen3-moe": ("Qwen3Moe", {**HEADS, **EXPERTS}),
    "gemma": ("Gemma", HEADS),
    "gemma2": ("Gemma2", {**GEMMA, "final_logit_softcapping": 5.0}),
    "gemma3": ("Gemma3", {**GEMMA, "final_logit_softcapping": 5.0}),
    "phi": ("Phi", {"num_key_value_heads": 4}),
    "phi3": ("Phi3", {}),
    "granite": ("Granite", {"logits_scaling": 4.0}),
    "granite-moe": ("GraniteMoe", {**LOCAL_EXPERTS, "logits_scaling": 4.0}),
    "cohere": ("Cohere", {"logit_scale": 0.25}),
    "cohere2": ("Cohere2", {**HEADS, "logit_scale": 0.25, "sliding_window": 8}),
    "olmo2": ("Olmo2", {}),
    "olmoe": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "starcoder2": ("Starcoder2", {}),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt-neox": ("GPTNeoX", {}),
    "gptj": ("GPTJ", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4}),
    "opt": ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 16}),
    "bloom": ("Bloom", {"n_layer": 2, "n_head": 4}),
    "falcon": ("Falcon", {}),
    "falcon-h1": (
        "FalconH1",
        {
            **HEADS,
            "lm_head_multiplier": 0.3,
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_chunk_size": 8,
        },
    ),
    "mamba": ("Mamba", {"state_size": 4}),
    "deepseek-v3": (
        "DeepseekV3",
        {
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
    "smollm3": ("SmolLM3", {}),
    "gpt-oss": ("GptOss", {**HEADS, **LOCAL_EXPERTS, "sliding_window": 8}),
    "minicpm3": (
        "MiniCPM3",
        {
            "num_key_value_heads": 4,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "dim_model_base": 16,  # its logits_scaling is hidden_size / dim_model_base, and divides the hidden states
        },
    ),
    "hyperclovax": ("HyperCLOVAX", {**HEADS, "logits_scaling": 0.25}),
    "nanochat": ("NanoChat", {**HEADS, "final_logit_softcapping": 4.0}),
    "recurrent-gemma": ("RecurrentGemma", {**HEADS, "logits_soft_cap": 5.0, "lru_width": 32, "num_hidden_layers": 3}),
    "glm4": ("Glm4", HEADS),
    "exaone4": ("Exaone4", HEADS),
}
MULTIMODAL = ("llava", "gemma3 with vision", "qwen2-vl")
ARCHITECTURES = (*TEXT_MODELS, *MULTIMODAL)


def available(name: str) -> bool:
    """True if the installed transformers has this architecture; older supported versions lack the newest."""
    return name in MULTIMODAL or hasattr(transformers, f"{TEXT_MODELS[name][0]}Config")


def build(name: str, *, seed: int = 0, **changes: Any) -> Any:
    """Return a random model, on the CPU, in fp32 and in evaluation mode; its logits have a standard deviation of a few nats."""
    torch.manual_seed(seed)
    model: Any = _multimodal(name, changes) if name in MULTIMODAL else _text(name, changes)
    if hasattr(model, "set_experts_implementation"):
        # torch's grouped product does not support fp64, in which the reference is computed.
        model.set_experts_implementation("eager")
    with torch.no_grad():
        nn.init.normal_(model.get_output_embeddings().weight, std=0.5)
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases and norms that start at 0 or 1 would hide what is done to them
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def _text(name: str, changes: dict[str, Any]) -> Any:
    stem, own = TEXT_MODELS[name]
    config = getattr(transformers, f"{stem}{'Text' if stem == 'Gemma3' else ''}Config")(
        **{**TEXT, "tie_word_embeddings": False, **own, **changes}
    )
    model_class = getattr(transformers, f"{stem}{'LMHeadModel' if stem == 'GPT2' else 'ForCausalLM'}")
    return model_class._from_config(config, attn_implementation="eager")


def _multimodal(name: str, changes: dict[str, Any]) -> Any:
    text = {**TEXT, **changes}
    match name:
        case "llava":
            config: Any = transformers.LlavaConfig(
                vision_config=transformers.CLIPVisionConfig(**VISION),
                text_config=transformers.LlamaConfig(**text),
                image_token_index=3,
            )
            return transformers.LlavaForConditionalGeneration._from_config(config, attn_implementation="eager")
        case "gemma3 with vision":
            config = transformers.Gemma3Config(
                vision_config=transformers.SiglipVisionConfig(**VISION),
                text_config=transformers.Gemma3TextConfig(**{**text, **GEMMA, "final_logit_softcapping": 5.0}),
                image_token_index=3,
                boi_token_index=4,
                eoi_token_index=5,
                mm_tokens_per_image=4,
            )
            return transformers.Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager")
        case _:
            rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
            config = transformers.Qwen2VLConfig(
                text_config={**text, "rope_parameters": rope},
                vision_config={"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 32, "patch_size": 8},
                image_token_id=3,
                video_token_id=4,
                vision_start_token_id=5,
                vision_end_token_id=6,
            )
            return transformers.Qwen2VLForConditionalGeneration._from_config(config, attn_implementation="eager")
