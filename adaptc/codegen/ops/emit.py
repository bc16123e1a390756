"""Pieces of lowerings: each emits nodes through an edit."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from adaptc.ir.edit import Edit
from adaptc.torch_internals import node_value

aten = torch.ops.aten


def cast(edit: Edit, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    if node_value(node).dtype == dtype:
        return node
    return edit.call(torch.ops.prims.convert_element_type.default, node, dtype)


def transposed(edit: Edit, node: fx.Node) -> fx.Node:
    return edit.call(aten.permute.default, node, [1, 0])


def rows(edit: Edit, node: fx.Node) -> fx.Node:
    """(..., k) as (rows, k)."""
    value = node_value(node)
    if value.dim() == 2:
        return node
    if not _is_viewable(value):
        node = edit.call(aten.clone.default, node, memory_format=torch.contiguous_format)
    return edit.call(aten.view.default, node, [-1, size_of(edit, node, -1)])


def size_of(edit: Edit, node: fx.Node, dim: int) -> int | fx.Node:
    """A size as a graph may hold it: a number, or the node that reads a symbolic one."""
    value = node_value(node)
    size = value.shape[dim]
    return size if isinstance(size, int) else edit.call(aten.sym_size.int, node, dim % value.dim())


def _is_viewable(value: torch.Tensor) -> bool:
    """Whether the leading dimensions are one dimension in memory. A fake tensor's own view does not tell: it allows
    what fails at run time."""
    leading = zip(value.shape[:-1], value.stride()[:-1], strict=True)
    real = [(size, stride) for size, stride in leading if not statically_known_true(size == 1)]
    return all(
        statically_known_true(outer == size * inner) for (_, outer), (size, inner) in itertools.pairwise(real)
    )


def like(edit: Edit, rows: fx.Node, model: fx.Node) -> fx.Node:
    """``rows`` (rows, n) with the leading dimensions of ``model`` (..., k)."""
    dims = node_value(model).dim()
    if dims == 2:
        return rows
    sizes = [size_of(edit, model, i) for i in range(dims - 1)]
    return edit.call(aten.view.default, rows, [*sizes, size_of(edit, rows, -1)])


def scaled(edit: Edit, node: fx.Node, scale: fx.Node) -> fx.Node:
    dtype = node_value(node).dtype
    wide = torch.float32 if dtype.itemsize < 4 else dtype
    product = edit.call(aten.mul.Tensor, cast(edit, node, wide), cast(edit, scale, wide))
    return cast(edit, product, dtype)


def joined(edit: Edit, nodes: Sequence[fx.Node], dim: int) -> fx.Node:
    return nodes[0] if len(nodes) == 1 else edit.call(aten.cat.default, list(nodes), dim)


def parts(edit: Edit, node: fx.Node, sizes: Sequence[int | fx.Node], dim: int) -> list[fx.Node]:
    """``node`` cut along ``dim``."""
    if len(sizes) == 1:
        return [node]

    def add(a: int | fx.Node, b: int | fx.Node) -> int | fx.Node:
        return a + b if isinstance(a, int) and isinstance(b, int) else edit.call(operator.add, a, b)

    ends = list(itertools.accumulate(sizes, add))
    return [edit.call(aten.slice.Tensor, node, dim, *cut) for cut in itertools.pairwise([0, *ends])]


def contiguous(edit: Edit, node: fx.Node) -> fx.Node:
    return edit.call(aten.clone.default, node, memory_format=torch.contiguous_format)
