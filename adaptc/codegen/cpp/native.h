// What makes kernels ops of torch, by its stable interface: a call then runs no Python. What is around a kernel is cold
// when it runs, between products of the base model that leave nothing else in the caches: by way of Python that took as
// long as the kernel itself.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // since 2.13; before it the message of an error is lost
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
typedef std::vector<Tensor> Tensors;
typedef std::optional<Tensor> Maybe;

// Operations below which a second thread costs more than it does.
constexpr int64_t GRAIN_OPERATIONS = 1 << 19;
static int threads_for(int64_t operations) {
    return operations > GRAIN_OPERATIONS ? static_cast<int>(torch::stable::get_num_threads()) : 1;
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
    STD_TORCH_CHECK(t.numel() == width && t.is_cpu(), "expected ", width, " numbers on the CPU, one a column, found ",
                    t.numel());
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
