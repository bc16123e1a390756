"""Compute a LoRA layer in the association order that is the fastest for its shape.

before:  %y = mm(%x, W^T);  %y2, %h = lora_linear(%x, %y, A, B, s, "r")
         %q = lora_bottleneck_grad(%g, B, s);  %dB = lora_factor_grad(%g, %h);  %dA = lora_factor_grad(%q, %x)
         %a = lora_input_grad(%q, A);  %b = mm(%g, W);  %dx = add(%a, %b)
after:   %E = lora_merged_weight(W, A, B, s);  %y2 = mm(%x, %E^T)                             "merge", in the backward:
         %h = lora_shrink(%x, A, s);  %q, %dB, %dA as before;  %dx = mm(%g, %E)
or       %Z = lora_factor_grad(%g, %x);  %dA, %dB = lora_dense_grads(%Z, A, B, s);  %dx = mm(%g, %E)        "dense"

``codegen.orders`` says which is the fastest for as many rows as the graph was captured with. E is made again for the
backward.

Legal where nothing is dropped, weight and factors are of one dtype of 32 bits or more (a smaller one would round the
correction away beside the weight), and nothing else reads the frozen layer's output.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from torch import fx

from adaptc.codegen import orders
from adaptc.codegen.choices import Choice
from adaptc.ir.edit import Result
from adaptc.ir.sites import lora_nodes, site_of
from adaptc.passes.contract import Context, Contract
from adaptc.passes.reassociate.site import Site, read
from adaptc.passes.reassociate.write import in_order
from adaptc.passes.walk import Match, Refusal, everywhere
from adaptc.torch_internals import node_value, product_precision, size_hint

CONTRACT = Contract(level="joint", numerics="reassociates", conflicts=frozenset({"shared", "fused", "aten"}))


def reassociate(gm: fx.GraphModule, context: Context) -> Result:
    return everywhere(gm, (_reassociate,), context)


def _reassociate(gm: fx.GraphModule, context: Context) -> Iterator[Match | Refusal]:
    for node in lora_nodes(gm):
        site = read(node)
        reason = site if isinstance(site, str) else _illegal(site)
        if not isinstance(site, Site) or reason is not None:
            if orders.could_gain(_layer_of(node)):
                yield Refusal(site_of(node), str(reason))
            continue
        choice = _choose(site)
        if choice is None:
            continue
        context.choices.append(dataclasses.replace(choice, sites=(site_of(node),)))
        if choice.chosen != choice.usual:
            yield in_order(site, choice.chosen)


def _illegal(site: Site) -> str | None:
    if site.grads is None and not isinstance(node_value(site.product.node).shape[0], int):
        return "the number of rows is not fixed: a prompt's may be followed by single ones"
    _, _, A, B = site.operands
    values = [node_value(n) for n in (site.product.node, site.product.right, A, B)]
    if len({value.dtype for value in values}) > 1:
        return "weight, factors and output are not of one dtype"
    if values[0].dtype.itemsize < 4 or product_precision(values[0].device.type, values[0].dtype) != "ieee":
        return "a weight with its correction would be rounded to fewer digits than fp32 has, and lose it"
    return None


def _layer_of(node: fx.Node) -> orders.Layer:
    """The layer of a ``lora_linear`` node, as of one that is trained in full."""
    y, A, B = (node_value(node.args[i]) for i in (1, 2, 3))  # type: ignore[arg-type]
    k, n, r = (size_hint(size) for size in (A.shape[1], *B.shape))
    return orders.Layer(math.prod(map(size_hint, y.shape[:-1])), k, n, r, trained=True, input_grad=True)


def _choose(site: Site) -> Choice | None:
    value = node_value(site.product.node)
    input_grad = site.grads is not None and site.grads.dx is not None
    return orders.choose(orders.Layer(*site.sizes, site.grads is not None, input_grad), value.dtype, value.device)
