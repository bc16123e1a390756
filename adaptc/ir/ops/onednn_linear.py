"""A frozen layer's product by oneDNN, on the weight as it is.

    y = onednn_linear(x, W, b)          x (M, K), W (N, K) of any strides, b (N,) or None -> y (M, N) = x W^T + b

In fp32 on the CPU torch's products call MKL. oneDNN computes the same from the same memory, and is the faster one on
some hosts. On joint graphs only; it has no gradient of its own.
"""

from __future__ import annotations

from typing import Any

import torch

from adaptc.ir import dialect
from adaptc.ir.dialect import Cost, DialectOp, nbytes
from adaptc.ir.ops.lora import draw_tensor


def body(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    product = x @ weight.t()
    return product if bias is None else product + bias


def fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


def cost(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Cost:
    out = fake(x, weight, bias)
    flops = int(x.shape[0]) * int(weight.shape[0]) * (2 * int(x.shape[1]) + (bias is not None))
    return Cost(flops=flops, read=nbytes(x, weight, bias), written=nbytes(out))


def sample(draw: Any) -> tuple[Any, ...]:
    from hypothesis import strategies as st

    m, k, n = (draw(st.integers(1, 9)) for _ in range(3))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    weight = draw_tensor(draw, (n, k), dtype)
    if draw(st.booleans()):
        weight = weight.t().contiguous().t()
    return draw_tensor(draw, (m, k), dtype), weight, draw_tensor(draw, (n,), dtype) if draw(st.booleans()) else None


ONEDNN_LINEAR = dialect.define(
    DialectOp(
        name="onednn_linear",
        schema="(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
        body=body,
        fake=fake,
        cost=cost,
        sample=sample,
    )
)
