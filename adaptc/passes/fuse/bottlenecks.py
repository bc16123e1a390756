"""Make both products that read the gradient of a site's output in one op.

before:  %q = lora_bottleneck_grad(%g, B, s);  ...;  %dB = lora_factor_grad(%g, %h, f32)
after:   %q, %dB = lora_bottleneck_grads(%g, %h, B, s, f32)

One of the two may read the gradient through a view. Reassociates nothing. The op stands where the first of them did.
"""

from __future__ import annotations

from typing import Any, cast

from torch import fx

from adaptc.ir import dialect
from adaptc.ir.edit import Edit, Result
from adaptc.ir.products import without_views
from adaptc.ir.sites import site_of
from adaptc.ir.types import same_sizes
from adaptc.passes.contract import Context
from adaptc.torch_internals import node_value


def fuse_bottlenecks(gm: fx.GraphModule, context: Context, result: Result) -> None:
    factors: dict[fx.Node, list[fx.Node]] = {}
    for node in gm.graph.find_nodes(op="call_function", target=dialect.get("lora_factor_grad").overload):
        factors.setdefault(without_views(cast(fx.Node, node.args[0])), []).append(node)
    for node in list(gm.graph.find_nodes(op="call_function", target=dialect.get("lora_bottleneck_grad").overload)):
        others = factors.get(without_views(cast(fx.Node, node.args[0])), [])
        other = next((one for one in others if _is_pair(node, one)), None)
        if other is None:
            continue
        others.remove(other)
        pair = sorted((node, other))
        if any(pair[0] < needed for needed in (*node.all_input_nodes, *other.all_input_nodes)):
            result.refuse(site_of(node), "its second factor's gradient reads what is made behind the bottleneck's")
            continue
        if not context.spend():
            result.refuse(site_of(node), "limit reached")
            continue
        (grad, B, scale), (_, h, dtype) = node.args, other.args
        edit = Edit(gm, site_of(node), pair, [node, other], at=pair[0], record=context.record)
        both = edit.call(dialect.get("lora_bottleneck_grads").overload, grad, h, B, scale, dtype)
        result.applied.append(edit.finish(edit.item(both, 0), edit.item(both, 1)))


def _is_pair(bottleneck: fx.Node, factor: fx.Node) -> bool:
    """Whether both read the rows of one gradient, for one site and of one rank."""
    (grad, B, _), (left, h, _) = (cast(tuple[Any, ...], node.args) for node in (bottleneck, factor))
    alike = [(node_value(a).shape[-1:], node_value(b).shape[-1:]) for a, b in ((grad, left), (B, h))]
    return site_of(bottleneck) == site_of(factor) and all(same_sizes(*pair) for pair in alike)
