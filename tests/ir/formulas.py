"""The LoRA ops written out in fp64, and how far an op that rounds may be from them. Nothing from adaptc."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


def lora_linear(x, y, A, B, scale, scale_at):
    h = torch.einsum("...k,rk->...r", x, A)
    scaled = h * scale
    out = y + torch.einsum("...r,nr->...n", scaled, B)
    return out, scaled if scale_at == "r" else h


def lora_bottleneck_grad(grad, B, scale):
    return torch.einsum("...n,nr->...r", grad, B) * scale


def lora_factor_grad(left, right, dtype):
    return torch.einsum("...i,...j->ij", left, right)


def lora_input_grad(q, A):
    return torch.einsum("...r,rk->...k", q, A)


FORMULAS: dict[str, Callable[..., Any]] = {
    f.__name__: f for f in (lora_linear, lora_bottleneck_grad, lora_factor_grad, lora_input_grad)
}


def outputs(result: Any) -> tuple[torch.Tensor, ...]:
    return tuple(result) if isinstance(result, tuple | list) else (result,)


def in_double(args: Sequence[Any], *, absolute: bool = False) -> list[Any]:
    doubled = [a.detach().double() if isinstance(a, torch.Tensor) else a for a in args]
    return [a.abs() if absolute and isinstance(a, torch.Tensor) else a for a in doubled]


def rounding_bound(magnitude: torch.Tensor, args: Sequence[Any], dtype: torch.dtype) -> torch.Tensor:
    """The largest error that rounding can make in a sum of products of ``args``, computed in ``dtype``.

    ``magnitude`` is the formula on absolute values. Between inputs and result a product is rounded to ``dtype``
    at most eight times (casts of two factors and the scale, the bottleneck, its scaling, the product, its
    scaling, the sum), and each sum over an index rounds once a term in the accumulator's precision.
    A value that underflows is off by half the smallest subnormal, and at most two sums multiply that on.
    """
    info = torch.finfo(dtype)
    accumulator = torch.finfo(torch.float32 if dtype.itemsize < 4 else dtype)
    sizes = [a.numel() for a in args if isinstance(a, torch.Tensor)]
    relative = 8 * info.eps / 2 + sum(sizes) * accumulator.eps / 2
    return relative * magnitude + sum(sizes) * 4 * info.smallest_normal * info.eps


def assert_within(got: torch.Tensor, want: torch.Tensor, bound: torch.Tensor, label: str = "") -> None:
    assert got.shape == want.shape, label
    error = (got.detach().double() - want).abs()
    assert bool((error <= bound).all()), f"{label}: error {error.max():.3g}, {(error / bound).max():.3g} x the bound"
