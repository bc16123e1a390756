"""Read a value once for the bottlenecks of all adapters that read it.

before:  %q:q, %h1 = lora_linear(%x, %y1, A:q, B:q, s:q, "r");   %q:k, %h2 = lora_linear(%x, %y2, A:k, B:k, s:k, "r")
after:   %h1, %h2 = lora_shrink(%x, [A:q, A:k], [s:q, s:k])
         %q:q = lora_expand(%y1, %h1, B:q);   %q:k = lora_expand(%y2, %h2, B:k)

Reassociates nothing: each bottleneck is the same sum. An adapter whose factors are made behind the first reader, as
those of several adapters that were joined, keeps its own product.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, cast

from torch import fx

from adaptc.ir import dialect
from adaptc.ir.edit import Edit, Result, Rewrite
from adaptc.ir.sites import lora_nodes, site_of
from adaptc.passes.contract import Context


def share_shrink(gm: fx.GraphModule, context: Context, result: Result) -> None:
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    for readers in _groups(gm):
        early = [node for node in readers if _is_known(node, order[readers[0]], order)]
        for node in (n for n in readers if n not in early):
            result.refuse(site_of(node), "its first factor is made after another site reads the same value")
        if len(early) < 2:
            continue
        if not context.spend(len(early) + 1):
            result.refused += [(site_of(node), "limit reached") for node in early]
            continue
        shrinks = [_split(gm, node, context, result) for node in early]
        result.applied.append(_join(gm, shrinks, record=context.record))


def _groups(gm: fx.GraphModule) -> list[list[fx.Node]]:
    """The adapters with their scale at the bottleneck that read one value, two at least, in graph order."""
    readers: dict[fx.Node, list[fx.Node]] = {}
    for node in lora_nodes(gm):
        x = node.args[0]
        if isinstance(x, fx.Node) and node.args[5] == "r":
            readers.setdefault(x, []).append(node)
    return [nodes for nodes in readers.values() if len(nodes) > 1]


def _is_known(node: fx.Node, place: int, order: Mapping[fx.Node, int]) -> bool:
    """Whether the first factor and the scale stand before ``place``."""
    return all(order[cast(fx.Node, node.args[i])] < place for i in (2, 4))


def _split(gm: fx.GraphModule, node: fx.Node, context: Context, result: Result) -> fx.Node:
    """Write the two products of a site as two nodes; returns the bottleneck."""
    x, y, A, B, scale, _ = node.args
    outputs = [user for user in node.users if user.target is operator.getitem]
    edit = Edit(gm, site_of(node), [node, *outputs], outputs, at=node, record=context.record)
    h = edit.item(edit.call(dialect.get("lora_shrink").overload, x, [A], [scale]), 0)
    new = (edit.call(dialect.get("lora_expand").overload, y, h, B), h)
    result.applied.append(edit.finish(*(new[output.args[1]] for output in outputs)))  # type: ignore[index]
    return h


def _join(gm: fx.GraphModule, bottlenecks: list[fx.Node], *, record: bool) -> Rewrite:
    calls = [cast(fx.Node, h.args[0]) for h in bottlenecks]
    matched = [node for call, h in zip(calls, bottlenecks, strict=True) for node in (call, h)]
    edit = Edit(gm, site_of(bottlenecks[0]), matched, bottlenecks, at=calls[0], record=record)
    factors, scales = ([cast(Any, call.args[i])[0] for call in calls] for i in (1, 2))
    wide = edit.call(dialect.get("lora_shrink").overload, calls[0].args[0], factors, scales)
    return edit.finish(*(edit.item(wide, i) for i in range(len(calls))))
