"""Tiny, seeded, offline instances of real transformers classes, and batches with labels for them.

``build(name)`` gives a float32 model in eval mode whose dropout is 0; ``batch(name)`` gives keyword
arguments for it, so that ``build(name)(**batch(name)).loss`` is a scalar (CLIP: its contrastive loss).
The sizes differ from each other wherever a class allows it (hidden, intermediate, heads, vocabulary), so
that swapped dimensions show; Llama and Mixtral use grouped-query attention (``k_proj`` is not square).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

VOCAB = 99
CLASSES = 3
Builder = Callable[..., PreTrainedModel]


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block under its own CPU seed and give the caller's random state back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def llama(**changes: Any) -> PreTrainedModel:
    options = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**options, **changes}))


def gpt2(**changes: Any) -> PreTrainedModel:
    options = {
        "vocab_size": VOCAB,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "n_inner": 96,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**options, **changes}))


def _encoder_options() -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "classifier_dropout": 0.0,
        "pad_token_id": 0,
        "num_labels": CLASSES,
    }


def bert(**changes: Any) -> PreTrainedModel:
    config = transformers.BertConfig(**{**_encoder_options(), **changes})
    return transformers.BertForSequenceClassification(config)


def roberta(**changes: Any) -> PreTrainedModel:
    config = transformers.RobertaConfig(**{**_encoder_options(), **changes})
    return transformers.RobertaForSequenceClassification(config)


def t5(**changes: Any) -> PreTrainedModel:
    options = {
        "vocab_size": VOCAB,
        "d_model": 64,
        "d_kv": 12,
        "d_ff": 96,
        "num_layers": 2,
        "num_heads": 4,
        "dropout_rate": 0.0,
        "feed_forward_proj": "gated-gelu",
        "pad_token_id": 0,
        "decoder_start_token_id": 0,
        "eos_token_id": 2,
    }
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**{**options, **changes}))


def mixtral(**changes: Any) -> PreTrainedModel:
    options = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 128,
        "router_jitter_noise": 0.0,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**{**options, **changes}))


def albert(**changes: Any) -> PreTrainedModel:
    """One physical layer that runs twice (``num_hidden_groups`` is 1)."""
    config = transformers.AlbertConfig(**{**_encoder_options(), "embedding_size": 32, **changes})
    config.classifier_dropout_prob = 0.0
    return transformers.AlbertForSequenceClassification(config)


def clip(**changes: Any) -> PreTrainedModel:
    tower = {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "attention_dropout": 0.0,
        "projection_dim": 24,
    }
    text = {**tower, "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "eos_token_id": 2}
    vision = {**tower, "hidden_size": 64, "intermediate_size": 80, "image_size": 32, "patch_size": 16}
    options = {
        "text_config": {**text, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1},
        "vision_config": vision,
        "projection_dim": 24,
    }
    return transformers.CLIPModel(transformers.CLIPConfig(**{**options, **changes}))


HOSTS: dict[str, Builder] = {
    "llama": llama,
    "gpt2": gpt2,
    "bert": bert,
    "roberta": roberta,
    "t5": t5,
    "mixtral": mixtral,
    "albert": albert,
    "clip": clip,
}


def slowly(names: Iterable[str], *rest: Iterable[Any], also: Sequence[str] = ()) -> list[Any]:
    """Parameters of a test, one for each of ``names`` (with what stands beside it in ``rest``): hosts that take
    longest, or resemble another, and those in ``also`` are in the slow set."""
    slow = ("roberta", "albert", "mixtral", "t5", "clip", *also)
    return [
        pytest.param(*row, marks=[pytest.mark.slow] if row[0] in slow else [])
        for row in zip(names, *rest, strict=True)
    ]
#: Host -> modules of :func:`short` that "all-linear" adapts, and how often they are called in one forward.
ALL_LINEAR = {
    "llama": (7, 7),
    "gpt2": (4, 4),
    "bert": (7, 7),
    "roberta": (6, 6),
    "t5": (18, 18),
    "mixtral": (4, 4),  # the attention; the experts are fused weights, not linear layers
    "albert": (8, 14),  # its one layer has six linear modules and runs twice
    "clip": (26, 26),
}
_CLASSIFIERS = {"bert", "roberta", "albert"}


def build(name: str, *, seed: int = 0, train: bool = False, **changes: Any) -> PreTrainedModel:
    """The tiny model ``name``; ``changes`` are passed to its config."""
    with seeded(seed):
        model = HOSTS[name](**changes)
    # 1-d weights start at exactly 0 or 1, which hides mistakes in biases and norms.
    with seeded(seed + 1), torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.train(train)


def short(name: str, **options: Any) -> PreTrainedModel:
    """:func:`build` with one layer (of T5 one in either half; CLIP's towers have two, ALBERT's one runs twice), where
    depth adds time only."""
    depth = {"clip": {}, "albert": {}, "t5": {"num_layers": 1}}.get(name, {"num_hidden_layers": 1})
    return build(name, **{**depth, **options})


def batch(name: str, *, rows: int = 2, length: int = 10, seed: int = 0) -> dict[str, Any]:
    """Inputs with labels; the last row is padded on the right by a third of its length."""
    if name not in HOSTS:
        raise KeyError(f"no host {name!r}; known: {', '.join(HOSTS)}")
    with seeded(seed):
        ids = torch.randint(3, VOCAB, (rows, length))
        mask = torch.ones_like(ids)
        mask[-1, length - length // 3 :] = 0
        ids = torch.where(mask.bool(), ids, torch.zeros_like(ids))
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if name in _CLASSIFIERS:
            inputs["labels"] = torch.randint(0, CLASSES, (rows,))
        elif name == "t5":
            inputs["labels"] = torch.randint(3, VOCAB, (rows, length - 3))
        elif name == "clip":
            # CLIP pools the text at the end-of-text token, so each row needs one.
            inputs["input_ids"][torch.arange(rows), mask.sum(1) - 1] = 2
            inputs["pixel_values"] = torch.randn(rows, 3, 32, 32)
            inputs["return_loss"] = True
        else:
            inputs["labels"] = torch.where(mask.bool(), ids, torch.full_like(ids, -100))
    return inputs
