"""LoRA's products together with the frozen layer's (LoRAFusion, Zhu et al. 2025, section 3: the graph is split at the
tensors of the rank's size, and each side is one op).

    y     = lora_linear_expand(x, right, bias, h, B)                  y = x right + bias + h B^T
    q, dB = lora_bottleneck_grads(grad, h, B, scale, dtype)           q = scale * (grad B);  dB = grad^T h
    dx    = lora_linear_input_grads(grad, right, q, A, seeds, p)      dx = sum_i grad_i right_i + sum_j drop_j(q_j A_j)

        x (M, K) or (..., K), right (K, N), bias (N,), h (..., r), B (N, r) -> y (..., N)
        grad (..., N), h (..., r), B (N, r), scale (1,) or (r,) -> q (..., r), dB (N, r) of ``dtype``
        grad_i (M, N_i) or (..., N_i), right_i (N_i, K), q_j (..., r_j), A_j (r_j, K) -> dx (..., K)

``right`` is the right operand of the frozen product as it is in the graph: a weight, or a transpose of one. The leading
dimensions of a result are those of ``h``, or of the first ``q``; the other operands have as many rows. ``seeds`` and
``p`` are those of the sites' dropouts, or empty. The computation is in the dtype of the activations; factors of another
dtype are cast, activations never. On joint graphs only: the ops have no gradients of their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from adaptc.ir import dialect
from adaptc.ir.dialect import Cost, DialectOp, nbytes
from adaptc.ir.ops.lora import (
    bottleneck_grad_body,
    bottleneck_grad_cost,
    bottleneck_grad_fake,
    draw_dtypes,
    draw_tensor,
    factor_grad_body,
    factor_grad_cost,
    factor_grad_fake,
    rows,
)
from adaptc.ir.ops.lora_split import (
    Tensors,
    expand_body,
    expand_cost,
    input_grads_body,
    input_grads_cost,
)


def linear_expand_body(
    x: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None, h: torch.Tensor, B: torch.Tensor
) -> torch.Tensor:
    y = rows(x) @ right if bias is None else torch.addmm(bias, rows(x), right)
    return expand_body(y.view(*h.shape[:-1], right.shape[1]), h, B)


def linear_expand_fake(
    x: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None, h: torch.Tensor, B: torch.Tensor
) -> torch.Tensor:
    return x.new_empty((*h.shape[:-1], right.shape[1]))


def linear_expand_cost(
    x: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None, h: torch.Tensor, B: torch.Tensor
) -> Cost:
    y = linear_expand_fake(x, right, bias, h, B)
    flops = _elements(y) * (2 * int(x.shape[-1]) + (bias is not None)) + expand_cost(y, h, B).flops
    return Cost(flops=flops, read=nbytes(x, right, bias, h, B), written=nbytes(y))


def bottleneck_grads_body(
    grad: torch.Tensor, h: torch.Tensor, B: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    return bottleneck_grad_body(grad, B, scale), factor_grad_body(grad, h, dtype)


def bottleneck_grads_fake(
    grad: torch.Tensor, h: torch.Tensor, B: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    return bottleneck_grad_fake(grad, B, scale), factor_grad_fake(grad, h, dtype)


def bottleneck_grads_cost(
    grad: torch.Tensor, h: torch.Tensor, B: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
) -> Cost:
    q, dB = bottleneck_grad_cost(grad, B, scale), factor_grad_cost(grad, h, dtype)
    return Cost(flops=q.flops + dB.flops, read=nbytes(grad, h, B), written=q.written + dB.written)


def linear_input_grads_body(
    grad: Tensors, right: Tensors, q: Tensors, A: Tensors, seeds: Tensors, p: Sequence[float]
) -> torch.Tensor:
    total, *others = [rows(g) @ w for g, w in zip(grad, right, strict=True)]
    for other in others:
        total = total + other
    return input_grads_body(total.view(*q[0].shape[:-1], right[0].shape[1]), q, A, seeds, p)


def linear_input_grads_fake(
    grad: Tensors, right: Tensors, q: Tensors, A: Tensors, seeds: Tensors, p: Sequence[float]
) -> torch.Tensor:
    return grad[0].new_empty((*q[0].shape[:-1], right[0].shape[1]))


def linear_input_grads_cost(
    grad: Tensors, right: Tensors, q: Tensors, A: Tensors, seeds: Tensors, p: Sequence[float]
) -> Cost:
    dx = linear_input_grads_fake(grad, right, q, A, seeds, p)
    sizes = sum(2 * _elements(dx) * int(w.shape[0]) for w in right)
    sums = (len(right) - 1) * _elements(dx)
    flops = sizes + sums + input_grads_cost(dx, q, A, seeds, p).flops
    return Cost(flops=flops, read=nbytes(*grad, *right, *q, *A), written=nbytes(dx))


def _elements(t: torch.Tensor) -> int:
    return math.prod(int(s) for s in t.shape)


def _draw_rows(draw: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Leading dimensions, and those of an operand that may have them as one."""
    from hypothesis import strategies as st

    batch = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=2)))
    return batch, draw(st.sampled_from([batch, (math.prod(batch),)]))


def linear_expand_sample(draw: Any) -> tuple[Any, ...]:
    from hypothesis import strategies as st

    batch, lead = _draw_rows(draw)
    k, n, r = (draw(st.integers(1, high)) for high in (9, 9, 5))
    compute, factors = draw_dtypes(draw)
    bias = draw_tensor(draw, (n,), compute) if draw(st.booleans()) else None
    return (
        draw_tensor(draw, (*lead, k), compute), draw_tensor(draw, (k, n), compute), bias,
        draw_tensor(draw, (*batch, r), compute), draw_tensor(draw, (n, r), factors),
    )  # fmt: skip


def bottleneck_grads_sample(draw: Any) -> tuple[Any, ...]:
    from hypothesis import strategies as st

    batch, lead = _draw_rows(draw)
    n, r = (draw(st.integers(1, high)) for high in (9, 5))
    compute, factors = draw_dtypes(draw)
    scale = draw_tensor(draw, draw(st.sampled_from([(1,), (r,)])), torch.float64)
    return (
        draw_tensor(draw, (*batch, n), compute), draw_tensor(draw, (*lead, r), compute),
        draw_tensor(draw, (n, r), factors), scale, factors,
    )  # fmt: skip


def linear_input_grads_sample(draw: Any) -> tuple[Any, ...]:
    from hypothesis import strategies as st

    batch, lead = _draw_rows(draw)
    k = draw(st.integers(1, 9))
    widths, ranks = (draw(st.lists(st.integers(1, high), min_size=1, max_size=3)) for high in (9, 5))
    compute, factors = draw_dtypes(draw)
    grad = [draw_tensor(draw, (*lead, n), compute) for n in widths]
    right = [draw_tensor(draw, (n, k), compute) for n in widths]
    q = [draw_tensor(draw, (*batch, r), compute) for r in ranks]
    A = [draw_tensor(draw, (r, k), factors) for r in ranks]
    drops = draw(st.booleans())
    seeds = [torch.tensor([draw(st.integers(0, 2**62 - 1))]) for _ in ranks] if drops else []
    return grad, right, q, A, seeds, [draw(st.floats(0, 0.9)) for _ in seeds]


LORA_LINEAR_EXPAND = dialect.define(
    DialectOp(
        name="lora_linear_expand",
        schema="(Tensor x, Tensor right, Tensor? bias, Tensor h, Tensor B) -> Tensor",
        body=linear_expand_body, fake=linear_expand_fake, cost=linear_expand_cost, sample=linear_expand_sample,
    )
)  # fmt: skip
LORA_BOTTLENECK_GRADS = dialect.define(
    DialectOp(
        name="lora_bottleneck_grads",
        schema="(Tensor grad, Tensor h, Tensor B, Tensor scale, ScalarType dtype) -> (Tensor, Tensor)",
        body=bottleneck_grads_body, fake=bottleneck_grads_fake, cost=bottleneck_grads_cost,
        sample=bottleneck_grads_sample,
    )
)  # fmt: skip
LORA_LINEAR_INPUT_GRADS = dialect.define(
    DialectOp(
        name="lora_linear_input_grads",
        schema="(Tensor[] grad, Tensor[] right, Tensor[] q, Tensor[] A, Tensor[] seeds, float[] p) -> Tensor",
        body=linear_input_grads_body, fake=linear_input_grads_fake, cost=linear_input_grads_cost,
        sample=linear_input_grads_sample,
    )
)  # fmt: skip
