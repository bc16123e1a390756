"""The DoRA dialect ops (Liu et al. 2024, equation 5 and section 4.3).

    n     = dora_row_norm(W, A, B, scale, transposed)      n_i = |W_i + scale * (B A)_i|, never differentiated
    y', h = dora_linear(x, y, base, bias, A, B, magnitude, norm, scale)
        h = scale * (x A^T)       c = magnitude / norm       z = base, or y - bias where there is none
        y' = y + (c - 1) * z + c * (h B^T)

W (N, K), or (K, N) when ``transposed``; x (..., K), y and base (..., N), bias, magnitude and norm (N,), A (r, K),
B (N, r), scale (1,). ``base`` is x W^T where x is not the layer's own input (PEFT's dropout), else None.

The norms come from n_i^2 = |W_i|^2 + 2 s B_i . (A W^T)_i + s^2 B_i (A A^T) B_i^T: W is read, nothing of its size is
written. At ``magnitude`` = ``norm`` without a correction, y' is y to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from adaptc.errors import UnsupportedError
from adaptc.ir import dialect
from adaptc.ir.dialect import Cost, DialectOp, nbytes
from adaptc.ir.ops.dora_expand import expand_body, expand_cost
from adaptc.ir.ops.dora_grads import product_of_columns
from adaptc.ir.ops.dora_rescale import bias_gradient
from adaptc.ir.ops.lora import draw_tensor, rows, scaled
from adaptc.torch_internals import is_wrapped

#: Into how many blocks of rows W is cut: what is computed of a block (its squares; a 16-bit weight in fp32) is the
#: largest temporary.
BLOCKS = 8


def norm_dtype(weight: torch.Tensor, A: torch.Tensor) -> torch.dtype:
    """fp64 where the weight or the factors are, else fp32."""
    return torch.promote_types(torch.promote_types(weight.dtype, A.dtype), torch.float32)


def _reads_blocks(W: torch.Tensor, A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    squares, products = [], []
    for block in torch.split(W, -(-W.shape[0] // BLOCKS)):
        wide = block.to(A.dtype)
        squares.append((wide * wide).sum(1))
        products.append(wide @ A.t())
    return torch.cat(squares), torch.cat(products)


def row_norm_body(
    weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: torch.Tensor, transposed: bool,
    reads: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] = _reads_blocks,
) -> torch.Tensor:  # fmt: skip
    """``reads``: (W, A) -> the squares of the rows of W (N, K), and W A^T, in the dtype of A."""
    dtype = norm_dtype(weight, A)
    W = weight.detach().t() if transposed else weight.detach()
    A, B, s = A.detach().to(dtype), B.detach().to(dtype), scale.detach().to(dtype)
    squares, products = reads(W, A)
    gram = (B @ (A @ A.t()) * B).sum(1)
    # Rounding can take a row that the correction cancels below zero.
    return (squares + 2 * s * (products * B).sum(1) + s * s * gram).clamp_min(0).sqrt()


def row_norm(
    weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: torch.Tensor, transposed: bool
) -> torch.Tensor:
    """The op outside a graph: the same bits as in one."""
    given = weight, A, B, scale
    # Of a subclass the memory may be elsewhere, and under torch.func's transforms a tensor has none.
    plain = all(type(t) in (torch.Tensor, torch.nn.Parameter) and not is_wrapped(t) for t in given)
    return DORA_ROW_NORM.overload(*given, transposed) if plain else row_norm_body(*given, transposed)


def row_norm_fake(
    weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: torch.Tensor, transposed: bool
) -> torch.Tensor:
    return weight.new_empty((weight.shape[1 if transposed else 0],), dtype=norm_dtype(weight, A))


def row_norm_save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.mark_non_differentiable(output)


def row_norm_gradient(ctx: Any, grad: torch.Tensor) -> tuple[None, ...]:
    """None: the paper holds the norm constant in the backward pass (section 4.3)."""
    return (None,) * 5


def linear_body(
    x: torch.Tensor, y: torch.Tensor, base: torch.Tensor | None, bias: torch.Tensor | None, A: torch.Tensor,
    B: torch.Tensor, magnitude: torch.Tensor, norm: torch.Tensor, scale: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    h = _bottleneck(x, A, scale)
    return expand_body(y, base, bias, h, B, magnitude, norm), h


def _bottleneck(x: torch.Tensor, A: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return scaled(rows(x) @ A.to(x.dtype).t(), scale).view(*x.shape[:-1], A.shape[0])


def linear_fake(
    x: torch.Tensor, y: torch.Tensor, base: torch.Tensor | None, bias: torch.Tensor | None, A: torch.Tensor,
    B: torch.Tensor, magnitude: torch.Tensor, norm: torch.Tensor, scale: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    return y.new_empty(y.shape), x.new_empty((*x.shape[:-1], A.shape[0]))


#: The inputs of ``dora_linear`` that have gradients, by position.
_TRAINED = {0: "x", 1: "y", 2: "base", 3: "bias", 4: "A", 5: "B", 6: "magnitude"}


def linear_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    if ctx.needs_input_grad[8]:
        raise UnsupportedError(
            "dora_linear: its scale is frozen", expected="a scale without gradient", found="a scale that requires one"
        )
    x, y, base, bias, A, B, magnitude, norm, scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    # Where there is a base, y is not needed: its gradient is the output's.
    ctx.save_for_backward(x, y if base is None else None, base, bias, A, B, magnitude, norm, scale, output[1])


_GRADIENTS = ("lora_bottleneck_grad", "lora_factor_grad", "lora_input_grad", "dora_output_grads")


def linear_gradient(ctx: Any, grad: torch.Tensor | None, _: Any) -> tuple[torch.Tensor | None, ...]:
    """q, dB, dz and dmagnitude as ``dora_output_grads`` has them;  dA = q^T x;  dx = q A;  with a base:  dy = g, dbase
    = dz;  without:  dy = dz, dbias = (1 - c) g summed over the rows. Only what is needed."""
    if grad is None:
        return (None,) * 9
    x, y, base, bias, A, B, magnitude, norm, scale, h = ctx.saved_tensors
    need_x, need_y, need_base, need_bias, need_A, need_B, need_magnitude = (ctx.needs_input_grad[i] for i in _TRAINED)
    # With create_graph=True someone differentiates this result: the ops have no second derivative, their bodies have,
    # and the saved h has lost its history.
    twice = torch.is_grad_enabled()
    bottleneck_grad, factor_grad, input_grad, output_grads = (
        op.body if twice else op.overload for op in map(dialect.get, _GRADIENTS)
    )
    has_base = base is not None
    dx = dz = dA = dB = dm = None
    dbias = bias_gradient(grad, bias, magnitude, norm) if need_bias and not has_base else None
    if need_B or need_magnitude:
        h = _bottleneck(x, A, scale) if twice else h
        z, bias = (base, None) if has_base else (y, bias)
        q, dB, dz, dm = output_grads(grad, z, bias, h, B, magnitude, norm, scale, has_base)
    else:
        c = magnitude / norm
        q = bottleneck_grad(grad, c[:, None] * B, scale) if need_x or need_A else None
        dz = product_of_columns(grad, c - 1 if has_base else c) if need_base or need_y else None
    dx = input_grad(q, A) if need_x else None
    dA = factor_grad(q, x, A.dtype) if need_A else None
    dy, dbase = (grad, dz) if has_base else (dz, None)
    found = (dx, dy, dbase, dbias, dA, dB, dm, None, None)
    return tuple(g if need else None for g, need in zip(found, ctx.needs_input_grad, strict=True))


def _elements(*sizes: Any) -> int:
    return math.prod(int(s) for s in sizes)


def row_norm_cost(
    weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: torch.Tensor, transposed: bool
) -> Cost:
    """W is read for its squares and for its product with A^T, and a 16-bit W is written and read in fp32 once."""
    size, (r, k), n = _elements(*weight.shape), A.shape, int(B.shape[0])
    dtype = norm_dtype(weight, A)
    wide = 0 if weight.dtype == dtype else size * dtype.itemsize
    flops = 2 * size * (1 + r) + 2 * int(r) * int(r) * (int(k) + n)
    return Cost(flops=flops, read=2 * nbytes(weight) + wide + nbytes(A, B), written=wide + n * dtype.itemsize)


def linear_cost(
    x: torch.Tensor, y: torch.Tensor, base: torch.Tensor | None, bias: torch.Tensor | None, A: torch.Tensor,
    B: torch.Tensor, magnitude: torch.Tensor, norm: torch.Tensor, scale: torch.Tensor,
) -> Cost:  # fmt: skip
    h = linear_fake(x, y, base, bias, A, B, magnitude, norm, scale)[1]
    shrink = Cost(2 * _elements(*h.shape) * int(x.shape[-1]), nbytes(x, A), nbytes(h), nbytes(h))
    return shrink + expand_cost(y, base, bias, h, B, magnitude, norm)


def row_norm_sample(draw: Any) -> tuple[Any, ...]:
    from hypothesis import strategies as st

    k, n, r = (draw(st.integers(1, 9)) for _ in range(3))
    weight = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    factors = draw(st.sampled_from([weight, torch.float32 if weight.itemsize < 4 else weight]))
    transposed = draw(st.booleans())
    return (
        draw_tensor(draw, (k, n) if transposed else (n, k), weight),
        draw_tensor(draw, (r, k), factors), draw_tensor(draw, (n, r), factors),
        draw_tensor(draw, (1,), torch.float64), transposed,
    )  # fmt: skip


def linear_sample(draw: Any) -> tuple[Any, ...]:
    from hypothesis import strategies as st

    batch = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=2)))
    k, n, r = (draw(st.integers(1, 9)) for _ in range(3))
    compute = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    wide = torch.float32 if compute.itemsize < 4 else compute
    factors = draw(st.sampled_from([compute, wide]))
    base = draw_tensor(draw, (*batch, n), compute) if draw(st.booleans()) else None
    bias = draw_tensor(draw, (n,), compute) if draw(st.booleans()) else None
    return (
        draw_tensor(draw, (*batch, k), compute), draw_tensor(draw, (*batch, n), compute), base, bias,
        draw_tensor(draw, (r, k), factors), draw_tensor(draw, (n, r), factors),
        draw_tensor(draw, (n,), factors), draw_tensor(draw, (n,), wide).abs() + 0.5,
        draw_tensor(draw, (1,), torch.float64),
    )  # fmt: skip


DORA_ROW_NORM = dialect.define(
    DialectOp(
        name="dora_row_norm",
        schema="(Tensor weight, Tensor A, Tensor B, Tensor scale, bool transposed) -> Tensor",
        body=row_norm_body,
        fake=row_norm_fake,
        save=row_norm_save,
        gradient=row_norm_gradient,
        cost=row_norm_cost,
        sample=row_norm_sample,
    )
)
DORA_LINEAR = dialect.define(
    DialectOp(
        name="dora_linear",
        schema="(Tensor x, Tensor y, Tensor? base, Tensor? bias, Tensor A, Tensor B, Tensor magnitude, Tensor norm,"
        " Tensor scale) -> (Tensor, Tensor)",
        body=linear_body,
        fake=linear_fake,
        save=linear_save,
        gradient=linear_gradient,
        cost=linear_cost,
        sample=linear_sample,
    )
)
