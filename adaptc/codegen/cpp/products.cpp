// The dialect's products with a small side, by the kernels that takes.py gives.
#include "constants.h"
#include "products.h"
#include <atomic>

// The libraries that there are.
static std::atomic<const Products*> skinny{nullptr}, pairs{nullptr};
extern "C" void found_skinny(const Products* found) { skinny = found; }
extern "C" void found_pairs(const Products* found) { pairs = found; }

// Who multiplies; null: Python.
static const Products* kernels_for(const Tensor& x, bool drops, int64_t ranks) {
    if (!x.is_cpu() || x.numel() == 0 || ranks == 0) return nullptr;
    const ScalarType type = x.scalar_type();
    const Products* found;
    RULES  // of takes.py: the first that holds returns its library
    return nullptr;
}
static int64_t ranks_of(const Tensors& all, bool last) {
    int64_t total = 0;
    for (const Tensor& one : all) total += one.size(last ? one.dim() - 1 : 0);
    return total;
}

static Tensors lora_shrink(const Tensor& x, const Tensors& A, const Tensors& scale, const Tensors& seeds,
                           const Rates& p) {
    const Products* kernels = kernels_for(x, !seeds.empty(), ranks_of(A, false));
    if (kernels != nullptr) return kernels->shrink(x, A, scale, seeds, p);
    return taken<Tensors>(in_python("adaptc_python::lora_shrink", x, A, scale, seeds, p)[0]);
}
static Tensors lora_factor_grads(const Tensors& left, const Tensor& right, ScalarType type, const Tensors& seeds,
                                 const Rates& p) {
    const Products* kernels = kernels_for(right, !seeds.empty(), ranks_of(left, true));
    if (kernels != nullptr) return kernels->gradient(left, right, type, seeds, p);
    return taken<Tensors>(in_python("adaptc_python::lora_factor_grads", left, right, type, seeds, p)[0]);
}
static std::tuple<Tensor, Tensor> lora_bottleneck_grads(const Tensor& g, const Tensor& h, const Tensor& B,
                                                        const Tensor& scale, ScalarType type) {
    const Products* kernels = B.size(1) <= MOST_RANKS ? kernels_for(g, false, B.size(1)) : nullptr;
    if (kernels != nullptr) return kernels->both(g, h, B, scale, type);
    const auto found = in_python("adaptc_python::lora_bottleneck_grads", g, h, B, scale, type);
    return {taken<Tensor>(found[0]), taken<Tensor>(found[1])};
}
static void add_products(const Tensor& total, const Tensors& q, const Tensors& A, const Tensors& seeds,
                         const Rates& p) {
    const Products* kernels = kernels_for(total, !seeds.empty(), ranks_of(A, false));
    if (kernels != nullptr) return kernels->update(total, q, A, seeds, p);
    in_python("adaptc_python::add_products_", total, q, A, seeds, p);
}
static void add_product(const Tensor& total, const Tensor& left, const Tensor& right) {
    const bool alike = left.scalar_type() == total.scalar_type() && right.scalar_type() == total.scalar_type();
    const Products* kernels = alike ? kernels_for(total, false, right.size(0)) : nullptr;
    if (kernels != nullptr) return kernels->update(total, {left}, {right}, {}, {});
    in_python("adaptc_python::add_product_", total, left, right);
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
