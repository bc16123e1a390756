// The products with one small side as ops of torch.
#pragma once
#include "skinny.h"
#include "products.h"

// How many rows a thread has at least where each sums up by itself what it reads.
constexpr int64_t ROWS_OF_A_THREAD = 96;

// What a kernel is called with: ``Factors`` and, behind each of the first, where its result goes.
struct Call {
    Factors factors;
    Groups groups;
    Tensors held;

    void add(const Tensor& factor, int small, int64_t size, void* part, const Maybe& scale = {}) {
        factors.add(factor, small, size);
        const Factor& last = factors.all.back();
        const Tensor scales = scale ? scales_of(*scale, last.rank) : factor;
        held.push_back(scales);
        groups.push_back(
            {last, 0, nullptr, 0, 0.0f, scale ? data_of<double>(scales) : nullptr, scale ? scales.numel() : 0, part});
    }
    void drop(const Tensors& seeds, const Rates& p) {
        STD_TORCH_CHECK(seeds.empty() || (seeds.size() == groups.size() && p.size() == groups.size()), "expected ",
                        groups.size(), " seeds and rates or none, found ", seeds.size(), " and ", p.size());
        for (size_t g = 0; g < seeds.size(); ++g) {
            STD_TORCH_CHECK(seeds[g].is_cpu() && seeds[g].scalar_type() == ScalarType::Long && seeds[g].numel() == 1,
                            "expected a seed of one int64 on the CPU");
            groups[g].seed = data_of<int64_t>(seeds[g]);
            const double least = std::min(std::floor(p[g] * 4294967296.0), 4294967295.0);
            groups[g].least = static_cast<int32_t>(static_cast<int64_t>(least) - 2147483648);
            groups[g].keep = p[g] < 1 ? static_cast<float>(1 / (1 - p[g])) : 0.0f;
        }
    }
    int threads(int64_t elements) const { return threads_for(elements * factors.ranks); }
};
static ScalarType kernel_type(const Tensor& x) {
    const ScalarType type = x.scalar_type();
    STD_TORCH_CHECK(x.is_cpu() && x.numel() > 0 && (type == ScalarType::Float || type == ScalarType::BFloat16),
                    "expected numbers in fp32 or bf16 on the CPU");
    return type;
}
// ``run`` with the rows of ``x`` in its dtype.
template <typename F> static void with_rows(const Tensor& x, const F& run) {
    if (kernel_type(x) == ScalarType::BFloat16) run(rows_of<bf16>(x));
    else run(rows_of<float>(x));
}

static Tensors shrink_op(const Tensor& x, const Tensors& A, const Tensors& scale, const Tensors& seeds,
                         const Rates& p) {
    Tensors made;
    with_rows(x, [&](const auto& from) {
        Call call;
        for (size_t g = 0; g < A.size(); ++g) {
            made.push_back(empty(sizes_with(x, A[g].size(0)), x.scalar_type()));
            call.add(A[g], 0, from.width, made[g].data_ptr(), scale.at(g));
        }
        call.drop(seeds, p);
        shrink(from.data, from.rows, from.width, from.distance, call.groups, call.threads(x.numel()));
    });
    return made;
}
static Tensors gradient_op(const Tensors& h, const Tensor& x, ScalarType type, const Tensors& seeds, const Rates& p) {
    Tensors made;
    with_rows(x, [&](const auto& from) {
        Call call;
        for (const Tensor& one : h) {
            made.push_back(empty({width_of(one), from.width}, ScalarType::Float));
            call.add(one, 1, from.rows, made.back().data_ptr());
        }
        call.drop(seeds, p);
        gradient(from.data, from.rows, from.width, from.distance, call.groups, call.threads(x.numel()));
    });
    for (Tensor& one : made) one = as(one, type);
    return made;
}
static std::tuple<Tensor, Tensor> both_op(const Tensor& g, const Tensor& h, const Tensor& B, const Tensor& scale,
                                          ScalarType type) {
    const Tensor q = empty(sizes_with(g, B.size(1)), kernel_type(g));
    const Tensor dB = empty({B.size(0), B.size(1)}, ScalarType::Float);
    with_rows(g, [&](const auto& from) {
        Call call;
        call.add(B, 1, from.width, q.data_ptr(), scale);
        call.factors.add(h, 1, from.rows);
        call.factors.check_pairs(1);
        // Each thread sums up by itself what it reads.
        const int64_t most = (from.rows + ROWS_OF_A_THREAD - 1) / ROWS_OF_A_THREAD, columns = padded(B.size(1), W);
        const int threads = static_cast<int>(std::min<int64_t>(call.threads(g.numel()), most));
        const Tensor sums = empty({2 * threads * from.width * columns}, ScalarType::Float);
        both(from.data, from.rows, from.width, from.distance, call.groups, call.factors.all[1], data_of<float>(dB),
             data_of<float>(sums), threads);
    });
    return {q, as(dB, type)};
}
static void update_op(const Tensor& total, const Tensors& q, const Tensors& A, const Tensors& seeds, const Rates& p) {
    STD_TORCH_CHECK(total.is_contiguous(), "a sum in place: expected contiguous memory");
    with_rows(total, [&](const auto& to) {
        Call call;
        Factors left;
        for (size_t g = 0; g < A.size(); ++g) {
            call.add(A[g], 0, to.width, nullptr);
            left.add(q.at(g), 1, to.rows);
            STD_TORCH_CHECK(left.all[g].rank == call.groups[g].factor.rank,
                            "factors of one product: expected one rank, found ", left.all[g].rank, " and ",
                            call.groups[g].factor.rank);
        }
        call.drop(seeds, p);
        update(to.data, to.rows, to.width, call.groups, left.all, call.threads(total.numel()));
    });
}

extern "C" const Products* products() {
    static const Products found{&shrink_op, &gradient_op, &both_op, &update_op};
    return &found;
}
STABLE_TORCH_LIBRARY_FRAGMENT(adaptc_skinny, m) { define_products(m); }
STABLE_TORCH_LIBRARY_IMPL(adaptc_skinny, CPU, m) {
    m.impl("shrink", TORCH_BOX(&shrink_op));
    m.impl("gradient", TORCH_BOX(&gradient_op));
    m.impl("both", TORCH_BOX(&both_op));
    m.impl("update", TORCH_BOX(&update_op));
}
