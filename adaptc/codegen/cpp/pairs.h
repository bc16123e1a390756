// The kernels of the products of bf16 with one small side; pairs.py says what each computes.
#pragma once
#include "elements.h"
#include "operands.h"
#include <immintrin.h>

typedef uint16_t half;  // the bits of a bf16
typedef uint32_t pair;  // two of them, the first in the low bits
constexpr int W = 16;
// 24 sums and what they read fit the 32 registers. Rows of a power of two bytes fall on few sets of a cache: no more of
// them than it has ways for.
constexpr int64_t ROWS = 12, BLOCK = 96, STRIP = 2 * W, TILE = 8, AHEAD = 4 * STRIP;

// A result, dense: (other side, rank), or (rank, other side).
struct Part {
    void* data;
    const double* scale;  // ``scales`` of them: none, one for all ranks, or one each
    int64_t scales, is_bf16, by_rank;
};

static inline half rounded(float v) {
    bf16 out;
    store(&out, v);
    return out.bits;
}
static inline float value(const Factor& f, int64_t rank, int64_t other) {
    const int64_t at = rank * f.along + other * f.across;
    return f.is_bf16 ? load(static_cast<const bf16*>(f.data) + at) : static_cast<const float*>(f.data)[at];
}
static inline half element(const Factor& f, int64_t rank, int64_t other) {
    const int64_t at = rank * f.along + other * f.across;
    return f.is_bf16 ? static_cast<const half*>(f.data)[at] : rounded(static_cast<const float*>(f.data)[at]);
}
static inline pair joined(half low, half high) { return low | static_cast<pair>(high) << 16; }
static inline __m512 widened(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }
// As store, but for numbers below the smallest normal one: they become zero, as in the products.
static inline __m256i narrowed(__m512 v) { return (__m256i)_mm512_cvtneps_pbh(v); }
static inline __m512 summed(__m512 sum, pair a, __m512i b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)), (__m512bh)b);
}
static inline pair two(const half* p) {
    pair found;
    std::memcpy(&found, p, 4);
    return found;
}
static inline __m256i sixteen(const Factor& f, int64_t rank, int64_t other) {  // along a side with unit stride
    const int64_t at = rank * f.along + other * f.across;
    if (f.is_bf16) return _mm256_loadu_si256((const __m256i*)(static_cast<const half*>(f.data) + at));
    return narrowed(_mm512_loadu_ps(static_cast<const float*>(f.data) + at));
}

// Pairs of neighbours on the other side: to[k * columns + c] = (f(c, 2k), f(c, 2k + 1)), for k in [begin, end).
static void pack_others(const Factor& f, int64_t others, pair* to, int64_t columns, int64_t begin, int64_t end) {
    int64_t k = begin;
    if (f.across == 1) {  // a row of the factor is 16 numbers at a time
        for (; 2 * k + W <= others && k + 8 <= end; k += 8)
            for (int64_t c = 0; c < f.rank; ++c) {
                pair row[8];
                _mm256_storeu_si256((__m256i*)row, sixteen(f, c, 2 * k));
                for (int i = 0; i < 8; ++i) to[(k + i) * columns + c] = row[i];
            }
    } else if (f.along == 1) {  // two rows of the factor are next to each other in every pair
        for (; k < end && 2 * k + 1 < others; ++k) {
            int64_t c = 0;
            for (; c + W <= f.rank; c += W) {
                const __m512i low = _mm512_cvtepu16_epi32(sixteen(f, c, 2 * k));
                const __m512i high = _mm512_cvtepu16_epi32(sixteen(f, c, 2 * k + 1));
                _mm512_storeu_si512(to + k * columns + c, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
            }
            for (; c < f.rank; ++c) to[k * columns + c] = joined(element(f, c, 2 * k), element(f, c, 2 * k + 1));
        }
    }
    for (; k < end; ++k)
        for (int64_t c = 0; c < f.rank; ++c) {
            const half high = 2 * k + 1 < others ? element(f, c, 2 * k + 1) : 0;
            to[k * columns + c] = joined(element(f, c, 2 * k), high);
        }
}
// Pairs of neighbouring ranks: to[r * width + k] = (f(2r, k), f(2r + 1, k)), for k in [begin, end).
static void pack_ranks(const Factor& f, pair* to, int64_t width, int64_t begin, int64_t end) {
    for (int64_t r = 0; 2 * r < f.rank; ++r) {
        const bool both = 2 * r + 1 < f.rank;
        int64_t k = begin;
        if (f.across == 1 && both)
            for (; k + W <= end; k += W) {
                const __m512i low = _mm512_cvtepu16_epi32(sixteen(f, 2 * r, k));
                const __m512i high = _mm512_cvtepu16_epi32(sixteen(f, 2 * r + 1, k));
                _mm512_storeu_si512(to + r * width + k, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
            }
        for (; k < end; ++k) to[r * width + k] = joined(element(f, 2 * r, k), both ? element(f, 2 * r + 1, k) : 0);
    }
}

// The ranks of one row of a factor: to[r] = (f(2r, k), f(2r + 1, k))
static inline void pack_row(const Factor& f, int64_t k, pair* to) {
    int64_t r = 0;
    if (f.along == 1)
        for (; 2 * r + W <= f.rank; r += W / 2) _mm256_storeu_si256((__m256i*)(to + r), sixteen(f, 2 * r, k));
    for (; 2 * r < f.rank; ++r) to[r] = joined(element(f, 2 * r, k), 2 * r + 1 < f.rank ? element(f, 2 * r + 1, k) : 0);
}

// out[R, V*W] = x[R, width] times pairs; ``ahead``: rows that are read next, which the memory is asked for meanwhile.
template <int R, int V>
static inline void shrink_tile(const half* x, int64_t ldx, int64_t width, const pair* p, int64_t columns, float* out,
                               int64_t ldo, const half* ahead) {
    __m512 sum[R][V];
    UNROLLED_FOR (int i = 0; i < R; ++i)
        UNROLLED_FOR (int v = 0; v < V; ++v) sum[i][v] = _mm512_setzero_ps();
    const int64_t pairs = width / 2;
    for (int64_t k = 0; k < pairs; ++k) {
        if (ahead != nullptr && k % W == 0)
            for (int i = 0; i < R; ++i) _mm_prefetch((const char*)(ahead + i * ldx + 2 * k), _MM_HINT_T0);
        UNROLLED_FOR (int v = 0; v < V; ++v) {
            const __m512i b = _mm512_loadu_si512(p + k * columns + v * W);
            UNROLLED_FOR (int i = 0; i < R; ++i) sum[i][v] = summed(sum[i][v], two(x + i * ldx + 2 * k), b);
        }
    }
    UNROLLED_FOR (int v = 0; v < V && width % 2; ++v) {
        const __m512i b = _mm512_loadu_si512(p + pairs * columns + v * W);
        UNROLLED_FOR (int i = 0; i < R; ++i) sum[i][v] = summed(sum[i][v], x[i * ldx + width - 1], b);
    }
    UNROLLED_FOR (int i = 0; i < R; ++i)
        UNROLLED_FOR (int v = 0; v < V; ++v) _mm512_storeu_ps(out + i * ldo + v * W, sum[i][v]);
}
template <int V>
static void shrink_rows(const half* x, int64_t ldx, int64_t width, const pair* p, int64_t columns, float* out,
                        int64_t rows, int64_t left) {
    constexpr int R = V == 1 ? ROWS : 24 / V, FEW = V == 1 ? 4 : 2;
    int64_t i = 0;
    for (; i + R <= rows; i += R) {
        const half* ahead = i + 2 * R <= left ? x + (i + R) * ldx : nullptr;
        shrink_tile<R, V>(x + i * ldx, ldx, width, p, columns, out + i * columns, columns, ahead);
    }
    for (; i + FEW <= rows; i += FEW)
        shrink_tile<FEW, V>(x + i * ldx, ldx, width, p, columns, out + i * columns, columns, nullptr);
    for (; i < rows; ++i) shrink_tile<1, V>(x + i * ldx, ldx, width, p, columns, out + i * columns, columns, nullptr);
}
// out[rows, columns] = x[rows, width] times pairs[width / 2, columns]; ``left``: how many rows x has from here on.
static void shrink_block(const half* x, int64_t ldx, int64_t width, const pair* p, int64_t columns, float* out,
                         int64_t rows, int64_t left) {
    int64_t c = 0;
    for (; c + 3 * W <= columns; c += 3 * W) shrink_rows<3>(x, ldx, width, p + c, columns, out + c, rows, left);
    if (c + 2 * W <= columns) {
        shrink_rows<2>(x, ldx, width, p + c, columns, out + c, rows, left);
        c += 2 * W;
    }
    if (c < columns) shrink_rows<1>(x, ldx, width, p + c, columns, out + c, rows, left);
}

// sums[columns, stride] += h^T x for a block of rows of x, whose pairs ``h`` (rows / 2, columns) holds; ``soon``: as
// many rows of the same width that are read behind it, which the memory is asked for meanwhile.
static void gradient_block(const half* x, int64_t ldx, int64_t width, int64_t rows, const pair* h, int64_t columns,
                           float* sums, int64_t stride, const half* soon = nullptr) {
    const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                           37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    __m512i strip[BLOCK / 2][2];
    const int64_t pairs = (rows + 1) / 2;
    for (int64_t c = 0; c < width; c += STRIP) {
        const int64_t count = std::min<int64_t>(STRIP, width - c);
        const __mmask32 mask = count == STRIP ? ~0u : (1u << count) - 1;
        for (int64_t k = 0; k < pairs; ++k) {
            const half* row = x + 2 * k * ldx + c;
            if (soon != nullptr)
                for (int64_t i = 2 * k; i < std::min(2 * k + 2, rows); ++i)
                    _mm_prefetch((const char*)(soon + i * width + c), _MM_HINT_T1);
            const __m512i a = _mm512_maskz_loadu_epi16(mask, row);
            const __m512i b = 2 * k + 1 < rows ? _mm512_maskz_loadu_epi16(mask, row + ldx) : _mm512_setzero_si512();
            strip[k][0] = _mm512_permutex2var_epi16(a, first, b);
            strip[k][1] = _mm512_permutex2var_epi16(a, second, b);
        }
        for (int64_t r = 0; r < columns; r += TILE) {
            float* to = sums + r * stride + c;
            __m512 sum[TILE][2];
            UNROLLED_FOR (int i = 0; i < TILE; ++i)
                UNROLLED_FOR (int v = 0; v < 2; ++v) sum[i][v] = _mm512_loadu_ps(to + i * stride + v * W);
            for (int64_t k = 0; k < pairs; ++k)
                UNROLLED_FOR (int i = 0; i < TILE; ++i)
                    UNROLLED_FOR (int v = 0; v < 2; ++v)
                        sum[i][v] = summed(sum[i][v], h[k * columns + r + i], strip[k][v]);
            UNROLLED_FOR (int i = 0; i < TILE; ++i)
                UNROLLED_FOR (int v = 0; v < 2; ++v) _mm512_storeu_ps(to + i * stride + v * W, sum[i][v]);
        }
    }
}

static int64_t all_ranks(const Factor* f, int64_t count) {
    int64_t total = 0;
    for (int64_t g = 0; g < count; ++g) total += f[g].rank;
    return total;
}
static inline void put(const Part& part, int64_t at, __m512 v, __mmask16 mask) {
    if (part.is_bf16) _mm256_mask_storeu_epi16(static_cast<half*>(part.data) + at, mask, narrowed(v));
    else _mm512_mask_storeu_ps(static_cast<float*>(part.data) + at, mask, v);
}
static inline float scale_of(const Part& part, int64_t rank) {
    return part.scales == 0 ? 1.0f : static_cast<float>(part.scale[std::min(rank, part.scales - 1)]);
}
static inline __mmask16 first_of(int64_t count) { return count >= W ? 0xFFFF : (1u << count) - 1; }
// Rows [from, from + rows) of what was shrunk, (rows, columns), to the parts.
static void put_rows(const float* h, int64_t columns, int64_t from, int64_t rows, const Factor* f, const Part* parts,
                     int64_t count) {
    for (int64_t g = 0, c0 = 0; g < count; c0 += f[g++].rank) {
        const Part& part = parts[g];
        for (int64_t c = 0; c < f[g].rank; c += W) {
            const __mmask16 mask = first_of(f[g].rank - c);
            float scales[W];
            for (int64_t i = 0; i < W; ++i) scales[i] = scale_of(part, c + i);
            const __m512 scale = _mm512_loadu_ps(scales);
            for (int64_t i = 0; i < rows; ++i) {
                const __m512 v = _mm512_maskz_loadu_ps(mask, h + i * columns + c0 + c);
                put(part, (from + i) * f[g].rank + c, _mm512_mul_ps(v, scale), mask);
            }
        }
    }
}
// ``copies`` of sums, (columns, stride) each, to the parts: added in their order, for columns of x [begin, end).
static void put_sums(const float* sums, int64_t copies, int64_t columns, int64_t stride, int64_t width, int64_t begin,
                     int64_t end, const Factor* f, const Part* parts, int64_t count) {
    for (int64_t g = 0, c0 = 0; g < count; c0 += f[g++].rank)
        for (int64_t j = begin; j < end; j += W) {
            const __mmask16 mask = first_of(end - j);
            float turned[W][W];  // (columns of x, ranks)
            for (int64_t c = 0; c < f[g].rank; ++c) {
                const float* from = sums + (c0 + c) * stride + j;
                __m512 total = _mm512_maskz_loadu_ps(mask, from);
                for (int64_t t = 1; t < copies; ++t)
                    total = _mm512_add_ps(total, _mm512_maskz_loadu_ps(mask, from + t * columns * stride));
                if (parts[g].by_rank) {
                    put(parts[g], c * width + j, total, mask);
                    continue;
                }
                float row[W];
                _mm512_storeu_ps(row, total);
                for (int i = 0; i < W; ++i) turned[i][c % W] = row[i];
                if (c % W != W - 1 && c != f[g].rank - 1) continue;
                for (int64_t i = 0; i < std::min<int64_t>(W, end - j); ++i)
                    put(parts[g], (j + i) * f[g].rank + c / W * W, _mm512_loadu_ps(turned[i]), first_of(c % W + 1));
            }
        }
}

// One pass over x (rows, width): its products with ``count`` factors of ``width`` on the other side, ``shrinks``, and
// the gradients of as many of ``rows`` there, ``grads``; null: none. The results of each go to the parts behind them.
static void products(const half* x, int64_t rows, int64_t width, int64_t ldx, int64_t count, const Factor* shrinks,
                     const Part* shrunk, const Factor* grads, const Part* summed_up, int threads) {
    const int64_t pairs = (width + 1) / 2, stride = padded(width, STRIP);
    const int64_t columns = shrinks == nullptr ? 0 : padded(all_ranks(shrinks, count), W);
    const int64_t ranks = grads == nullptr ? 0 : padded(all_ranks(grads, count), TILE);
    // Threads share the rows, and what each sums is added up; without products that need whole rows, the columns.
    const bool by_rows = shrinks != nullptr;
    const int64_t copies = by_rows ? threads : 1;
    pair* packed = scratch<0, pair>(pairs * columns);
    float* sums = scratch<1, float>(copies * ranks * stride);
    #pragma omp parallel num_threads(threads) if (threads > 1)
    {
        #pragma omp for schedule(static)
        for (int part = 0; part < threads; ++part)
            for (int64_t g = 0, c = 0; by_rows && g < count; c += shrinks[g++].rank)
                pack_others(shrinks[g], width, packed + c, columns, share_of(pairs, 8, part, threads),
                            share_of(pairs, 8, part + 1, threads));
        #pragma omp for schedule(static)
        for (int part = 0; part < threads; ++part) {
            const int64_t first = by_rows ? share_of(rows, ROWS, part, threads) : 0;
            const int64_t last = by_rows ? share_of(rows, ROWS, part + 1, threads) : rows;
            const int64_t begin = by_rows ? 0 : share_of(width, STRIP, part, threads);
            const int64_t end = by_rows ? width : share_of(width, STRIP, part + 1, threads);
            float* h = scratch<2, float>(BLOCK * columns);
            pair* left = scratch<3, pair>(BLOCK / 2 * ranks);
            float* own = sums + (by_rows ? part * ranks * stride : 0) + begin;
            for (int64_t r = 0; r < ranks; ++r) std::fill_n(own + r * stride, padded(end - begin, STRIP), 0.0f);
            std::fill_n(left, BLOCK / 2 * ranks, 0);
            for (int64_t i0 = first; i0 < last; i0 += BLOCK) {
                const int64_t n = std::min(BLOCK, last - i0);
                const half* from = x + i0 * ldx;
                if (shrinks != nullptr) {
                    shrink_block(from, ldx, width, packed, columns, h, n, last - i0);
                    put_rows(h, columns, i0, n, shrinks, shrunk, count);
                }
                if (grads == nullptr) continue;
                for (int64_t g = 0, c = 0; g < count; c += grads[g++].rank) {
                    Factor rest = grads[g];
                    rest.data = static_cast<const char*>(rest.data) + i0 * rest.across * (rest.is_bf16 ? 2 : 4);
                    pack_others(rest, n, left + c, ranks, 0, (n + 1) / 2);
                }
                gradient_block(from + begin, ldx, end - begin, n, left, ranks, own, stride);
            }
        }
        #pragma omp for schedule(static)
        for (int part = 0; part < threads; ++part)
            if (grads != nullptr)
                put_sums(sums, copies, ranks, stride, width, share_of(width, STRIP, part, threads),
                         share_of(width, STRIP, part + 1, threads), grads, summed_up, count);
    }
}

// What a sum is given to: it is added to a row; or y + (c - 1) z + c * it, where z is another row, or y - bias.
struct Columns {
    const half* z;
    const float *bias, *c;
    Columns from(int64_t element, int64_t column) const {
        return {z == nullptr ? z : z + element, bias == nullptr ? bias : bias + column, c + column};
    }
};
static inline __m512 wide_half(__m512i row, int v) {
    return widened(v == 0 ? _mm512_castsi512_si256(row) : _mm512_extracti64x4_epi64(row, 1));
}
static inline __m512 finished(__m512 sum, __m512 y, __m512 z, __m512 bias, __m512 c) {
    const __m512 less = _mm512_sub_ps(c, _mm512_set1_ps(1.0f));
    return _mm512_fmadd_ps(c, sum, _mm512_fmadd_ps(less, _mm512_sub_ps(z, bias), y));
}

// out[R, 2 * W] = from, and pairs of q's ranks times pairs of the factors' ranks
template <int R, bool RESCALES>
static inline void update_tile(const half* from, half* out, int64_t ld, const pair* q, int64_t depth, const pair* a,
                               int64_t lda, __mmask32 mask, const Columns& at) {
    __m512 sum[R][2];
    UNROLLED_FOR (int i = 0; i < R; ++i) {
        const __m512i row = RESCALES ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi16(mask, from + i * ld);
        UNROLLED_FOR (int v = 0; v < 2; ++v) sum[i][v] = wide_half(row, v);
    }
    for (int64_t k = 0; k < depth; ++k)
        UNROLLED_FOR (int v = 0; v < 2; ++v) {
            const __m512i b = _mm512_loadu_si512(a + k * lda + v * W);
            UNROLLED_FOR (int i = 0; i < R; ++i) sum[i][v] = summed(sum[i][v], q[i * depth + k], b);
        }
    __m512 c[2], bias[2];
    UNROLLED_FOR (int v = 0; v < 2 && RESCALES; ++v) {
        const __mmask16 columns = static_cast<__mmask16>(mask >> v * W);
        c[v] = _mm512_maskz_loadu_ps(columns, at.c + v * W);
        bias[v] = at.bias == nullptr ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(columns, at.bias + v * W);
    }
    UNROLLED_FOR (int i = 0; i < R; ++i) {
        if (RESCALES) {
            const __m512i y = _mm512_maskz_loadu_epi16(mask, from + i * ld);
            const __m512i z = at.z == nullptr ? y : _mm512_maskz_loadu_epi16(mask, at.z + i * ld);
            UNROLLED_FOR (int v = 0; v < 2; ++v)
                sum[i][v] = finished(sum[i][v], wide_half(y, v), wide_half(z, v), bias[v], c[v]);
        }
        const __m512i row = _mm512_castsi256_si512(narrowed(sum[i][0]));
        _mm512_mask_storeu_epi16(out + i * ld, mask, _mm512_inserti64x4(row, narrowed(sum[i][1]), 1));
    }
}
template <bool RESCALES>
static void update_rows(const half* from, half* out, int64_t ld, int64_t rows, const pair* q, int64_t depth,
                        const pair* a, int64_t lda, __mmask32 mask, Columns at) {
    // What is written soon is fetched first, where it is not the memory that is read.
    for (int64_t i = 0; i < rows && RESCALES; ++i) __builtin_prefetch(out + i * ld + AHEAD, 1);
    if (rows == ROWS) return update_tile<ROWS, RESCALES>(from, out, ld, q, depth, a, lda, mask, at);
    for (int64_t i = 0; i < rows; ++i) {
        update_tile<1, RESCALES>(from, out, ld, q, depth, a, lda, mask, at);
        from += ld, out += ld, q += depth;
        if (at.z != nullptr) at.z += ld;
    }
}

// The sum over ``count`` q (rows, rank) times as many factors (rank, width), the q given first, is added to ``from``
// (rows, width), or with ``columns`` what those say.
template <bool RESCALES>
static void update_all(const half* from, half* out, int64_t rows, int64_t width, int64_t count, const Factor* q,
                       const Columns& columns, int threads) {
    const Factor* a = q + count;
    const int64_t lda = padded(width, STRIP), blocks = (rows + ROWS - 1) / ROWS;
    int64_t depth = 0;
    for (int64_t g = 0; g < count; ++g) depth += (q[g].rank + 1) / 2;
    pair* packed = scratch<0, pair>(depth * lda);
    #pragma omp parallel num_threads(threads) if (threads > 1)
    {
        #pragma omp for schedule(static)
        for (int part = 0; part < threads; ++part)
            for (int64_t g = 0, r = 0; g < count; r += (a[g++].rank + 1) / 2)
                pack_ranks(a[g], packed + r * lda, lda, share_of(width, STRIP, part, threads),
                           share_of(width, STRIP, part + 1, threads));
        pair* left = scratch<3, pair>(ROWS * depth);
        #pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; ++block) {
            const int64_t i0 = block * ROWS, n = std::min<int64_t>(ROWS, rows - i0);
            for (int64_t g = 0, r0 = 0; g < count; r0 += (q[g++].rank + 1) / 2)
                for (int64_t i = 0; i < n; ++i) pack_row(q[g], i0 + i, left + i * depth + r0);
            for (int64_t j = 0; j < width; j += STRIP) {
                const int64_t cols = std::min<int64_t>(STRIP, width - j), at = i0 * width + j;
                const __mmask32 mask = cols == STRIP ? ~0u : (1u << cols) - 1;
                update_rows<RESCALES>(from + at, out + at, width, n, left, depth, packed + j, lda, mask,
                                      RESCALES ? columns.from(at, j) : columns);
            }
        }
    }
}
