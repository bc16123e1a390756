"""The kernel of the gradients of a factor per column, at sizes with whole and cut blocks, on one thread and on more."""

from __future__ import annotations

import pytest
import torch

from adaptc.codegen.cpp import rescale


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
    assert rescale.gradient(g.double(), g.double(), None, c) is None
    assert rescale.gradient(g, g.double(), None, c) is None
    assert rescale.gradient(g[:0], g[:0], None, c) is None
