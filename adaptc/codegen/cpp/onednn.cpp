// oneDNN's product by torch's C interface.
#include "native.h"
#include <torch/csrc/inductor/aoti_torch/c/shim_cpu.h>

static Tensor onednn_linear(const Tensor& x, const Tensor& weight, const Maybe& bias) {
    if (!is_plain(x) || !is_plain(weight) || (bias && !is_plain(*bias)))
        return taken<Tensor>(in_python("adaptc_python::onednn_linear", x, weight, bias)[0]);
    AtenTensorHandle held = bias ? bias->get() : nullptr, made;
    const char* algorithm = "";
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu__linear_pointwise(x.get(), weight.get(), bias ? &held : nullptr,
                                                                   "none", nullptr, 0, &algorithm, &made));
    return Tensor(made);
}
STABLE_TORCH_LIBRARY_IMPL(adaptc, CPU, m) { m.impl("onednn_linear", TORCH_BOX(&onednn_linear)); }
