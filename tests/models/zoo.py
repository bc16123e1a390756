"""Tiny instances of transformers classes by name alone: configs shrunk by the standard names of their fields.

``classes(task)`` lists what the installed transformers has for a task; ``build(task, model_type)`` makes one with
seeded weights and no dropout; ``batch`` makes inputs and labels for it. Classes that need more than their fields'
names say get a row in ``SPECIAL``.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.models.hosts import CLASSES, VOCAB, seeded

TASKS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "image": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "audio": modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    "speech": modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
}
IMAGE = 32
#: Field names -> value. Heads, widths and depths differ from each other, so that swapped dimensions show.
SIZES: dict[int | str, tuple[str, ...]] = {
    64: (
        "hidden_size", "d_model", "n_embd", "embed_dim", "emb_dim", "dim", "embedding_size", "lru_width",
        "hidden_size_global",
    ),
    96: (
        "intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "n_inner", "hidden_dim",
        "mlp_dim", "ffn_hidden_size",
    ),
    2: (
        "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers",
        "num_decoder_layers", "num_encoder_layers", "num_key_value_heads", "num_experts_per_tok", "moe_top_k",
        "depth", "num_experts_per_token", "moe_topk", "linear_num_key_heads",
    ),
    4: (
        "num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
        "decoder_attention_heads", "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts",
        "linear_num_value_heads", "index_n_heads", "index_topk",
    ),
    1: ("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "mamba_n_groups", "n_groups"),
    16: (
        "mamba_n_heads", "head_dim", "d_kv", "q_lora_rank", "kv_lora_rank", "v_head_dim", "mamba_d_state", "state_size",
        "linear_key_head_dim", "linear_value_head_dim", "global_head_dim", "index_head_dim", "attention_head_dim",
    ),
    8: ("qk_rope_head_dim", "qk_nope_head_dim", "sliding_window", "patch_size", "mamba_d_head"),
    32: (
        "moe_intermediate_size", "image_size", "shared_expert_intermediate_size", "hidden_size_per_layer_input",
        "shared_intermediate_size", "chunk_size", "mamba_chunk_size", "expert_ffn_hidden_size",
    ),
    128: (
        "max_position_embeddings", "n_positions", "n_ctx", "max_source_positions", "max_target_positions",
        "max_seq_len",
    ),
    VOCAB: (
        "vocab_size", "entity_vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size", "encoder_vocab_size",
    ),
}  # fmt: skip
BY_FIELD = {name: size for size, names in SIZES.items() for name in names}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
#: Shifted windows: the width doubles per stage, and its heads (3, 6, ...) divide it.
SWIN = {"embed_dim": 48, "patch_size": 4, "window_size": 2, "depths": [1, 1], "num_heads": [3, 6]}
HYBRID = {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
QWEN4_INDEXER = {
    "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 4,
    "indexer_compress_ratio": 2, "hc_lowrank": 16,
}  # fmt: skip
REFORMER = {
    "axial_pos_embds": False, "attn_layers": ["local", "lsh"], "local_attn_chunk_length": 5, "lsh_attn_chunk_length": 5,
    "attention_head_size": 16, "feed_forward_size": 96, "num_buckets": 2, "hash_seed": 0,
}  # fmt: skip
#: Model type -> what its config needs on top. What a sub-config needs stands under its own type.
SPECIAL: dict[str, dict[str, Any]] = {
    "audio-spectrogram-transformer": {"max_length": 24, "num_mel_bins": 16},
    "axk2": {"num_key_value_heads": 4},
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"use_cache": False, "encoder_hash_byte_group_vocab": 50},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {**ROPE, "mrope_section": [4, 2, 2]}}},
    "convnext": {"patch_size": 4},
    "convnextv2": {"patch_size": 4},
    "cvt": {"depth": [1, 2, 3]},  # its blocks take their drop rate by the number of the stage
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v32": {"num_key_value_heads": 4},
    "donut-swin": SWIN,
    "dots3_note": {"num_key_value_heads": 4, "per_layer_config": None, "shared_experts_intermediate_size": 32},
    "efficientnet": {"width_coefficient": 0.2, "depth_coefficient": 0.2, "hidden_dim": 256},
    "ernie4_5_moe": {"moe_k": 2},
    "esmc": {"num_key_value_heads": 4},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "glm_moe_dsa": {"num_key_value_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "levit": {"image_size": 64, "patch_size": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"num_key_value_heads": 4, "head_dim": 8},
    "mamba2": {"num_heads": 8},
    "mobilevitv2": {"image_size": 64, "patch_size": 2},
    "moshi": {"audio_vocab_size": VOCAB},
    "opt": {"word_embed_proj_dim": 64},
    "perceiver": {"max_position_embeddings": 10, "num_latents": 8, "d_latents": 64, "num_self_attends_per_block": 2},
    "qwen4_exp": QWEN4_INDEXER,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": 8},
    "reformer": REFORMER,
    "swin": SWIN,
    "swinv2": SWIN,
    "whisper": {"num_mel_bins": 16, "max_source_positions": 12, "suppress_tokens": None, "begin_suppress_tokens": None},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {**HYBRID, "num_key_value_heads": 4, "attention_head_dim": 32},
    "zamba2": {**HYBRID, "num_key_value_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
}


class NotBuiltError(Exception):
    """A class cannot be made from its fields' names; says why."""


def classes(task: str) -> dict[str, str]:
    """Model type -> class name, one row a class."""
    found: dict[str, str] = {}
    for model_type, name in TASKS[task].items():
        for one in (name,) if isinstance(name, str) else name[:1]:
            if one not in found.values():
                found[model_type] = one
    return found


def tiny_config(config_class: type[PreTrainedConfig], **changes: Any) -> PreTrainedConfig:
    """A config of the class with every size that has a standard name made small, and no dropout."""
    sizes = _shrunk(config_class)
    for name, value in changes.items():
        sizes[name] = {**sizes[name], **value} if name in config_class.sub_configs else value
    return config_class(**sizes)


def _shrunk(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    try:
        plain = config_class()
    except Exception:  # some do not take their own defaults
        plain = None
    for field in dataclasses.fields(config_class):
        name, default = field.name, field.default
        if default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if name.startswith("_"):
            continue
        if name in TOKENS:
            changes[name] = TOKENS[name]
        elif name in BY_FIELD and not isinstance(default, list | tuple | dict):
            changes[name] = BY_FIELD[name]
        elif isinstance(default, float) and any(part in name for part in ("drop", "jitter")):
            changes[name] = 0.0
        elif "drop" in name and isinstance(default, list | tuple):
            changes[name] = [0.0] * len(default)
        elif name in ("depths", "depth") and isinstance(default, list | tuple):
            changes[name] = [1] * len(default)
    kinds = list(dict.fromkeys(getattr(plain, "layer_types", None) or ()))
    if len(kinds) > 1 and "layer_types" in {field.name for field in dataclasses.fields(config_class)}:
        changes.update(layer_types=kinds, num_hidden_layers=len(kinds))
    for name, inner in config_class.sub_configs.items():
        if not dataclasses.is_dataclass(inner):  # an AutoConfig: of any class
            inner = type(getattr(plain, name, None))
        if isinstance(inner, type) and dataclasses.is_dataclass(inner):
            changes[name] = {"model_type": inner.model_type, **_shrunk(inner), **SPECIAL.get(inner.model_type, {})}
    return changes


def build(task: str, model_type: str, *, seed: int = 0) -> PreTrainedModel:
    """The tiny model of ``model_type`` for ``task``, in eval mode.

    Raises:
        NotBuiltError: its config or its constructor does not take the small sizes.
    """
    name = classes(task)[model_type]
    cls: type[PreTrainedModel] = getattr(transformers, name)
    extra = dict(SPECIAL.get(model_type, {}))
    if task in ("image", "audio"):
        extra["num_labels"] = CLASSES
    if task == "seq2seq":  # T5's kind have it no longer by default
        extra["decoder_start_token_id"] = TOKENS["decoder_start_token_id"]
    config_class = cls.config_class or CONFIG_MAPPING[model_type]  # of the decoder alone, say
    if task == "causal" and "is_decoder" in {f.name for f in dataclasses.fields(config_class)}:
        extra["is_decoder"] = True
    try:
        config = tiny_config(config_class, **extra)
        with torch.device("meta"):
            count = sum(p.numel() for p in cls(config).parameters())
        if count > 30_000_000:
            raise NotBuiltError(f"{count} parameters")
        with seeded(seed):
            model = cls(config)
    except NotBuiltError:
        raise
    except Exception as error:
        raise NotBuiltError(f"{type(error).__name__}: {str(error)[:300]}") from error
    with seeded(seed + 1), torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.05 * torch.randn_like(parameter))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.eval()


def batch(task: str, model: PreTrainedModel, *, rows: int = 2, length: int = 10, seed: int = 0) -> dict[str, Any]:
    """Inputs with labels for a model of ``task``."""
    with seeded(seed):
        inputs = _BATCHES.get(task, _text)(model.config, rows, length)
    if next(iter(inputs)) not in inspect.signature(model.forward).parameters:  # Perceiver's, say
        inputs[model.main_input_name] = inputs.pop(next(iter(inputs)))
    return inputs


def _text(config: PreTrainedConfig, rows: int, length: int) -> dict[str, Any]:
    ids = torch.randint(3, VOCAB, (rows, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.randint(3, VOCAB, ids.shape)}


def _causal(config: PreTrainedConfig, rows: int, length: int) -> dict[str, Any]:
    books = getattr(config, "num_codebooks", None)
    if books is not None:  # several streams of audio tokens
        ids = torch.randint(3, VOCAB, (rows, length, books))
        return {"input_ids": ids.transpose(1, 2).reshape(rows * books, length), "labels": ids}
    ids = torch.randint(3, VOCAB, (rows, length))
    inputs = {"input_ids": ids, "labels": ids}
    if config.model_type == "git":  # always reads an image
        inputs["pixel_values"] = _image(config.vision_config, rows, length)["pixel_values"]
    return inputs


def _image(config: PreTrainedConfig, rows: int, length: int) -> dict[str, Any]:
    labels = torch.randint(0, CLASSES, (rows,))
    if config.model_type == "imagegpt":  # colours as tokens
        return {"input_ids": torch.randint(3, VOCAB, (rows, length)), "labels": labels}
    if config.model_type == "siglip2":  # patches of images of several shapes
        patches = torch.randn(rows, 16, 3 * config.vision_config.patch_size**2)
        shapes, mask = torch.tensor([[4, 4]] * rows), torch.ones(rows, 16)
        return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes, "labels": labels}
    size = getattr(config, "image_size", IMAGE)
    size = size if isinstance(size, int) else size[0]
    pixels = torch.randn(rows, getattr(config, "num_channels", 3), size, size)
    return {"pixel_values": pixels, "labels": labels}


def _audio(config: PreTrainedConfig, rows: int, length: int) -> dict[str, Any]:
    if hasattr(config, "frequency_stride"):  # a spectrogram, else a wave
        values = torch.randn(rows, config.max_length, config.num_mel_bins)
    else:
        values = torch.randn(rows, 4000)
    return {"input_values": values, "labels": torch.randint(0, CLASSES, (rows,))}


def _speech(config: PreTrainedConfig, rows: int, length: int) -> dict[str, Any]:
    features = torch.randn(rows, config.num_mel_bins, 2 * config.max_source_positions)
    return {"input_features": features, "labels": torch.randint(3, VOCAB, (rows, length))}


_BATCHES = {"causal": _causal, "image": _image, "audio": _audio, "speech": _speech}
