"""Make the frozen layers' part of an input's gradient and the adapters' in one op.

before:  %m1 = mm(%g1, W:q);  %m2 = mm(%g2, W:k);  %s = add(view(%m1), view(%m2))
         %dx = lora_input_grads(%s, [%q1, %q2], [A:q, A:k], [], [])
after:   %dx = lora_linear_input_grads([%g1, %g2], [W:q, W:k], [%q1, %q2], [A:q, A:k], [], [])

Reassociates nothing. Where a part of the gradient is another than such a product, all stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, cast

from torch import fx

from adaptc.ir.edit import Edit
from adaptc.ir.products import Product
from adaptc.ir.sites import calls_of, is_inserted, site_of
from adaptc.ir.sums import is_sum
from adaptc.ir.types import same_sizes
from adaptc.passes.fuse.products import CHECKPOINT, Fused, own_product
from adaptc.passes.walk import Match, Refusal
from adaptc.torch_internals import node_value


def fuse_inputs(gm: fx.GraphModule, fused: list[Fused]) -> Iterator[Match | Refusal]:
    for node in calls_of(gm, "lora_input_grads"):
        found = _match(node)
        if isinstance(found, str):
            yield Refusal(site_of(node), found)
        else:
            sums, products = found
            matched = sorted({*sums, node, *(n for one in products for n in one.nodes)})
            yield Match(node, partial(_write, node, products, fused), matched)


def _write(node: fx.Node, products: list[Product], fused: list[Fused], edit: Edit) -> fx.Node:
    pairs = [one.x for one in products], [one.right for one in products]
    new = edit.op("lora_linear_input_grads", *pairs, *node.args[1:])
    fused.append(Fused(new, new, node, products))
    return new


def _match(node: fx.Node) -> tuple[list[fx.Node], list[Product]] | str:
    """The additions and the products that the frozen layers' part of a gradient is made of."""
    total, q, *_ = cast(tuple[Any, ...], node.args)
    reader, sums = node, []
    terms: list[tuple[fx.Node, fx.Node]] = []
    while _is_sum(total):
        first, last = cast(tuple[fx.Node, fx.Node], total.args)
        terms.insert(0, (last, total))
        sums.append(total)
        reader, total = total, first
    found = [own_product(term, reader) for term, reader in ((total, reader), *terms)]
    if CHECKPOINT in found:
        return CHECKPOINT
    products = [one for one in found if isinstance(one, Product) and one.bias is None]
    alike = same_sizes(node_value(node).shape[:-1], node_value(q[0]).shape[:-1])
    if len(products) < len(found) or not alike:
        return "the gradient of its input is not made of products with frozen weights alone, or others read these"
    return sums, products


def _is_sum(node: fx.Node) -> bool:
    """An addition that ``share`` wrote and one node reads."""
    return is_sum(node) and is_inserted(node) and len(node.users) == 1
