"""Replace every anchor by what its method means.

before:  %y2 = lora_site(%x, %y, %site_id, %A, %B, %scale, 0.05, True, None)
after:   %d  = dropout(%x, 0.05, True)
         %t  = lora_linear(%d, %y, %A, %B, %scale, "n");  %y2 = %t[0]

The casts that the anchor's body makes are written out. Exact: the op's body at scale_at "n" is the anchor's
reference. Recurses into the bodies of higher-order ops (checkpointed blocks); there a site id is traced to
the input that carries it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

from torch import fx

from adaptc import methods
from adaptc.ir.edit import Result, in_bodies
from adaptc.passes.contract import Context, Contract
from adaptc.passes.walk import Match, everywhere

CONTRACT = Contract(level="dynamo", numerics="exact", provides=frozenset({"inserted"}))


def insert(gm: fx.GraphModule, context: Context) -> Result:
    return everywhere(gm, (partial(_insert, in_bodies(gm, context.sites)),), context)


def _insert(sites: Mapping[fx.Node, str], gm: fx.GraphModule, context: Context) -> Iterator[Match]:
    anchors = methods.anchors()
    for node in list(gm.graph.nodes):
        anchor = anchors.get(node.target) if node.op == "call_function" else None
        if anchor is not None:
            bound = anchor.bind(node)
            yield Match(node, partial(anchor.expand, **bound), site=sites.get(bound["site_id"], "(unknown site)"))
