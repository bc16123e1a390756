// LoRA by rows as ops of torch, which the dialect's ops call.
#include "lora_rows.h"
#include <memory>

typedef std::vector<int64_t> Numbers;

static bool is_float(const Tensor& t) {
    const ScalarType type = t.scalar_type();
    return t.is_cpu() && (type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half ||
                          type == ScalarType::Double);
}
static bool takes(const Tensor& x, const Tensor& y, const Tensors& A, const Tensors& B, const Tensors& scale,
                  const Tensor& ids) {
    const ScalarType type = x.scalar_type();
    if (type != ScalarType::Float && type != ScalarType::BFloat16) return false;
    if (!x.is_cpu() || x.numel() == 0 || y.numel() == 0 || !y.is_cpu() || y.scalar_type() != type) return false;
    if (!ids.is_cpu() || ids.scalar_type() != ScalarType::Long) return false;
    for (const Tensors* all : {&A, &B, &scale})
        for (const Tensor& one : *all)
            if (!is_float(one)) return false;
    return true;
}

// What a call is about, and what has to live as long.
struct Rows {
    Factors factors;
    Tensors scales;
    Adapters adapters;
    Grouped grouped;
    Sizes sizes;

    Rows(const Tensor& x, const Tensor& y, const Tensors& A, const Tensors& B, const Tensors& scale, const Tensor& ids,
         const Numbers& numbers)
        : sizes{x.size(0), x.size(1), y.size(1), 0} {
        const size_t count = A.size();
        STD_TORCH_CHECK(x.dim() == 2 && y.dim() == 2 && y.size(0) == sizes.rows && ids.numel() == sizes.rows,
                        "LoRA by rows: expected as many rows of x and y as ids, found ", x.size(0), ", ", y.size(0),
                        " and ", ids.numel());
        STD_TORCH_CHECK(B.size() == count && scale.size() == count && numbers.size() == count,
                        "LoRA by rows: expected as many of A, B, scales and numbers, found ", count, ", ", B.size(),
                        ", ", scale.size(), " and ", numbers.size());
        for (const Tensor& a : A) factors.add(a, 0, sizes.inputs);
        for (const Tensor& b : B) factors.add(b, 1, sizes.outputs);
        factors.check_pairs(count);
        for (size_t i = 0; i < count; ++i) {
            const int64_t rank = factors.all[i].rank;
            scales.push_back(scales_of(scale[i], rank));
            adapters.push_back({factors.all[i], factors.all[count + i], data_of<double>(scales[i]), scales[i].numel()});
            sizes.widest = std::max(sizes.widest, rank);
        }
        const Tensor held = dense(ids);
        grouped = ::grouped(data_of<int64_t>(held), sizes.rows, numbers);
    }
    int threads(int times) const {
        int64_t operations = 0;
        for (size_t a = 0; a < adapters.size(); ++a)
            operations += times * grouped.count(a) * adapters[a].rank() * (sizes.inputs + sizes.outputs);
        return threads_for(operations);
    }
};
template <typename T> static Table<const T> table(const RowsOf<T>& rows) { return {rows.data, rows.distance}; }
template <typename F> static void in_type(const Tensor& x, const F& run) {
    if (x.scalar_type() == ScalarType::BFloat16) run(bf16{});
    else run(float{});
}

static Tensor rows_to(const Tensor& x, const Tensor& y, const Tensor& out, const Tensors& A, const Tensors& B,
                      const Tensors& scale, const Tensor& ids, const Numbers& numbers) {
    const Rows rows(x, y, A, B, scale, ids, numbers);
    const Tensor h = empty({rows.sizes.rows, rows.sizes.widest}, x.scalar_type());
    in_type(x, [&](auto number) {
        typedef decltype(number) T;
        const RowsOf<T> from = rows_of<T>(x), base = rows_of<T>(y);
        forward<T>(rows.grouped, rows.adapters, rows.sizes, table(from), table(base),
                   {data_of<T>(out), rows.sizes.outputs}, data_of<T>(h), rows.threads(1));
    });
    return h;
}
static Tensors gradients(const Tensor& grad, const Tensor& x, const Tensor& h, const Tensors& A, const Tensors& B,
                         const Tensors& scale, const Tensor& ids, const Numbers& numbers, const Maybe& dx,
                         const std::vector<bool>& need) {
    const Rows rows(x, grad, A, B, scale, ids, numbers);
    const size_t count = A.size();
    STD_TORCH_CHECK(need.size() == 2 * count && h.size(1) == rows.sizes.widest,
                    "gradients of LoRA by rows: expected h as wide as the largest rank and a flag for each factor");
    Tensors made, found;
    std::vector<float*> to(2 * count, nullptr);
    for (size_t i = 0; i < 2 * count; ++i) {
        if (!need[i]) continue;
        const Tensor& factor = i < count ? A[i] : B[i - count];
        made.push_back(empty({factor.size(0), factor.size(1)}, ScalarType::Float));
        to[i] = data_of<float>(made.back());
    }
    in_type(x, [&](auto number) {
        typedef decltype(number) T;
        const RowsOf<T> g = rows_of<T>(grad), from = rows_of<T>(x), kept = rows_of<T>(h);
        const Table<T> out{data_of<T>(dx), rows.sizes.inputs};
        const Gradients<T> all{
            table(g), table(from), table(kept), out, {to.begin(), to.begin() + count}, {to.begin() + count, to.end()}};
        backward<T>(rows.grouped, rows.adapters, rows.sizes, all, rows.threads(2));
    });
    for (size_t i = 0, next = 0; i < 2 * count; ++i)
        if (need[i]) found.push_back(as(made[next++], (i < count ? A[i] : B[i - count]).scalar_type()));
    return found;
}

// bool[] as the dispatcher takes it from C++
struct Flags {
    std::unique_ptr<bool[]> each;
    size_t count;
    Flags(const std::vector<bool>& flags) : each(new bool[flags.size() + 1]), count(flags.size()) {
        std::copy(flags.begin(), flags.end(), each.get());
    }
    // No braces: they would make a list of two flags.
    typedef torch::headeronly::HeaderOnlyArrayRef<bool> List;
    List all() const { return List(static_cast<const bool*>(each.get()), count); }
};

static std::tuple<Tensor, Tensor> lora_rows(const Tensor& x, const Tensor& y, const Tensors& A, const Tensors& B,
                                            const Tensors& scale, const Tensor& ids, const Numbers& numbers) {
    if (!takes(x, y, A, B, scale, ids)) {
        const auto found = in_python("adaptc_python::lora_rows", x, y, A, B, scale, ids, numbers);
        return {taken<Tensor>(found[0]), taken<Tensor>(found[1])};
    }
    const Tensor out = empty({y.size(0), y.size(1)}, y.scalar_type());
    const Tensor h = rows_to(x, y, out, A, B, scale, ids, numbers);
    return {out, h};
}
static Tensor lora_rows_in_place(const Tensor& y, const Tensor& x, const Tensors& A, const Tensors& B,
                                 const Tensors& scale, const Tensor& ids, const Numbers& numbers) {
    if (takes(x, y, A, B, scale, ids) && y.is_contiguous()) {
        const Tensor two = flat(y);
        return rows_to(x, two, two, A, B, scale, ids, numbers);
    }
    return taken<Tensor>(in_python("adaptc_python::lora_rows_", y, x, A, B, scale, ids, numbers)[0]);
}
static Tensors lora_rows_grads(const Tensor& grad, const Tensor& x, const Tensor& h, const Tensors& A, const Tensors& B,
                               const Tensors& scale, const Tensor& ids, const Numbers& numbers, bool need_x,
                               const std::vector<bool>& need) {
    if (!takes(x, grad, A, B, scale, ids) || h.scalar_type() != x.scalar_type() || h.numel() == 0) {
        const Flags flags(need);
        return taken<Tensors>(
            in_python("adaptc_python::lora_rows_grads", grad, x, h, A, B, scale, ids, numbers, need_x, flags.all())[0]);
    }
    const Maybe dx = need_x ? Maybe(empty({x.size(0), x.size(1)}, x.scalar_type())) : Maybe();
    Tensors found = gradients(grad, x, h, A, B, scale, ids, numbers, dx, need);
    if (dx) found.insert(found.begin(), *dx);
    return found;
}
STABLE_TORCH_LIBRARY_FRAGMENT(adaptc_rows, m) {
    m.def("forward(Tensor x, Tensor y, Tensor[] A, Tensor[] B, Tensor[] scale, Tensor ids, int[] numbers)"
          " -> (Tensor, Tensor)");
    m.def("forward_(Tensor(a!) y, Tensor x, Tensor[] A, Tensor[] B, Tensor[] scale, Tensor ids, int[] numbers)"
          " -> Tensor");
    m.def("backward(Tensor grad, Tensor x, Tensor h, Tensor[] A, Tensor[] B, Tensor[] scale, Tensor ids, int[] numbers,"
          " bool need_x, bool[] need) -> Tensor[]");
}
STABLE_TORCH_LIBRARY_IMPL(adaptc_rows, CPU, m) {
    m.impl("forward", TORCH_BOX(&lora_rows));
    m.impl("forward_", TORCH_BOX(&lora_rows_in_place));
    m.impl("backward", TORCH_BOX(&lora_rows_grads));
}
STABLE_TORCH_LIBRARY_IMPL(adaptc, CPU, m) {
    m.impl("lora_rows", TORCH_BOX(&lora_rows));
    m.impl("lora_rows_grads", TORCH_BOX(&lora_rows_grads));
}
STABLE_TORCH_LIBRARY_IMPL(adaptc_lowered, CPU, m) { m.impl("lora_rows_", TORCH_BOX(&lora_rows_in_place)); }
