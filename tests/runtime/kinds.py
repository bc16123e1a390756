"""Every registered kind of adapter, with the options that change how it acts, on each of the first three classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import adaptc
from tests.sites.moe import NAMES

LINEAR = {"llama": ["q_proj", "down_proj"], "qwen3_moe": ["q_proj", "o_proj"], "vit": ["q_proj", "fc1"]}
MLP = {"llama": "mlp", "qwen3_moe": "mlp", "vit": "mlp"}
TAP = {"llama": "post_attention_layernorm", "qwen3_moe": "post_attention_layernorm", "vit": "layernorm_after"}
EMBEDDING = {"llama": ["embed_tokens"], "qwen3_moe": ["embed_tokens"], "vit": ["re:.*patch_embeddings.projection"]}
HEAD = {"llama": ["lm_head"], "qwen3_moe": ["lm_head"], "vit": ["classifier"]}
LANGUAGE = ("llama", "qwen3_moe")

#: What a kind is tried as -> (host -> plan). Every registered kind is here.
KINDS: dict[str, Callable[[str], Any]] = {
    "lora": lambda host: adaptc.LoRA(r=3, alpha=6, targets=LINEAR[host]),
    "lora rslora": lambda host: adaptc.LoRA(r=2, alpha=6, rslora=True, targets=LINEAR[host]),
    "lora dora": lambda host: adaptc.LoRA(r=3, alpha=6, dora=True, targets=LINEAR[host]),
    "lora bias": lambda host: adaptc.LoRA(r=3, alpha=6, lora_bias=True, targets=LINEAR[host]),
    "lora trained bias": lambda host: adaptc.LoRA(r=3, bias="lora_only", targets=LINEAR[host]),
    "lora pissa": lambda host: adaptc.LoRA(r=3, init="pissa", targets=LINEAR[host]),
    "lora fp32": lambda host: adaptc.LoRA(r=3, compute_dtype="float64", targets=LINEAR[host]),
    "lora embedding": lambda host: adaptc.LoRA(r=3, init="random", targets=EMBEDDING[host]),
    "lora experts": lambda host: adaptc.LoRA(r=3, init="random", targets=NAMES),
    "ia3": lambda host: adaptc.IA3(targets=LINEAR[host][:1]),
    "ia3 before": lambda host: adaptc.IA3(feedforward=True, targets=LINEAR[host][1:]),
    "vera": lambda host: adaptc.VeRA(r=4, init="random", targets=LINEAR[host]),
    "ssf": lambda host: adaptc.SSF(targets=LINEAR[host]),
    "hydra": lambda host: adaptc.Hydra(r=2, targets=LINEAR[host]),
    "bottleneck": lambda host: adaptc.Bottleneck(r=4, targets=LINEAR[host]),
    "bottleneck before": lambda host: adaptc.Bottleneck(r=4, placement="series_in", targets=LINEAR[host]),
    "bottleneck beside": lambda host: adaptc.Bottleneck(r=4, placement="parallel", targets=LINEAR[host]),
    "adaptformer": lambda host: adaptc.AdaptFormer(
        r=4, dropout=0, tap=TAP[host], features=64 if host != "vit" else None, targets=[MLP[host]]
    ),
    "conv_adapter": lambda host: adaptc.ConvAdapter(
        r=4, style="convpass", dropout=0, init="random", features=64 if host != "vit" else None, targets=[MLP[host]]
    ),
    "bias": lambda host: adaptc.LoRA(r=2, bias="lora_only" if host == "vit" else "all", targets=LINEAR[host]),
    "full": lambda host: {"version": 1, "rules": [{"match": {"targets": HEAD[host]}, "train": "full"}]},
    "prompt": lambda host: adaptc.Prompt(num_virtual_tokens=3),
    "prefix": lambda host: adaptc.Prefix(num_virtual_tokens=3),
    "prefix projected": lambda host: adaptc.Prefix(
        num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8
    ),
    "trainable_tokens": lambda host: adaptc.TrainableTokens(indices=(33, 38, 42), targets=EMBEDDING[host]),
}
#: Kinds that one host alone has, or that it does not have.
ONLY = {"lora experts": ("qwen3_moe",), "prompt": LANGUAGE, "prefix": LANGUAGE, "prefix projected": LANGUAGE,
        "trainable_tokens": LANGUAGE}  # fmt: skip
TOKENS = ("prompt", "prefix", "prefix projected")


def kinds_of(host: str) -> list[str]:
    """The names of the kinds that a host can have."""
    return [kind for kind in KINDS if kind not in ONLY or host in ONLY[kind]]
