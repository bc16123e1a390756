"""Products with one small side (tall and skinny: a rank), in fp32 sums, with dropout where the input is read.

    shrink     h_g   = scale_g * (D_g . x) A_g^T        x (..., K), A_g (r_g, K) -> h_g (..., r_g) in the dtype of x
    gradient   d_g   = h_g^T (D_g . x)                  h_g (..., r_g), x (..., K) -> d_g (r_g, K) of ``dtype``
    both       q = scale * (g B),  dB = g^T h           g (..., N), B (N, r), h (..., r) -> q (..., r), dB (N, r)
    update     total += sum_g D_g . (q_g A_g)           q_g (..., r_g), A_g (r_g, K), total (..., K)
    row_norms  n_i   = |W_i + s (B A)_i|                W (N, K), A (r, K), B (N, r), n (N,)

x, g, W and total are fp32 or bf16; factors of either have any strides. D_g is the mask of ``adaptc.ir.ops.dropout`` of
``seeds`` (1,) int64 and ``p`` over 1 - p, or one where there are none. x, g, W and total are read once: rows that fit a
cache are copied, with the mask or in fp32, and each register tile of the result is summed from the copy. Libraries cut
their tiles for wide results, and cannot drop. n_i^2 = |W_i|^2 + 2 s B_i . (A W^T)_i + s^2 B_i (A A^T) B_i^T.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from adaptc import torch_internals
from adaptc.codegen.cpp import products
from adaptc.codegen.cpp.sources import text_of

#: By which ``takes`` calls the kernels.
NAME = "skinny"
#: What x, g, W and total may be made of.
DTYPES = (torch.float32, torch.bfloat16)
Tensors = Sequence[torch.Tensor]


@functools.cache
def library() -> Any:
    """The ops of the kernels; None without a C++ compiler, or with one that has no vector types."""
    found = torch_internals.load_cpp(text_of("skinny.cpp"))
    if found is None:
        return None
    products.found(NAME, found)
    return torch.ops.adaptc_skinny


def is_there(device: torch.device) -> bool:
    """Whether the kernels are, on ``device``."""
    return device.type == "cpu" and library() is not None


def shrink(
    x: torch.Tensor, A: Tensors, scale: Tensors, seeds: Tensors = (), p: Sequence[float] = ()
) -> list[torch.Tensor]:
    """h_g (..., r_g) of each of ``A``."""
    return list(library().shrink(x, A, scale, seeds, p))


def gradient(
    h: Tensors, x: torch.Tensor, dtype: torch.dtype, seeds: Tensors = (), p: Sequence[float] = ()
) -> list[torch.Tensor]:
    """d_g (r_g, K) of each of ``h``."""
    return list(library().gradient(h, x, dtype, seeds, p))


def both(
    g: torch.Tensor, h: torch.Tensor, B: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of a bottleneck (..., r) and of the factor ``B`` (N, r) behind it, in one pass over the output's
    ``g`` (..., N)."""
    return library().both(g, h, B, scale, dtype)  # type: ignore[no-any-return]


def update(total: torch.Tensor, q: Tensors, A: Tensors, seeds: Tensors = (), p: Sequence[float] = ()) -> None:
    """Add D_g . (q_g A_g) to ``total``, which is contiguous, for each of ``q`` and ``A``."""
    library().update(total, q, A, seeds, p)


def row_norms(W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """n (N,) in fp32; ``scale`` is one number."""
    return library().row_norms(W.detach(), A.detach(), B.detach(), scale)  # type: ignore[no-any-return]
