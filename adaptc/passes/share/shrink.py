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

from collections.abc import Iterator
from typing import Any, cast

from torch import fx

from adaptc.ir import dialect
from adaptc.ir.edit import Edit
from adaptc.ir.sites import LORA_LINEAR, items_of, site_of
from adaptc.passes.contract import Context
from adaptc.passes.share.dropped import Dropped, dropouts_of, dropped, seeds_of
from adaptc.passes.walk import Found, Match, Refusal, Together


def share_shrink(gm: fx.GraphModule, context: Context) -> Iterator[Found]:
    for is_dropped, readers in _groups(gm):
        while readers:
            early = [node for node in readers if _is_known(node, readers[0])]
            late = [node for node in readers if node not in early]
            if not is_dropped:
                reason = "its first factor is made after another site reads the same value"
                yield from (Refusal(site_of(node), reason) for node in late)
            if is_dropped or len(early) > 1:
                group = early or readers[:1]
                yield Together([site_of(node) for node in group], _share(group), len(group) + (len(group) > 1))
            readers = late[0 if early else 1 :] if is_dropped else []


def _share(readers: list[fx.Node]) -> Iterator[Match]:
    bottlenecks: list[fx.Node] = []
    for node in readers:
        if _is_bottleneck(node):
            bottlenecks += node.users
        else:
            yield _split(node, bottlenecks)
    if len(bottlenecks) > 1:
        yield _join(bottlenecks)


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


def _is_known(node: fx.Node, place: fx.Node) -> bool:
    """Whether the first factor, the scale and the seed stand before ``place``."""
    if _is_bottleneck(node):
        needed = node.all_input_nodes
    else:
        needed = [cast(fx.Node, node.args[i]) for i in (2, 4)]
        needed += seeds_of([cast(Dropped, dropped(node.args[0]))])[0]
    return all(one < place for one in needed)


def _split(node: fx.Node, bottlenecks: list[fx.Node]) -> Match:
    """The two products of a site as two nodes, of which the bottleneck is added to ``bottlenecks``."""
    x, y, A, B, scale, _ = node.args
    read = cast(Dropped, dropped(x))
    outputs = items_of(node)

    def write(edit: Edit) -> list[fx.Node]:
        h = edit.item(edit.op("lora_shrink", read.source, [A], [scale], *seeds_of([read])), 0)
        bottlenecks.append(h)
        new = (edit.op("lora_expand", y, h, B), h)
        return [new[cast(int, output.args[1])] for output in outputs]

    return Match(node, write, [*dropouts_of([read]), node, *outputs], outputs)


def _join(bottlenecks: list[fx.Node]) -> Match:
    calls = [cast(fx.Node, h.args[0]) for h in bottlenecks]
    lists = [[item for call in calls for item in cast(Any, call.args[i])] for i in (1, 2, 3, 4)]

    def write(edit: Edit) -> list[fx.Node]:
        wide = edit.op("lora_shrink", calls[0].args[0], *lists)
        return [edit.item(wide, i) for i in range(len(calls))]

    matched = [node for call, h in zip(calls, bottlenecks, strict=True) for node in (call, h)]
    return Match(calls[0], write, matched, bottlenecks)
