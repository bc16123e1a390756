"""LoRA where each row has an adapter of its own, or none, on a CPU: rows are grouped by adapter where they lie.

    forward   y', h as the op ``lora_rows``                       x (M, K), y (M, N), A_i (r_i, K), B_i (N, r_i)
    backward  dx, dA_i, dB_i as the op ``lora_rows_grads``

x, y and the gradient of y' are fp32 or bf16; factors have any floating-point dtype and strides. Nothing is gathered: a
register tile reads rows wherever they are, and the factors of an adapter are copied once for all of its rows, in pieces
that a cache holds. Where an adapter has few rows, as in a decode step, its factors are read once where they are. Sums
are in fp32; h and the gradient of it are rounded to the dtype of x, and y' is rounded once. Threads share the rows, and
for dA and dB the columns: the bits do not depend on how many there are.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from adaptc import torch_internals
from adaptc.codegen.cpp.sources import text_of

Tensors = Sequence[torch.Tensor]


@functools.cache
def library() -> Any:
    """The ops of the kernels; None without a C++ compiler, or with one that has no vector types. From then on torch
    calls them for the dialect's ops, without Python."""
    return None if torch_internals.load_cpp(text_of("lora_rows.cpp")) is None else torch.ops.adaptc_rows


def is_there(device: torch.device) -> bool:
    """Whether the kernels are, on ``device``."""
    return device.type == "cpu" and library() is not None


def forward(
    x: torch.Tensor, y: torch.Tensor, A: Tensors, B: Tensors, scale: Tensors, ids: torch.Tensor, numbers: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y', h)."""
    found: tuple[torch.Tensor, torch.Tensor] = library().forward(x, y, A, B, scale, ids, numbers)
    return found


def add(
    y: torch.Tensor, x: torch.Tensor, A: Tensors, B: Tensors, scale: Tensors, ids: torch.Tensor, numbers: Sequence[int]
) -> torch.Tensor:
    """h; y' is left in the memory of ``y``, which is contiguous, in any shape."""
    return library().forward_(y, x, A, B, scale, ids, numbers)  # type: ignore[no-any-return]


def backward(
    grad: torch.Tensor, x: torch.Tensor, h: torch.Tensor, A: Tensors, B: Tensors, scale: Tensors, ids: torch.Tensor,
    numbers: Sequence[int], need_x: bool, need: Sequence[bool],
) -> list[torch.Tensor]:  # fmt: skip
    """dx if ``need_x``, and of each factor that ``need`` names its gradient, those of A first."""
    return list(library().backward(grad, x, h, A, B, scale, ids, numbers, need_x, need))
