// Operands with a small side, which kernels read where they are.
#pragma once
#include "native.h"

static int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
// Where a thread's share of ``count`` begins, in whole units.
static inline int64_t share_of(int64_t count, int64_t unit, int part, int parts) {
    return std::min(count, padded(count, unit) / unit * part / parts * unit);
}
// The calling thread's memory of one kind, kept from call to call: fresh memory costs more than what is done in it.
// From a line of the caches on: a vector that lies across two is read in two steps.
template <int KIND, typename T = float> static T* scratch(int64_t count) {
    constexpr uintptr_t line = 64;
    static thread_local std::vector<T> kept;
    count += line / sizeof(T);
    if (static_cast<int64_t>(kept.size()) < count) kept.resize(count);
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(kept.data()) + line - 1) / line * line);
}
// A matrix whose rows are contiguous, at any distance from each other.
template <typename T> struct RowsOf {
    Tensor held;
    T* data;
    int64_t rows, width, distance;
};
template <typename T> static RowsOf<T> rows_of(const Tensor& t) {
    const int64_t width = width_of(t), rows = t.numel() / width;
    if (t.is_contiguous()) return {t, data_of<T>(t), rows, width, width};
    Tensor two = flat(t);
    if (two.stride(1) != 1 && width != 1) two = torch::stable::contiguous(two);
    return {two, data_of<T>(two), rows, width, two.stride(0)};
}
struct Factor {  // fp32 or bf16, of any strides
    const void* data;
    int64_t rank, along, across, is_bf16;  // strides along the small side and along the other
};
// What the kernels read as a factor or write as a gradient: fp32 or bf16.
static ScalarType plain(ScalarType type) { return type == ScalarType::BFloat16 ? type : ScalarType::Float; }

// Operands with a small side, and what has to live as long as they do.
struct Factors {
    Tensors held;
    std::vector<Factor> all;
    int64_t ranks = 0;

    // ``t`` (2-d, or more that are rows) with its small side at dimension ``small`` and ``size`` on the other
    void add(const Tensor& t, int small, int64_t size) {
        const Tensor two = as(flat(t), plain(t.scalar_type()));
        STD_TORCH_CHECK(two.size(1 - small) == size && two.is_cpu(), "a factor of shape (", two.size(0), ", ",
                        two.size(1), "): expected ", size, " at dimension ", 1 - small, ", on the CPU");
        const bool is_bf16 = two.scalar_type() == ScalarType::BFloat16;
        all.push_back({two.data_ptr(), two.size(small), two.stride(small), two.stride(1 - small), is_bf16});
        held.push_back(two);
        ranks += two.size(small);
    }
    // Each of the first ``count`` with one of those behind them.
    void check_pairs(size_t count) const {
        STD_TORCH_CHECK(all.size() == 2 * count, "expected as many factors on either side, found ", count, " of ",
                        all.size());
        for (size_t g = 0; g < count; ++g)
            STD_TORCH_CHECK(all[g].rank == all[count + g].rank, "factors of one product: expected one rank, found ",
                            all[g].rank, " and ", all[count + g].rank);
    }
};
