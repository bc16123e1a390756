"""Make the frozen layer's product and the correction that is added to it in one op.

before:  %m = addmm(b, %x, %W^T);  %y = view(%m);  %q = lora_expand(%y, %h, B)
after:   %q = lora_linear_expand(%x, %W^T, b, %h, B)

before:  %y = mm(%x, %W^T);  %q, %h = lora_linear(%x, %y, A, B, s, "r")
after:   %h = lora_shrink(%x, [A], [s], [], []);  %q = lora_linear_expand(%x, %W^T, None, %h, B)

Reassociates nothing: the product is rounded before the correction is added, as it was. Where something else reads the
frozen layer's output it stays, and so does its correction.
"""

from __future__ import annotations

import operator
from typing import Any, cast

from torch import fx

from adaptc.ir import dialect
from adaptc.ir.edit import Edit, Result
from adaptc.ir.products import Product
from adaptc.ir.sites import LORA_LINEAR, site_of
from adaptc.ir.types import same_sizes
from adaptc.passes.contract import Context
from adaptc.passes.fuse.products import Fused, origins_of, own_product
from adaptc.torch_internals import node_value


def fuse_outputs(gm: fx.GraphModule, context: Context, result: Result, fused: list[Fused]) -> None:
    for node in list(gm.graph.nodes):
        if node.target not in (dialect.get("lora_expand").overload, LORA_LINEAR()):
            continue
        if node.target is LORA_LINEAR() and not any(_takes(user, 0) for user in node.users):
            continue
        found = _match(node)
        if isinstance(found, str):
            result.refuse(site_of(node), found)
        elif not context.spend():
            result.refuse(site_of(node), "limit reached")
        else:
            _fuse(gm, node, found, context, result, fused)


def _match(node: fx.Node) -> Product | str:
    args = cast(tuple[Any, ...], node.args)
    # Of a lora_linear the bottleneck has the leading dimensions of x.
    lead, y = args[:2] if node.target is LORA_LINEAR() else (args[1], args[0])
    if node.target is LORA_LINEAR() and args[5] != "r":
        return "its scale multiplies the output and not the bottleneck"
    if not same_sizes(node_value(y).shape[:-1], node_value(lead).shape[:-1]):
        return "its frozen layer's output has other leading dimensions than its bottleneck"
    return own_product(y, node)


def _fuse(
    gm: fx.GraphModule, node: fx.Node, found: Product, context: Context, result: Result, fused: list[Fused]
) -> None:
    outputs = [user for user in node.users if user.target is operator.getitem] if node.target is LORA_LINEAR() else []
    matched, origins = [*found.nodes, node, *outputs], origins_of([found])
    edit = Edit(gm, site_of(node), matched, outputs or [node], at=node, record=context.record)
    if outputs:
        x, _, A, B, scale, _ = node.args
        h = edit.item(edit.call(dialect.get("lora_shrink").overload, x, [A], [scale], [], []), 0)
    else:
        _, h, B = cast(tuple[Any, ...], node.args)
    new = edit.call(dialect.get("lora_linear_expand").overload, found.x, found.right, found.bias, h, B)
    fused.append(Fused(new, edit.new_nodes[0], node, (found.node,), origins))
    results = [(new, h)[cast(int, output.args[1])] for output in outputs] or [new]
    result.applied.append(edit.finish(*results))


def _takes(user: fx.Node, index: int) -> bool:
    return user.target is operator.getitem and user.args[1:] == (index,)
