"""The correction of a DoRA site and its factor per column together (Liu et al. 2024, equation 5).

    y' = dora_expand(y, base, bias, h, B, magnitude, norm)
        c = magnitude / norm       z = base, or y - bias where there is none       y' = y + (c - 1) * z + c * (h B^T)

y and base (..., N), bias, magnitude and norm (N,), h (..., r), B (N, r). The sum is rounded once, to the dtype of y. A
part of ``dora_linear`` on joint graphs: it has no gradient of its own.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from adaptc.ir import dialect
from adaptc.ir.dialect import Cost, DialectOp, nbytes
from adaptc.ir.ops.lora import draw_dtypes, draw_tensor, opmath, rows


def expand_body(
    y: torch.Tensor, base: torch.Tensor | None, bias: torch.Tensor | None, h: torch.Tensor, B: torch.Tensor,
    magnitude: torch.Tensor, norm: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    wide = opmath(y)
    product = (rows(h) @ B.to(h.dtype).t()).to(wide)
    c = magnitude / norm
    z = rows(y if base is None else base).to(wide)
    z = z if bias is None or base is not None else z - bias.to(wide)
    out = rows(y).to(wide) + (c - 1).to(wide) * z + c.to(wide) * product
    return out.to(y.dtype).contiguous().view(y.shape)


def expand_fake(
    y: torch.Tensor, base: torch.Tensor | None, bias: torch.Tensor | None, h: torch.Tensor, B: torch.Tensor,
    magnitude: torch.Tensor, norm: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    return y.new_empty(y.shape)


def expand_cost(
    y: torch.Tensor, base: torch.Tensor | None, bias: torch.Tensor | None, h: torch.Tensor, B: torch.Tensor,
    magnitude: torch.Tensor, norm: torch.Tensor,
) -> Cost:  # fmt: skip
    """The correction's product is written once and read with y."""
    size = math.prod(int(s) for s in y.shape)
    return Cost(
        flops=size * (2 * int(B.shape[1]) + 5),
        read=2 * nbytes(y) + nbytes(base, bias, h, B, magnitude, norm),
        written=2 * nbytes(y),
        saved=nbytes(y if base is None else base),
    )


def expand_sample(draw: Any) -> tuple[Any, ...]:
    from hypothesis import strategies as st

    batch = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=2)))
    n, r = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    compute, factors = draw_dtypes(draw)
    wide = torch.float32 if compute.itemsize < 4 else compute
    base = draw_tensor(draw, (*batch, n), compute) if draw(st.booleans()) else None
    bias = draw_tensor(draw, (n,), compute) if draw(st.booleans()) else None
    return (
        draw_tensor(draw, (*batch, n), compute), base, bias, draw_tensor(draw, (*batch, r), compute),
        draw_tensor(draw, (n, r), factors), draw_tensor(draw, (n,), factors),
        draw_tensor(draw, (n,), wide).abs() + 0.5,
    )  # fmt: skip


DORA_EXPAND = dialect.define(
    DialectOp(
        name="dora_expand",
        schema="(Tensor y, Tensor? base, Tensor? bias, Tensor h, Tensor B, Tensor magnitude, Tensor norm) -> Tensor",
        body=expand_body, fake=expand_fake, cost=expand_cost, sample=expand_sample,
    )
)  # fmt: skip
