"""adaptc: the adapter compiler for PyTorch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from adaptc.api import compile as compile
    from adaptc.codegen.rewrite import rewrite as rewrite
    from adaptc.methods.bias import Bias as Bias
    from adaptc.methods.lora import LoRA as LoRA
    from adaptc.plan import Match as Match
    from adaptc.plan import Plan as Plan
    from adaptc.plan import Rule as Rule

_TABLE = {
    "compile": "adaptc.api",
    "rewrite": "adaptc.codegen.rewrite",
    "Plan": "adaptc.plan",
    "Rule": "adaptc.plan",
    "Match": "adaptc.plan",
    "LoRA": "adaptc.methods.lora",
    "Bias": "adaptc.methods.bias",
}

__all__ = ["Bias", "LoRA", "Match", "Plan", "Rule", "compile", "rewrite"]


def __getattr__(name: str) -> Any:
    if name not in _TABLE:
        raise AttributeError(f"module 'adaptc' has no attribute {name!r}")
    value = getattr(importlib.import_module(_TABLE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_TABLE])
