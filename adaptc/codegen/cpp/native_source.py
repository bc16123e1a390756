"""The C++ that makes kernels ops of torch, by its stable interface: a call then runs no Python.

What is around a kernel is cold when it runs, between products of the base model that leave nothing else in the caches:
by way of Python that took as long as the kernel itself.
"""

from __future__ import annotations

NATIVE = r"""
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <array>
#include <optional>
#include <tuple>

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // since 2.13; before it the message of an error is lost
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
typedef std::vector<Tensor> Tensors;
typedef std::optional<Tensor> Maybe;

// Operations below which a second thread costs more than it does.
constexpr int64_t GRAIN = 1 << 19;
static int threads_for(int64_t operations) {
    return operations > GRAIN ? static_cast<int>(torch::stable::get_num_threads()) : 1;
}

template <typename T> static T* data_of(const Tensor& t) { return static_cast<T*>(t.data_ptr()); }
template <typename T> static T* data_of(const Maybe& t) { return t ? static_cast<T*>(t->data_ptr()) : nullptr; }

static Tensor empty(const std::vector<int64_t>& sizes, ScalarType type) {
    std::vector<int64_t> strides(sizes.size(), 1);
    for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
    const int32_t code = type == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16() : aoti_torch_dtype_float32();
    AtenTensorHandle made;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), code,
                                                           aoti_torch_device_type_cpu(), 0, &made));
    return Tensor(made);
}
static Tensor as(const Tensor& t, ScalarType type) { return t.scalar_type() == type ? t : torch::stable::to(t, type); }
[[maybe_unused]] static bool is_plain(const Tensor& t) {
    return t.is_cpu() && t.scalar_type() == ScalarType::Float && t.numel() > 0;
}
static Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }
static Tensor flat(const Tensor& t) {  // (..., r) as (rows, r)
    return t.dim() == 2 ? t : torch::stable::reshape(t, {-1, t.size(t.dim() - 1)});
}
static int64_t width_of(const Tensor& t) { return t.size(t.dim() - 1); }
// The sizes of t, but ``last`` for its last one.
static std::vector<int64_t> sizes_with(const Tensor& t, int64_t last) {
    std::vector<int64_t> sizes(t.sizes().begin(), t.sizes().end());
    sizes.back() = last;
    return sizes;
}
// A tensor of one number a column, in fp32.
static Tensor of_columns(const Tensor& t, int64_t width) {
    STD_TORCH_CHECK(t.numel() == width && t.is_cpu(), "expected ", width,
                    " numbers on the CPU, one a column, found ", t.numel());
    return dense(as(t, ScalarType::Float));
}
static Maybe of_columns(const Maybe& t, int64_t width) { return t ? Maybe(of_columns(*t, width)) : Maybe(); }
static Tensor scales_of(const Tensor& t, int64_t rank) {
    STD_TORCH_CHECK(t.numel() == 1 || t.numel() == rank, "a product of rank ", rank, ": expected a scale of 1 or ",
                    rank, " numbers, found ", t.numel());
    return dense(as(t, ScalarType::Double));
}

// The op of this name in Python, for what a kernel does not take; the results stand first.
template <typename... Arguments>
static auto in_python(const char* name, const Arguments&... arguments) {
    constexpr size_t most = std::max<size_t>(sizeof...(Arguments), 4);
    std::array<StableIValue, most> stack{torch::stable::detail::from(arguments)...};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
    return stack;
}
template <typename T> static T taken(StableIValue value) { return torch::stable::detail::to<T>(value); }
"""
#: And what a library of kernels for products with a small side has, which another calls: by pointers, for the
#: dispatcher's way to an op is as cold as Python's.
PRODUCTS = r"""
typedef std::vector<double> Rates;
struct Products {
    Tensors (*shrink)(const Tensor& x, const Tensors& A, const Tensors& scale, const Tensors& seeds, const Rates& p);
    Tensors (*gradient)(const Tensors& h, const Tensor& x, ScalarType type, const Tensors& seeds, const Rates& p);
    std::tuple<Tensor, Tensor> (*both)(const Tensor& g, const Tensor& h, const Tensor& B, const Tensor& scale,
                                       ScalarType type);
    void (*update)(const Tensor& total, const Tensors& q, const Tensors& A, const Tensors& seeds, const Rates& p);
};
"""
#: And operands with a small side, which kernels read where they are.
OPERANDS = PRODUCTS + r"""
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
"""
