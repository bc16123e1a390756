"""What the adapters of LoRA at other than linear sites have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from adaptc.ir.dialect import DialectOp
from adaptc.ir.edit import Edit
from adaptc.methods.affine import rounded
from adaptc.methods.base import Adapter, Anchor
from adaptc.methods.lora.options import LoRAOptions
from adaptc.methods.quantised import Refusal
from adaptc.methods.scaled import ScaledAdapter
from adaptc.torch_internals import node_value


class SiteAdapter(ScaledAdapter):
    """LoRA at one kind of module; built as ``(method, module, dtype=..., site_id=...)``."""

    merges_alone = "other adapters act beside the update of its weights"
    method: LoRAOptions

    def __init__(
        self, method: LoRAOptions, module: nn.Module, *, dtype: torch.dtype | None = None, site_id: int = 0
    ) -> None:
        raise NotImplementedError(f"{type(self).__name__}.__init__")

    @classmethod
    def refusal(cls, method: LoRAOptions, module: nn.Module) -> str | None:
        """Why LoRA with these options cannot adapt ``module``, or None when it can."""
        raise NotImplementedError(f"{cls.__name__}.refusal")

    def updated(self) -> Sequence[str]:
        """The paths of the weights that ``deltas`` has updates of."""
        return ("weight",)

    def deltas(self) -> dict[str, torch.Tensor]:
        """Path of a weight below the module -> its update, in fp64; only where ``merge_refusal`` is None."""
        raise NotImplementedError(f"{type(self).__name__}.deltas")

    def merge_refusal(self, module: nn.Module, beside: Sequence[Adapter] = ()) -> Refusal | None:
        return beside[0].merge_refusal(module, beside[1:]) if beside else None

    def merged(self, module: nn.Module, beside: Sequence[Adapter] = ()) -> dict[str, torch.Tensor]:
        total: dict[str, torch.Tensor] = {}
        for adapter in (self, *beside):
            assert isinstance(adapter, SiteAdapter)
            for name, update in adapter.deltas().items():
                total[name] = total.get(name, module.get_parameter(name).detach().double()) + update
        return {name: rounded(value, module.get_parameter(name)) for name, value in total.items()}

    def replaced(self, module: nn.Module, beside: Sequence[Adapter] = ()) -> Sequence[str]:
        names = [name for a in (self, *beside) if isinstance(a, SiteAdapter) for name in a.updated()]
        return list(dict.fromkeys(names))

    @property
    def adds(self) -> bool:
        return True

    def signature(self) -> tuple[object, ...]:
        return (*super().signature(), type(self).__name__, self.method.compute_dtype)


#: How factors may be initialised where the frozen weight is not a linear layer's.
INITS = ("default", "gaussian", "random")


def only_plain(method: LoRAOptions, module: nn.Module) -> str | None:
    """Why the options of ``method`` do not apply to what is not a linear layer, or None."""
    kind = type(module).__name__
    if method.dora:
        return f"dora is for linear layers, and this is a {kind}"
    if method.lora_bias:
        return f"lora_bias is for linear layers, and this is a {kind}"
    if method.init not in INITS:
        return f'init "{method.init}" is for linear layers, and this is a {kind}; here: {", ".join(INITS)}'
    if method.bias == "lora_only" and getattr(module, "bias", None) is not None:
        return f'bias="lora_only" is for linear layers, and this is a {kind}'
    return None


def compute_in(y: torch.Tensor, compute_dtype: str | None) -> torch.dtype:
    """The dtype in which the correction of ``y`` is computed."""
    return y.dtype if compute_dtype is None else getattr(torch, compute_dtype)


def anchor_of(op: DialectOp) -> Anchor:
    """The anchor of an op ``(x, y, *operands)`` that corrects y, in ``compute_dtype``; x is dropped unless it is ids.

    In a graph the call becomes the op, with its casts written out.
    """

    @torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
    def site(
        x: torch.Tensor, y: torch.Tensor, site_id: torch.Tensor, dropout: float, training: bool,
        compute_dtype: str | None, *operands: Any,
    ) -> torch.Tensor:  # fmt: skip
        dtype = compute_in(y, compute_dtype)
        with torch.autocast(y.device.type, enabled=False):
            if x.is_floating_point():
                x = F.dropout(x.to(dtype), dropout, training)
            return op.body(x, y.to(dtype), *operands).to(y.dtype)  # type: ignore[no-any-return]

    site.__name__ = site.__qualname__ = f"{op.name}_site"

    def expand(
        edit: Edit, x: fx.Node, y: fx.Node, site_id: fx.Node, dropout: float, training: bool,
        compute_dtype: str | None, operands: tuple[Any, ...],
    ) -> fx.Node:  # fmt: skip
        value = node_value(y)
        dtype = compute_in(value, compute_dtype)
        if node_value(x).is_floating_point():
            x = edit.call(F.dropout, edit.cast(x, dtype), dropout, training)
        return edit.cast(edit.call(op.overload, x, edit.cast(y, dtype), *operands), value.dtype)

    return Anchor(site, expand)
