"""The association orders of a LoRA layer (RunLoRA, arXiv 2312.03415): what each computes, and what it keeps.

    split   y = x W^T + (x A^T) B^T            dx = g W + (g B) A    dA = (g B)^T x    dB = g^T (x A^T)
    merge   y = x E^T,  E = W + B A            dx = g E              dA, dB as in split
    dense   y = x E^T                          dx = g E              Z = g^T x,  dA = B^T Z,  dB = Z A^T

The scale is left out: it is one more factor on what is small. ``merge`` makes E, of the size of W, twice, and no sums
of the size of x and y: for many rows. ``dense`` makes the gradient of a dense weight besides: for ranks near the width.
The other orders double a large product for no less of the small ones.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Tensor = torch.Tensor


def _linear(x: Tensor, W: Tensor) -> Tensor:
    return x @ W.t()


def split(
    x: Tensor, g: Tensor | None, W: Tensor, A: Tensor, B: Tensor, input_grad: bool,
    linear: Callable[[Tensor, Tensor], Tensor] = _linear,
) -> None:  # fmt: skip
    """``linear``: what makes the frozen products, (x, W) -> x W^T."""
    y, h = linear(x, W), x @ A.t()
    torch.addmm(y, h, B.t(), out=y)
    if g is None:
        return
    q = _factor_grads(x, g, A, B, h)
    if input_grad:
        dx = linear(g, W.t())
        torch.addmm(dx, q, A, out=dx)


def merge(x: Tensor, g: Tensor | None, W: Tensor, A: Tensor, B: Tensor, input_grad: bool) -> None:
    x @ torch.addmm(W, B, A).t()
    if g is None:
        return
    _factor_grads(x, g, A, B, x @ A.t())
    if input_grad:
        g @ torch.addmm(W, B, A)


def _factor_grads(x: Tensor, g: Tensor, A: Tensor, B: Tensor, h: Tensor) -> Tensor:
    q = g @ B
    q.t() @ x
    g.t() @ h
    return q


def dense(x: Tensor, g: Tensor | None, W: Tensor, A: Tensor, B: Tensor, input_grad: bool) -> None:
    x @ torch.addmm(W, B, A).t()
    if g is None:
        return
    Z = g.t() @ x
    B.t() @ Z
    Z @ A.t()
    if input_grad:
        g @ torch.addmm(W, B, A)


#: The usual one first.
PLANS: dict[str, Callable[..., None]] = {"split": split, "merge": merge, "dense": dense}


def names(*, trained: bool) -> tuple[str, ...]:
    """Those that differ."""
    return tuple(PLANS) if trained else ("split", "merge")


def multiplications(plan: str, m: int, k: int, n: int, r: int) -> int:
    """Those of a trained layer beside its frozen products, with the gradient of its input."""
    small, merged = m * r * (k + n), k * n * r
    return {"split": 3 * small, "merge": 2 * (small + merged), "dense": m * k * n + 4 * merged}[plan]


def saved(plan: str, m: int, k: int, r: int, itemsize: int) -> int:
    """Bytes of activations that it keeps for the backward: x, and in ``split`` the bottleneck."""
    return m * (k + (r if plan == "split" else 0)) * itemsize
