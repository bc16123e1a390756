"""The C++ of the products with one small side; ``adaptc.codegen.cpp.skinny`` says what each computes."""

from __future__ import annotations

from adaptc.codegen.cpp.elements import ELEMENTS

#: The constants of the hash are those of ``adaptc.ir.dropout``.
SOURCE = ELEMENTS + r"""
#include <algorithm>
#include <cmath>
#include <vector>

// A sum of products is one instruction and rounds once.
#if defined(__clang__)
#pragma clang fp contract(fast)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=fast")
#endif

#if defined(__AVX512F__)
constexpr int W = 16, ROWS = 12;
#elif defined(__AVX__)
constexpr int W = 8, ROWS = 6;
#else
constexpr int W = 4, ROWS = 6;
#endif
typedef float vec __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(W * 4)));

static inline vec read(const float* p) { return *reinterpret_cast<const vec*>(p); }
static inline void write(float* p, vec v) { *reinterpret_cast<vec*>(p) = v; }
typedef uint16_t halves __attribute__((vector_size(W * 2), aligned(2), may_alias));
static inline vec widened(const float* p) { return read(p); }
static inline vec widened(const bf16* p) {
    return (vec)(__builtin_convertvector(*reinterpret_cast<const halves*>(p), words) << 16);
}
static inline void narrow(float* p, vec v) { write(p, v); }
static inline void narrow(bf16* p, vec v) {  // as store
    const words word = (words)v, rounded = (word + 0x7FFFu + ((word >> 16) & 1u)) >> 16, nan = (words)(v != v);
    *reinterpret_cast<halves*>(p) = __builtin_convertvector((nan & 0x7FC0u) | (~nan & rounded), halves);
}
template <typename T> static inline void load_row(const T* from, float* to, int64_t count) {
    int64_t j = 0;
    for (; j + W <= count; j += W) write(to + j, widened(from + j));
    for (; j < count; ++j) to[j] = load(from + j);
}
template <typename T> static inline void store_row(const float* from, T* to, int64_t count) {
    int64_t j = 0;
    for (; j + W <= count; j += W) narrow(to + j, read(from + j));
    for (; j < count; ++j) store(to + j, from[j]);
}
static inline vec splat(float v) { return v - vec{}; }  // v + 0 is not v where v is -0: an instruction more


// One adapter: its columns of the packed factors, its dropout (seed null: none), its part of the result.
struct Group {
    int64_t rank, first;  // columns, and the first of them among the padded columns of all groups
    const int64_t* seed;
    uint32_t least;
    float keep;           // 1 / (1 - p)
    void* part;           // shrink: h; gradient: d
};

struct Row { uint32_t first, second; };
static inline Row row_keys(const Group& g, int64_t row) {
    const uint64_t seed = static_cast<uint64_t>(*g.seed);
    const uint32_t high = static_cast<uint32_t>(seed >> 32), low = static_cast<uint32_t>(seed);
    const uint32_t r = static_cast<uint32_t>(row);
    return {r * 0xC13FA9A9u + (low + high * 0x85EBCA6Bu), r * 0xD1B54A33u + high};
}
// For W columns from one on: v * keep where an element is kept, else 0.
static inline vec kept(vec v, uint32_t column, Row k, uint32_t least, float keep) {
    words h;
    for (int l = 0; l < W; ++l) h[l] = l;
    h = (h + column) * 0x9E3779B1u + k.first;
    h = ((h ^ (h >> 16)) * 0x7FEB352Du) ^ k.second;
    h = ((h ^ (h >> 15)) * 0x846CA68Bu) ^ 0x80000000u;
    return (vec)((words)(v * splat(keep)) & (words)(h >= least));
}

template <typename T>
static void copy_row(const T* from, float* to, int64_t row, int64_t first, int64_t count, const Group* g) {
    if (g == nullptr) return load_row(from, to, count);
    const Row keys = row_keys(*g, row);
    const uint32_t least = g->least;
    const float keep = g->keep;
    int64_t j = 0;
    for (; j + W <= count; j += W)
        write(to + j, kept(widened(from + j), static_cast<uint32_t>(first + j), keys, least, keep));
    if (j < count) {
        float part[W] = {};
        load_row(from + j, part, count - j);
        write(part, kept(read(part), static_cast<uint32_t>(first + j), keys, least, keep));
        std::copy(part, part + (count - j), to + j);
    }
}

// out[N, V*W] += left[N, depth] right[depth, V*W], left's elements at (i * left_row + k * left_step)
template <int N, int V>
static inline void tile(const float* left, int64_t left_row, int64_t left_step, const float* right, int64_t right_row,
                        float* out, int64_t out_row, int64_t depth) {
    vec sum[N][V];
    for (int i = 0; i < N; ++i)
        for (int v = 0; v < V; ++v) sum[i][v] = read(out + i * out_row + v * W);
    for (int64_t k = 0; k < depth; ++k) {
        vec b[V];
        for (int v = 0; v < V; ++v) b[v] = read(right + k * right_row + v * W);
        for (int i = 0; i < N; ++i) {
            const vec a = splat(left[i * left_row + k * left_step]);
            for (int v = 0; v < V; ++v) sum[i][v] += a * b[v];
        }
    }
    for (int i = 0; i < N; ++i)
        for (int v = 0; v < V; ++v) write(out + i * out_row + v * W, sum[i][v]);
}

template <int V>
static void row_tiles(const float* x, int64_t ldx, const float* a, int64_t lda, float* h, int64_t ldh, int64_t depth,
                      int64_t rows) {
    if (rows == ROWS) return tile<ROWS, V>(x, ldx, 1, a, lda, h, ldh, depth);
    for (int64_t i = 0; i < rows; ++i) tile<1, V>(x + i * ldx, ldx, 1, a, lda, h + i * ldh, ldh, depth);
}

static int64_t padded(const Group& g, int64_t to) { return (g.rank + to - 1) / to * to; }

template <typename T>
static void shrink(const T* x, int64_t rows, int64_t width, int64_t ldx, const float* a, int64_t columns,
                   const float* scale, const Group* groups, int64_t count, int threads) {
    constexpr int64_t DEPTH = 512;
    const bool dropped = groups[0].seed != nullptr, direct = sizeof(T) == 4 && !dropped;
    const int64_t blocks = (rows + ROWS - 1) / ROWS;
    #pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<float> copy(direct ? 0 : ROWS * DEPTH), h(ROWS * columns);
        #pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; ++block) {
            const int64_t i0 = block * ROWS, n = std::min<int64_t>(ROWS, rows - i0);
            std::fill(h.begin(), h.end(), 0.0f);
            for (int64_t k0 = 0; k0 < width; k0 += DEPTH) {
                const int64_t depth = std::min<int64_t>(DEPTH, width - k0);
                const float* from = direct ? reinterpret_cast<const float*>(x + i0 * ldx + k0) : copy.data();
                for (int64_t g = 0; g < count; ++g) {
                    if (!direct && (dropped || g == 0))
                        for (int64_t i = 0; i < n; ++i)
                            copy_row(x + (i0 + i) * ldx + k0, copy.data() + i * DEPTH, i0 + i, k0, depth,
                                     dropped ? groups + g : nullptr);
                    const int64_t ld = direct ? ldx : DEPTH;
                    int64_t c = groups[g].first;
                    const int64_t end = c + padded(groups[g], W);
                    for (; c + 2 * W <= end; c += 2 * W)
                        row_tiles<2>(from, ld, a + k0 * columns + c, columns, h.data() + c, columns, depth, n);
                    if (c < end) row_tiles<1>(from, ld, a + k0 * columns + c, columns, h.data() + c, columns, depth, n);
                }
            }
            for (int64_t g = 0; g < count; ++g) {
                const int64_t rank = groups[g].rank, first = groups[g].first;
                T* part = static_cast<T*>(groups[g].part);
                for (int64_t i = 0; i < n; ++i)
                    for (int64_t c = 0; c < rank; ++c)
                        store(part + (i0 + i) * rank + c, h[i * columns + first + c] * scale[first + c]);
            }
        }
    }
}

template <typename T>
static void gradient(const float* h, int64_t columns, const T* x, int64_t rows, int64_t width, int64_t ldx,
                     const Group* groups, int64_t count, int threads) {
    constexpr int64_t BLOCK = 128, PANEL = 4 * 2 * W > 64 ? 4 * 2 * W : 64;
    const bool dropped = groups[0].seed != nullptr;
    const int64_t panels = (width + PANEL - 1) / PANEL;
    #pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<float> copy(BLOCK * PANEL), sums(columns * PANEL);
        #pragma omp for schedule(static)
        for (int64_t p = 0; p < panels; ++p) {
            const int64_t c0 = p * PANEL, cols = std::min<int64_t>(PANEL, width - c0);
            std::fill(sums.begin(), sums.end(), 0.0f);
            for (int64_t m0 = 0; m0 < rows; m0 += BLOCK) {
                const int64_t n = std::min<int64_t>(BLOCK, rows - m0);
                for (int64_t g = 0; g < count; ++g) {
                    if (dropped || g == 0)
                        for (int64_t i = 0; i < n; ++i)
                            copy_row(x + (m0 + i) * ldx + c0, copy.data() + i * PANEL, m0 + i, c0, cols,
                                     dropped ? groups + g : nullptr);
                    const int64_t first = groups[g].first, end = first + padded(groups[g], 4);
                    for (int64_t c = 0; c < cols; c += 2 * W)
                        for (int64_t r = first; r < end; r += 4)
                            tile<4, 2>(h + m0 * columns + r, 1, columns, copy.data() + c, PANEL,
                                       sums.data() + r * PANEL + c, PANEL, n);
                }
            }
            for (int64_t g = 0; g < count; ++g) {
                float* part = static_cast<float*>(groups[g].part);
                for (int64_t r = 0; r < groups[g].rank; ++r)
                    for (int64_t c = 0; c < cols; ++c)
                        part[r * width + c0 + c] = sums[(groups[g].first + r) * PANEL + c];
            }
        }
    }
}

// a: factors packed as rows, (sum of ranks, stride); q: (rows, sum of ranks), both fp32.
template <typename T>
static void update(T* total, int64_t rows, int64_t width, const float* q, int64_t ranks, const float* a, int64_t lda,
                   const Group* groups, int64_t count, int threads) {
    constexpr int64_t PANEL = 2 * W;
    const bool dropped = groups[0].seed != nullptr;
    const int64_t blocks = (rows + ROWS - 1) / ROWS;
    #pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t i0 = block * ROWS, n = std::min<int64_t>(ROWS, rows - i0);
        float sums[ROWS * PANEL], product[ROWS * PANEL];
        for (int64_t c0 = 0; c0 < width; c0 += PANEL) {
            const int64_t cols = std::min<int64_t>(PANEL, width - c0);
            for (int64_t i = 0; i < n; ++i) load_row(total + (i0 + i) * width + c0, sums + i * PANEL, cols);
            for (int64_t g = 0; g < count; ++g) {
                float* to = dropped ? product : sums;
                if (dropped) std::fill(product, product + ROWS * PANEL, 0.0f);
                row_tiles<2>(q + i0 * ranks + groups[g].first, ranks, a + groups[g].first * lda + c0, lda, to, PANEL,
                             groups[g].rank, n);
                for (int64_t i = 0; dropped && i < n; ++i) {
                    const Row keys = row_keys(groups[g], i0 + i);
                    const uint32_t least = groups[g].least;
                    const float keep = groups[g].keep;
                    for (int64_t c = 0; c < PANEL; c += W)
                        write(sums + i * PANEL + c, read(sums + i * PANEL + c) +
                              kept(read(product + i * PANEL + c), static_cast<uint32_t>(c0 + c), keys, least, keep));
                }
            }
            for (int64_t i = 0; i < n; ++i) store_row(sums + i * PANEL, total + (i0 + i) * width + c0, cols);
        }
    }
}

static inline double square_sum(const float* p, int64_t n) {
    vec parts[4] = {};
    int64_t j = 0;
    for (; j + 4 * W <= n; j += 4 * W)
        for (int v = 0; v < 4; ++v) parts[v] += read(p + j + v * W) * read(p + j + v * W);
    for (; j + W <= n; j += W) parts[0] += read(p + j) * read(p + j);
    double total = 0;
    for (const vec& part : parts)
        for (int l = 0; l < W; ++l) total += part[l];
    for (; j < n; ++j) total += p[j] * p[j];
    return total;
}

// a: the first factor packed as for shrink; b (rows, rank); gram (rank, rank), a's products with itself.
template <typename T>
static void row_norm(const T* w, int64_t rows, int64_t width, int64_t ldw, const float* a, const float* b,
                     int64_t columns, int64_t rank, const float* gram, double s, float* out, int threads) {
    constexpr int64_t DEPTH = 512;
    constexpr bool direct = sizeof(T) == 4;
    const int64_t blocks = (rows + ROWS - 1) / ROWS;
    #pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<float> copy(direct ? 0 : ROWS * DEPTH), h(ROWS * columns);
        #pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; ++block) {
            const int64_t i0 = block * ROWS, n = std::min<int64_t>(ROWS, rows - i0);
            double squares[ROWS] = {};
            std::fill(h.begin(), h.end(), 0.0f);
            for (int64_t k0 = 0; k0 < width; k0 += DEPTH) {
                const int64_t depth = std::min<int64_t>(DEPTH, width - k0), ld = direct ? ldw : DEPTH;
                const float* from = direct ? reinterpret_cast<const float*>(w + i0 * ldw + k0) : copy.data();
                for (int64_t i = 0; i < n; ++i) {
                    if (!direct) load_row(w + (i0 + i) * ldw + k0, copy.data() + i * DEPTH, depth);
                    squares[i] += square_sum(from + i * ld, depth);
                }
                int64_t c = 0;
                for (; c + 2 * W <= columns; c += 2 * W)
                    row_tiles<2>(from, ld, a + k0 * columns + c, columns, h.data() + c, columns, depth, n);
                if (c < columns) row_tiles<1>(from, ld, a + k0 * columns + c, columns, h.data() + c, columns, depth, n);
            }
            for (int64_t i = 0; i < n; ++i) {
                const float* row = b + (i0 + i) * rank;
                double cross = 0, own = 0;
                for (int64_t c = 0; c < rank; ++c) {
                    double sum = 0;
                    for (int64_t d = 0; d < rank; ++d) sum += static_cast<double>(gram[c * rank + d]) * row[d];
                    cross += static_cast<double>(h[i * columns + c]) * row[c];
                    own += sum * row[c];
                }
                // Rounding can take a row that the correction cancels below zero; NaN stays NaN.
                const double square = squares[i] + 2 * s * cross + s * s * own;
                out[i0 + i] = static_cast<float>(std::sqrt(square < 0 ? 0.0 : square));
            }
        }
    }
}

extern "C" int lanes() { return W; }
#define EXPORT(T, NAME)                                                                                               \
    extern "C" void shrink_##NAME(const void* x, int64_t rows, int64_t width, int64_t ldx, const float* a,             \
                                  int64_t columns, const float* scale, const Group* groups, int64_t count,            \
                                  int threads) {                                                                      \
        shrink(static_cast<const T*>(x), rows, width, ldx, a, columns, scale, groups, count, threads);                \
    }                                                                                                                 \
    extern "C" void gradient_##NAME(const float* h, int64_t columns, const void* x, int64_t rows, int64_t width,      \
                                    int64_t ldx, const Group* groups, int64_t count, int threads) {                   \
        gradient(h, columns, static_cast<const T*>(x), rows, width, ldx, groups, count, threads);                     \
    }                                                                                                                 \
    extern "C" void update_##NAME(void* total, int64_t rows, int64_t width, const float* q, int64_t ranks,            \
                                  const float* a, int64_t lda, const Group* groups, int64_t count, int threads) {     \
        update(static_cast<T*>(total), rows, width, q, ranks, a, lda, groups, count, threads);                        \
    }                                                                                                                 \
    extern "C" void row_norm_##NAME(const void* w, int64_t rows, int64_t width, int64_t ldw, const float* a,           \
                                    const float* b, int64_t columns, int64_t rank, const float* gram, double s,       \
                                    float* out, int threads) {                                                        \
        row_norm(static_cast<const T*>(w), rows, width, ldw, a, b, columns, rank, gram, s, out, threads);             \
    }
EXPORT(float, f32)
EXPORT(bf16, bf16)
"""
