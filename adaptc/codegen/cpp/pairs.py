"""Products of bf16 with one small side (a rank), two numbers at a time, in fp32 sums.

    shrink      h_g = scale_g * (x A_g^T)          x (..., K), A_g (r_g, K) -> h_g (..., r_g) in bf16
    gradient    d_g = h_g^T x                      h_g (..., r_g), x (..., K) -> d_g (r_g, K) of ``dtype``
    both        q = scale * (g B),  dB = g^T h     g (..., N), B (N, r), h (..., r) -> q (..., r) in bf16, dB (N, r)
    update      total += sum_g q_g A_g             q_g (..., r_g), A_g (r_g, K), total (..., K) in bf16
    dora_expand, dora_output_grads                 as the ops of these names

For CPUs with AVX512_BF16. x, g and total are read once, where their rows lie at one distance, else from a copy. Factors
may be fp32 or bf16 and have any strides: they are rounded to bf16 as they are packed. Numbers below the smallest normal
one may come out as zero.

Once the library is there, it does what the dialect's ops of DoRA do on a CPU, and calls Python for what it does not
take; ``adaptc.codegen.cpp.products`` has it do the others.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from adaptc import torch_internals
from adaptc.codegen.cpp import products
from adaptc.codegen.cpp.sources import text_of

#: By which ``takes`` calls the kernels. They do not drop: seeds and rates are empty.
NAME = "pairs"
Tensors = Sequence[torch.Tensor]
Rates = Sequence[float]


@functools.cache
def library() -> Any:
    """The ops of the kernels; None without a C++ compiler, or for a CPU that lacks the instructions."""
    if not torch_internals.has_avx512_bf16():
        return None
    found = torch_internals.load_cpp(text_of("pairs.cpp"))
    if found is None or not found.lanes():
        return None
    products.found(NAME, found)
    return torch.ops.adaptc_pairs


def is_there(device: torch.device) -> bool:
    """Whether the kernels are, on ``device``."""
    return device.type == "cpu" and library() is not None


def shrink(x: torch.Tensor, A: Tensors, scale: Tensors, seeds: Tensors = (), p: Rates = ()) -> list[torch.Tensor]:
    """h (..., r_g) of each of ``A`` (r_g, K)."""
    return list(library().shrink(x, A, scale, seeds, p))


def gradient(
    h: Tensors, x: torch.Tensor, dtype: torch.dtype, seeds: Tensors = (), p: Rates = ()
) -> list[torch.Tensor]:
    """d (r_g, K) of each of ``h`` (..., r_g)."""
    return list(library().gradient(h, x, dtype, seeds, p))


def both(
    g: torch.Tensor, h: torch.Tensor, B: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of a bottleneck (..., r) and of the factor ``B`` (N, r) behind it, in one pass over the output's
    ``g`` (..., N)."""
    return library().both(g, h, B, scale, dtype)  # type: ignore[no-any-return]


def update(total: torch.Tensor, q: Tensors, A: Tensors, seeds: Tensors = (), p: Rates = ()) -> None:
    """Add q A to ``total`` (..., K), which is contiguous, for each ``q`` (..., r_g) and ``A`` (r_g, K)."""
    library().update(total, q, A, seeds, p)


def dora_expand(
    y: torch.Tensor, base: torch.Tensor | None, bias: torch.Tensor | None, h: torch.Tensor, B: torch.Tensor,
    magnitude: torch.Tensor, norm: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """y + (c - 1) * z + c * (h B^T) (..., N), c = magnitude / norm; z is ``base``, or y - ``bias`` without one."""
    return library().dora_expand(y, base, bias, h, B, magnitude, norm)  # type: ignore[no-any-return]


def dora_output_grads(
    g: torch.Tensor, z: torch.Tensor, bias: torch.Tensor | None, h: torch.Tensor, B: torch.Tensor,
    magnitude: torch.Tensor, norm: torch.Tensor, scale: torch.Tensor, of_base: bool, dz: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """q (..., r), dB (N, r) and the gradient of ``magnitude`` (N,), in one pass over ``g`` (..., N). ``dz``:
    contiguous, takes its result; it may be ``g``."""
    found: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    found = library().dora_output_grads(g, z, bias, h, B, magnitude, norm, scale, of_base, dz)
    return found
