// The kernel with the ops that call it: around a kernel Python takes as long as it does.
#include "rescale.h"
#include "constants.h"
#include "native.h"

static bool are_plain(const Tensor& y, const Maybe& bias, const Tensor& magnitude, const Tensor& norm) {
    return is_plain(y) && is_plain(magnitude) && is_plain(norm) && (!bias || is_plain(*bias));
}
static Tensor factor(const Tensor& magnitude, const Tensor& norm) {
    const int64_t width = norm.numel();
    const Tensor m = of_columns(magnitude, width), n = of_columns(norm, width), c = empty({width}, ScalarType::Float);
    for (int64_t j = 0; j < width; ++j) data_of<float>(c)[j] = data_of<float>(m)[j] / data_of<float>(n)[j];
    return c;
}
// dmagnitude; dy is written
static Tensor gradient(const Tensor& g, const Tensor& y, const Maybe& bias, const Tensor& magnitude, const Tensor& norm,
                       const Tensor& dy) {
    const int64_t width = width_of(y), rows = y.numel() / width;
    STD_TORCH_CHECK(g.numel() == y.numel(), "dora_rescale_grad: expected a gradient of ", y.numel(), " numbers, found ",
                    g.numel());
    const Tensor values = dense(y), n = of_columns(norm, width), c = factor(magnitude, n);
    const Maybe centre = of_columns(bias, width);
    std::vector<double> sums(width);
    rescale_gradient(data_of<float>(g), data_of<float>(values), data_of<float>(centre), data_of<float>(c),
                     data_of<float>(dy), sums.data(), rows, width,
                     y.numel() > GRAIN_ELEMENTS ? static_cast<int>(torch::stable::get_num_threads()) : 1);
    const Tensor dm = empty({width}, ScalarType::Float);
    for (int64_t j = 0; j < width; ++j) data_of<float>(dm)[j] = static_cast<float>(sums[j] / data_of<float>(n)[j]);
    return dm;
}
static Tensor dora_factor(const Tensor& magnitude, const Tensor& norm) {
    if (is_plain(magnitude) && is_plain(norm) && norm.dim() == 1) return factor(magnitude, norm);
    return taken<Tensor>(in_python("adaptc_python::dora_factor", magnitude, norm)[0]);
}
static std::tuple<Tensor, Tensor> dora_rescale_grad(const Tensor& grad, const Tensor& y, const Maybe& bias,
                                                    const Tensor& magnitude, const Tensor& norm) {
    if (is_plain(grad) && are_plain(y, bias, magnitude, norm)) {
        const Tensor g = dense(grad), dy = empty(sizes_with(g, width_of(g)), ScalarType::Float);
        const Tensor dm = gradient(g, y, bias, magnitude, norm, dy);
        return {dy, dm};
    }
    const auto found = in_python("adaptc_python::dora_rescale_grad", grad, y, bias, magnitude, norm);
    return {taken<Tensor>(found[0]), taken<Tensor>(found[1])};
}
static Tensor rescale_grad_in_place(const Tensor& grad, const Tensor& y, const Maybe& bias, const Tensor& magnitude,
                                    const Tensor& norm) {
    if (is_plain(grad) && grad.is_contiguous() && are_plain(y, bias, magnitude, norm))
        return gradient(grad, y, bias, magnitude, norm, grad);
    return taken<Tensor>(in_python("adaptc_python::rescale_grad_", grad, y, bias, magnitude, norm)[0]);
}
STABLE_TORCH_LIBRARY_IMPL(adaptc, CPU, m) {
    m.impl("dora_factor", TORCH_BOX(&dora_factor));
    m.impl("dora_rescale_grad", TORCH_BOX(&dora_rescale_grad));
}
STABLE_TORCH_LIBRARY_IMPL(adaptc_lowered, CPU, m) { m.impl("rescale_grad_", TORCH_BOX(&rescale_grad_in_place)); }
