// What a library of kernels for products with a small side has, which another calls: by pointers, for the dispatcher's
// way to an op is as cold as Python's.
#pragma once
#include "native.h"

typedef std::vector<double> Rates;
struct Products {
    Tensors (*shrink)(const Tensor& x, const Tensors& A, const Tensors& scale, const Tensors& seeds, const Rates& p);
    Tensors (*gradient)(const Tensors& h, const Tensor& x, ScalarType type, const Tensors& seeds, const Rates& p);
    std::tuple<Tensor, Tensor> (*both)(const Tensor& g, const Tensor& h, const Tensor& B, const Tensor& scale,
                                       ScalarType type);
    void (*update)(const Tensor& total, const Tensors& q, const Tensors& A, const Tensors& seeds, const Rates& p);
};
// The same as ops of a library of torch.
template <typename Library> static void define_products(Library& m) {
    m.def("shrink(Tensor x, Tensor[] A, Tensor[] scale, Tensor[] seeds, float[] p) -> Tensor[]");
    m.def("gradient(Tensor[] h, Tensor x, ScalarType dtype, Tensor[] seeds, float[] p) -> Tensor[]");
    m.def("both(Tensor g, Tensor h, Tensor B, Tensor scale, ScalarType dtype) -> (Tensor, Tensor)");
    m.def("update(Tensor(a!) total, Tensor[] q, Tensor[] A, Tensor[] seeds, float[] p) -> ()");
}
