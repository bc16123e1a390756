// The products of bf16 as ops of torch, which the dialect's ops call.
#pragma once
#include "constants.h"
#include "pairs.h"
#include "pairs_dora.h"
#include "products.h"

// How many rows a thread has at least where each sums up by itself what it reads.
constexpr int64_t ROWS_OF_A_THREAD = 96;

typedef RowsOf<half> Rows;
// The memory of ``t``, contiguous and in any shape, as rows of those of ``like``.
static Rows dense_rows(const Tensor& t, const Rows& like) {
    const Tensor held = dense(t);
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::BFloat16 && t.is_cpu() && t.numel() == like.rows * like.width,
                    "expected ", like.rows * like.width, " numbers of bf16 on the CPU, found ", t.numel());
    return {held, data_of<half>(held), like.rows, like.width, like.width};
}
static Part part_of(const Tensor& t, const Maybe& scale = {}, bool by_rank = false) {
    const bool is_bf16 = t.scalar_type() == ScalarType::BFloat16;
    return {t.data_ptr(), data_of<double>(scale), scale ? scale->numel() : 0, is_bf16, by_rank};
}
static int threads_of(const Rows& x, int64_t ranks, bool sums_alone = false) {
    const int threads = threads_for(x.rows * x.width * ranks);
    const int64_t most = (x.rows + ROWS_OF_A_THREAD - 1) / ROWS_OF_A_THREAD;
    return sums_alone ? static_cast<int>(std::min<int64_t>(threads, most)) : threads;
}

// None of them drops: the seeds are empty.
static Tensors shrink(const Tensor& x, const Tensors& A, const Tensors& scale, const Tensors&, const Rates&) {
    const Rows from = rows_of<half>(x);
    Factors factors;
    Tensors made, scales;
    std::vector<Part> parts;
    for (size_t g = 0; g < A.size(); ++g) {
        factors.add(A[g], 0, from.width);
        scales.push_back(scales_of(scale.at(g), A[g].size(0)));
        made.push_back(empty(sizes_with(x, A[g].size(0)), ScalarType::BFloat16));
        parts.push_back(part_of(made[g], scales[g]));
    }
    products(from.data, from.rows, from.width, from.distance, A.size(), factors.all.data(), parts.data(), nullptr,
             nullptr, threads_of(from, factors.ranks));
    return made;
}

static Tensors gradient(const Tensors& h, const Tensor& x, ScalarType type, const Tensors&, const Rates&) {
    const Rows from = rows_of<half>(x);
    Factors factors;
    Tensors made;
    std::vector<Part> parts;
    for (size_t g = 0; g < h.size(); ++g) {
        factors.add(h[g], 1, from.rows);
        made.push_back(empty({factors.all[g].rank, from.width}, plain(type)));
        parts.push_back(part_of(made[g], {}, true));
    }
    products(from.data, from.rows, from.width, from.distance, h.size(), nullptr, nullptr, factors.all.data(),
             parts.data(), threads_of(from, factors.ranks));
    for (Tensor& one : made) one = as(one, type);
    return made;
}

static std::tuple<Tensor, Tensor> both(const Tensor& g, const Tensor& h, const Tensor& B, const Tensor& scale,
                                       ScalarType type) {
    const Rows from = rows_of<half>(g);
    Factors factors;
    factors.add(B, 1, from.width);
    factors.add(h, 1, from.rows);
    factors.check_pairs(1);
    const int64_t rank = B.size(1);
    const Tensor scales = scales_of(scale, rank), q = empty(sizes_with(g, rank), ScalarType::BFloat16);
    const Tensor dB = empty({from.width, rank}, plain(type));
    const Part parts[] = {part_of(q, scales), part_of(dB)};
    products(from.data, from.rows, from.width, from.distance, 1, &factors.all[0], &parts[0], &factors.all[1], &parts[1],
             threads_of(from, 2 * rank, true));
    return {q, as(dB, type)};
}

static void update_in_place(const Tensor& total, const Tensors& q, const Tensors& A, const Tensors&, const Rates&) {
    STD_TORCH_CHECK(total.is_contiguous(), "a sum in place: expected contiguous memory");
    const Rows to = rows_of<half>(total);
    Factors factors;
    for (const Tensor& one : q) factors.add(one, 1, to.rows);
    const int64_t ranks = factors.ranks;
    for (const Tensor& one : A) factors.add(one, 0, to.width);
    factors.check_pairs(q.size());
    update_all<false>(to.data, to.data, to.rows, to.width, q.size(), factors.all.data(), {}, threads_of(to, ranks));
}

static Tensor dora_expanded(const Tensor& y, const Maybe& base, const Maybe& bias, const Tensor& h, const Tensor& B,
                            const Tensor& magnitude, const Tensor& norm) {
    const Rows from = rows_of<half>(dense(y));
    const Rows z = base ? dense_rows(*base, from) : Rows{from.held, nullptr, 0, 0, 0};
    const Maybe centre = base ? Maybe() : of_columns(bias, from.width);
    const Tensor wide = of_columns(magnitude, from.width), norms = of_columns(norm, from.width);
    Factors factors;
    factors.add(h, 1, from.rows);
    factors.add(B, 1, from.width);
    factors.check_pairs(1);
    const Tensor out = empty(sizes_with(y, from.width), ScalarType::BFloat16);
    dora_expand(from.data, data_of<half>(out), from.rows, from.width, factors.all.data(), z.data,
                data_of<float>(centre), data_of<float>(wide), data_of<float>(norms), threads_of(from, B.size(1)));
    return out;
}

// dz goes to the memory of ``dz``, which may be that of ``g``.
static std::tuple<Tensor, Tensor, Tensor> dora_grads(
    const Tensor& g, const Tensor& z, const Maybe& bias, const Tensor& h, const Tensor& B, const Tensor& magnitude,
    const Tensor& norm, const Tensor& scale, bool of_base, const Tensor& dz) {
    const Rows values = rows_of<half>(dense(z)), from = dense_rows(g, values), to = dense_rows(dz, values);
    STD_TORCH_CHECK(to.data == data_of<half>(dz), "a gradient in place: expected contiguous memory");
    const Maybe centre = of_columns(bias, from.width);
    const Tensor wide = of_columns(magnitude, from.width), norms = of_columns(norm, from.width);
    const int64_t rank = B.size(1);
    Factors factors;
    factors.add(B, 1, from.width);
    factors.add(h, 1, from.rows);
    factors.check_pairs(1);
    const Tensor scales = scales_of(scale, rank), q = empty(sizes_with(z, rank), ScalarType::BFloat16);
    const Tensor dB = empty({from.width, rank}, plain(B.scalar_type())), dm = empty({from.width}, ScalarType::Float);
    const DoraGradients given{factors.all[0], factors.all[1], part_of(q, scales), part_of(dB)};
    dora_output_grads(from.data, values.data, data_of<float>(centre), data_of<float>(wide), data_of<float>(norms),
                      to.data, data_of<float>(dm), given, from.rows, from.width, of_base,
                      threads_of(from, 2 * rank, true));
    return {q, as(dB, B.scalar_type()), as(dm, magnitude.scalar_type())};
}

extern "C" const Products* products() {
    static const Products found{&shrink, &gradient, &both, &update_in_place};
    return &found;
}
STABLE_TORCH_LIBRARY_FRAGMENT(adaptc_pairs, m) {
    define_products(m);
    m.def("dora_expand(Tensor y, Tensor? base, Tensor? bias, Tensor h, Tensor B, Tensor magnitude, Tensor norm)"
          " -> Tensor");
    m.def("dora_output_grads(Tensor g, Tensor z, Tensor? bias, Tensor h, Tensor B, Tensor magnitude, Tensor norm,"
          " Tensor scale, bool of_base, Tensor(a!) dz) -> (Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(adaptc_pairs, CPU, m) {
    m.impl("shrink", TORCH_BOX(&shrink));
    m.impl("gradient", TORCH_BOX(&gradient));
    m.impl("both", TORCH_BOX(&both));
    m.impl("update", TORCH_BOX(&update_in_place));
    m.impl("dora_expand", TORCH_BOX(&dora_expanded));
    m.impl("dora_output_grads", TORCH_BOX(&dora_grads));
}

// The dialect's ops that are no mere products, on a CPU: what the kernels take; Python does the rest.
static bool takes(const Tensor& x, int64_t ranks) {
    return x.scalar_type() == ScalarType::BFloat16 && x.is_cpu() && 0 < ranks && ranks <= MOST_RANKS && x.numel() > 0;
}
static Tensor op_dora_expand(const Tensor& y, const Maybe& base, const Maybe& bias, const Tensor& h, const Tensor& B,
                             const Tensor& magnitude, const Tensor& norm) {
    const int64_t rank = B.size(1);
    if (takes(y, rank) && (!base || takes(*base, rank))) return dora_expanded(y, base, bias, h, B, magnitude, norm);
    return taken<Tensor>(in_python("adaptc_python::dora_expand", y, base, bias, h, B, magnitude, norm)[0]);
}
static std::tuple<Tensor, Tensor, Tensor, Tensor> op_dora_output_grads(
    const Tensor& g, const Tensor& z, const Maybe& bias, const Tensor& h, const Tensor& B, const Tensor& magnitude,
    const Tensor& norm, const Tensor& scale, bool of_base) {
    if (takes(g, B.size(1)) && takes(z, B.size(1))) {
        const Tensor dz = empty(sizes_with(g, width_of(g)), ScalarType::BFloat16);
        const auto [q, dB, dm] = dora_grads(g, z, bias, h, B, magnitude, norm, scale, of_base, dz);
        return {q, dB, dz, dm};
    }
    const auto found = in_python("adaptc_python::dora_output_grads", g, z, bias, h, B, magnitude, norm, scale, of_base);
    return {taken<Tensor>(found[0]), taken<Tensor>(found[1]), taken<Tensor>(found[2]), taken<Tensor>(found[3])};
}
static std::tuple<Tensor, Tensor, Tensor> op_dora_output_grads_in_place(
    const Tensor& g, const Tensor& z, const Maybe& bias, const Tensor& h, const Tensor& B, const Tensor& magnitude,
    const Tensor& norm, const Tensor& scale, bool of_base) {
    if (takes(g, B.size(1)) && takes(z, B.size(1)))
        return dora_grads(g, z, bias, h, B, magnitude, norm, scale, of_base, g);
    const auto found =
        in_python("adaptc_python::dora_output_grads_", g, z, bias, h, B, magnitude, norm, scale, of_base);
    return {taken<Tensor>(found[0]), taken<Tensor>(found[1]), taken<Tensor>(found[2])};
}

STABLE_TORCH_LIBRARY_IMPL(adaptc, CPU, m) {
    m.impl("dora_expand", TORCH_BOX(&op_dora_expand));
    m.impl("dora_output_grads", TORCH_BOX(&op_dora_output_grads));
}
STABLE_TORCH_LIBRARY_IMPL(adaptc_lowered, CPU, m) {
    m.impl("dora_output_grads_", TORCH_BOX(&op_dora_output_grads_in_place));
}
