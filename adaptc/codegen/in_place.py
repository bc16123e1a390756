"""Accumulate into a product where it is, on the graphs that Inductor is about to lower.

before:  %y = mm(%x, %W);  %out = addmm(%y, %h, %B);  f(%out)        the library copies y, then adds to the copy
after:   %y = mm(%x, %W);  add_product_(%y, %h, %B);  f(%y)

Where nothing else reads the first product, and it has the shape of the second; on the CPU, where it was measured. After
partitioning, because what runs before that must be functional. The op returns nothing: Inductor takes the result of
``addmm_`` for another buffer than its argument, and gives its memory away while the other is still read.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import fx

from adaptc.codegen.torch_internals import node_value
from adaptc.ir.structure import same_type

aten = torch.ops.aten
_PRODUCTS = (aten.mm.default, aten.addmm.default)
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


def _add_product_(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    total.addmm_(left, right)


_LIBRARY = torch.library.Library("adaptc_lowered", "DEF")  # type: ignore[no-untyped-call]
_NAME = "adaptc_lowered::add_product_"
_SCHEMA = "(Tensor(a!) total, Tensor left, Tensor right) -> ()"
torch.library.define(_NAME, _SCHEMA, lib=_LIBRARY, tags=torch.Tag.pt2_compliant_tag)
torch.library.impl(_NAME, "CPU", _add_product_, lib=_LIBRARY)
torch.library.register_fake(_NAME, lambda total, left, right: None, lib=_LIBRARY)
ADD_PRODUCT = torch.ops.adaptc_lowered.add_product_.default


def accumulate_in_place(graph: fx.Graph) -> int:
    """Rewrite ``graph``; returns how many sums are made in place now."""
    count = 0
    for node in graph.find_nodes(op="call_function", target=aten.addmm.default):
        views, left, right = cast(tuple[fx.Node, ...], node.args)
        product = _owned_product(views)
        if product is None or node.kwargs or not _same_memory(product, node):
            continue
        if views in (left, right):  # y + y W: one reader, which needs the product as it was
            continue
        with graph.inserting_before(node):
            graph.call_function(ADD_PRODUCT, (product, left, right)).meta = {**node.meta, "val": None}
        node.replace_all_uses_with(product)
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
    readers = [user for user in node.users if user.target is not ADD_PRODUCT]
    return node if node.target in _PRODUCTS and len(readers) == 1 else None


def _same_memory(product: fx.Node, total: fx.Node) -> bool:
    """Whether both are contiguous tensors of one shape and dtype on the CPU."""
    first, second = node_value(product), node_value(total)
    if not (isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)):
        return False
    if first.device.type != "cpu" or not (first.is_contiguous() and second.is_contiguous()):
        return False
    return same_type(first, second)
