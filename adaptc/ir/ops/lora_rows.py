"""LoRA where each row of a batch has an adapter of its own, or none.

    y', h = lora_rows(x, y, A, B, scale, ids, numbers)
        x (M, K), y (M, N); of adapter i: A[i] (r_i, K), B[i] (N, r_i), scale[i] (1,); ids (M,) int64
        row m has adapter i where ids[m] = numbers[i]:   h_m = scale_i * (x_m A_i^T)      y'_m = y_m + h_m B_i^T
        all other rows:                                   h_m = 0                           y'_m = y_m, bit for bit

h (M, largest r) is what the backward needs. Gradients of an adapter are sums over its own rows: of those of others
nothing is read, so that what is not finite there stays there. Computed in the dtype of ``x``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from adaptc.ir import dialect
from adaptc.ir.dialect import Cost, DialectOp, nbytes
from adaptc.ir.ops.lora import draw_dtypes, draw_tensor, scaled

Tensors = Sequence[torch.Tensor]


def _widest(A: Tensors) -> int:
    return max(a.shape[0] for a in A)


def body(
    x: torch.Tensor, y: torch.Tensor, A: Tensors, B: Tensors, scale: Tensors, ids: torch.Tensor, numbers: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    out, width = y.contiguous().clone(), _widest(A)
    h = x.new_zeros((x.shape[0], width))
    for a, b, s, number in zip(A, B, scale, numbers, strict=True):
        own = (ids == number)[:, None]
        inner = scaled(torch.where(own, x, 0) @ a.to(x.dtype).mT, s)
        out = torch.where(own, torch.addmm(y, inner, b.to(x.dtype).mT), out)
        h = torch.where(own, torch.nn.functional.pad(inner, (0, width - inner.shape[1])), h)
    return out, h


def fake(
    x: torch.Tensor, y: torch.Tensor, A: Tensors, B: Tensors, scale: Tensors, ids: torch.Tensor, numbers: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    return y.new_empty(y.shape), x.new_empty((x.shape[0], _widest(A)))


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, _, A, B, scale, ids, numbers = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.count, ctx.numbers = len(A), numbers
    ctx.save_for_backward(x, ids, output[1], *A, *B, *scale)


def gradient(ctx: Any, grad: torch.Tensor | None, _: Any) -> tuple[Any, ...]:
    """Of an adapter's rows: q = scale * (g B);  dA = q^T x;  dB = g^T h;  dx = q A.  dy = g."""
    n = ctx.count
    nothing: list[None] = [None] * n
    if grad is None:
        return None, None, nothing, nothing, nothing, None, None
    x, ids, h, *factors = ctx.saved_tensors
    A, B, scale = factors[:n], factors[n : 2 * n], factors[2 * n :]
    need_x, need_y, need_A, need_B, *_ = ctx.needs_input_grad
    need = [*_flags(need_A, n), *_flags(need_B, n)]
    op = dialect.get("lora_rows_grads")
    twice = torch.is_grad_enabled()  # the saved h has lost its history, and the op has no second derivative
    if twice:
        h = body(x, torch.zeros_like(grad), A, B, scale, ids, ctx.numbers)[1]
    found = iter((op.body if twice else op.overload)(grad, x, h, A, B, scale, ids, ctx.numbers, bool(need_x), need))
    dx = next(found) if need_x else None
    dA = [next(found) if flag else None for flag in need[:n]]
    dB = [next(found) if flag else None for flag in need[n:]]
    return dx, grad if need_y else None, dA, dB, nothing, None, None


def _flags(need: Any, count: int) -> list[bool]:
    return [bool(n) for n in need] if isinstance(need, list | tuple) else [bool(need)] * count


def grads_body(
    grad: torch.Tensor, x: torch.Tensor, h: torch.Tensor, A: Tensors, B: Tensors, scale: Tensors, ids: torch.Tensor,
    numbers: list[int], need_x: bool, need: list[bool],
) -> list[torch.Tensor]:  # fmt: skip
    dx, dA, dB = torch.zeros_like(x, memory_format=torch.contiguous_format), [], []
    for i, (a, b, s, number) in enumerate(zip(A, B, scale, numbers, strict=True)):
        own = (ids == number)[:, None]
        g = torch.where(own, grad, 0)
        q = scaled(g @ b.to(g.dtype), s)
        if need_x:
            dx = torch.where(own, q @ a.to(q.dtype), dx)
        if need[i]:
            dA.append((q.mT @ torch.where(own, x, 0)).to(a.dtype))
        if need[len(A) + i]:
            dB.append((g.mT @ torch.where(own, h[:, : a.shape[0]], 0)).to(b.dtype))
    return [*([dx] if need_x else []), *dA, *dB]


def grads_fake(
    grad: torch.Tensor, x: torch.Tensor, h: torch.Tensor, A: Tensors, B: Tensors, scale: Tensors, ids: torch.Tensor,
    numbers: list[int], need_x: bool, need: list[bool],
) -> list[torch.Tensor]:  # fmt: skip
    factors = [t.new_empty(t.shape) for t, flag in zip([*A, *B], need, strict=True) if flag]
    return [*([x.new_empty(x.shape)] if need_x else []), *factors]


def _flops(x: torch.Tensor, n: int, A: Tensors) -> int:
    """Of one product with every factor, rows shared evenly among adapters."""
    m, k = int(x.shape[0]), int(x.shape[1])
    return 2 * m * (k + n) * sum(int(a.shape[0]) for a in A) // max(len(A), 1)


def cost(
    x: torch.Tensor, y: torch.Tensor, A: Tensors, B: Tensors, scale: Tensors, ids: torch.Tensor, numbers: list[int]
) -> Cost:
    h = int(x.shape[0]) * _widest(A) * x.dtype.itemsize
    flops = _flops(x, int(y.shape[1]), A) + int(y.shape[0]) * int(y.shape[1])
    return Cost(flops=flops, read=nbytes(x, y, *A, *B, ids) + h, written=nbytes(y) + h, saved=h)


def grads_cost(
    grad: torch.Tensor, x: torch.Tensor, h: torch.Tensor, A: Tensors, B: Tensors, scale: Tensors, ids: torch.Tensor,
    numbers: list[int], need_x: bool, need: list[bool],
) -> Cost:  # fmt: skip
    made = [t for t, flag in zip([*A, *B], need, strict=True) if flag]
    written = nbytes(*made) + (nbytes(x) if need_x else 0)
    read = 2 * nbytes(grad, x, h) + nbytes(*A, *B)
    return Cost(flops=2 * _flops(x, int(grad.shape[1]), A), read=read, written=written)


def sample(draw: Any) -> tuple[Any, ...]:
    from hypothesis import strategies as st

    m, k, n, count = (draw(st.integers(1, 6)) for _ in range(4))
    ranks = [draw(st.integers(1, 5)) for _ in range(count)]
    compute, factors = draw_dtypes(draw)
    numbers = draw(st.permutations(range(count + 1)))[:count]
    ids = torch.tensor([draw(st.integers(0, count + 1)) for _ in range(m)])
    return (
        draw_tensor(draw, (m, k), compute), draw_tensor(draw, (m, n), compute),
        [draw_tensor(draw, (r, k), factors) for r in ranks], [draw_tensor(draw, (n, r), factors) for r in ranks],
        [draw_tensor(draw, (1,), torch.float64) for _ in ranks], ids, list(numbers),
    )  # fmt: skip


def grads_sample(draw: Any) -> tuple[Any, ...]:
    from hypothesis import strategies as st

    x, y, A, B, scale, ids, numbers = sample(draw)
    h = draw_tensor(draw, (x.shape[0], _widest(A)), x.dtype)
    need = [draw(st.booleans()) for _ in range(2 * len(A))]
    return y, x, h, A, B, scale, ids, numbers, draw(st.booleans()), need


LORA_ROWS = dialect.define(
    DialectOp(
        name="lora_rows",
        schema="(Tensor x, Tensor y, Tensor[] A, Tensor[] B, Tensor[] scale, Tensor ids, int[] numbers)"
        " -> (Tensor, Tensor)",
        body=body, fake=fake, save=save, gradient=gradient, cost=cost, sample=sample,
    )
)  # fmt: skip
LORA_ROWS_GRADS = dialect.define(
    DialectOp(
        name="lora_rows_grads",
        schema="(Tensor grad, Tensor x, Tensor h, Tensor[] A, Tensor[] B, Tensor[] scale, Tensor ids, int[] numbers,"
        " bool need_x, bool[] need) -> Tensor[]",
        body=grads_body, fake=grads_fake, cost=grads_cost, sample=grads_sample,
    )
)  # fmt: skip
