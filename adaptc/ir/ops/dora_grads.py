"""What the backward of a DoRA site makes of the gradient of its output (Liu et al. 2024, section 4.3).

    q, dB, dz, dmagnitude = dora_output_grads(grad, z, bias, h, B, magnitude, norm, scale, of_base)

        c = magnitude / norm        G = grad^T h         q = scale * (grad (c B))       dB = c G
        dz = c * grad, or (c - 1) * grad if ``of_base``
        dmagnitude = (sum over the rows of grad * (z - bias), + sum_r G * B) / norm

grad and z (..., N), bias, magnitude and norm (N,), h (..., r), B (N, r), scale (1,). h, z, bias and ``of_base`` are as
in ``dora_linear``: z is its base, or its y. c multiplies B and G, which are N x r: the correction's product is neither
saved nor computed again.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from adaptc.ir import dialect
from adaptc.ir.dialect import Cost, DialectOp, nbytes
from adaptc.ir.ops.dora_rescale import dense
from adaptc.ir.ops.lora import bottleneck_grad_body, draw_dtypes, draw_tensor, factor_grad_body, opmath


def product_of_columns(t: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """c * t, rounded once; c (N,), t (..., N)."""
    wide = opmath(t)
    return (c.to(wide) * t.to(wide)).to(t.dtype)


def grads_body(
    grad: torch.Tensor, z: torch.Tensor, bias: torch.Tensor | None, h: torch.Tensor, B: torch.Tensor,
    magnitude: torch.Tensor, norm: torch.Tensor, scale: torch.Tensor, of_base: bool,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    wide = opmath(grad)
    c = magnitude / norm
    q = bottleneck_grad_body(grad, c[:, None] * B, scale)
    G = factor_grad_body(grad, h, c.dtype)
    centred = z.to(wide) if bias is None else z.to(wide) - bias.to(wide)
    total = (grad.to(wide) * centred).reshape(-1, grad.shape[-1]).sum(0).to(norm.dtype) + (G * B).sum(1)
    dB, dz = (c[:, None] * G).to(B.dtype), product_of_columns(grad, c - 1 if of_base else c)
    return q, dense(dB), dense(dz), (total / norm).to(magnitude.dtype)


def grads_fake(
    grad: torch.Tensor, z: torch.Tensor, bias: torch.Tensor | None, h: torch.Tensor, B: torch.Tensor,
    magnitude: torch.Tensor, norm: torch.Tensor, scale: torch.Tensor, of_base: bool,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    q = grad.new_empty((*grad.shape[:-1], B.shape[1]))
    return q, B.new_empty(B.shape), grad.new_empty(grad.shape), magnitude.new_empty(magnitude.shape)


def grads_cost(
    grad: torch.Tensor, z: torch.Tensor, bias: torch.Tensor | None, h: torch.Tensor, B: torch.Tensor,
    magnitude: torch.Tensor, norm: torch.Tensor, scale: torch.Tensor, of_base: bool,
) -> Cost:  # fmt: skip
    """Each product reads the gradient once, and so do the gradients of z and magnitude together."""
    out = grads_fake(grad, z, bias, h, B, magnitude, norm, scale, of_base)
    size = math.prod(int(s) for s in grad.shape)
    return Cost(
        flops=size * (4 * int(B.shape[1]) + 3),
        read=3 * nbytes(grad) + nbytes(z, bias, h, B, magnitude, norm),
        written=nbytes(*out),
    )


def grads_sample(draw: Any) -> tuple[Any, ...]:
    from hypothesis import strategies as st

    batch = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=2)))
    n, r = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    compute, factors = draw_dtypes(draw)
    wide = torch.float32 if compute.itemsize < 4 else compute
    bias = draw_tensor(draw, (n,), compute) if draw(st.booleans()) else None
    return (
        draw_tensor(draw, (*batch, n), compute), draw_tensor(draw, (*batch, n), compute), bias,
        draw_tensor(draw, (*batch, r), compute), draw_tensor(draw, (n, r), factors), draw_tensor(draw, (n,), factors),
        draw_tensor(draw, (n,), wide).abs() + 0.5, draw_tensor(draw, (1,), torch.float64),
        bias is None and draw(st.booleans()),
    )  # fmt: skip


DORA_OUTPUT_GRADS = dialect.define(
    DialectOp(
        name="dora_output_grads",
        schema="(Tensor grad, Tensor z, Tensor? bias, Tensor h, Tensor B, Tensor magnitude, Tensor norm, Tensor scale,"
        " bool of_base) -> (Tensor, Tensor, Tensor, Tensor)",
        body=grads_body, fake=grads_fake, cost=grads_cost, sample=grads_sample,
    )
)  # fmt: skip
