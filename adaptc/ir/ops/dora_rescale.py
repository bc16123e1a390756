"""The factor per column of a DoRA site without dropout (Liu et al. 2024, equation 5).

    y' = dora_rescale(y, bias, magnitude, norm)       c = magnitude / norm       y' = c * y + (1 - c) * bias

y (..., N) is the frozen layer's output with the low-rank correction added; bias, magnitude and norm are (N,). The norm
is a constant of the backward pass (section 4.3). At ``magnitude`` = ``norm`` y' is y to the bit.

    c = dora_factor(magnitude, norm)

is that quotient as a tensor of its own: Inductor on a CPU would divide anew for every element of y that it rescales.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from adaptc.ir import dialect
from adaptc.ir.dialect import Cost, DialectOp, nbytes
from adaptc.ir.ops.lora import draw_tensor


def body(y: torch.Tensor, bias: torch.Tensor | None, magnitude: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    c = magnitude / norm
    out = y * c.to(y.dtype)
    return dense(out if bias is None else out + ((1 - c) * bias).to(y.dtype))


def dense(t: torch.Tensor) -> torch.Tensor:
    """``t`` contiguous, with the strides that a new tensor of its shape has in dimensions of one element too."""
    return t.reshape(-1).view(t.shape)


def fake(y: torch.Tensor, bias: torch.Tensor | None, magnitude: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    return y.new_empty(y.shape)


def save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def gradient(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    need_y, need_bias, need_magnitude, _ = ctx.needs_input_grad
    _, bias, magnitude, norm = ctx.saved_tensors
    dbias = bias_gradient(grad, bias, magnitude, norm) if need_bias else None
    if not need_magnitude:
        c = magnitude / norm
        return grad * c.to(grad.dtype) if need_y else None, dbias, None, None
    op = dialect.get("dora_rescale_grad")
    # With create_graph=True someone differentiates this result: the body has a second derivative, the op none.
    dy, dm = (op.body if torch.is_grad_enabled() else op.overload)(grad, *ctx.saved_tensors)
    return dy if need_y else None, dbias, dm, None


def bias_gradient(
    grad: torch.Tensor, bias: torch.Tensor, magnitude: torch.Tensor, norm: torch.Tensor
) -> torch.Tensor:
    """(1 - c) * grad summed over the rows: what y' = c * y + (1 - c) * bias gives a bias that somebody trains, besides
    what it gets through y."""
    total = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=norm.dtype)
    return ((1 - magnitude / norm) * total).to(bias.dtype)


def grad_body(
    grad: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None, magnitude: torch.Tensor, norm: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """dy = c g;  dmagnitude = (sum over the rows of g * (y - bias)) / norm."""
    c = magnitude / norm
    centred = y if bias is None else y - bias.to(y.dtype)
    total = (grad * centred).reshape(-1, grad.shape[-1]).sum(0)
    return dense(grad * c.to(grad.dtype)), (total.to(norm.dtype) / norm).to(magnitude.dtype)


def grad_fake(
    grad: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None, magnitude: torch.Tensor, norm: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return grad.new_empty(grad.shape), magnitude.new_empty(magnitude.shape)


def cost(y: torch.Tensor, bias: torch.Tensor | None, magnitude: torch.Tensor, norm: torch.Tensor) -> Cost:
    flops = (1 + (bias is not None)) * math.prod(int(s) for s in y.shape)
    return Cost(flops=flops, read=nbytes(y, bias, magnitude, norm), written=nbytes(y), saved=nbytes(y))


def grad_cost(
    grad: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None, magnitude: torch.Tensor, norm: torch.Tensor
) -> Cost:
    flops = (3 + (bias is not None)) * math.prod(int(s) for s in y.shape)
    return Cost(flops=flops, read=nbytes(grad, y, bias, magnitude, norm), written=nbytes(grad, magnitude))


def factor_sample(draw: Any) -> tuple[Any, ...]:
    return sample(draw)[2:]


def sample(draw: Any) -> tuple[Any, ...]:
    from hypothesis import strategies as st

    batch = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=2)))
    n = draw(st.integers(1, 9))
    dtype = draw(st.sampled_from([torch.float64, torch.float32]))
    bias = draw_tensor(draw, (n,), dtype) if draw(st.booleans()) else None
    return (
        draw_tensor(draw, (*batch, n), dtype), bias, draw_tensor(draw, (n,), dtype),
        draw_tensor(draw, (n,), dtype).abs() + 0.5,
    )  # fmt: skip


def grad_sample(draw: Any) -> tuple[Any, ...]:
    y, *rest = sample(draw)
    return draw_tensor(draw, tuple(y.shape), y.dtype), y, *rest


DORA_FACTOR = dialect.define(
    DialectOp(
        name="dora_factor",
        schema="(Tensor magnitude, Tensor norm) -> Tensor",
        body=lambda magnitude, norm: magnitude / norm,
        fake=lambda magnitude, norm: norm.new_empty(norm.shape),
        cost=None,
        sample=factor_sample,
    )
)
DORA_RESCALE = dialect.define(
    DialectOp(
        name="dora_rescale",
        schema="(Tensor y, Tensor? bias, Tensor magnitude, Tensor norm) -> Tensor",
        body=body,
        fake=fake,
        save=save,
        gradient=gradient,
        cost=cost,
        sample=sample,
    )
)
DORA_RESCALE_GRAD = dialect.define(
    DialectOp(
        name="dora_rescale_grad",
        schema="(Tensor grad, Tensor y, Tensor? bias, Tensor magnitude, Tensor norm) -> (Tensor, Tensor)",
        body=grad_body,
        fake=grad_fake,
        cost=grad_cost,
        sample=grad_sample,
    )
)
