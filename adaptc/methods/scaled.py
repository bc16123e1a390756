"""Adapters with a scale s = alpha / r that can be changed by hand."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Self

import torch
from torch import nn

from adaptc.methods.base import Adapter, Method
from adaptc.torch_internals import is_fake


def storage_dtype(weight: torch.Tensor, asked: torch.dtype | None) -> torch.dtype:
    """The dtype of factors beside ``weight``: the one asked for, else fp32 on a 16-bit or quantised base and the base's
    own."""
    if asked is not None:
        return asked
    return weight.dtype if weight.is_floating_point() and weight.dtype.itemsize >= 4 else torch.float32


class ScaledAdapter(Adapter):
    """An adapter whose ``scale`` (fp64, shape (1,)) is data of the graph, not a constant."""

    scale: torch.Tensor

    def __init__(self, method: Any, site_id: int, device: torch.device) -> None:
        super().__init__(method, site_id)
        self._scaling: float = method.scaling
        self.register_buffer("scale", self._scale_tensor(device), persistent=False)

    @property
    def scaling(self) -> float:
        """s in the formula, as ``scale`` holds it; setting it changes data of the graph and recompiles nothing."""
        return self._scaling if self.scale.is_meta or is_fake(self.scale) else float(self.scale)

    @scaling.setter
    def scaling(self, value: float) -> None:
        self._scaling = float(value)
        with torch.no_grad():
            self.scale.fill_(self._scaling)

    def method_now(self) -> Method:
        method: Any = self.method
        if self.scaling == method.scaling:
            return self.method
        alpha = self.scaling * (math.sqrt(method.r) if method.rslora else method.r)
        return dataclasses.replace(method, alpha=alpha)  # type: ignore[no-any-return]

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._scaling = self.scaling
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # `.half()` and `.to(dtype)` cast buffers; the scale is a number, not a weight.
        self.scale = self._scale_tensor(self.scale.device)
        return self

    def _scale_tensor(self, device: torch.device) -> torch.Tensor:
        # fp64, so that alpha / sqrt(r) is not rounded; one element in one dimension, because Dynamo takes the
        # value of a 0-dimensional fp64 tensor for a Python float and captures twice.
        return torch.tensor([self._scaling], dtype=torch.float64, device=device)


def draw_factors(init: str, r: int, A: torch.Tensor, B: torch.Tensor) -> None:
    """LoRA's initial values: A kaiming-uniform or normal with std 1/r, B zero or (init "random") drawn like A."""
    with torch.no_grad():
        if init == "gaussian":
            A.normal_(std=1 / r)
        else:
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        if init == "random":
            nn.init.kaiming_uniform_(B, a=math.sqrt(5))
        else:
            B.zero_()
