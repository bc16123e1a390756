"""A linear layer and adapters that are affine in its input, as one weight and one bias, in fp64 and in eval mode.

    y(x) = x W'^T + b'        b' = y(0), column k of W' = y(e_k) - y(0)

Where every adapter adds to the weight, W' is W and the sum of what they add: the map's values would add the bias and
take it away again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn

from adaptc.methods import linear, quantised
from adaptc.methods.quantised import Refusal

#: Rows of the identity that go through a site at a time: bounds what is held beside the weight.
_ROWS = 1024


def refusal(module: nn.Module, adapters: Sequence[Any]) -> Refusal | None:
    """Why the module has no weight and bias of its own that could be these, or None when it has."""
    if not linear.is_linear(module):
        return Refusal(f"{type(module).__name__} is not a linear layer")
    if how := quantised.describe(module):
        return Refusal(
            "its weight is quantised", "save the adapter by itself, and merge it into the base without quantisation",
            f"{how}: the sum would be rounded to its codes, by as much as an adapter moves a weight",
        )  # fmt: skip
    weight = _stored(module)
    if not weight.is_floating_point():
        return Refusal(f"its weight is {weight.dtype}")
    if getattr(module, "bias", None) is None and bool(_constant(module, adapters).any()):
        return Refusal("the adapter adds a constant, and the layer has no bias to take it")
    return None


def replaced(module: nn.Module) -> tuple[str, ...]:
    """The names of the tensors that :func:`merged` gives."""
    return ("weight",) if getattr(module, "bias", None) is None else ("weight", "bias")


def merged(module: nn.Module, adapters: Sequence[Any]) -> dict[str, torch.Tensor]:
    """The module's ``weight``, and ``bias`` where it has one, rounded once to their dtypes."""
    bias = _constant(module, adapters)
    weight = _sum(module, adapters)
    if weight is None:
        run = _map(module, _stored(module), adapters)
        points = torch.eye(linear.features(module)[0], dtype=torch.float64, device=_stored(module).device)
        weight = torch.cat([run(rows) - bias for rows in torch.split(points, _ROWS)]).mT
    values = {"weight": weight.mT if linear.is_conv1d(module) else weight}
    if getattr(module, "bias", None) is not None:
        values["bias"] = bias
    return {name: rounded(value, getattr(module, name)) for name, value in values.items()}


def rounded(value: torch.Tensor, like: Any) -> torch.Tensor:
    """``value`` in the dtype of ``like``, rounded once, in memory of its own."""
    return nearest(value.detach(), like.dtype).contiguous().clone()


def nearest(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``value`` in ``dtype``. torch rounds fp64 to 16 bits by way of fp32, so that what lies just beside the middle of
    two numbers may go to the farther one; here fp32 gets an odd last bit where it is not exact, and is no middle."""
    if value.dtype != torch.float64 or dtype not in (torch.float16, torch.bfloat16):
        return value.to(dtype)
    single = value.to(torch.float32)
    error = single.double() - value
    below = torch.where(error.sign() * value.sign() > 0, torch.nextafter(single, torch.zeros_like(single)), single)
    inexact = (error != 0) & ~error.isnan()
    return (below.view(torch.int32) | inexact.int()).view(torch.float32).to(dtype)


def _sum(module: nn.Module, adapters: Sequence[Any]) -> torch.Tensor | None:
    """The weight and what the adapters add to it; None where one does something else."""
    total: Any = 0
    for adapter in adapters:
        update = adapter.weight_update()
        if update is None:
            return None
        total = total + update
    weight: torch.Tensor = _stored(module).double() + total
    return weight


def _constant(module: nn.Module, adapters: Sequence[Any]) -> torch.Tensor:
    """y(0) (N,). Zero times an infinite weight counts as zero."""
    weight = _stored(module)
    zero = torch.zeros(1, linear.features(module)[0], dtype=torch.float64, device=weight.device)
    return _map(module, weight.nan_to_num(0.0, 0.0, 0.0), adapters)(zero)[0]


def _map(
    module: nn.Module, weight: torch.Tensor, adapters: Sequence[Any]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """What the module with ``weight`` (N, K) and the adapters compute together, in fp64 and eval mode."""
    bias = getattr(module, "bias", None)
    inputs, outputs = linear.features(module)
    # Of the module's own class where that says how the weight is stored.
    own: type[Any] = type(module)
    new: Any = own(outputs, inputs) if linear.is_conv1d(module) else nn.Linear(inputs, outputs, bias is not None)
    plain = new.to(weight.device, torch.float64)
    with torch.no_grad():
        plain.weight.copy_(weight.mT if linear.is_conv1d(module) else weight)
        if bias is not None:
            plain.bias.copy_(bias)
    copies = [copy.deepcopy(a).double().eval() for a in adapters]

    def run(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            for adapter in copies:
                if adapter.acts_before:
                    x = adapter.apply_before(plain, x)
            y = plain(x)
            for adapter in copies:
                y = adapter.apply_to(plain, x, y)
            return cast(torch.Tensor, y)

    return run


def _stored(module: nn.Module) -> torch.Tensor:
    """The weight as (N, K)."""
    weight = cast(torch.Tensor, module.weight).detach()
    return weight.mT if linear.is_conv1d(module) else weight
