"""Rounding of merged weights."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from adaptc.methods.affine import nearest

ODD = [float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1e300, -1e300, 1e-320]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_goes_to_the_nearest_and_a_middle_to_the_even_one(dtype):
    """Against exact arithmetic, beside the middles of neighbours too, where torch's own rounding is wrong."""
    generator = torch.Generator().manual_seed(0)
    scale = 10.0 ** torch.randint(-6, 4, (400,), generator=generator)
    low = (torch.randn(400, generator=generator) * scale).to(dtype)
    middle = (low.double() + (low.view(torch.int16) + 1).view(dtype).double()) / 2
    values = torch.cat([middle, middle * (1 + 2.0**-40), middle * (1 - 2.0**-40), low.double(), middle * 1.001])
    found = nearest(values, dtype)
    for value, one in zip(values.tolist(), found, strict=True):
        off = abs(Fraction(value) - Fraction(one.item()))
        for step in (-1, 1):
            other = (one.view(torch.int16) + step).view(dtype)
            if other.isfinite():
                further = abs(Fraction(value) - Fraction(other.item()))
                assert off < further or (off == further and one.view(torch.int16).item() % 2 == 0), value
    assert not torch.equal(values.to(dtype), found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_what_is_no_number_or_too_large_is_as_torch_has_it(dtype):
    odd = torch.tensor(ODD, dtype=torch.float64)
    assert torch.equal(nearest(odd, dtype).nan_to_num(7.0), odd.to(dtype).nan_to_num(7.0))
    assert nearest(odd, dtype).signbit()[3] and nearest(odd, dtype).isnan()[0]
