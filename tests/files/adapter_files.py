"""A small adapter on disk, for the tests of adapter files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from adaptc.files import checkpoint

CONFIG = {"peft_type": "LORA", "r": 2, "target_modules": ["q"], "lora_alpha": 4}
PLAN = {"version": 1, "rules": []}


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "base_model.model.q.lora_A.weight": torch.randn(2, 5, generator=generator),
        "base_model.model.q.lora_B.weight": torch.randn(3, 2, generator=generator).to(torch.bfloat16),
        "base_model.model.head.weight": torch.randn(3, 4, generator=generator, dtype=torch.float64),
        "base_model.model.head.steps": torch.tensor(7),
    }


NAMES = sorted(tensors())


def write(directory: Path, *, seed: int = 0, **changes: Any) -> Path:
    arguments = {
        "config": {**CONFIG, "seed": seed},
        "tensors": tensors(seed),
        "plan": PLAN,
        "fingerprint": None,
    }
    return checkpoint.write_adapter(directory, **{**arguments, **changes})


def same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[k].dtype == v.dtype and torch.equal(found[k], v) for k, v in expected.items()
    )
