"""Sums of products in the memory of the first."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import fx

from adaptc.codegen.ops.in_place import ADD_PRODUCT, ADD_PRODUCTS
from adaptc.ir import dialect
from adaptc.ir.edit import Edit
from adaptc.ir.products import views_down_to
from adaptc.passes.accumulate.memory import call, is_new, is_product, owned, same_memory, same_shape, view
from adaptc.passes.walk import Match, each
from adaptc.torch_internals import OpOverload, node_value, tree_leaves

aten = torch.ops.aten
_IN_PLACE: dict[Any, OpOverload] = {
    aten.addmm.default: ADD_PRODUCT, dialect.get("lora_input_grads").overload: ADD_PRODUCTS,
}  # fmt: skip


@each(lambda gm: gm.graph.nodes)
def add_products(node: fx.Node) -> Match | None:
    """Those of factors, to what a product or a loop has just made."""
    op = _IN_PLACE.get(node.target)
    if op is None or node.kwargs:
        return None
    views, *rest = cast(tuple[fx.Node, ...], node.args)
    product = owned(views, is_new)
    if product is None or not (same_memory(product, node) and same_shape(views, node)):
        return None
    if views in tree_leaves(rest):  # y + y W: one reader, which needs the product as it was
        return None

    def write(edit: Edit) -> fx.Node:
        call(edit, op, (product, *rest), node, None)
        return _viewed(edit, product, views)

    return Match(node, write, [*views_down_to(views, product), node])


@each(lambda gm: gm.graph.find_nodes(op="call_function", target=aten.add.Tensor))
def sum_products(node: fx.Node) -> Match | None:
    """Of the base model, as the gradients of one input are."""
    if node.kwargs or not all(isinstance(arg, fx.Node) for arg in node.args):
        return None
    terms = cast(tuple[fx.Node, ...], node.args)
    pairs = [(views, product) for views in terms if (product := owned(views, is_product)) is not None]
    if len(pairs) < 2 or pairs[0][1] is pairs[1][1]:
        return None
    (views, total), (folded_views, folded) = sorted(pairs, key=lambda pair: pair[1])
    is_plain = folded.target is aten.mm.default and len(folded.users) == 1
    # A matrix that is broadcast to a batch of one has another shape than the sum.
    alike = same_shape(views, node) and same_memory(total, node) and same_memory(folded, node)
    value = node_value(node)
    if not (is_plain and alike) or value.dtype.itemsize < 4 or value.device.type != "cpu":
        return None  # in 16 bits rounded once each, as without an adapter

    def write(edit: Edit) -> fx.Node:
        edit.position = folded
        call(edit, ADD_PRODUCT, (total, *folded.args), folded, None)
        edit.position = node
        return _viewed(edit, total, views)

    matched = [*views_down_to(views, total), folded, *views_down_to(folded_views, folded), node]
    return Match(node, write, sorted(matched))


def _viewed(edit: Edit, product: fx.Node, views: fx.Node) -> fx.Node:
    """``product`` in the shape of ``views``, behind the sum."""
    return product if node_value(views).dim() == 2 else view(edit, product, views)
