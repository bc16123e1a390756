"""The registry of adapter methods: kind -> class, loaded on first use. Calling it lists what each can do."""

from __future__ import annotations

import dataclasses
import importlib
import sys
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from adaptc.errors import UnsupportedError

if TYPE_CHECKING:
    from adaptc.methods.base import Anchor, Method

#: One row a method: kind -> "module:class". Adding a method is its file and its row.
TABLE = {
    "lora": "adaptc.methods.lora.method:LoRA",
    "ia3": "adaptc.methods.ia3:IA3",
    "hydra": "adaptc.methods.hydra:Hydra",
    "vera": "adaptc.methods.vera:VeRA",
    "ssf": "adaptc.methods.ssf:SSF",
    "bottleneck": "adaptc.methods.bottleneck:Bottleneck",
    "adaptformer": "adaptc.methods.adaptformer:AdaptFormer",
    "conv_adapter": "adaptc.methods.conv_adapter:ConvAdapter",
    "prompt": "adaptc.methods.prompt:Prompt",
    "prefix": "adaptc.methods.prefix:Prefix",
    "trainable_tokens": "adaptc.methods.trainable_tokens:TrainableTokens",
    "bias": "adaptc.methods.bias:Bias",
    "full": "adaptc.methods.full:Full",
}


@dataclasses.dataclass(frozen=True)
class Capabilities:
    """What a method can do.

    Attributes:
        mergeable: it can be folded into the frozen weight.
        batchable: rows of one batch can use different adapters of it.
        bankable: adapters of it at linear layers can be in a bank (``adaptc.Bank``).
        sparse: it trains entries of the frozen weight itself.
        quantised: it trains on a quantised base.
        peft: PEFT's name for it, when adapters can be exchanged with PEFT.
    """

    kind: str
    summary: str
    mergeable: bool
    batchable: bool
    bankable: bool
    sparse: bool
    quantised: bool
    peft: str | None


def kinds() -> list[str]:
    """Every method kind that this version has, sorted."""
    return sorted(TABLE)


def get(kind: str) -> type[Method]:
    """The method class of ``kind``.

    Raises:
        UnsupportedError: no such kind.
    """
    if kind not in TABLE:
        raise UnsupportedError(f"no adapter method of kind {kind!r}", found=", ".join(kinds()))
    module, _, name = TABLE[kind].partition(":")
    return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]


def load_all() -> list[types.ModuleType]:
    """The modules of all methods; importing one defines its ops."""
    return [importlib.import_module(entry.partition(":")[0]) for entry in TABLE.values()]


def anchors() -> dict[Callable[..., Any], Anchor]:
    """Anchor function -> how its calls are rewritten, for every kind that has an anchor."""
    return {anchor.function: anchor for module in load_all() for anchor in getattr(module, "ANCHORS", ())}


def capabilities() -> dict[str, Capabilities]:
    """Kind -> what the method can do; also what ``adaptc.methods()`` returns."""
    found = {}
    for kind in kinds():
        cls = get(kind)
        summary = (cls.__doc__ or "").split("\n")[0]
        found[kind] = Capabilities(
            kind, summary, cls.mergeable, cls.batchable, cls.bankable, cls.sparse, cls.quantised, cls.peft_kind
        )
    return found


class _Registry(types.ModuleType):
    """Lets ``adaptc.methods()`` be called."""

    def __call__(self) -> dict[str, Capabilities]:
        return capabilities()


sys.modules[__name__].__class__ = _Registry
