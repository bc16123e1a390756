// What is made of a DoRA site's output and of its gradient.
#pragma once
#include "pairs.h"

// y (rows, width) + (c - 1) z + c (h B^T), where c = magnitude / norm, and z is ``base``, or y - bias without one.
static void dora_expand(const half* y, half* out, int64_t rows, int64_t width, const Factor* factors, const half* base,
                        const float* bias, const float* magnitude, const float* norm, int threads) {
    float* c = scratch<4, float>(width);
    for (int64_t j = 0; j < width; ++j) c[j] = magnitude[j] / norm[j];
    update_all<true>(y, out, rows, width, 1, factors, {base, bias, c}, threads);
}

// dz = c g, where dz may be g;  sums_j += g_j (z_j - bias_j)
static void dora_row(const half* g, const half* z, const float* bias, const float* c, half* dz, float* sums,
                     int64_t width) {
    for (int64_t j = 0; j < width; j += W) {
        const __mmask16 mask = first_of(width - j);
        const __m512 v = widened(_mm256_maskz_loadu_epi16(mask, g + j));
        __m512 centred = widened(_mm256_maskz_loadu_epi16(mask, z + j));
        if (bias != nullptr) centred = _mm512_sub_ps(centred, _mm512_maskz_loadu_ps(mask, bias + j));
        _mm512_storeu_ps(sums + j, _mm512_fmadd_ps(v, centred, _mm512_loadu_ps(sums + j)));
        _mm256_mask_storeu_epi16(dz + j, mask, narrowed(_mm512_mul_ps(v, _mm512_loadu_ps(c + j))));
    }
}

// What a call works on: B (width, rank) and h (rows, rank), the results q and dB.
struct DoraGradients {
    Factor b, h;
    Part q, db;
};

// One pass over g (rows, width): q = scale * g (c B), dB = c G, dz = (c - of_base) g and
// dmagnitude = (sum over the rows of g (z - bias) + sum over the ranks of G B) / norm, where G = g^T h.
static void dora_output_grads(const half* g, const half* z, const float* bias, const float* magnitude,
                              const float* norm, half* dz, float* dmagnitude, const DoraGradients& given, int64_t rows,
                              int64_t width, bool of_base, int threads) {
    const Factor &b = given.b, &h = given.h;
    const int64_t rank = b.rank, columns = padded(rank, W), ranks = padded(rank, TILE);
    const int64_t pairs = (width + 1) / 2, stride = padded(width, STRIP);
    float* c = scratch<4, float>(2 * stride + 2 * width * rank);
    float *own_c = c + stride, *scaled = own_c + stride, *total = scaled + width * rank;
    pair* packed = scratch<0, pair>(pairs * columns);
    float* sums = scratch<1, float>(threads * ranks * stride);
    double* along = scratch<5, double>(threads * stride);
    #pragma omp parallel num_threads(threads) if (threads > 1)
    {
        #pragma omp for schedule(static)
        for (int part = 0; part < threads; ++part) {
            const int64_t begin = share_of(width, STRIP, part, threads);
            const int64_t end = share_of(width, STRIP, part + 1, threads);
            for (int64_t j = begin; j < end; ++j) {
                c[j] = magnitude[j] / norm[j];
                own_c[j] = of_base ? c[j] - 1.0f : c[j];
                for (int64_t r = 0; r < rank; ++r) scaled[j * rank + r] = c[j] * value(b, r, j);
            }
            const Factor cb{scaled, rank, 1, rank, 0};
            pack_others(cb, width, packed, columns, begin / 2, (end + 1) / 2);
        }
        #pragma omp for schedule(static)
        for (int part = 0; part < threads; ++part) {
            const int64_t first = share_of(rows, ROWS, part, threads), last = share_of(rows, ROWS, part + 1, threads);
            float* shrunk = scratch<2, float>(BLOCK * columns + stride);
            float* partial = shrunk + BLOCK * columns;
            pair* left = scratch<3, pair>(BLOCK / 2 * ranks);
            float* own = sums + part * ranks * stride;
            double* own_along = along + part * stride;
            std::fill_n(own, ranks * stride, 0.0f);
            std::fill_n(own_along, stride, 0.0);
            std::fill_n(left, BLOCK / 2 * ranks, 0);
            for (int64_t i0 = first; i0 < last; i0 += BLOCK) {
                const int64_t n = std::min(BLOCK, last - i0);
                shrink_block(g + i0 * width, width, width, packed, columns, shrunk, n, last - i0);
                put_rows(shrunk, columns, i0, n, &b, &given.q, 1);
                Factor rest = h;
                rest.data = static_cast<const char*>(rest.data) + i0 * rest.across * (rest.is_bf16 ? 2 : 4);
                pack_others(rest, n, left, ranks, 0, (n + 1) / 2);
                gradient_block(g + i0 * width, width, width, n, left, ranks, own, stride, z + i0 * width);
                std::fill_n(partial, stride, 0.0f);
                for (int64_t i = i0; i < i0 + n; ++i)
                    dora_row(g + i * width, z + i * width, bias, own_c, dz + i * width, partial, width);
                for (int64_t j = 0; j < width; ++j) own_along[j] += partial[j];
            }
        }
        #pragma omp for schedule(static)
        for (int part = 0; part < threads; ++part) {
            const int64_t begin = share_of(width, STRIP, part, threads);
            const int64_t end = share_of(width, STRIP, part + 1, threads);
            const Part dense{total, nullptr, 0, 0, 0};
            put_sums(sums, threads, ranks, stride, width, begin, end, &b, &dense, 1);
            for (int64_t j = begin; j < end; ++j) {
                double sum = 0;
                for (int t = 0; t < threads; ++t) sum += along[t * stride + j];
                float dot = 0;
                for (int64_t r = 0; r < rank; ++r) dot += total[j * rank + r] * value(b, r, j);
                dmagnitude[j] = static_cast<float>((sum + dot) / norm[j]);
                for (int64_t r = 0; r < rank; r += W) {
                    const __mmask16 mask = first_of(rank - r);
                    const __m512 v = _mm512_maskz_loadu_ps(mask, total + j * rank + r);
                    put(given.db, j * rank + r, _mm512_mul_ps(_mm512_set1_ps(c[j]), v), mask);
                }
            }
        }
    }
}
