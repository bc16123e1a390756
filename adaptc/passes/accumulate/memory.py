"""Whose memory a value is, and how a result comes to be made in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from adaptc.codegen.ops.in_place import ADD_PRODUCT, ADD_PRODUCTS, LORA_ROWS
from adaptc.ir import dialect
from adaptc.ir.edit import Edit
from adaptc.torch_internals import OpOverload, demand_layouts, node_value, size_hint, tree_leaves, writes_products

aten = torch.ops.aten
_PRODUCTS = (aten.mm.default, aten.addmm.default, dialect.get("onednn_linear").overload)
_LOOPS = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.clone.default)
#: Bytes on a GPU below which the copy may cost less than Python does around a call of an op.
_WORTH_A_CALL = 1 << 24
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


def add(edit: Edit, op: Callable[..., Any], args: tuple[Any, ...], meta: Mapping[str, Any]) -> fx.Node:
    """Add a call of which ``meta`` says everything."""
    with edit.gm.graph.inserting_before(edit.position):
        node = edit.gm.graph.call_function(op, args)
    node.meta = dict(meta)
    edit.new_nodes.append(node)
    return node


def call(edit: Edit, op: OpOverload, args: tuple[Any, ...], instead_of: fx.Node, value: Any) -> fx.Node:
    """Add a call of ``op`` that knows what ``instead_of`` does, with the layouts of its own arguments."""
    node = add(edit, op, args, {**instead_of.meta, "val": value})
    demand_layouts(node)
    return node


def view(edit: Edit, memory: fx.Node, views: fx.Node) -> fx.Node:
    """``memory`` in the shape of ``views``: who reads it reads what was left there."""
    return memory if views is memory else add(edit, aten.view.default, (memory, *views.args[1:]), views.meta)


def owned(node: fx.Node, makes: Callable[[fx.Node], bool]) -> fx.Node | None:
    """The node whose result ``node`` is the memory of, if it ``makes`` one that nothing else reads, directly or through
    views."""
    while node.target in _VIEWS and len(node.users) == 1:
        node = cast(fx.Node, node.args[0])
    readers = [user for user in node.users if not _only_adds_to(user, node)]
    return node if makes(node) and len(readers) == 1 else None


def _only_adds_to(user: fx.Node, total: fx.Node) -> bool:
    """Whether ``user`` is a sum in the memory of ``total``, which it does not read as a factor too."""
    is_sum = user.target in (ADD_PRODUCT, ADD_PRODUCTS, LORA_ROWS) and user.args[0] is total
    return is_sum and total not in tree_leaves(user.args[1:])


def is_product(node: fx.Node) -> bool:
    return node.target in _PRODUCTS


def is_new(node: fx.Node) -> bool:
    """Whether a node's memory is no other's: a product's, or what a loop over elements writes. A cast to the dtype that
    a value has is the value itself."""
    if node.target is not torch.ops.prims.convert_element_type.default:
        return node.target in (*_PRODUCTS, *_LOOPS)
    return bool(node_value(node).dtype != node_value(cast(fx.Node, node.args[0])).dtype)


def is_dense(node: fx.Node) -> bool:
    value = node_value(node)
    return isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.is_contiguous()


def same_memory(product: fx.Node, total: fx.Node) -> bool:
    """Whether both are contiguous where sums in place are worth it, of one dtype, and of one shape or the first of that
    of the second as rows."""
    first, second = node_value(product), node_value(total)
    if not (isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)) or second.dim() == 0:
        return False
    if not (_is_worth_it(first) and first.is_contiguous() and second.is_contiguous()):
        return False
    rows = torch.Size((math.prod(second.shape[:-1]), second.shape[-1]))
    return first.dtype == second.dtype and any(_equal(first.shape, shape) for shape in (second.shape, rows))


def _is_worth_it(total: torch.Tensor) -> bool:
    """Whether adding to ``total`` where it is saves time."""
    if total.device.type == "cpu":
        return True
    size = math.prod(size_hint(s) for s in total.shape) * total.dtype.itemsize
    return total.device.type == "cuda" and size >= _WORTH_A_CALL and not writes_products()


def same_shape(one: fx.Node, other: fx.Node) -> bool:
    return _equal(node_value(one).shape, node_value(other).shape)


def _equal(first: torch.Size, second: torch.Size) -> bool:
    return len(first) == len(second) and all(
        statically_known_true(a == b) for a, b in zip(first, second, strict=True)
    )
