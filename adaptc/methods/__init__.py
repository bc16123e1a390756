"""The registry of adapter methods: kind -> class, loaded on first use."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from adaptc.errors import UnsupportedError

if TYPE_CHECKING:
    from adaptc.methods.base import Anchor, Method

_TABLE = {
    "lora": "adaptc.methods.lora:LoRA",
    "bias": "adaptc.methods.bias:Bias",
    "full": "adaptc.methods.full:Full",
}


def kinds() -> list[str]:
    """Every method kind that this version has, sorted."""
    return sorted(_TABLE)


def get(kind: str) -> type[Method]:
    """The method class of ``kind``.

    Raises:
        UnsupportedError: no such kind.
    """
    if kind not in _TABLE:
        raise UnsupportedError(f"no adapter method of kind {kind!r}", found=", ".join(kinds()))
    module, _, name = _TABLE[kind].partition(":")
    return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]


def anchors() -> dict[Callable[..., Any], Anchor]:
    """Anchor function -> how its calls are rewritten, for every kind that has an anchor."""
    modules = [importlib.import_module(entry.partition(":")[0]) for entry in _TABLE.values()]
    return {m.ANCHOR.function: m.ANCHOR for m in modules if hasattr(m, "ANCHOR")}
