"""Tiny, seeded, offline vision and audio encoders of transformers, and batches with labels for them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from tests.models.hosts import CLASSES, seeded

_SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 8,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": CLASSES,
}  # fmt: skip


def vit(**changes: Any) -> PreTrainedModel:
    config = transformers.ViTConfig(**{**_SIZES, "image_size": 16, **changes})
    return transformers.ViTForImageClassification(config)


def deit(**changes: Any) -> PreTrainedModel:
    config = transformers.DeiTConfig(**{**_SIZES, "image_size": 16, **changes})
    return transformers.DeiTForImageClassification(config)


def ast(**changes: Any) -> PreTrainedModel:
    """2 x 3 patches of 8 x 8, and two class tokens."""
    sizes = {"num_mel_bins": 16, "max_length": 24, "frequency_stride": 8, "time_stride": 8}
    config = transformers.ASTConfig(**{**_SIZES, **sizes, **changes})
    return transformers.ASTForAudioClassification(config)


TOWERS = {"vit": vit, "deit": deit, "ast": ast}


def build(name: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """The tiny model ``name``, float32, in eval mode; no bias is zero and no norm one."""
    with seeded(seed), torch.no_grad():
        model = TOWERS[name](**changes)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def batch(name: str, *, rows: int = 3, seed: int = 0) -> dict[str, Any]:
    with seeded(seed):
        labels = torch.randint(0, CLASSES, (rows,))
        if name == "ast":
            return {"input_values": torch.randn(rows, 24, 16), "labels": labels}
        return {"pixel_values": torch.randn(rows, 3, 16, 16), "labels": labels}
