"""Trained biases (BitFit, Ben Zaken et al. 2021): y' = y + (bias - frozen bias), bias (N,).

PEFT's ``bias="lora_only"`` and ``bias="all"`` are this method beside LoRA.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from typing import ClassVar, TypeGuard

import torch
from torch import fx, nn

from adaptc.ir.edit import Edit
from adaptc.methods import linear
from adaptc.methods.affine import rounded
from adaptc.methods.base import Adapter, Anchor, Method
from adaptc.methods.quantised import Refusal
from adaptc.torch_internals import node_value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bias(Method):
    """Train the bias of linear and layer-normalisation modules."""

    kind: ClassVar[str] = "bias"
    mergeable: ClassVar[bool] = True
    batchable: ClassVar[bool] = True
    bankable: ClassVar[bool] = True
    quantised: ClassVar[bool] = True

    def refusal(self, path: str, module: nn.Module) -> str | None:
        if getattr(module, "bias", None) is None:
            return f"this {type(module).__name__} has no bias"
        if isinstance(module, nn.LayerNorm):
            return None
        return linear.refusal(path, module)

    def build(self, path: str, module: nn.Module, *, dtype: torch.dtype | None, site_id: int) -> BiasAdapter:
        return BiasAdapter(self, module, dtype=dtype, site_id=site_id)


class BiasAdapter(Adapter):
    """The trained copy ``bias`` (N,) of a module's bias."""

    def __init__(
        self, method: Bias, module: nn.Module, *, dtype: torch.dtype | None = None, site_id: int = 0
    ) -> None:
        super().__init__(method, site_id)
        frozen = module.bias
        assert isinstance(frozen, torch.Tensor)
        self.bias = nn.Parameter(frozen.detach().clone().to(dtype or frozen.dtype))

    def apply_to(self, module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return bias_site(x, y, self.site_id, self.bias, module.bias)  # type: ignore[no-any-return]

    def merge_refusal(self, module: nn.Module, beside: Sequence[Adapter] = ()) -> Refusal | None:
        return None if _are_biases(beside) else super().merge_refusal(module, beside)

    def merged(self, module: nn.Module, beside: Sequence[Adapter] = ()) -> Mapping[str, torch.Tensor]:
        if not _are_biases(beside):
            return super().merged(module, beside)
        value, frozen = self.bias.detach(), module.get_parameter("bias").double()
        for other in beside:
            value = value.double() + (other.bias.double() - frozen)
        return {"bias": rounded(value, module.bias)}

    def replaced(self, module: nn.Module, beside: Sequence[Adapter] = ()) -> Sequence[str]:
        return ("bias",) if _are_biases(beside) else super().replaced(module, beside)

    @property
    def adds(self) -> bool:
        return True

    def peft_tensors(self) -> dict[str, nn.Parameter]:
        return {"bias": self.bias}


def _are_biases(adapters: Sequence[Adapter]) -> TypeGuard[Sequence[BiasAdapter]]:
    return all(isinstance(adapter, BiasAdapter) for adapter in adapters)


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def bias_site(
    x: torch.Tensor, y: torch.Tensor, site_id: torch.Tensor, bias: torch.Tensor, frozen: torch.Tensor
) -> torch.Tensor:
    """The anchor of a trained bias, and its reference: y + (bias - frozen)."""
    return y + (bias - frozen).to(y.dtype)


def expand_site(
    edit: Edit, x: fx.Node, y: fx.Node, site_id: fx.Node, bias: fx.Node, frozen: fx.Node
) -> fx.Node:
    """The anchor's body as plain torch: there is nothing for a later pass to match."""
    difference = edit.call(operator.sub, bias, frozen)
    return edit.call(operator.add, y, edit.cast(difference, node_value(y).dtype))


ANCHORS = (Anchor(bias_site, expand_site),)
