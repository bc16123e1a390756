"""The libraries that the bench times make the same products."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bench.libraries import _products
from bench.torch_internals import has_both_libraries, onednn_product

needs_both = pytest.mark.skipif(not has_both_libraries(), reason="this CPU's torch has one library for products only")


@needs_both
@pytest.mark.parametrize("transposed", [False, True])
def test_onednn_multiplies_by_the_weight_where_it_is(transposed: bool) -> None:
    left, right = torch.randn(7, 33), torch.randn(33, 19)
    if transposed:
        right = right.t().contiguous().t()
    found = onednn_product(left, right)
    assert torch.allclose(found.double(), left.double() @ right.double(), rtol=1e-5, atol=1e-5)


@needs_both
def test_every_layer_is_multiplied_forward_and_backward() -> None:
    base = nn.Sequential(nn.Linear(6, 4, bias=False), nn.ReLU(), nn.Linear(4, 10, bias=False))
    shapes = [tuple(way().shape for way in ways.values()) for ways in _products(base, rows=5)]  # type: ignore[attr-defined]
    assert shapes == [((5, 4),) * 2, ((5, 6),) * 2, ((5, 10),) * 2, ((5, 4),) * 2]
