"""The C++ of the products with one small side; ``adaptc.codegen.cpp.skinny`` says what each computes."""

from __future__ import annotations

from adaptc.codegen.cpp.elements import VECTORS
from adaptc.codegen.cpp.native_source import NATIVE

#: The constants of the hash are those of ``adaptc.ir.dropout``.
KERNELS = (
    VECTORS
    + r"""

constexpr int ROWS = W == 16 ? 12 : 6;

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

static inline double total_of(vec v) {
    double total = 0;
    for (int l = 0; l < W; ++l) total += v[l];
    return total;
}
// The sum of squares of ``n`` numbers, which are written to ``to`` in fp32 where they are others there.
static inline double square_sum(const float* p, float*, int64_t n) {
    vec parts[4] = {};
    int64_t j = 0;
    for (; j + 4 * W <= n; j += 4 * W)
        for (int v = 0; v < 4; ++v) parts[v] += read(p + j + v * W) * read(p + j + v * W);
    for (; j + W <= n; j += W) parts[0] += read(p + j) * read(p + j);
    double total = total_of((parts[0] + parts[1]) + (parts[2] + parts[3]));
    for (; j < n; ++j) total += p[j] * p[j];
    return total;
}
static inline double square_sum(const bf16* p, float* to, int64_t n) {
    vec parts[4] = {};
    int64_t j = 0;
    for (; j + 4 * W <= n; j += 4 * W)
        for (int v = 0; v < 4; ++v) {
            const vec wide = widened(p + j + v * W);
            write(to + j + v * W, wide);
            parts[v] += wide * wide;
        }
    double total = total_of((parts[0] + parts[1]) + (parts[2] + parts[3]));
    for (; j < n; ++j) {
        to[j] = load(p + j);
        total += to[j] * to[j];
    }
    return total;
}

// a (rank, width), b (rows, rank); packed: room for (width, columns), with as many columns as ranks or up to W more.
template <typename T>
static void row_norm(const T* w, int64_t rows, int64_t width, int64_t ldw, const float* a, const float* b,
                     float* packed, int64_t columns, int64_t rank, double s, float* out, int threads) {
    constexpr int64_t DEPTH = 256;
    constexpr bool direct = sizeof(T) == 4;
    const int64_t blocks = (rows + ROWS - 1) / ROWS;
    std::vector<double> gram(rank * rank);
    #pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<float> copy(direct ? 0 : ROWS * DEPTH), h(ROWS * columns);
        std::vector<double> sums(rank);
        #pragma omp for schedule(static)
        for (int64_t k = 0; k < width; k += W)
            for (int64_t c = 0; c < columns; ++c)
                for (int64_t j = k; j < std::min<int64_t>(width, k + W); ++j)
                    packed[j * columns + c] = c < rank ? a[c * width + j] : 0.0f;
        #pragma omp for schedule(static)
        for (int64_t c = 0; c < rank; ++c)  // a's products with itself
            for (int64_t d = 0; d < rank; ++d) {
                double sum = 0;
                #pragma omp simd reduction(+ : sum)
                for (int64_t k = 0; k < width; ++k)
                    sum += static_cast<double>(a[c * width + k]) * static_cast<double>(a[d * width + k]);
                gram[c * rank + d] = sum;
            }
        #pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; ++block) {
            const int64_t i0 = block * ROWS, n = std::min<int64_t>(ROWS, rows - i0);
            double squares[ROWS] = {};
            std::fill(h.begin(), h.end(), 0.0f);
            for (int64_t k0 = 0; k0 < width; k0 += DEPTH) {
                const int64_t depth = std::min<int64_t>(DEPTH, width - k0), ld = direct ? ldw : DEPTH;
                const float* from = direct ? reinterpret_cast<const float*>(w + i0 * ldw + k0) : copy.data();
                for (int64_t i = 0; i < n; ++i)
                    squares[i] += square_sum(w + (i0 + i) * ldw + k0, copy.data() + i * DEPTH, depth);
                // What is read next, into the second cache: rows begin too often for the processor to see it come.
                const bool last = k0 + DEPTH >= width;
                const int64_t next_row = last ? i0 + ROWS : i0, next = last ? 0 : k0 + DEPTH;
                for (int64_t i = next_row; i < std::min(rows, next_row + ROWS); ++i)
                    for (int64_t j = next; j < std::min(width, next + DEPTH); j += 64 / sizeof(T))
                        __builtin_prefetch(w + i * ldw + j, 0, 2);
                int64_t c = 0;
                for (; c + 2 * W <= columns; c += 2 * W)
                    row_tiles<2>(from, ld, packed + k0 * columns + c, columns, h.data() + c, columns, depth, n);
                if (c < columns)
                    row_tiles<1>(from, ld, packed + k0 * columns + c, columns, h.data() + c, columns, depth, n);
            }
            for (int64_t i = 0; i < n; ++i) {
                const float* row = b + (i0 + i) * rank;
                std::fill(sums.begin(), sums.end(), 0.0);
                for (int64_t d = 0; d < rank; ++d) {
                    const double v = row[d];
                    #pragma omp simd
                    for (int64_t c = 0; c < rank; ++c) sums[c] += v * gram[d * rank + c];
                }
                double cross = 0, own = 0;
                for (int64_t c = 0; c < rank; ++c) {
                    cross += static_cast<double>(h[i * columns + c]) * row[c];
                    own += sums[c] * row[c];
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
    }
EXPORT(float, f32)
EXPORT(bf16, bf16)
"""
)
#: With what needs torch's stable interface, of which older versions have less.
SOURCE = (
    KERNELS
    + NATIVE
    + r"""
static Tensor row_norms(const Tensor& weight, const Tensor& A, const Tensor& B, const Tensor& scale) {
    const Tensor w = weight.stride(1) == 1 ? weight : torch::stable::contiguous(weight);
    const Tensor a = dense(as(A, ScalarType::Float)), b = dense(as(B, ScalarType::Float));
    const int64_t rows = w.size(0), width = w.size(1), rank = a.size(0), columns = (rank + W - 1) / W * W;
    STD_TORCH_CHECK(a.size(1) == width && b.size(0) == rows && b.size(1) == rank && a.is_cpu() && b.is_cpu(),
                    "row norms of a weight (", rows, ", ", width, "): expected factors of these sizes and one rank");
    const Tensor packed = empty({width, columns}, ScalarType::Float), out = empty({rows}, ScalarType::Float);
    const double s = *data_of<double>(scales_of(scale, 1));
    const int threads = threads_for(rows * width * columns);
    const auto run = [&](auto* data) {
        row_norm(data, rows, width, w.stride(0), data_of<float>(a), data_of<float>(b), data_of<float>(packed), columns,
                 rank, s, data_of<float>(out), threads);
    };
    if (w.scalar_type() == ScalarType::BFloat16) run(data_of<bf16>(w));
    else run(data_of<float>(w));
    return out;
}
static Tensor dora_row_norm(const Tensor& weight, const Tensor& A, const Tensor& B, const Tensor& scale,
                            bool transposed) {
    const ScalarType type = weight.scalar_type();
    const bool known = type == ScalarType::Float || type == ScalarType::BFloat16;
    const bool wide = A.scalar_type() == ScalarType::Double || B.scalar_type() == ScalarType::Double;
    if (known && !wide && !transposed && weight.numel() > 0 && weight.stride(1) == 1)
        return row_norms(weight, A, B, scale);
    return taken<Tensor>(in_python("adaptc_python::dora_row_norm", weight, A, B, scale, transposed)[0]);
}
STABLE_TORCH_LIBRARY_FRAGMENT(adaptc_skinny, m) {
    m.def("row_norms(Tensor W, Tensor A, Tensor B, Tensor scale) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(adaptc_skinny, CPU, m) { m.impl("row_norms", TORCH_BOX(&row_norms)); }
STABLE_TORCH_LIBRARY_IMPL(adaptc, CPU, m) { m.impl("dora_row_norm", TORCH_BOX(&dora_row_norm)); }
"""
)
