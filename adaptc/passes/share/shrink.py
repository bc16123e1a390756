"""Read a value once for the bottlenecks of all adapters that read it, each through its own dropout if it has one.

before:  %q:q, %h1 = lora_linear(%x, %y1, A:q, B:q, s:q, "r");   %q:k, %h2 = lora_linear(%x, %y2, A:k, B:k, s:k, "r")
after:   %h1, %h2 = lora_shrink(%x, [A:q, A:k], [s:q, s:k], [], [])
         %q:q = lora_expand(%y1, %h1, B:q);   %q:k = lora_expand(%y2, %h2, B:k)

before:  %h1 = lora_shrink(%x, [A:q], [s:q], [], []);   %h2 = lora_shrink(%x, [A:k], [s:k], [], [])
after:   %h1, %h2 = lora_shrink(%x, [A:q, A:k], [s:q, s:k], [], [])

before:  %d = seeded_dropout(%x, %seed, p);  %q:q, %h = lora_linear(%d, %y, A:q, B:q, s:q, "r")
after:   %h = lora_shrink(%x, [A:q], [s:q], [%seed], [p]);  %q:q = lora_expand(%y, %h, B:q)

Reassociates nothing: each bottleneck is the same sum. An adapter whose factors are made behind the first reader, as
those of several adapters that were joined, keeps its own product; one whose seed is drawn there, its own op.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, cast

from torch import fx

from adaptc.ir import dialect
from adaptc.ir.edit import Edit, Result, Rewrite
from adaptc.ir.sites import LORA_LINEAR, site_of
from adaptc.passes.contract import Context
from adaptc.passes.share.dropped import Dropped, dropouts_of, dropped, seeds_of


def share_shrink(gm: fx.GraphModule, context: Context, result: Result) -> None:
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    for is_dropped, readers in _groups(gm):
        while readers:
            early = [node for node in readers if _is_known(node, order[readers[0]], order)]
            late = [node for node in readers if node not in early]
            if not is_dropped:
                for node in late:
                    result.refuse(site_of(node), "its first factor is made after another site reads the same value")
            if is_dropped or len(early) > 1:
                _share(gm, early or readers[:1], context, result)
            readers = late[0 if early else 1 :] if is_dropped else []


def _share(gm: fx.GraphModule, readers: list[fx.Node], context: Context, result: Result) -> None:
    if not context.spend(len(readers) + (len(readers) > 1)):
        result.refused += [(site_of(node), "limit reached") for node in readers]
        return
    shrinks = [_split(gm, node, context, result) for node in readers]
    if len(shrinks) > 1:
        result.applied.append(_join(gm, shrinks, record=context.record))


def _groups(gm: fx.GraphModule) -> list[tuple[bool, list[fx.Node]]]:
    """The adapters with their scale at the bottleneck that read one value, and bottlenecks alone that do, in graph
    order; whether they drop some of it. Without dropout two at least."""
    readers: dict[tuple[bool, fx.Node], list[fx.Node]] = {}
    for node in gm.graph.nodes:
        if not (_is_bottleneck(node) or (node.target is LORA_LINEAR() and node.args[5] == "r")):
            continue
        if (x := _read_by(node)) is not None:
            readers.setdefault((x.dropout is not None, x.source), []).append(node)
    return [(is_dropped, nodes) for (is_dropped, _), nodes in readers.items() if is_dropped or len(nodes) > 1]


def _is_bottleneck(node: fx.Node) -> bool:
    """Whether the node makes one bottleneck, without dropout, and nothing else."""
    if node.target is not dialect.get("lora_shrink").overload:
        return False
    _, A, _, seeds, _ = cast(tuple[Any, ...], node.args)
    return len(A) == 1 and not seeds and len(node.users) == 1


def _read_by(node: fx.Node) -> Dropped | None:
    return Dropped(cast(fx.Node, node.args[0])) if _is_bottleneck(node) else dropped(node.args[0])


def _is_known(node: fx.Node, place: int, order: Mapping[fx.Node, int]) -> bool:
    """Whether the first factor, the scale and the seed stand before ``place``."""
    if _is_bottleneck(node):
        needed = node.all_input_nodes
    else:
        needed = [cast(fx.Node, node.args[i]) for i in (2, 4)]
        needed += seeds_of([cast(Dropped, dropped(node.args[0]))])[0]
    return all(order[one] < place for one in needed)


def _split(gm: fx.GraphModule, node: fx.Node, context: Context, result: Result) -> fx.Node:
    """Write the two products of a site as two nodes; returns the bottleneck."""
    if _is_bottleneck(node):
        (h,) = node.users
        return h
    x, y, A, B, scale, _ = node.args
    read = cast(Dropped, dropped(x))
    outputs = [user for user in node.users if user.target is operator.getitem]
    matched = [*dropouts_of([read]), node, *outputs]
    edit = Edit(gm, site_of(node), matched, outputs, at=node, record=context.record)
    shrink = edit.call(dialect.get("lora_shrink").overload, read.source, [A], [scale], *seeds_of([read]))
    h = edit.item(shrink, 0)
    new = (edit.call(dialect.get("lora_expand").overload, y, h, B), h)
    result.applied.append(edit.finish(*(new[output.args[1]] for output in outputs)))  # type: ignore[index]
    return h


def _join(gm: fx.GraphModule, bottlenecks: list[fx.Node], *, record: bool) -> Rewrite:
    calls = [cast(fx.Node, h.args[0]) for h in bottlenecks]
    matched = [node for call, h in zip(calls, bottlenecks, strict=True) for node in (call, h)]
    edit = Edit(gm, site_of(bottlenecks[0]), matched, bottlenecks, at=calls[0], record=record)
    lists = ([item for call in calls for item in cast(Any, call.args[i])] for i in (1, 2, 3, 4))
    wide = edit.call(dialect.get("lora_shrink").overload, calls[0].args[0], *lists)
    return edit.finish(*(edit.item(wide, i) for i in range(len(calls))))
