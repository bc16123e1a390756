"""The gradients of a factor per column in one pass: g and y are read once, dy is written, the sums stay in cache.

Inductor would make g again for each of the two results where cheap ops made it, and sum it down the columns as it does.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch

from adaptc.codegen import torch_internals
from adaptc.codegen.cpp.elements import VECTORS

SOURCE = (
    VECTORS
    + r"""
#ifdef _OPENMP
#include <omp.h>
#else
static inline int omp_get_thread_num() { return 0; }
#endif

static void row_gradient(const float* g, const float* y, const float* bias, const float* c, float* dy, float* sums,
                         int64_t width) {
    int64_t j = 0;
    for (; j + W <= width; j += W) {
        const vec v = read(g + j), z = read(y + j);
        write(sums + j, read(sums + j) + v * (bias == nullptr ? z : z - read(bias + j)));
        write(dy + j, read(c + j) * v);
    }
    for (; j < width; ++j) {
        sums[j] += g[j] * (bias == nullptr ? y[j] : y[j] - bias[j]);
        dy[j] = c[j] * g[j];
    }
}

// dy = c * g, where dy may be g;  sums_j = sum_i g_ij (y_ij - bias_j), from partial sums of 64 rows in fp32. The
// threads' sums are added in the order of the threads: the same numbers in every run.
extern "C" void rescale_gradient(const float* g, const float* y, const float* bias, const float* c, float* dy,
                                 double* sums, int64_t rows, int64_t width, int threads) {
    constexpr int64_t BLOCK = 64;
    const int64_t blocks = (rows + BLOCK - 1) / BLOCK;
    std::vector<double> all(static_cast<size_t>(threads) * width, 0.0);
    #pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<float> part(width);
        double* own = all.data() + omp_get_thread_num() * width;
        #pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; ++block) {
            std::fill(part.begin(), part.end(), 0.0f);
            const int64_t end = std::min(rows, (block + 1) * BLOCK);
            for (int64_t i = block * BLOCK; i < end; ++i)
                row_gradient(g + i * width, y + i * width, bias, c, dy + i * width, part.data(), width);
            for (int64_t j = 0; j < width; ++j) own[j] += part[j];
        }
    }
    std::fill(sums, sums + width, 0.0);
    for (int t = 0; t < threads; ++t)
        for (int64_t j = 0; j < width; ++j) sums[j] += all[t * width + j];
}
"""
)
#: Elements below which a second thread costs more than it does.
_GRAIN = 1 << 15


@functools.cache
def _library() -> Any:
    found = torch_internals.load_cpp(SOURCE)
    if found is not None:
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        found.rescale_gradient.argtypes = (*[pointer] * 6, size, size, ctypes.c_int)
        found.rescale_gradient.restype = None
    return found


def gradient(
    g: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None, c: torch.Tensor, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(c * g, sum over the rows of g * (y - bias)) of fp32 CPU tensors ``g`` and ``y`` (..., N); None for others.

    ``out``: contiguous, takes c * g; it may be ``g``.
    """
    tensors = [g, y, *([] if bias is None else [bias])]
    # Of a subclass the memory may be elsewhere, or nowhere.
    plain = all(type(t) in (torch.Tensor, torch.nn.Parameter) and t.device.type == "cpu" for t in tensors)
    if not plain or {t.dtype for t in tensors} != {torch.float32} or not g.numel() or _library() is None:
        return None
    g, y, c = (t.detach().contiguous() for t in (g, y, c.to(torch.float32)))
    bias = None if bias is None else bias.detach().contiguous()
    dy, width = torch.empty_like(g) if out is None else out, g.shape[-1]
    sums = torch.empty(width, dtype=torch.float64)
    _library().rescale_gradient(
        g.data_ptr(), y.data_ptr(), None if bias is None else bias.data_ptr(), c.data_ptr(), dy.data_ptr(),
        sums.data_ptr(), g.numel() // width, width, torch.get_num_threads() if g.numel() > _GRAIN else 1,
    )  # fmt: skip
    return dy, sums
