"""The ATen lowering of each dialect op: what it becomes where no faster lowering is chosen.

Each function emits nodes through an edit and returns the nodes of the op's outputs. It must compute what the
op's body computes; tests compare the two.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from adaptc.errors import UnsupportedError
from adaptc.ir import dialect
from adaptc.ir.edit import Edit
from adaptc.ir.origin import origins
from adaptc.torch_internals import node_value

aten = torch.ops.aten


def aten_lowering(name: str) -> Callable[..., tuple[fx.Node, ...]]:
    """The ATen lowering of the op called ``name``.

    Raises:
        UnsupportedError: the op has none.
    """
    own = dialect.get(name).lowering if name in dialect.names() else None
    if own is not None:
        return own
    if name not in _ATEN:
        raise UnsupportedError(f"dialect op {name} has no ATen lowering", found=", ".join(sorted(_ATEN)))
    return _ATEN[name]


def _cast(edit: Edit, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    if node_value(node).dtype == dtype:
        return node
    return edit.call(torch.ops.prims.convert_element_type.default, node, dtype)


def _transposed(edit: Edit, node: fx.Node) -> fx.Node:
    return edit.call(aten.permute.default, node, [1, 0])


def _rows(edit: Edit, node: fx.Node) -> fx.Node:
    """(..., k) as (rows, k)."""
    value = node_value(node)
    if value.dim() == 2:
        return node
    if not _is_viewable(value):
        node = edit.call(aten.clone.default, node, memory_format=torch.contiguous_format)
    return edit.call(aten.view.default, node, [-1, _size(edit, node, -1)])


def _size(edit: Edit, node: fx.Node, dim: int) -> int | fx.Node:
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


def _like(edit: Edit, rows: fx.Node, model: fx.Node) -> fx.Node:
    """``rows`` (rows, n) with the leading dimensions of ``model`` (..., k)."""
    dims = node_value(model).dim()
    if dims == 2:
        return rows
    sizes = [_size(edit, model, i) for i in range(dims - 1)]
    return edit.call(aten.view.default, rows, [*sizes, _size(edit, rows, -1)])


def _scaled(edit: Edit, node: fx.Node, scale: fx.Node) -> fx.Node:
    dtype = node_value(node).dtype
    wide = torch.float32 if dtype.itemsize < 4 else dtype
    product = edit.call(aten.mul.Tensor, _cast(edit, node, wide), _cast(edit, scale, wide))
    return _cast(edit, product, dtype)


def _linear(
    edit: Edit, x: fx.Node, y: fx.Node, A: fx.Node, B: fx.Node, scale: fx.Node, scale_at: str
) -> tuple[fx.Node, ...]:
    dtype = node_value(x).dtype
    h = edit.call(aten.mm.default, _rows(edit, x), _transposed(edit, _cast(edit, A, dtype)))
    expand = _transposed(edit, _cast(edit, B, dtype))
    if scale_at == "r":
        h = _scaled(edit, h, scale)
        out = edit.call(aten.addmm.default, _rows(edit, y), h, expand)
    else:
        product = edit.call(aten.mm.default, h, expand)
        out = edit.call(aten.add.Tensor, _rows(edit, y), _scaled(edit, product, scale))
        if not node_value(out).is_contiguous():  # the sum takes y's layout
            out = edit.call(aten.clone.default, out, memory_format=torch.contiguous_format)
    return _like(edit, out, y), _like(edit, h, x)


def _bottleneck_grad(edit: Edit, grad: fx.Node, B: fx.Node, scale: fx.Node) -> tuple[fx.Node, ...]:
    q = edit.call(aten.mm.default, _rows(edit, grad), _cast(edit, B, node_value(grad).dtype))
    return (_like(edit, _scaled(edit, q, scale), grad),)


def _factor_grad(edit: Edit, left: fx.Node, right: fx.Node, dtype: torch.dtype) -> tuple[fx.Node, ...]:
    product = edit.call(aten.mm.default, _transposed(edit, _rows(edit, left)), _rows(edit, right))
    return (_cast(edit, product, dtype),)


def _input_grad(edit: Edit, q: fx.Node, A: fx.Node) -> tuple[fx.Node, ...]:
    dx = edit.call(aten.mm.default, _rows(edit, q), _cast(edit, A, node_value(q).dtype))
    return (_like(edit, dx, q),)


def _joined(edit: Edit, nodes: Sequence[fx.Node], dim: int) -> fx.Node:
    return nodes[0] if len(nodes) == 1 else edit.call(aten.cat.default, list(nodes), dim)


def _parts(edit: Edit, node: fx.Node, sizes: Sequence[int | fx.Node], dim: int) -> list[fx.Node]:
    """``node`` cut along ``dim``."""
    if len(sizes) == 1:
        return [node]

    def add(a: int | fx.Node, b: int | fx.Node) -> int | fx.Node:
        return a + b if isinstance(a, int) and isinstance(b, int) else edit.call(operator.add, a, b)

    ends = list(itertools.accumulate(sizes, add))
    return [edit.call(aten.slice.Tensor, node, dim, *cut) for cut in itertools.pairwise([0, *ends])]


def _contiguous(edit: Edit, node: fx.Node) -> fx.Node:
    return edit.call(aten.clone.default, node, memory_format=torch.contiguous_format)


def _dropped(edit: Edit, x: fx.Node, seeds: Sequence[fx.Node], p: Sequence[float]) -> list[fx.Node]:
    """What each site reads of ``x`` (..., k), as rows."""
    drop = dialect.get("seeded_dropout").lowering
    assert drop is not None
    return [_rows(edit, drop(edit, x, seed, one)[0]) for seed, one in zip(seeds, p, strict=True)]


def _shrink(
    edit: Edit, x: fx.Node, A: Sequence[fx.Node], scale: Sequence[fx.Node], seeds: Sequence[fx.Node], p: Sequence[float]
) -> tuple[fx.Node, ...]:
    factors = [_cast(edit, a, node_value(x).dtype) for a in A]
    if seeds:
        pairs = zip(_dropped(edit, x, seeds, p), factors, strict=True)
        parts = [edit.call(aten.mm.default, one, _transposed(edit, a)) for one, a in pairs]
    else:
        wide = edit.call(aten.mm.default, _rows(edit, x), _transposed(edit, _joined(edit, factors, 0)))
        parts = _parts(edit, wide, [_size(edit, a, 0) for a in A], 1)
    found = []
    for part, one in zip(parts, scale, strict=True):
        h = _scaled(edit, part, one)
        if not node_value(h).is_contiguous():
            h = _contiguous(edit, h)
        found.append(_like(edit, h, x))
    return tuple(found)


def _expand(edit: Edit, y: fx.Node, h: fx.Node, B: fx.Node) -> tuple[fx.Node, ...]:
    factor = _transposed(edit, _cast(edit, B, node_value(h).dtype))
    return (_like(edit, edit.call(aten.addmm.default, _rows(edit, y), _rows(edit, h), factor), y),)


def _factor_grads(
    edit: Edit, left: Sequence[fx.Node], right: fx.Node, dtype: torch.dtype, seeds: Sequence[fx.Node],
    p: Sequence[float],
) -> tuple[fx.Node, ...]:  # fmt: skip
    if seeds:
        pairs = zip(left, _dropped(edit, right, seeds, p), strict=True)
        return tuple(_factor_grad(edit, q, one, dtype)[0] for q, one in pairs)
    wide = _joined(edit, [_rows(edit, q) for q in left], 1)
    product = _cast(edit, edit.call(aten.mm.default, _transposed(edit, wide), _rows(edit, right)), dtype)
    # Each a tensor of its own: they become the gradients of parameters.
    sizes = [_size(edit, q, -1) for q in left]
    return tuple(_contiguous(edit, part) for part in _parts(edit, product, sizes, 0))


def _input_grads(
    edit: Edit, dx: fx.Node, q: Sequence[fx.Node], A: Sequence[fx.Node], seeds: Sequence[fx.Node], p: Sequence[float]
) -> tuple[fx.Node, ...]:
    if seeds:
        drop = dialect.get("seeded_dropout").lowering
        assert drop is not None
        for one, a, seed, rate in zip(q, A, seeds, p, strict=True):
            product = _input_grad(edit, one, a)[0]
            dx = edit.call(aten.add.Tensor, dx, drop(edit, product, seed, rate)[0])
        return (dx if node_value(dx).is_contiguous() else _contiguous(edit, dx),)
    wide = _joined(edit, [_rows(edit, one) for one in q], 1)
    factors = _joined(edit, [_cast(edit, a, node_value(dx).dtype) for a in A], 0)
    return (_like(edit, edit.call(aten.addmm.default, _rows(edit, dx), wide, factors), dx),)


def _frozen(edit: Edit, index: int, like: fx.Node, x: fx.Node, right: fx.Node, bias: fx.Node | None = None) -> fx.Node:
    """x right + bias with the leading dimensions of ``like``: the base model's product whose origin the node to be
    lowered keeps as its ``index``-th, where that was; an adapter's own if it keeps none."""
    known = origins(edit.position)
    origin = known[index] if known else None
    given = [node for node in (x, right, bias) if node is not None]
    with edit.in_place_of(origin, given):
        pair = _rows(edit, x), right
        product = edit.call(aten.mm.default, *pair) if bias is None else edit.call(aten.addmm.default, bias, *pair)
    with edit.in_place_of(origin):
        return _like(edit, product, like)


#: An op without the frozen layer's products, and its arguments.
_Rest = tuple[str, tuple[Any, ...]]


def _split_linear_expand(
    edit: Edit, x: fx.Node, right: fx.Node, bias: fx.Node | None, h: fx.Node, B: fx.Node
) -> _Rest:
    return "lora_expand", (_frozen(edit, 0, h, x, right, bias), h, B)


def _split_linear_input_grads(
    edit: Edit, grad: Sequence[fx.Node], right: Sequence[fx.Node], q: Sequence[fx.Node], *rest: Any
) -> _Rest:
    pairs = zip(grad, right, strict=True)
    dx, *others = [_frozen(edit, i, q[0], one, weight) for i, (one, weight) in enumerate(pairs)]
    for other in others:
        dx = edit.call(aten.add.Tensor, dx, other)
    return "lora_input_grads", (dx, q, *rest)


_SPLITS: dict[str, Callable[..., _Rest]] = {
    "lora_linear_expand": _split_linear_expand,
    "lora_linear_input_grads": _split_linear_input_grads,
}


def can_split(name: str) -> bool:
    """Whether an op has products of frozen layers in it."""
    return name in _SPLITS


def split(edit: Edit, name: str, *args: Any) -> fx.Node:
    """Emit the op called ``name`` as the frozen layer's products and the op that adds the adapters' part to them."""
    rest, given = _SPLITS[name](edit, *args)
    return edit.call(dialect.get(rest).overload, *given)


def _split_and_lowered(name: str) -> Callable[..., tuple[fx.Node, ...]]:
    def lower(edit: Edit, *args: Any) -> tuple[fx.Node, ...]:
        rest, given = _SPLITS[name](edit, *args)
        return _ATEN[rest](edit, *given)

    return lower


def _bottleneck_grads(
    edit: Edit, grad: fx.Node, h: fx.Node, B: fx.Node, scale: fx.Node, dtype: torch.dtype
) -> tuple[fx.Node, ...]:
    return (*_bottleneck_grad(edit, grad, B, scale), *_factor_grad(edit, grad, h, dtype))


_ATEN: dict[str, Callable[..., tuple[fx.Node, ...]]] = {
    "lora_linear": _linear,
    "lora_bottleneck_grad": _bottleneck_grad,
    "lora_factor_grad": _factor_grad,
    "lora_input_grad": _input_grad,
    "lora_shrink": _shrink,
    "lora_expand": _expand,
    "lora_factor_grads": _factor_grads,
    "lora_input_grads": _input_grads,
    "lora_bottleneck_grads": _bottleneck_grads,
    **{name: _split_and_lowered(name) for name in _SPLITS},
}
