"""The kernel of the gradients of a factor per column, at sizes with whole and cut blocks, on one thread and on more."""

from __future__ import annotations

import pytest
import torch

from adaptc.codegen.cpp import rescale
from adaptc.codegen.ops import registry
from adaptc.codegen.ops.in_place import RESCALE_GRAD


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (64, 33), (65, 700), (2, 300, 257)])
def test_against_fp64(shape, has_bias, threads):
    torch.manual_seed(0)
    g, y = torch.randn(shape), torch.randn(shape)
    bias, c = torch.randn(shape[-1]) if has_bias else None, torch.rand(shape[-1]) + 0.5
    dy, total = rescale.gradient(g, y, bias, c)
    terms = g.double() * (y.double() - (0 if bias is None else bias.double()))
    want, size = terms.flatten(0, -2).sum(0), terms.abs().flatten(0, -2).sum(0)
    assert torch.equal(dy, c * g)
    # 64 terms are summed in fp32; a difference, a product and a sum round each.
    assert bool(((total - want).abs() <= 66 * torch.finfo(torch.float32).eps * size).all())
    again, same = rescale.gradient(g, y, bias, c)
    assert torch.equal(again, dy) and torch.equal(same, total), "the same numbers in every run"
    in_place, last = rescale.gradient(g, y, bias, c, out=g)
    assert in_place is g and torch.equal(g, dy) and torch.equal(last, total)


def test_what_it_does_not_take_is_left_to_torch():
    g, c = torch.randn(3, 4), torch.rand(4)
    for one, other in ((g.double(), g.double()), (g, g.double()), (g[:0], g[:0])):
        assert registry.kernel_for("dora_rescale_grad", g.device, one, other, None, c, c) is None
    assert registry.kernel_for("dora_rescale_grad", g.device, g, g, None, c, c) is not None


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [lambda t: t, lambda t: t.mT.contiguous().mT], ids=["dense", "transposed"])
def test_the_ops_in_cpp_give_what_python_gives(has_bias, dtype, layout):
    """To the bit, and they are what torch calls once the kernels are there."""
    assert rescale._library() is not None
    torch.manual_seed(0)
    g, y = (layout(torch.randn(2, 30, 257, dtype=dtype)) for _ in range(2))
    bias = torch.randn(2 * 257, dtype=dtype)[::2] if has_bias else None
    magnitude, norm = (torch.rand(257, dtype=dtype) + 0.5 for _ in range(2))
    ops, python = torch.ops.adaptc, torch.ops.adaptc_python
    for name in ("adaptc::dora_factor", "adaptc::dora_rescale_grad", "adaptc_lowered::rescale_grad_"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU"), name
    assert torch.equal(ops.dora_factor(magnitude, norm), python.dora_factor(magnitude, norm))
    want = python.dora_rescale_grad(g, y, bias, magnitude, norm)
    for got, one in zip(ops.dora_rescale_grad(g, y, bias, magnitude, norm), want, strict=True):
        assert torch.equal(got, one) and got.is_contiguous() and got.shape == one.shape
    rows = g.contiguous().view(-1, 257).clone()
    last = RESCALE_GRAD(rows, y, bias, magnitude, norm)
    assert torch.equal(last, want[1]) and torch.equal(rows.view(g.shape), want[0])


def test_an_op_in_cpp_names_what_does_not_fit():
    rescale._library()
    g = torch.randn(3, 4)
    with pytest.raises(RuntimeError, match="12"):
        torch.ops.adaptc.dora_rescale_grad(g[:2], g, None, torch.rand(4), torch.rand(4))
