"""The types of values: when they are the same, and as text."""

from __future__ import annotations

import torch

from adaptc.ir.types import describe, same_type


def test_same_type():
    a = torch.empty(2, 1, 3)
    assert same_type(a, torch.empty(2, 1, 3))
    assert same_type(a, torch.empty_strided((2, 1, 3), (3, 99, 1))), "a stride of size 1 means nothing"
    assert not same_type(a, torch.empty_strided((2, 1, 3), (1, 1, 2)))
    assert same_type(a, torch.empty_strided((2, 1, 3), (1, 1, 2)), strides=False)
    assert not same_type(a, a.double()) and not same_type(a, a[0]) and not same_type(a, torch.empty(2, 1, 4))
    assert not same_type(a, a.to("meta"))
    assert same_type((a, None), (a, None)) and not same_type((a, None), (a,)) and not same_type((a, 1), (a, a))
    assert describe(a[:, 0].mT.bfloat16()) == "bf16[3, 2] stride (1, 3) on cpu"
