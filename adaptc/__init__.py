"""adaptc: the adapter compiler for PyTorch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from adaptc import earlier

__version__ = "0.1.0"

earlier.refuse()

if TYPE_CHECKING:
    from adaptc import methods as methods
    from adaptc.api import compile as compile
    from adaptc.files.merge_checkpoint import merge_checkpoint as merge_checkpoint
    from adaptc.methods.adaptformer import AdaptFormer as AdaptFormer
    from adaptc.methods.bias import Bias as Bias
    from adaptc.methods.bottleneck import Bottleneck as Bottleneck
    from adaptc.methods.conv_adapter import ConvAdapter as ConvAdapter
    from adaptc.methods.hydra import Hydra as Hydra
    from adaptc.methods.ia3 import IA3 as IA3
    from adaptc.methods.lora.method import LoRA as LoRA
    from adaptc.methods.prefix import Prefix as Prefix
    from adaptc.methods.prompt import Prompt as Prompt
    from adaptc.methods.ssf import SSF as SSF
    from adaptc.methods.trainable_tokens import TrainableTokens as TrainableTokens
    from adaptc.methods.vera import VeRA as VeRA
    from adaptc.plan import Match as Match
    from adaptc.plan import Plan as Plan
    from adaptc.plan import Rule as Rule
    from adaptc.rewrite import rewrite as rewrite

_TABLE = {
    "compile": "adaptc.api",
    "Bank": "adaptc.runtime.bank",
    "merge_checkpoint": "adaptc.files.merge_checkpoint",
    "rewrite": "adaptc.rewrite",
    "Plan": "adaptc.plan",
    "Rule": "adaptc.plan",
    "Match": "adaptc.plan",
}

__all__ = [
    "IA3",
    "SSF",
    "AdaptFormer",
    "Bank",
    "Bias",
    "Bottleneck",
    "ConvAdapter",
    "Hydra",
    "LoRA",
    "Match",
    "Plan",
    "Prefix",
    "Prompt",
    "Rule",
    "TrainableTokens",
    "VeRA",
    "compile",
    "merge_checkpoint",
    "methods",
    "rewrite",
]


def _where(name: str) -> str | None:
    """The module that defines a public name."""
    if name in _TABLE:
        return _TABLE[name]
    from adaptc.methods import TABLE

    rows = (row.partition(":") for row in TABLE.values())
    return next((module for module, _, cls in rows if cls == name), None)


def __getattr__(name: str) -> Any:
    if name == "methods":
        return importlib.import_module("adaptc.methods")
    where = _where(name)
    if where is None:
        raise AttributeError(f"module 'adaptc' has no attribute {name!r}")
    value = getattr(importlib.import_module(where), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
