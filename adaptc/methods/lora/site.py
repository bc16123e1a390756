"""What the adapters of LoRA at other than linear sites have in common."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from adaptc.methods.affine import rounded
from adaptc.methods.base import Adapter
from adaptc.methods.lora.options import LoRAOptions
from adaptc.methods.quantised import Refusal
from adaptc.methods.scaled import ScaledAdapter


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
