"""The gradients of a factor per column in one pass: g and y are read once, dy is written, the sums stay in cache.

Inductor would make g again for each of the two results where cheap ops made it, and sum it down the columns as it does.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch

from adaptc import torch_internals
from adaptc.codegen.cpp.elements import VECTORS
from adaptc.codegen.cpp.native_source import NATIVE

#: Elements below which a second thread costs more than it does.
_GRAIN = 1 << 15
KERNELS = (
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
#: With the ops that call them, by torch's stable interface: around a kernel Python takes as long as it does.
SOURCE = (
    KERNELS
    + NATIVE
    + r"""
static bool are_plain(const Tensor& y, const Maybe& bias, const Tensor& magnitude, const Tensor& norm) {
    return is_plain(y) && is_plain(magnitude) && is_plain(norm) && (!bias || is_plain(*bias));
}
static Tensor factor(const Tensor& magnitude, const Tensor& norm) {
    const int64_t width = norm.numel();
    const Tensor m = of_columns(magnitude, width), n = of_columns(norm, width), c = empty({width}, ScalarType::Float);
    for (int64_t j = 0; j < width; ++j) data_of<float>(c)[j] = data_of<float>(m)[j] / data_of<float>(n)[j];
    return c;
}
// dmagnitude; dy is written
static Tensor gradient(const Tensor& g, const Tensor& y, const Maybe& bias, const Tensor& magnitude,
                       const Tensor& norm, const Tensor& dy) {
    const int64_t width = width_of(y), rows = y.numel() / width;
    STD_TORCH_CHECK(g.numel() == y.numel(), "dora_rescale_grad: expected a gradient of ", y.numel(),
                    " numbers, found ", g.numel());
    const Tensor values = dense(y), n = of_columns(norm, width), c = factor(magnitude, n);
    const Maybe centre = of_columns(bias, width);
    std::vector<double> sums(width);
    rescale_gradient(data_of<float>(g), data_of<float>(values), data_of<float>(centre), data_of<float>(c),
                     data_of<float>(dy), sums.data(), rows, width,
                     y.numel() > @GRAIN@ ? static_cast<int>(torch::stable::get_num_threads()) : 1);
    const Tensor dm = empty({width}, ScalarType::Float);
    for (int64_t j = 0; j < width; ++j) data_of<float>(dm)[j] = static_cast<float>(sums[j] / data_of<float>(n)[j]);
    return dm;
}
static Tensor dora_factor(const Tensor& magnitude, const Tensor& norm) {
    if (is_plain(magnitude) && is_plain(norm) && norm.dim() == 1) return factor(magnitude, norm);
    return taken<Tensor>(in_python("adaptc_python::dora_factor", magnitude, norm)[0]);
}
static std::tuple<Tensor, Tensor> dora_rescale_grad(const Tensor& grad, const Tensor& y, const Maybe& bias,
                                                    const Tensor& magnitude, const Tensor& norm) {
    if (is_plain(grad) && are_plain(y, bias, magnitude, norm)) {
        const Tensor g = dense(grad), dy = empty(sizes_with(g, width_of(g)), ScalarType::Float);
        const Tensor dm = gradient(g, y, bias, magnitude, norm, dy);
        return {dy, dm};
    }
    const auto found = in_python("adaptc_python::dora_rescale_grad", grad, y, bias, magnitude, norm);
    return {taken<Tensor>(found[0]), taken<Tensor>(found[1])};
}
static Tensor rescale_grad_in_place(const Tensor& grad, const Tensor& y, const Maybe& bias, const Tensor& magnitude,
                                    const Tensor& norm) {
    if (is_plain(grad) && grad.is_contiguous() && are_plain(y, bias, magnitude, norm))
        return gradient(grad, y, bias, magnitude, norm, grad);
    return taken<Tensor>(in_python("adaptc_python::rescale_grad_", grad, y, bias, magnitude, norm)[0]);
}
STABLE_TORCH_LIBRARY_IMPL(adaptc, CPU, m) {
    m.impl("dora_factor", TORCH_BOX(&dora_factor));
    m.impl("dora_rescale_grad", TORCH_BOX(&dora_rescale_grad));
}
STABLE_TORCH_LIBRARY_IMPL(adaptc_lowered, CPU, m) { m.impl("rescale_grad_", TORCH_BOX(&rescale_grad_in_place)); }
""".replace("@GRAIN@", str(_GRAIN))
)


@functools.cache
def _library() -> Any:
    found = torch_internals.load_cpp(SOURCE, KERNELS)
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
        sums.data_ptr(), g.numel() // width, width, torch.get_num_threads() if g.numel() > _GRAIN else 1,
    )  # fmt: skip
    return dy, sums
