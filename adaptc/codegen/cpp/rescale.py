"""The gradients of a factor per column in one pass: g and y are read once, dy is written, the sums stay in cache.

Inductor would make g again for each of the two results where cheap ops made it, and sum it down the columns as it does.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch

from adaptc import torch_internals
from adaptc.codegen.cpp.sources import GRAIN_ELEMENTS, text_of


@functools.cache
def _library() -> Any:
    found = torch_internals.load_cpp(text_of("rescale.cpp"), text_of("rescale.h"))
    if found is not None:
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        found.rescale_gradient.argtypes = (*[pointer] * 6, size, size, ctypes.c_int)
        found.rescale_gradient.restype = None
    return found


def is_there(device: torch.device) -> bool:
    """Whether the kernel is, on ``device``."""
    return device.type == "cpu" and _library() is not None


def gradient(
    g: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None, c: torch.Tensor, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(c * g, sum over the rows of g * (y - bias)) of fp32 CPU tensors ``g`` and ``y`` (..., N), not empty.

    ``out``: contiguous, takes c * g; it may be ``g``.
    """
    g, y, c = (t.detach().contiguous() for t in (g, y, c.to(torch.float32)))
    bias = None if bias is None else bias.detach().contiguous()
    dy, width = torch.empty_like(g) if out is None else out, g.shape[-1]
    sums = torch.empty(width, dtype=torch.float64)
    _library().rescale_gradient(
        g.data_ptr(), y.data_ptr(), None if bias is None else bias.data_ptr(), c.data_ptr(), dy.data_ptr(),
        sums.data_ptr(), g.numel() // width, width, torch.get_num_threads() if g.numel() > GRAIN_ELEMENTS else 1,
    )  # fmt: skip
    return dy, sums
