// The kernel of the gradients of a factor per column.
#pragma once
#include "vectors.h"

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
