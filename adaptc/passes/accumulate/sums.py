"""Sums of products in the memory of the first."""

from __future__ import annotations

from typing import cast

import torch
from torch import fx

from adaptc.codegen.ops.in_place import ADD_PRODUCT, ADD_PRODUCTS
from adaptc.ir import dialect
from adaptc.ir.edit import Result
from adaptc.ir.sites import site_of
from adaptc.passes.accumulate.memory import Change, is_new, is_product, owned, same_memory, same_shape
from adaptc.passes.contract import Context
from adaptc.torch_internals import node_value, tree_leaves

aten = torch.ops.aten
_IN_PLACE = {aten.addmm.default: ADD_PRODUCT, dialect.get("lora_input_grads").overload: ADD_PRODUCTS}


def add_products(gm: fx.GraphModule, context: Context, result: Result) -> None:
    """Those of factors, to what a product or a loop has just made."""
    for node in gm.graph.nodes:
        if node.target not in _IN_PLACE or node.kwargs:
            continue
        views, *rest = cast(tuple[fx.Node, ...], node.args)
        product = owned(views, is_new)
        if product is None or not (same_memory(product, node) and same_shape(views, node)):
            continue
        if views in tree_leaves(rest):  # y + y W: one reader, which needs the product as it was
            continue
        if not context.spend():
            result.refuse(site_of(node), "limit reached")
            continue
        change = Change(gm, node)
        with gm.graph.inserting_before(node):
            change.call(_IN_PLACE[node.target], (product, *rest), node, None)
            total = _viewed(change, product, views)
        change.replace(node, total)
        change.erase_views(views, product)
        result.applied.append(change.finish())


def sum_products(gm: fx.GraphModule, context: Context, result: Result) -> None:
    """Of the base model, as the gradients of one input are."""
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    for node in gm.graph.find_nodes(op="call_function", target=aten.add.Tensor):
        if node.kwargs or not all(isinstance(arg, fx.Node) for arg in node.args):
            continue
        pairs = [(views, product) for views in node.args if (product := owned(views, is_product)) is not None]
        if len(pairs) < 2 or pairs[0][1] is pairs[1][1]:
            continue
        (views, total), (folded_views, folded) = sorted(pairs, key=lambda pair: order[pair[1]])
        is_plain = folded.target is aten.mm.default and len(folded.users) == 1
        # A matrix that is broadcast to a batch of one has another shape than the sum.
        alike = same_shape(views, node) and same_memory(total, node) and same_memory(folded, node)
        if not (is_plain and alike):
            continue
        value = node_value(node)
        if value.dtype.itemsize < 4 or value.device.type != "cpu":  # rounded once each, as without an adapter
            continue
        if not context.spend():
            result.refuse(site_of(node), "limit reached")
            continue
        change = Change(gm, node)
        with gm.graph.inserting_before(folded):
            change.call(ADD_PRODUCT, (total, *folded.args), folded, None)
        with gm.graph.inserting_before(node):
            viewed = _viewed(change, total, views)
        change.replace(node, viewed)
        change.erase_views(views, total)
        change.erase_views(folded_views, folded)
        change.erase(folded)
        result.applied.append(change.finish())


def _viewed(change: Change, product: fx.Node, views: fx.Node) -> fx.Node:
    """``product`` in the shape of ``views``, behind the sum."""
    return product if node_value(views).dim() == 2 else change.view(product, views)
