"""The C++ that makes the products of bf16 ops of torch, and has the dialect's ops call them."""

from __future__ import annotations

#: Ranks, of all sites together, up to which the libraries were slower wherever it was measured.
MOST_RANKS = 64

OPS = r"""
constexpr int64_t MOST_RANKS = @MOST_RANKS@;
// How many rows a thread has at least where each sums up by itself what it reads.
constexpr int64_t ROWS_OF_A_THREAD = 96;

// A matrix whose rows are contiguous, at any distance from each other.
struct Rows {
    Tensor held;
    half* data;
    int64_t rows, width, distance;
};
static Rows rows_of(const Tensor& t) {
    const int64_t width = width_of(t), rows = t.numel() / width;
    if (t.is_contiguous()) return {t, data_of<half>(t), rows, width, width};
    Tensor two = flat(t);
    if (two.stride(1) != 1 && width != 1) two = torch::stable::contiguous(two);
    return {two, data_of<half>(two), rows, width, two.stride(0)};
}
// The memory of ``t``, contiguous and in any shape, as rows of those of ``like``.
static Rows dense_rows(const Tensor& t, const Rows& like) {
    const Tensor held = dense(t);
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::BFloat16 && t.is_cpu() && t.numel() == like.rows * like.width,
                    "expected ", like.rows * like.width, " numbers of bf16 on the CPU, found ", t.numel());
    return {held, data_of<half>(held), like.rows, like.width, like.width};
}
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
static Part part_of(const Tensor& t, const Maybe& scale = {}, bool by_rank = false) {
    const bool is_bf16 = t.scalar_type() == ScalarType::BFloat16;
    return {t.data_ptr(), data_of<double>(scale), scale ? scale->numel() : 0, is_bf16, by_rank};
}
static int threads_of(const Rows& x, int64_t ranks, bool sums_alone = false) {
    const int threads = threads_for(x.rows * x.width * ranks);
    const int64_t most = (x.rows + ROWS_OF_A_THREAD - 1) / ROWS_OF_A_THREAD;
    return sums_alone ? static_cast<int>(std::min<int64_t>(threads, most)) : threads;
}

static Tensors shrink(const Tensor& x, const Tensors& A, const Tensors& scale) {
    const Rows from = rows_of(x);
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

static Tensors gradient(const Tensors& h, const Tensor& x, ScalarType type) {
    const Rows from = rows_of(x);
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
    const Rows from = rows_of(g);
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

static void update_in_place(const Tensor& total, const Tensors& q, const Tensors& A) {
    STD_TORCH_CHECK(total.is_contiguous(), "a sum in place: expected contiguous memory");
    const Rows to = rows_of(total);
    Factors factors;
    for (const Tensor& one : q) factors.add(one, 1, to.rows);
    const int64_t ranks = factors.ranks;
    for (const Tensor& one : A) factors.add(one, 0, to.width);
    factors.check_pairs(q.size());
    update_all<false>(to.data, to.data, to.rows, to.width, q.size(), factors.all.data(), {}, threads_of(to, ranks));
}

static Tensor dora_expanded(const Tensor& y, const Maybe& base, const Maybe& bias, const Tensor& h, const Tensor& B,
                            const Tensor& magnitude, const Tensor& norm) {
    const Rows from = rows_of(dense(y));
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
    const Rows values = rows_of(dense(z)), from = dense_rows(g, values), to = dense_rows(dz, values);
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

STABLE_TORCH_LIBRARY_FRAGMENT(adaptc_pairs, m) {
    m.def("shrink(Tensor x, Tensor[] A, Tensor[] scale) -> Tensor[]");
    m.def("gradient(Tensor[] h, Tensor x, ScalarType dtype) -> Tensor[]");
    m.def("both(Tensor g, Tensor h, Tensor B, Tensor scale, ScalarType dtype) -> (Tensor, Tensor)");
    m.def("update(Tensor(a!) total, Tensor[] q, Tensor[] A) -> ()");
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

// The dialect's ops, on a CPU: what the kernels take; Python does the rest.
static bool takes(const Tensor& x, int64_t ranks) {
    return x.scalar_type() == ScalarType::BFloat16 && x.is_cpu() && 0 < ranks && ranks <= MOST_RANKS && x.numel() > 0;
}
static int64_t ranks_of(const Tensors& all, bool last) {
    int64_t total = 0;
    for (const Tensor& one : all) total += one.size(last ? one.dim() - 1 : 0);
    return total;
}
typedef std::vector<double> Rates;

static Tensors lora_shrink(const Tensor& x, const Tensors& A, const Tensors& scale, const Tensors& seeds,
                           const Rates& p) {
    if (seeds.empty() && takes(x, ranks_of(A, false))) return shrink(x, A, scale);
    return taken<Tensors>(in_python("adaptc_python::lora_shrink", x, A, scale, seeds, p)[0]);
}
static Tensors lora_factor_grads(const Tensors& left, const Tensor& right, ScalarType type, const Tensors& seeds,
                                 const Rates& p) {
    if (seeds.empty() && takes(right, ranks_of(left, true))) return gradient(left, right, type);
    return taken<Tensors>(in_python("adaptc_python::lora_factor_grads", left, right, type, seeds, p)[0]);
}
static std::tuple<Tensor, Tensor> lora_bottleneck_grads(const Tensor& g, const Tensor& h, const Tensor& B,
                                                        const Tensor& scale, ScalarType type) {
    if (takes(g, B.size(1))) return both(g, h, B, scale, type);
    const auto found = in_python("adaptc_python::lora_bottleneck_grads", g, h, B, scale, type);
    return {taken<Tensor>(found[0]), taken<Tensor>(found[1])};
}
static void add_products(const Tensor& total, const Tensors& q, const Tensors& A, const Tensors& seeds,
                         const Rates& p) {
    if (seeds.empty() && takes(total, ranks_of(A, false))) return update_in_place(total, q, A);
    in_python("adaptc_python::add_products_", total, q, A, seeds, p);
}
static void add_product(const Tensor& total, const Tensor& left, const Tensor& right) {
    const bool few = takes(total, right.size(0)) && left.scalar_type() == ScalarType::BFloat16;
    if (few && right.scalar_type() == ScalarType::BFloat16) return update_in_place(total, {left}, {right});
    in_python("adaptc_python::add_product_", total, left, right);
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
    const auto found =
        in_python("adaptc_python::dora_output_grads", g, z, bias, h, B, magnitude, norm, scale, of_base);
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
    m.impl("lora_shrink", TORCH_BOX(&lora_shrink));
    m.impl("lora_factor_grads", TORCH_BOX(&lora_factor_grads));
    m.impl("lora_bottleneck_grads", TORCH_BOX(&lora_bottleneck_grads));
    m.impl("dora_expand", TORCH_BOX(&op_dora_expand));
    m.impl("dora_output_grads", TORCH_BOX(&op_dora_output_grads));
}
STABLE_TORCH_LIBRARY_IMPL(adaptc_lowered, CPU, m) {
    m.impl("add_product_", TORCH_BOX(&add_product));
    m.impl("add_products_", TORCH_BOX(&add_products));
    m.impl("dora_output_grads_", TORCH_BOX(&op_dora_output_grads_in_place));
}
""".replace("@MOST_RANKS@", str(MOST_RANKS))
