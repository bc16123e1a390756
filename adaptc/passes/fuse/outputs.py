"""Make the frozen layer's product and the correction that is added to it in one op.

before:  %m = addmm(b, %x, %W^T);  %y = view(%m);  %q = lora_expand(%y, %h, B)
after:   %q = lora_linear_expand(%x, %W^T, b, %h, B)

before:  %y = mm(%x, %W^T);  %q, %h = lora_linear(%x, %y, A, B, s, "r")
after:   %h = lora_shrink(%x, [A], [s], [], []);  %q = lora_linear_expand(%x, %W^T, None, %h, B)

Reassociates nothing: the product is rounded before the correction is added, as it was. Where something else reads the
frozen layer's output it stays, and so does its correction.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, cast

from torch import fx

from adaptc.ir import dialect
from adaptc.ir.edit import Edit
from adaptc.ir.products import Product
from adaptc.ir.sites import LORA_LINEAR, items_of, site_of
from adaptc.ir.types import same_sizes
from adaptc.passes.fuse.products import Fused, own_product
from adaptc.passes.walk import Match, Refusal
from adaptc.torch_internals import node_value


def fuse_outputs(gm: fx.GraphModule, fused: list[Fused]) -> Iterator[Match | Refusal]:
    for node in list(gm.graph.nodes):
        if node.target not in (dialect.get("lora_expand").overload, LORA_LINEAR()):
            continue
        outputs = items_of(node) if node.target is LORA_LINEAR() else []
        if node.target is LORA_LINEAR() and not any(output.args[1] == 0 for output in outputs):
            continue
        product = _product(node)
        if isinstance(product, str):
            yield Refusal(site_of(node), product)
        else:
            write = partial(_write, node, product, outputs, fused)
            yield Match(node, write, [*product.nodes, node, *outputs], outputs or [node])


def _product(node: fx.Node) -> Product | str:
    args = cast(tuple[Any, ...], node.args)
    # Of a lora_linear the bottleneck has the leading dimensions of x.
    lead, y = args[:2] if node.target is LORA_LINEAR() else (args[1], args[0])
    if node.target is LORA_LINEAR() and args[5] != "r":
        return "its scale multiplies the output and not the bottleneck"
    if not same_sizes(node_value(y).shape[:-1], node_value(lead).shape[:-1]):
        return "its frozen layer's output has other leading dimensions than its bottleneck"
    return own_product(y, node)


def _write(
    node: fx.Node, product: Product, outputs: list[fx.Node], fused: list[Fused], edit: Edit
) -> fx.Node | list[fx.Node]:
    if outputs:
        x, _, A, B, scale, _ = node.args
        h = edit.item(edit.op("lora_shrink", x, [A], [scale], [], []), 0)
    else:
        _, h, B = cast(tuple[Any, ...], node.args)
    new = edit.op("lora_linear_expand", product.x, product.right, product.bias, h, B)
    fused.append(Fused(new, edit.new_nodes[0], node, [product]))
    return [(new, h)[cast(int, output.args[1])] for output in outputs] or new
