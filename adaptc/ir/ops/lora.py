"""The LoRA dialect ops (Hu et al. 2021, section 4.1).

    y', h = lora_linear(x, y, A, B, scale, scale_at)
        x (..., K), y (..., N), A (r, K), B (N, r), scale (1,), or (r,) at "r"
        scale_at "n":  h = x A^T            y' = y + scale * (h B^T)      a pass over M x N
        scale_at "r":  h = scale * (x A^T)  y' = y + h B^T                a pass over M x r

``y`` is the frozen layer's output, whatever computed it. The computation is in the dtype of ``x``; factors of
another dtype are cast (they are small), and their gradients come back in their own dtype. ``h`` is what the
backward needs: it is an output so that it can be saved instead of recomputed.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from adaptc.errors import UnsupportedError
from adaptc.ir import dialect
from adaptc.ir.dialect import Cost, DialectOp, nbytes


def opmath(t: torch.Tensor) -> torch.dtype:
    return torch.float32 if t.dtype.itemsize < 4 else t.dtype


def scaled(t: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """scale * t, rounded once."""
    wide = opmath(t)
    return (t.to(wide) * scale.to(wide)).to(t.dtype)


def rows(t: torch.Tensor) -> torch.Tensor:
    """(..., k) as (rows, k)."""
    return t.reshape(-1, t.shape[-1])


def _check_scale(scale: torch.Tensor, scale_at: str) -> None:
    """A scale of the wrong size would broadcast silently where r equals N or 1."""
    if scale_at not in ("n", "r"):
        found = repr(scale_at)
        raise UnsupportedError("lora_linear: scale_at is not legal", expected='"n" or "r"', found=found)
    if scale_at == "n" and scale.shape[0] != 1:
        raise UnsupportedError(
            "lora_linear: a scale per rank multiplies the bottleneck", expected='scale_at "r"', found='"n"'
        )


def linear_body(
    x: torch.Tensor, y: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: torch.Tensor, scale_at: str
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_scale(scale, scale_at)
    h = rows(x) @ A.to(x.dtype).t()
    expand = B.to(x.dtype).t()
    if scale_at == "r":
        h = scaled(h, scale)
        out = torch.addmm(rows(y), h, expand)
    else:
        out = (rows(y) + scaled(h @ expand, scale)).contiguous()
    return out.view(y.shape), h.view(*x.shape[:-1], A.shape[0])


def linear_fake(
    x: torch.Tensor, y: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: torch.Tensor, scale_at: str
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_scale(scale, scale_at)
    return y.new_empty(y.shape), x.new_empty((*x.shape[:-1], A.shape[0]))


def linear_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, _, A, B, scale, scale_at = inputs
    h = output[1]
    if scale_at == "r" and ctx.needs_input_grad[4]:
        raise UnsupportedError(
            "lora_linear: a trained scale cannot be folded into the bottleneck",
            expected='scale_at "n" (its gradient needs the unscaled bottleneck)',
            found='scale_at "r"',
        )
    ctx.mark_non_differentiable(h)
    ctx.set_materialize_grads(False)
    ctx.scale_at = scale_at
    ctx.save_for_backward(x, A, B, scale, h)


_GRADIENTS = ("lora_bottleneck_grad", "lora_factor_grad", "lora_input_grad")


def linear_gradient(ctx: Any, grad: torch.Tensor | None, _: Any) -> tuple[torch.Tensor | None, ...]:
    """q = scale * (g B);  dA = q^T x;  dB = g^T (scale * x A^T);  dx = q A;  dy = g;  dscale = sum (g B) * h.

    Only what is needed.
    """
    if grad is None:
        return (None,) * 6
    x, A, B, scale, h = ctx.saved_tensors
    need_x, need_y, need_A, need_B, need_scale, _ = ctx.needs_input_grad
    # With create_graph=True someone differentiates this result. The ops carry no second derivative and the saved
    # h has lost its history: their bodies and a fresh h have both.
    twice = torch.is_grad_enabled()
    bottleneck_grad, factor_grad, input_grad = (
        op.body if twice else op.overload for op in map(dialect.get, _GRADIENTS)
    )
    if twice:
        h = (rows(x) @ A.to(x.dtype).t()).view(h.shape)
        h = scaled(h, scale) if ctx.scale_at == "r" else h
    dx = dA = dB = dscale = None
    if need_x or need_A:
        q = bottleneck_grad(grad, B, scale)
        dA = factor_grad(q, x, A.dtype) if need_A else None
        dx = input_grad(q, A) if need_x else None
    if need_B:
        dB = factor_grad(grad, h if ctx.scale_at == "r" else scaled(h, scale), B.dtype)
    if need_scale:
        weight = bottleneck_grad(grad, B, torch.ones_like(scale)).to(opmath(h)) * h
        dscale = weight.sum().reshape(1).to(scale.dtype)
    return dx, grad if need_y else None, dA, dB, dscale, None


def _numel(*sizes: Any) -> int:
    return math.prod(int(s) for s in sizes)


def linear_cost(
    x: torch.Tensor, y: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: torch.Tensor, scale_at: str
) -> Cost:
    m, k, n, r = _numel(*x.shape[:-1]), int(x.shape[-1]), int(y.shape[-1]), int(A.shape[0])
    wide = m * n if scale_at == "n" else m * r
    h = m * r * x.dtype.itemsize
    # At "n" the product is written and read again before it is scaled and added.
    extra = 2 * m * n * x.dtype.itemsize if scale_at == "n" else 0
    return Cost(
        flops=2 * m * r * (k + n) + wide + m * n,
        read=nbytes(x, y, A, B) + h + extra,
        written=nbytes(y) + h + extra,
        saved=h,
    )


def _draw_sizes(draw: Any) -> tuple[tuple[int, ...], int, int, int]:
    from hypothesis import strategies as st

    batch = draw(st.lists(st.integers(1, 4), min_size=1, max_size=2))
    k, n, r = (draw(st.integers(1, 9)) for _ in range(3))
    return tuple(batch), k, n, r


def draw_tensor(draw: Any, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Values in [-2, 2) with a drawn layout: contiguous, transposed, or a strided slice."""
    from hypothesis import strategies as st

    layout = draw(st.sampled_from(["contiguous", "transposed", "strided"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    if layout == "transposed" and len(shape) >= 2:
        base = torch.rand(*shape[:-2], shape[-1], shape[-2], generator=generator, dtype=torch.float64)
        base = base.transpose(-1, -2)
    elif layout == "strided":
        base = torch.rand(*shape[:-1], 2 * shape[-1], generator=generator, dtype=torch.float64)[..., ::2]
    else:
        base = torch.rand(shape, generator=generator, dtype=torch.float64)
    # `.to` keeps dense strides only; rebuild the layout in the wanted dtype.
    out = torch.empty_strided(base.shape, base.stride(), dtype=dtype)
    return out.copy_(4 * base - 2)


def draw_dtypes(draw: Any) -> tuple[torch.dtype, torch.dtype]:
    from hypothesis import strategies as st

    compute = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    factors = draw(st.sampled_from([compute, torch.float32 if compute.itemsize < 4 else compute]))
    return compute, factors


def linear_sample(draw: Any) -> tuple[Any, ...]:
    from hypothesis import strategies as st

    batch, k, n, r = _draw_sizes(draw)
    compute, factors = draw_dtypes(draw)
    scale_at = draw(st.sampled_from(["n", "r"]))
    scale_shape = draw(st.sampled_from([(1,), (r,)])) if scale_at == "r" else (1,)
    return (
        draw_tensor(draw, (*batch, k), compute),
        draw_tensor(draw, (*batch, n), compute),
        draw_tensor(draw, (r, k), factors),
        draw_tensor(draw, (n, r), factors),
        draw_tensor(draw, scale_shape, torch.float64),
        scale_at,
    )


def bottleneck_grad_body(grad: torch.Tensor, B: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return scaled((rows(grad) @ B.to(grad.dtype)).view(*grad.shape[:-1], B.shape[1]), scale)


def bottleneck_grad_fake(grad: torch.Tensor, B: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return grad.new_empty((*grad.shape[:-1], B.shape[1]))


def bottleneck_grad_cost(grad: torch.Tensor, B: torch.Tensor, scale: torch.Tensor) -> Cost:
    m, n, r = _numel(*grad.shape[:-1]), int(grad.shape[-1]), int(B.shape[1])
    q = m * r * grad.dtype.itemsize
    return Cost(flops=2 * m * n * r + m * r, read=nbytes(grad, B), written=q)


def bottleneck_grad_sample(draw: Any) -> tuple[Any, ...]:
    batch, _, n, r = _draw_sizes(draw)
    compute, factors = draw_dtypes(draw)
    return (
        draw_tensor(draw, (*batch, n), compute),
        draw_tensor(draw, (n, r), factors),
        draw_tensor(draw, (1,), torch.float64),
    )


def factor_grad_body(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (rows(left).t() @ rows(right)).to(dtype)


def factor_grad_fake(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return left.new_empty((left.shape[-1], right.shape[-1]), dtype=dtype)


def factor_grad_cost(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> Cost:
    m, i, j = _numel(*left.shape[:-1]), int(left.shape[-1]), int(right.shape[-1])
    return Cost(flops=2 * m * i * j, read=nbytes(left, right), written=i * j * dtype.itemsize)


def factor_grad_sample(draw: Any) -> tuple[Any, ...]:
    batch, k, _, r = _draw_sizes(draw)
    compute, factors = draw_dtypes(draw)
    return draw_tensor(draw, (*batch, r), compute), draw_tensor(draw, (*batch, k), compute), factors


def input_grad_body(q: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    return (rows(q) @ A.to(q.dtype)).view(*q.shape[:-1], A.shape[1])


def input_grad_fake(q: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    return q.new_empty((*q.shape[:-1], A.shape[1]))


def input_grad_cost(q: torch.Tensor, A: torch.Tensor) -> Cost:
    m, r, k = _numel(*q.shape[:-1]), int(q.shape[-1]), int(A.shape[1])
    return Cost(flops=2 * m * r * k, read=nbytes(q, A), written=m * k * q.dtype.itemsize)


def input_grad_sample(draw: Any) -> tuple[Any, ...]:
    batch, k, _, r = _draw_sizes(draw)
    compute, factors = draw_dtypes(draw)
    return draw_tensor(draw, (*batch, r), compute), draw_tensor(draw, (r, k), factors)


LORA_LINEAR = dialect.define(
    DialectOp(
        name="lora_linear",
        schema="(Tensor x, Tensor y, Tensor A, Tensor B, Tensor scale, str scale_at) -> (Tensor, Tensor)",
        body=linear_body,
        fake=linear_fake,
        save=linear_save,
        gradient=linear_gradient,
        cost=linear_cost,
        sample=linear_sample,
    )
)
LORA_BOTTLENECK_GRAD = dialect.define(
    DialectOp(
        name="lora_bottleneck_grad",
        schema="(Tensor grad, Tensor B, Tensor scale) -> Tensor",
        body=bottleneck_grad_body,
        fake=bottleneck_grad_fake,
        cost=bottleneck_grad_cost,
        sample=bottleneck_grad_sample,
    )
)
LORA_FACTOR_GRAD = dialect.define(
    DialectOp(
        name="lora_factor_grad",
        schema="(Tensor left, Tensor right, ScalarType dtype) -> Tensor",
        body=factor_grad_body,
        fake=factor_grad_fake,
        cost=factor_grad_cost,
        sample=factor_grad_sample,
    )
)
LORA_INPUT_GRAD = dialect.define(
    DialectOp(
        name="lora_input_grad",
        schema="(Tensor q, Tensor A) -> Tensor",
        body=input_grad_body,
        fake=input_grad_fake,
        cost=input_grad_cost,
        sample=input_grad_sample,
    )
)
