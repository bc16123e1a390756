"""Full training of a module: the adapter is a trainable copy that replaces the frozen original.

The plan's ``train: full`` (PEFT's ``modules_to_save``). The base keeps its own values, so adapters can be
switched and detached, and a head has one copy per adapter.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from adaptc.methods import run_again
from adaptc.methods.base import Adapter, Method
from adaptc.methods.quantised import Refusal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Full(Method):
    """Train a copy of the whole module."""

    kind: ClassVar[str] = "full"
    batchable: ClassVar[bool] = True

    def refusal(self, path: str, module: nn.Module) -> str | None:
        if not any(True for _ in module.parameters()):
            return f"this {type(module).__name__} has no parameters to train"
        return None

    def build(self, path: str, module: nn.Module, *, dtype: torch.dtype | None, site_id: int) -> FullAdapter:
        return FullAdapter(self, module, dtype=dtype, site_id=site_id)


class FullAdapter(Adapter):
    """A trainable copy of the module, called in its place."""

    replaces_forward: ClassVar[bool] = True
    merges_alone: ClassVar[str | None] = "other adapters act around a fully trained module"

    def __init__(
        self, method: Full, module: nn.Module, *, dtype: torch.dtype | None = None, site_id: int = 0
    ) -> None:
        super().__init__(method, site_id)
        self.copy = copy.deepcopy(module)
        self.copy.requires_grad_(True)
        if dtype is not None:
            self.copy.to(dtype)

    def rows_refusal(self, module: nn.Module, *, spans: bool) -> Refusal | None:
        if spans and not isinstance(module, nn.Linear | nn.Embedding | nn.LayerNorm):
            return Refusal(f"a {type(module).__name__} may mix the tokens of a row")
        return run_again.refusal(module)

    def replace(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output, computed by the copy (the original's own hooks run around it)."""
        return self.copy.forward(*args, **kwargs)

    def merge_refusal(self, module: nn.Module, beside: Sequence[Adapter] = ()) -> None:
        """A copy can always be written over its original."""

    def merged(self, module: nn.Module, beside: Sequence[Adapter] = ()) -> dict[str, torch.Tensor]:
        return dict(self.copy.state_dict())

    def replaced(self, module: nn.Module, beside: Sequence[Adapter] = ()) -> Sequence[str]:
        return list(self.copy.state_dict())

    def peft_tensors(self) -> dict[str, nn.Parameter]:
        return dict(self.copy.named_parameters())
