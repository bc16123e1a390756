"""Accumulate into a product where it is, on the graphs that Inductor is about to lower.

before:  %y = mm(%x, %W);  %out = addmm(%y, %h, %B);  f(%out)        the library copies y, then adds to the copy
after:   %y = mm(%x, %W);  add_product_(%y, %h, %B);  f(%y)

and the same for ``lora_input_grads(%dx, ...)``. Where nothing else reads the first product, and it has the shape of
the second; on the CPU, where it was measured. After partitioning, because what runs before that must be functional. The
op returns nothing: Inductor takes the result of ``addmm_`` for another buffer than its argument, and gives its memory
away while the other is still read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from adaptc.codegen.torch_internals import OpOverload, node_value, tree_leaves
from adaptc.ir import dialect
from adaptc.ir.lora_split import add_input_grads

aten = torch.ops.aten
_PRODUCTS = (aten.mm.default, aten.addmm.default)
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


def _add_product_(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    total.addmm_(left, right)


_LIBRARY = torch.library.Library("adaptc_lowered", "DEF")  # type: ignore[no-untyped-call]


def _define(name: str, arguments: str, function: Callable[..., None]) -> OpOverload:
    schema = f"(Tensor(a!) total, {arguments}) -> ()"
    torch.library.define(f"adaptc_lowered::{name}", schema, lib=_LIBRARY, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(f"adaptc_lowered::{name}", "CPU", function, lib=_LIBRARY)
    torch.library.register_fake(f"adaptc_lowered::{name}", lambda *arguments: None, lib=_LIBRARY)
    return cast(OpOverload, getattr(torch.ops.adaptc_lowered, name).default)


ADD_PRODUCT = _define("add_product_", "Tensor left, Tensor right", _add_product_)
ADD_PRODUCTS = _define("add_products_", "Tensor[] left, Tensor[] right, Tensor[] seeds, float[] p", add_input_grads)


def accumulate_in_place(graph: fx.Graph) -> int:
    """Rewrite ``graph``; returns how many sums are made in place now."""
    in_place = {aten.addmm.default: ADD_PRODUCT, dialect.get("lora_input_grads").overload: ADD_PRODUCTS}
    count = 0
    for node in graph.nodes:
        if node.target not in in_place or node.kwargs:
            continue
        views, *rest = cast(tuple[fx.Node, ...], node.args)
        product = _owned_product(views)
        if product is None or not _same_memory(product, node):
            continue
        if views in tree_leaves(rest):  # y + y W: one reader, which needs the product as it was
            continue
        with graph.inserting_before(node):
            graph.call_function(in_place[node.target], (product, *rest)).meta = {**node.meta, "val": None}
            total = _viewed(graph, product, views)
        node.replace_all_uses_with(total)
        graph.erase_node(node)
        while views is not product:
            views, dead = cast(fx.Node, views.args[0]), views
            graph.erase_node(dead)
        count += 1
    return count


def _owned_product(node: fx.Node) -> fx.Node | None:
    """The product whose memory ``node`` is, when one node alone reads it, directly or through views."""
    while node.target in _VIEWS and len(node.users) == 1:
        node = cast(fx.Node, node.args[0])
    readers = [user for user in node.users if user.target not in (ADD_PRODUCT, ADD_PRODUCTS)]
    return node if node.target in _PRODUCTS and len(readers) == 1 else None


def _same_memory(product: fx.Node, total: fx.Node) -> bool:
    """Whether both are contiguous on the CPU, of one dtype and, as rows, of one shape."""
    first, second = node_value(product), node_value(total)
    if not (isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)):
        return False
    if first.device.type != "cpu" or not (first.is_contiguous() and second.is_contiguous()):
        return False
    rows = (second.shape[:-1].numel(), second.shape[-1])
    return first.dtype == second.dtype and all(
        statically_known_true(a == b) for a, b in zip(first.shape, rows, strict=True)
    )


def _viewed(graph: fx.Graph, product: fx.Node, views: fx.Node) -> fx.Node:
    """``product`` in the shape of ``views``, behind the sum: who reads it reads what the sum left there."""
    if node_value(views).dim() == 2:
        return product
    view = graph.call_function(aten.view.default, (product, *views.args[1:]))
    view.meta = dict(views.meta)
    return view
