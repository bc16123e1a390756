"""Tiny mixtures of experts of every type whose names PEFT replaces; dense and shared layers where a type has them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from tests.models import hosts

_COMMON: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "max_position_embeddings": 64,
    "num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GROUPS = {"n_group": 1, "topk_group": 1, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}

#: Model type -> (class without "Config", options beside the common ones).
TYPES: dict[str, tuple[str, dict[str, Any]]] = {
    "afmoe": ("Afmoe", {"num_experts": 4, "num_shared_experts": 1, "num_dense_layers": 1}),
    "beam": ("Beam", {"num_experts": 4, "mlp_layer_types": ["dense", "sparse"], "n_group": 1, "topk_group": 1}),
    "cohere2_moe": ("Cohere2Moe", {"num_experts": 4}),
    "deepseek_v2": ("DeepseekV2", {**_GROUPS, **_LATENT}),
    "deepseek_v3": ("DeepseekV3", {**_GROUPS, **_LATENT}),
    "deepseek_v32": ("DeepseekV32", {**_GROUPS, **_LATENT}),
    "dots1": ("Dots1", _GROUPS),
    "ernie4_5_moe": ("Ernie4_5_Moe", {"num_experts": 4}),
    "exaone_moe": ("ExaoneMoe", {"num_experts": 4}),
    "flex_olmo": ("FlexOlmo", {"num_experts": 4}),
    "glm4_moe": ("Glm4Moe", _GROUPS),
    "glm4_moe_lite": ("Glm4MoeLite", {**_GROUPS, **_LATENT}),
    "glm4v_moe": ("Glm4vMoe", _GROUPS),
    "glm_moe_dsa": ("GlmMoeDsa", {**_GROUPS, **_LATENT}),
    "hunyuan_v1_moe": ("HunYuanMoEV1", {"num_experts": 4}),
    "longcat_flash": ("LongcatFlash", {**_LATENT, "n_routed_experts": 4, "zero_expert_num": 1, "moe_topk": 2}),
    "mellum": ("Mellum", {"num_experts": 4}),
    "minimax": ("MiniMax", {"num_local_experts": 4}),
    "minimax_m2": ("MiniMaxM2", {"num_local_experts": 4}),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "olmoe": ("Olmoe", {"num_experts": 4}),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 4, "mlp_only_layers": [0]}),
    "qwen3_next": (
        "Qwen3Next",
        {
            "num_experts": 4, "mlp_only_layers": [0], "shared_expert_intermediate_size": 16,
            "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
            "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        },
    ),
    "solar_open": ("SolarOpen", _GROUPS),
}  # fmt: skip

#: Types that had a layer per expert too, and are in no table of PEFT's.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "phimoe": ("Phimoe", {"num_local_experts": 4}),
    "qwen2_moe": ("Qwen2Moe", {"num_experts": 4, "shared_expert_intermediate_size": 16}),
}


def _causal(name: str, options: dict[str, Any]) -> nn.Module:
    return getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**{**_COMMON, **options}))


def _glm4v_moe() -> nn.Module:
    vision = {
        "depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32, "image_size": 28,
    }  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
    config = transformers.Glm4vMoeConfig(
        text_config={**_COMMON, **_GROUPS, "rope_parameters": rope}, vision_config=vision
    )
    return transformers.Glm4vMoeForConditionalGeneration(config)


def build(kind: str) -> nn.Module:
    with hosts.seeded(0):
        model = _glm4v_moe() if kind == "glm4v_moe" else _causal(*{**TYPES, **OTHERS}[kind])
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    nn.init.normal_(parameter, std=0.15)
    return model.eval()
