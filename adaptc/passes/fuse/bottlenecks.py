"""Make both products that read the gradient of a site's output in one op.

before:  %q = lora_bottleneck_grad(%g, B, s);  ...;  %dB = lora_factor_grad(%g, %h, f32)
after:   %q, %dB = lora_bottleneck_grads(%g, %h, B, s, f32)

One of the two may read the gradient through a view. Reassociates nothing. The op stands where the first of them did.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, cast

from torch import fx

from adaptc.ir.edit import Edit
from adaptc.ir.products import without_views
from adaptc.ir.sites import calls_of, site_of
from adaptc.ir.types import same_sizes
from adaptc.passes.walk import Match, Refusal
from adaptc.torch_internals import node_value


def fuse_bottlenecks(gm: fx.GraphModule) -> Iterator[Match | Refusal]:
    factors: dict[fx.Node, list[fx.Node]] = {}
    for node in calls_of(gm, "lora_factor_grad"):
        factors.setdefault(without_views(cast(fx.Node, node.args[0])), []).append(node)
    for node in calls_of(gm, "lora_bottleneck_grad"):
        others = factors.get(without_views(cast(fx.Node, node.args[0])), [])
        other = next((one for one in others if _is_pair(node, one)), None)
        if other is None:
            continue
        others.remove(other)
        pair = sorted((node, other))
        if any(pair[0] < needed for needed in (*node.all_input_nodes, *other.all_input_nodes)):
            reason = "its second factor's gradient reads what is made behind the bottleneck's"
            yield Refusal(site_of(node), reason)
        else:
            yield Match(pair[0], partial(_write, node, other), pair, [node, other])


def _write(bottleneck: fx.Node, factor: fx.Node, edit: Edit) -> list[fx.Node]:
    (grad, B, scale), (_, h, dtype) = bottleneck.args, factor.args
    both = edit.op("lora_bottleneck_grads", grad, h, B, scale, dtype)
    return [edit.item(both, 0), edit.item(both, 1)]


def _is_pair(bottleneck: fx.Node, factor: fx.Node) -> bool:
    """Whether both read the rows of one gradient, for one site and of one rank."""
    (grad, B, _), (left, h, _) = (cast(tuple[Any, ...], node.args) for node in (bottleneck, factor))
    alike = [(node_value(a).shape[-1:], node_value(b).shape[-1:]) for a, b in ((grad, left), (B, h))]
    return site_of(bottleneck) == site_of(factor) and all(same_sizes(*pair) for pair in alike)
