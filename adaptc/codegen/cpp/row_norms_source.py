"""The C++ of DoRA's row norms; ``adaptc.codegen.cpp.skinny`` says what it computes."""

from __future__ import annotations

#: Behind the kernels of ``adaptc.codegen.cpp.skinny_source`` and the C++ of ``adaptc.codegen.cpp.native_source``.
ROW_NORMS = r"""
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
        UNROLLED for (int v = 0; v < 4; ++v) parts[v] += read(p + j + v * W) * read(p + j + v * W);
    for (; j + W <= n; j += W) parts[0] += read(p + j) * read(p + j);
    double total = total_of((parts[0] + parts[1]) + (parts[2] + parts[3]));
    for (; j < n; ++j) total += p[j] * p[j];
    return total;
}
static inline double square_sum(const bf16* p, float* to, int64_t n) {
    vec parts[4] = {};
    int64_t j = 0;
    for (; j + 4 * W <= n; j += 4 * W)
        UNROLLED for (int v = 0; v < 4; ++v) {
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
        float *copy = scratch<1>(direct ? 0 : ROWS * DEPTH), *h = scratch<2>(ROWS * columns);
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
            std::fill_n(h, ROWS * columns, 0.0f);
            for (int64_t k0 = 0; k0 < width; k0 += DEPTH) {
                const int64_t depth = std::min<int64_t>(DEPTH, width - k0), ld = direct ? ldw : DEPTH;
                const float* from = direct ? reinterpret_cast<const float*>(w + i0 * ldw + k0) : copy;
                for (int64_t i = 0; i < n; ++i)
                    squares[i] += square_sum(w + (i0 + i) * ldw + k0, copy + i * DEPTH, depth);
                // What is read next, into the second cache: rows begin too often for the processor to see it come.
                const bool last = k0 + DEPTH >= width;
                const int64_t next_row = last ? i0 + ROWS : i0, next = last ? 0 : k0 + DEPTH;
                for (int64_t i = next_row; i < std::min(rows, next_row + ROWS); ++i)
                    for (int64_t j = next; j < std::min(width, next + DEPTH); j += 64 / sizeof(T))
                        __builtin_prefetch(w + i * ldw + j, 0, 2);
                multiply(from, ld, 1, packed + k0 * columns, columns, h, columns, depth, n, columns);
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
