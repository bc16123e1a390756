"""Seeded dropout in one pass over its input: the hash, the choice and the product, with unsigned words.

Inductor writes the hash of every element out in signed words, whose overflow C++ leaves undefined: a compiler that sees
the loop derives from it how often the loop runs.
"""

from __future__ import annotations

import ctypes
import functools

import torch

from adaptc import torch_internals
from adaptc.codegen.cpp.elements import ELEMENTS, hashing
from adaptc.ir.ops.dropout import kept_scale, threshold

SOURCE = ELEMENTS + hashing(r"""


template <typename T>
static void drop(const T* x, T* y, int64_t rows, int64_t width, uint64_t seed, uint32_t least, float scale,
                 int threads) {
    const uint32_t high = static_cast<uint32_t>(seed >> 32);
    const uint32_t start = static_cast<uint32_t>(seed) + high * @JOIN@;
    #pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < rows; ++i) {
        const uint32_t row = static_cast<uint32_t>(i);
        const uint32_t first = row * @ROW@ + start, second = row * @OTHER_ROW@ + high;
        const T* from = x + i * width;
        T* to = y + i * width;
        for (int64_t j = 0; j < width; ++j) {
            uint32_t h = static_cast<uint32_t>(j) * @COLUMN@ + first;
            h = ((h ^ (h >> 16)) * @FIRST@) ^ second;
            h = (h ^ (h >> 15)) * @SECOND@;
            const float v = load(from + j) * scale;
            store(to + j, (h ^ 0x80000000u) >= least ? v : 0.0f);
        }
    }
}

extern "C" void drop_f32(const void* x, void* y, int64_t rows, int64_t width, const int64_t* seed, uint32_t least,
                         float scale, int threads) {
    drop(static_cast<const float*>(x), static_cast<float*>(y), rows, width, static_cast<uint64_t>(*seed), least, scale,
         threads);
}
extern "C" void drop_bf16(const void* x, void* y, int64_t rows, int64_t width, const int64_t* seed, uint32_t least,
                          float scale, int threads) {
    drop(static_cast<const bf16*>(x), static_cast<bf16*>(y), rows, width, static_cast<uint64_t>(*seed), least, scale,
         threads);
}
""")
_NAMES = {torch.float32: "drop_f32", torch.bfloat16: "drop_bf16"}
#: Elements below which a second thread costs more than it does.
_GRAIN = 1 << 15


@functools.cache
def _library() -> ctypes.CDLL | None:
    library: ctypes.CDLL | None = torch_internals.load_cpp(SOURCE)
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
    threads = torch.get_num_threads() if x.numel() > _GRAIN else 1
    getattr(_library(), _NAMES[x.dtype])(
        x.data_ptr(), y.data_ptr(), x.numel() // width if width else 0, width, seed.data_ptr(),
        threshold(p), kept_scale(p), threads,
    )  # fmt: skip
    return y
