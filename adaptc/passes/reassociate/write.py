"""Write a site in another association order."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import fx

from adaptc.ir.edit import Edit
from adaptc.ir.origin import origin_of
from adaptc.ir.products import Product, views_down_to, without_views
from adaptc.ir.sums import ADD, flatten
from adaptc.passes.reassociate.site import Grads, InputGrad, Site
from adaptc.passes.walk import Match
from adaptc.torch_internals import node_value

aten = torch.ops.aten


def in_order(site: Site, plan: str) -> Match:
    """``plan``: "merge" or "dense"."""
    y, h, grads = site.output(0), site.output(1), site.grads
    matched = [*_read_by(site.product), *site.product.nodes, site.call, *(n for n in (y, h) if n is not None)]
    results = [] if y is None else [y]
    if grads is not None:
        matched += [grads.q, *((grads.da, grads.db) if plan == "dense" else ())]
        results += [grads.da, grads.db] if plan == "dense" else [cast(fx.Node, h)]
        if grads.dx is not None:
            dx = grads.dx
            matched += [*_read_by(dx.product), dx.own, *dx.product.nodes, *flatten(dx.root)[0]]
            results.append(dx.root)

    def write(edit: Edit) -> list[fx.Node]:
        right = _merged_right(edit, site)
        new = [] if y is None else [_product(edit, site.product, site.product.x, right)]
        if grads is not None:
            edit.position = min(grads.q, grads.db)
            new += _dense_grads(edit, site, grads) if plan == "dense" else [_bottleneck(edit, site)]
            if grads.dx is not None:
                new.append(_input_grad(edit, grads.dx, right))
        return new

    return Match(site.call, write, sorted({*matched}), results)


def _read_by(product: Product) -> list[fx.Node]:
    """The views and transposes that a frozen product reads: the adapter reads what they are of, and to check the
    rewrite one must be seen to be the other."""
    return [*views_down_to(product.x, without_views(product.x)), *views_down_to(product.right, product.weight)]


def _merged_right(edit: Edit, site: Site) -> fx.Node:
    """E as the frozen product's right operand (K, N)."""
    _, _, A, B = site.operands
    right, scale = site.product.right, site.call.args[4]
    transposed = node_value(right).is_contiguous()
    W = right if transposed else _turned(edit, right)
    E = edit.op("lora_merged_weight", W, A, B, scale, transposed)
    return E if transposed else _turned(edit, E)


def _turned(edit: Edit, node: fx.Node) -> fx.Node:
    return edit.call(aten.permute.default, node, [1, 0])


def _product(edit: Edit, old: Product, x: fx.Node, right: fx.Node) -> fx.Node:
    """The product ``old`` with another right operand, in the shape in which it was read."""
    arguments = (x, right) if old.bias is None else (old.bias, x, right)
    node = _call_instead(edit, old.node, old.node.target, *arguments)
    for view in old.views:
        node = _call_instead(edit, view, view.target, node, *view.args[1:])
    return node


def _call_instead(edit: Edit, old: fx.Node, target: Any, *args: Any) -> fx.Node:
    """A call that is what ``old`` was in its graph: the base model's."""
    with edit.in_place_of(origin_of(old)):
        return edit.call(target, *args)


def _bottleneck(edit: Edit, site: Site) -> fx.Node:
    """x A^T where the backward reads it: x is kept anyway."""
    x, _, A, _ = site.operands
    shrink = edit.op("lora_shrink", x, [A], [site.call.args[4]], [], [])
    return edit.item(shrink, 0)


def _dense_grads(edit: Edit, site: Site, grads: Grads) -> list[fx.Node]:
    x, _, A, B = site.operands
    dtype = node_value(A).dtype
    Z = edit.op("lora_factor_grad", grads.g, x, dtype)
    both = edit.op("lora_dense_grads", Z, A, B, site.call.args[4])
    return [edit.item(both, 0), edit.item(both, 1)]


def _input_grad(edit: Edit, dx: InputGrad, right: fx.Node) -> fx.Node:
    edit.position = dx.product.node
    product = _product(edit, dx.product, dx.product.x, _turned(edit, right))
    edit.position = dx.root
    terms = [product if term is dx.term else term for term in flatten(dx.root)[1] if term is not dx.own]
    total = terms[0]
    for term in terms[1:]:
        total = _call_instead(edit, dx.root, ADD, total, term)
    return total
