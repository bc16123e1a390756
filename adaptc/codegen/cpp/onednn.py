"""``adaptc::onednn_linear`` without Python around it: oneDNN's product by torch's C interface."""

from __future__ import annotations

import functools
from typing import Any

from adaptc import torch_internals
from adaptc.codegen.cpp.native_source import NATIVE

SOURCE = (
    """
#include <algorithm>
#include <cstdint>
#include <vector>
#include <torch/csrc/inductor/aoti_torch/c/shim_cpu.h>
"""
    + NATIVE
    + r"""
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
"""
)


@functools.cache
def library() -> Any:
    """Compiled, from when on torch calls it; None without a C++ compiler."""
    return torch_internals.load_cpp(SOURCE)
