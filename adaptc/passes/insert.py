"""Replace every anchor by what its method means.

before:  %y2 = lora_site(%x, %y, %site_id, %A, %B, %scale, 0.05, True, None)
after:   %d  = dropout(%x, 0.05, True)
         %t  = lora_linear(%d, %y, %A, %B, %scale, "n");  %y2 = %t[0]

The casts that the anchor's body makes are written out. Exact: the op's body at scale_at "n" is the anchor's
reference. Recurses into the bodies of higher-order ops (checkpointed blocks); there a site id is traced to
the input that carries it.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from adaptc import methods
from adaptc.ir.edit import Edit, Result, nested
from adaptc.passes.contract import Context, Contract

CONTRACT = Contract(level="dynamo", numerics="exact", provides=frozenset({"inserted"}))


def insert(gm: fx.GraphModule, context: Context) -> Result:
    result = Result()
    _insert(gm, context, context.sites, result)
    return result


def _insert(gm: fx.GraphModule, context: Context, sites: Mapping[fx.Node, str], result: Result) -> None:
    anchors = methods.anchors()
    for node in list(gm.graph.nodes):
        anchor = anchors.get(node.target) if node.op == "call_function" else None
        if anchor is None:
            continue
        bound = anchor.bind(node)
        site = sites.get(bound["site_id"], "(unknown site)")
        if not context.spend():
            result.refuse(site, "limit reached")
            continue
        edit = Edit(gm, site, [node], [node], record=context.record)
        result.applied.append(edit.finish(anchor.expand(edit, **bound)))
    for _, body, operands in nested(gm):
        inner = {inside: sites[outside] for inside, outside in operands.items() if outside in sites}
        _insert(body, context, inner, result)
    gm.recompile()
