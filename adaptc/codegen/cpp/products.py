"""The dialect's products with a small side on a CPU: which kernels make them, without Python around them.

    no dropout, bf16, up to ``MOST_RANKS``     ``pairs``, on a CPU that has its instructions
    no dropout, bf16, a CPU that emulates it   ``skinny``: the libraries go through fp32 number by number there
    no dropout, fp32, up to ``MOST_RANKS``     ``skinny``
    dropout, fp32 or bf16                      ``skinny``
    else                                       Python: the libraries

``adaptc.ir.lora_split`` and ``lora_fused`` choose alike in Python, which runs until the kernels are there.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch

from adaptc.codegen import torch_internals
from adaptc.codegen.cpp.native_source import NATIVE

#: Ranks, of all sites together, up to which the libraries were slower wherever it was measured.
MOST_RANKS = 64
SOURCE = (
    """
#include <algorithm>
#include <cstdint>
#include <vector>
"""
    + NATIVE
    + r"""
typedef std::vector<double> Rates;
constexpr int64_t MOST_RANKS = @MOST_RANKS@;
constexpr bool EMULATES = @EMULATES@;

// The libraries whose ops there are.
static bool has_skinny = false, has_pairs = false;
extern "C" void found_skinny() { has_skinny = true; }
extern "C" void found_pairs() { has_pairs = true; }

enum Kernels { PYTHON, SKINNY, PAIRS };
static Kernels kernels_for(const Tensor& x, bool drops, int64_t ranks) {
    const bool half = x.scalar_type() == ScalarType::BFloat16, few = 0 < ranks && ranks <= MOST_RANKS;
    if (!x.is_cpu() || x.numel() == 0 || ranks == 0 || !(half || x.scalar_type() == ScalarType::Float)) return PYTHON;
    if (!drops && half && few && has_pairs) return PAIRS;
    return has_skinny && (drops || (half ? EMULATES : few)) ? SKINNY : PYTHON;
}
static int64_t ranks_of(const Tensors& all, bool last) {
    int64_t total = 0;
    for (const Tensor& one : all) total += one.size(last ? one.dim() - 1 : 0);
    return total;
}

static Tensors lora_shrink(const Tensor& x, const Tensors& A, const Tensors& scale, const Tensors& seeds,
                           const Rates& p) {
    switch (kernels_for(x, !seeds.empty(), ranks_of(A, false))) {
        case PAIRS: return taken<Tensors>(called("adaptc_pairs::shrink", x, A, scale)[0]);
        case SKINNY: return taken<Tensors>(called("adaptc_skinny::shrink", x, A, scale, seeds, p)[0]);
        default: return taken<Tensors>(called("adaptc_python::lora_shrink", x, A, scale, seeds, p)[0]);
    }
}
static Tensors lora_factor_grads(const Tensors& left, const Tensor& right, ScalarType type, const Tensors& seeds,
                                 const Rates& p) {
    switch (kernels_for(right, !seeds.empty(), ranks_of(left, true))) {
        case PAIRS: return taken<Tensors>(called("adaptc_pairs::gradient", left, right, type)[0]);
        case SKINNY: return taken<Tensors>(called("adaptc_skinny::gradient", left, right, type, seeds, p)[0]);
        default: return taken<Tensors>(called("adaptc_python::lora_factor_grads", left, right, type, seeds, p)[0]);
    }
}
static std::tuple<Tensor, Tensor> lora_bottleneck_grads(const Tensor& g, const Tensor& h, const Tensor& B,
                                                        const Tensor& scale, ScalarType type) {
    const Kernels kernels = B.size(1) <= MOST_RANKS ? kernels_for(g, false, B.size(1)) : PYTHON;
    const char* names[] = {"adaptc_python::lora_bottleneck_grads", "adaptc_skinny::both", "adaptc_pairs::both"};
    const auto found = called(names[kernels], g, h, B, scale, type);
    return {taken<Tensor>(found[0]), taken<Tensor>(found[1])};
}
static void add_products(const Tensor& total, const Tensors& q, const Tensors& A, const Tensors& seeds,
                         const Rates& p) {
    switch (kernels_for(total, !seeds.empty(), ranks_of(A, false))) {
        case PAIRS: called("adaptc_pairs::update", total, q, A); return;
        case SKINNY: called("adaptc_skinny::update", total, q, A, seeds, p); return;
        default: called("adaptc_python::add_products_", total, q, A, seeds, p);
    }
}
static void add_product(const Tensor& total, const Tensor& left, const Tensor& right) {
    const bool alike = left.scalar_type() == total.scalar_type() && right.scalar_type() == total.scalar_type();
    switch (alike ? kernels_for(total, false, right.size(0)) : PYTHON) {
        case PAIRS: called("adaptc_pairs::update", total, Tensors{left}, Tensors{right}); return;
        case SKINNY: called("adaptc_skinny::update", total, Tensors{left}, Tensors{right}, Tensors{}, Rates{}); return;
        default: called("adaptc_python::add_product_", total, left, right);
    }
}

STABLE_TORCH_LIBRARY_IMPL(adaptc, CPU, m) {
    m.impl("lora_shrink", TORCH_BOX(&lora_shrink));
    m.impl("lora_factor_grads", TORCH_BOX(&lora_factor_grads));
    m.impl("lora_bottleneck_grads", TORCH_BOX(&lora_bottleneck_grads));
}
STABLE_TORCH_LIBRARY_IMPL(adaptc_lowered, CPU, m) {
    m.impl("add_product_", TORCH_BOX(&add_product));
    m.impl("add_products_", TORCH_BOX(&add_products));
}
""".replace("@MOST_RANKS@", str(MOST_RANKS))
)


@functools.cache
def _library() -> Any:
    emulates = "true" if torch_internals.cpu_emulates(torch.bfloat16) else "false"
    return torch_internals.load_cpp(SOURCE.replace("@EMULATES@", emulates))


def found(kernels: str) -> None:
    """Have torch call ``kernels`` ("skinny" or "pairs"), which are loaded, from now on."""
    if _library() is not None:
        getattr(_library(), f"found_{kernels}")()


def are_few(ranks: Iterable[int]) -> bool:
    """Whether kernels are faster than the libraries for so many ranks."""
    return 0 < sum(ranks) <= MOST_RANKS
