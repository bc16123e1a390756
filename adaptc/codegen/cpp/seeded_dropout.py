"""Seeded dropout in one pass over its input: the hash, the choice and the product, with unsigned words.

Inductor writes the hash of every element out in signed words, whose overflow C++ leaves undefined: a compiler that sees
the loop derives from it how often the loop runs.
"""

from __future__ import annotations

import ctypes
import functools

import torch

from adaptc import torch_internals
from adaptc.codegen.cpp.sources import GRAIN_ELEMENTS, text_of
from adaptc.ir.ops.dropout import kept_scale, threshold

_NAMES = {torch.float32: "drop_f32", torch.bfloat16: "drop_bf16"}


@functools.cache
def _library() -> ctypes.CDLL | None:
    library: ctypes.CDLL | None = torch_internals.load_cpp(text_of("seeded_dropout.cpp"))
    for name in _NAMES.values() if library is not None else ():
        function = getattr(library, name)
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        function.argtypes = (pointer, pointer, size, size, pointer, ctypes.c_uint32, ctypes.c_float, ctypes.c_int)
        function.restype = None
    return library


def takes(x: torch.Tensor, seed: torch.Tensor, p: float) -> bool:
    """Whether the kernel is for the dtype of ``x``, a plain tensor."""
    # Of a subclass the memory may be elsewhere, or nowhere.
    return type(x) is torch.Tensor and x.dtype in _NAMES


def is_there(device: torch.device) -> bool:
    """Whether the kernel is, on ``device``."""
    return device.type == "cpu" and _library() is not None


def seeded_dropout(x: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
    """The op on a CPU tensor in fp32 or bf16, bit for bit."""
    x = x.detach().contiguous()
    y = torch.empty_like(x)
    width = x.shape[-1]
    threads = torch.get_num_threads() if x.numel() > GRAIN_ELEMENTS else 1
    getattr(_library(), _NAMES[x.dtype])(
        x.data_ptr(), y.data_ptr(), x.numel() // width if width else 0, width, seed.data_ptr(),
        threshold(p), kept_scale(p), threads,
    )  # fmt: skip
    return y
