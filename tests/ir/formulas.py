"""The LoRA ops written out in fp64, and how far an op that rounds may be from them. Nothing from adaptc."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

WORD = 2**32


def kept(seed, row, column, p):
    """Whether a seeded dropout keeps an element, in Python's integers."""
    h = (column * 0x9E3779B1 + row * 0xC13FA9A9 + seed + seed // WORD * 0x85EBCA6B) % WORD
    h = (h ^ (h >> 16)) * 0x7FEB352D % WORD
    h ^= (row * 0xD1B54A33 + seed // WORD) % WORD
    h = (h ^ (h >> 15)) * 0x846CA68B % WORD
    signed = h - WORD if h >= WORD // 2 else h
    return signed + WORD // 2 >= min(math.floor(p * WORD), WORD - 1)


def dropped(x, count, seeds, p):
    """What each of ``count`` sites reads of x: where it has a seed, x / (1 - p) where that keeps it and 0 elsewhere."""
    if not seeds:
        return [x] * count
    width, found = x.shape[-1], []
    for seed, rate in zip(seeds, p, strict=True):
        mask = [kept(int(seed), i // width, i % width, rate) for i in range(x.numel())]
        found.append(x * torch.tensor(mask).view(x.shape) / (1 - rate))
    return found


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


def lora_shrink(x, A, scale, seeds=(), p=()):
    reads = dropped(x, len(A), seeds, p)
    return [s * torch.einsum("...k,rk->...r", one, a) for one, a, s in zip(reads, A, scale, strict=True)]


def lora_expand(y, h, B):
    return y + torch.einsum("...r,nr->...n", h, B)


def lora_factor_grads(left, right, dtype, seeds=(), p=()):
    reads = dropped(right, len(left), seeds, p)
    return [torch.einsum("...i,...j->ij", one, read) for one, read in zip(left, reads, strict=True)]


def lora_input_grads(dx, q, A, seeds=(), p=()):
    products = [torch.einsum("...r,rk->...k", one, a) for one, a in zip(q, A, strict=True)]
    for i, product in enumerate(products):
        dx = dx + dropped(product, 1, seeds[i : i + 1], p[i : i + 1])[0]
    return dx


def lora_merged_weight(W, A, B, scale, transposed):
    update = torch.einsum("nr,rk->nk", B * scale, A)
    return W + (update.t() if transposed else update)


def lora_dense_grads(Z, A, B, scale):
    return torch.einsum("nr,nk->rk", B * scale, Z), torch.einsum("nk,rk->nr", Z, A) * scale


def shaped(rows, like):
    """``rows`` (..., n) with the leading dimensions of ``like``."""
    return rows.reshape(*like.shape[:-1], rows.shape[-1])


def lora_linear_expand(x, right, bias, h, B):
    y = torch.einsum("...k,kn->...n", x, right) + (0 if bias is None else bias)
    return shaped(y, h) + torch.einsum("...r,nr->...n", h, B)


def lora_bottleneck_grads(grad, h, B, scale, dtype):
    dB = torch.einsum("...n,...r->nr", grad, h.reshape(*grad.shape[:-1], h.shape[-1]))
    return torch.einsum("...n,nr->...r", grad, B) * scale, dB


def lora_linear_input_grads(grad, right, q, A, seeds=(), p=()):
    dx = sum(torch.einsum("...n,nk->...k", g, w) for g, w in zip(grad, right, strict=True))
    return lora_input_grads(shaped(dx, q[0]), q, A, seeds, p)


FORMULAS: dict[str, Callable[..., Any]] = {
    f.__name__: f
    for f in (
        lora_linear, lora_bottleneck_grad, lora_factor_grad, lora_input_grad,
        lora_shrink, lora_expand, lora_factor_grads, lora_input_grads,
        lora_merged_weight, lora_dense_grads,
        lora_linear_expand, lora_bottleneck_grads, lora_linear_input_grads,
    )
}  # fmt: skip


def outputs(result: Any) -> tuple[torch.Tensor, ...]:
    return tuple(result) if isinstance(result, tuple | list) else (result,)


def leaves(args: Sequence[Any]) -> list[torch.Tensor]:
    """The tensors among ``args`` and in the lists among them."""
    return [t for a in args for t in (a if isinstance(a, list | tuple) else [a]) if isinstance(t, torch.Tensor)]


def in_double(args: Sequence[Any], *, absolute: bool = False) -> list[Any]:
    def one(a: Any) -> Any:
        if isinstance(a, list | tuple):
            return [one(t) for t in a]
        if not (isinstance(a, torch.Tensor) and a.is_floating_point()):
            return a
        return a.detach().double().abs() if absolute else a.detach().double()

    return [one(a) for a in args]


def rounding_bound(magnitude: torch.Tensor, args: Sequence[Any], dtype: torch.dtype) -> torch.Tensor:
    """The largest error that rounding can make in a sum of products of ``args``, computed in ``dtype``.

    ``magnitude`` is the formula on absolute values. Between inputs and result a product is rounded to ``dtype``
    at most eight times (casts of two factors and the scale, the bottleneck, its scaling, the product, its
    scaling, the sum), and each sum over an index rounds once a term in the accumulator's precision.
    A value that underflows is off by half the smallest subnormal, and at most two sums multiply that on.
    """
    info = torch.finfo(dtype)
    accumulator = torch.finfo(torch.float32 if dtype.itemsize < 4 else dtype)
    sizes = [t.numel() for t in leaves(args)]
    relative = 8 * info.eps / 2 + sum(sizes) * accumulator.eps / 2
    return relative * magnitude + sum(sizes) * 4 * info.smallest_normal * info.eps


def assert_within(got: torch.Tensor, want: torch.Tensor, bound: torch.Tensor, label: str = "") -> None:
    assert got.shape == want.shape, label
    error = (got.detach().double() - want).abs()
    assert bool((error <= bound).all()), f"{label}: error {error.max():.3g}, {(error / bound).max():.3g} x the bound"
