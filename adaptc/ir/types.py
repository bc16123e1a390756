"""The types of the values in a graph: shape, dtype, device and strides."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from adaptc.ir.names import dtype_text
from adaptc.torch_internals import tree_leaves


def describe(value: Any, *, strides: bool = True) -> str:
    """A value's type in the form of the graph text, ``f32[2, 8] stride (8, 1) on cpu``."""
    if not isinstance(value, torch.Tensor):
        return repr(value)
    layout = f" stride ({', '.join(map(str, value.stride()))})" if strides else ""
    shape = ", ".join(map(str, value.shape))
    return f"{dtype_text(value.dtype)}[{shape}]{layout} on {value.device}"


def same_type(a: Any, b: Any, *, strides: bool = True) -> bool:
    """Whether two values, fake or real, have one shape, dtype, device and, if asked, strides.

    Symbolic sizes are compared without adding guards. The stride of a dimension of size 1 means nothing.
    """
    left, right = tree_leaves(a), tree_leaves(b)
    if len(left) != len(right):
        return False
    for one, other in zip(left, right, strict=True):
        if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
            if type(one) is not type(other):
                return False
            continue
        if (one.dtype, one.device, one.dim()) != (other.dtype, other.device, other.dim()):
            return False
        if not same_sizes(one.shape, other.shape):
            return False
        wide = [i for i, size in enumerate(one.shape) if not statically_known_true(size == 1)]
        if strides and not same_sizes([one.stride(i) for i in wide], [other.stride(i) for i in wide]):
            return False
    return True


def same_sizes(a: Any, b: Any) -> bool:
    return all(statically_known_true(x == y) for x, y in zip(a, b, strict=True))
