"""LoRA as one dense weight, for layers that read many rows or have high ranks (RunLoRA, arXiv 2312.03415, section 3).

    E      = lora_merged_weight(W, A, B, scale, transposed)      E = W + (B * scale) A        one product instead of two
    dA, dB = lora_dense_grads(Z, A, B, scale)                    dA = (B * scale)^T Z;  dB = (Z A^T) * scale

W (N, K), or (K, N) when ``transposed``, and E in the same layout; A (r, K), B (N, r), scale (1,) or (r,). Z (N, K) is
the gradient of the dense weight, g^T x. On joint graphs only, without gradients of their own. All in one dtype: a
16-bit E would lose corrections that are small beside W.
"""

from __future__ import annotations

from typing import Any

import torch

from adaptc.ir import dialect
from adaptc.ir.dialect import Cost, DialectOp, nbytes
from adaptc.ir.ops.lora import draw_tensor, scaled


def merged_body(
    W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: torch.Tensor, transposed: bool
) -> torch.Tensor:
    factor = scaled(B, scale)
    return torch.addmm(W, A.t(), factor.t()) if transposed else torch.addmm(W, factor, A)


def merged_fake(
    W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: torch.Tensor, transposed: bool
) -> torch.Tensor:
    return W.new_empty(W.shape)


def merged_cost(W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: torch.Tensor, transposed: bool) -> Cost:
    n, r = (int(size) for size in B.shape)
    elements = n * int(A.shape[1])
    return Cost(flops=(2 * r + 1) * elements + n * r, read=nbytes(W, A, B), written=nbytes(W))


def dense_grads_body(
    Z: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return scaled(B, scale).t() @ Z, scaled(Z @ A.t(), scale)


def dense_grads_fake(
    Z: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return A.new_empty(A.shape), B.new_empty(B.shape)


def dense_grads_cost(Z: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: torch.Tensor) -> Cost:
    n, r = (int(size) for size in B.shape)
    elements = n * int(A.shape[1])
    return Cost(flops=4 * r * elements + 2 * n * r, read=nbytes(Z, Z, A, B), written=nbytes(A, B))


def _draw(draw: Any) -> tuple[int, int, torch.Tensor, torch.Tensor, torch.Tensor, torch.dtype]:
    from hypothesis import strategies as st

    k, n, r = (draw(st.integers(1, 9)) for _ in range(3))
    dtype = draw(st.sampled_from([torch.float64, torch.float32]))
    scale = draw_tensor(draw, draw(st.sampled_from([(1,), (r,)])), torch.float64)
    return k, n, draw_tensor(draw, (r, k), dtype), draw_tensor(draw, (n, r), dtype), scale, dtype


def merged_sample(draw: Any) -> tuple[Any, ...]:
    from hypothesis import strategies as st

    k, n, A, B, scale, dtype = _draw(draw)
    transposed = draw(st.booleans())
    # As weights lie: in rows without gaps.
    return draw_tensor(draw, (k, n) if transposed else (n, k), dtype).contiguous(), A, B, scale, transposed


def dense_grads_sample(draw: Any) -> tuple[Any, ...]:
    k, n, A, B, scale, dtype = _draw(draw)
    return draw_tensor(draw, (n, k), dtype), A, B, scale


LORA_MERGED_WEIGHT = dialect.define(
    DialectOp(
        name="lora_merged_weight",
        schema="(Tensor W, Tensor A, Tensor B, Tensor scale, bool transposed) -> Tensor",
        body=merged_body,
        fake=merged_fake,
        cost=merged_cost,
        sample=merged_sample,
        recomputed=True,
    )
)
LORA_DENSE_GRADS = dialect.define(
    DialectOp(
        name="lora_dense_grads",
        schema="(Tensor Z, Tensor A, Tensor B, Tensor scale) -> (Tensor, Tensor)",
        body=dense_grads_body,
        fake=dense_grads_fake,
        cost=dense_grads_cost,
        sample=dense_grads_sample,
    )
)
