// DoRA's row norms; skinny.py says what they are.
#pragma once
#include "skinny.h"

// A sum of squares that is not finished: each lane adds few of them, so that it rounds little.
struct Squares {
    vec parts[4] = {};
    double rest = 0;
};
static inline double total_of(vec v) {
    double total = 0;
    for (int l = 0; l < W; ++l) total += v[l];
    return total;
}
static inline double total_of(const Squares& s) {
    return total_of((s.parts[0] + s.parts[1]) + (s.parts[2] + s.parts[3])) + s.rest;
}
// The squares of ``n`` numbers, which are written to ``to`` in fp32.
template <typename T> static inline void add_squares(const T* p, float* to, int64_t n, Squares& squares) {
    Squares sum = squares;
    int64_t j = 0;
    for (; j + 4 * W <= n; j += 4 * W)
        UNROLLED_FOR (int v = 0; v < 4; ++v) {
            const vec wide = widened(p + j + v * W);
            write(to + j + v * W, wide);
            sum.parts[v] += wide * wide;
        }
    for (; j < n; ++j) {
        const float one = load(p + j);
        to[j] = one;
        sum.rest += one * one;
    }
    squares = sum;
}

// What a call works on: a (rank, width) and b (rows, rank), and room for a as (width, columns), with as many columns as
// ranks or up to W more, and for (rank, columns) numbers.
struct NormFactors {
    const float *a, *b;
    float *packed, *gram;
    int64_t rank, columns;
};
// Columns [begin, end) of a to ``packed``, and their part of a's products with itself.
static void pack_norm_share(const NormFactors& f, int64_t width, int64_t begin, int64_t end, double* gram) {
    constexpr int64_t DEPTH = 64;  // so many products are summed in fp32
    const int64_t size = f.rank * f.columns;
    float* product = scratch<4>(size);
    std::fill_n(gram, size, 0.0);
    for (int64_t k = begin; k < end; k += W)
        for (int64_t c = 0; c < f.columns; ++c)
            for (int64_t j = k; j < std::min<int64_t>(end, k + W); ++j)
                f.packed[j * f.columns + c] = c < f.rank ? f.a[c * width + j] : 0.0f;
    for (int64_t k = begin; k < end; k += DEPTH) {
        std::fill_n(product, size, 0.0f);
        multiply(f.a + k, width, 1, f.packed + k * f.columns, f.columns, product, f.columns, std::min(DEPTH, end - k),
                 f.rank, f.columns);
        for (int64_t i = 0; i < size; ++i) gram[i] += product[i];
    }
}

// n_i^2 = |w_i|^2 + 2 s b_i . (h_i + g_i), where h = w a^T and g = s / 2 b (a a^T)
template <typename T>
static void row_norm(const T* w, int64_t rows, int64_t width, int64_t ldw, const NormFactors& f, double s, float* out,
                     int threads) {
    constexpr int64_t DEPTH = 128;
    const int64_t blocks = (rows + ROWS - 1) / ROWS, columns = f.columns, rank = f.rank, size = rank * columns;
    double* grams = scratch<3, double>(threads * size);
    #pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *copy = scratch<1>(ROWS * DEPTH), *h = scratch<2>(2 * ROWS * columns);
        float* g = h + ROWS * columns;
        #pragma omp for schedule(static)
        for (int part = 0; part < threads; ++part)
            pack_norm_share(f, width, share_of(width, W, part, threads), share_of(width, W, part + 1, threads),
                            grams + part * size);
        #pragma omp for schedule(static)
        for (int64_t i = 0; i < size; ++i) {
            double sum = 0;
            for (int part = 0; part < threads; ++part) sum += grams[part * size + i];
            f.gram[i] = static_cast<float>(s / 2 * sum);
        }
        #pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; ++block) {
            const int64_t i0 = block * ROWS, n = std::min<int64_t>(ROWS, rows - i0);
            Squares squares[ROWS];
            std::fill_n(h, 2 * ROWS * columns, 0.0f);
            multiply(f.b + i0 * rank, rank, 1, f.gram, columns, g, columns, rank, n, columns);
            for (int64_t k0 = 0; k0 < width; k0 += DEPTH) {
                const int64_t depth = std::min<int64_t>(DEPTH, width - k0);
                for (int64_t i = 0; i < n; ++i)
                    add_squares(w + (i0 + i) * ldw + k0, copy + i * DEPTH, depth, squares[i]);
                // What is read next, into the second cache: rows begin too often for the processor to see it come.
                const bool last = k0 + DEPTH >= width;
                const int64_t next_row = last ? i0 + ROWS : i0, next = last ? 0 : k0 + DEPTH;
                for (int64_t i = next_row; i < std::min(rows, next_row + ROWS); ++i)
                    for (int64_t j = next; j < std::min(width, next + DEPTH); j += 64 / sizeof(T))
                        __builtin_prefetch(w + i * ldw + j, 0, 2);
                multiply(copy, DEPTH, 1, f.packed + k0 * columns, columns, h, columns, depth, n, columns);
            }
            for (int64_t i = 0; i < n; ++i) {
                const float *row = f.b + (i0 + i) * rank, *first = h + i * columns, *second = g + i * columns;
                vec products = {};
                int64_t c = 0;
                for (; c + W <= rank; c += W) products += (read(first + c) + read(second + c)) * read(row + c);
                double cross = total_of(products);
                for (; c < rank; ++c) cross += (static_cast<double>(first[c]) + second[c]) * row[c];
                // Rounding can take a row that the correction cancels below zero; NaN stays NaN.
                const double square = total_of(squares[i]) + 2 * s * cross;
                out[i0 + i] = static_cast<float>(std::sqrt(square < 0 ? 0.0 : square));
            }
        }
    }
}

static Tensor row_norms(const Tensor& weight, const Tensor& A, const Tensor& B, const Tensor& scale) {
    const Tensor w = weight.stride(1) == 1 ? weight : torch::stable::contiguous(weight);
    const Tensor a = dense(as(A, ScalarType::Float)), b = dense(as(B, ScalarType::Float));
    const int64_t rows = w.size(0), width = w.size(1), rank = a.size(0), columns = (rank + W - 1) / W * W;
    STD_TORCH_CHECK(a.size(1) == width && b.size(0) == rows && b.size(1) == rank && a.is_cpu() && b.is_cpu(),
                    "row norms of a weight (", rows, ", ", width, "): expected factors of these sizes and one rank");
    const Tensor packed = empty({width + rank, columns}, ScalarType::Float), out = empty({rows}, ScalarType::Float);
    float* room = data_of<float>(packed);
    const NormFactors factors{data_of<float>(a), data_of<float>(b), room, room + width * columns, rank, columns};
    const double s = *data_of<double>(scales_of(scale, 1));
    const int threads = threads_for(rows * width * columns);
    const auto run = [&](auto* data) {
        row_norm(data, rows, width, w.stride(0), factors, s, data_of<float>(out), threads);
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
