"""Replace every dialect op of the joint graph by its chosen lowering.

before:  %t = adaptc.lora_linear(%x, %y, %A, %B, %s, "r")
after:   %h = mm(%x, %A^T);  %hs = %h * %s;  %y2 = addmm(%y, %hs, %B^T)

before:  %y2 = adaptc.lora_linear_expand(%x, %W^T, %b, %h, %B)
after:   %y = addmm(%b, %x, %W^T);  %y2 = addmm(%y, %h, %B^T)

Runs before partitioning, so that the partitioner sees the bottleneck and may save it. LoRA's ops are written out
as their bodies compute, to the bit; ops derived from a body in Inductor's decompositions, which round differently. An
op stays whole where its row says so. A frozen layer's product that is part of an op becomes a node of the base model
again, where it was.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import fx

from adaptc.codegen.ops import registry
from adaptc.codegen.ops.inline import tracing_once
from adaptc.codegen.ops.row import Row
from adaptc.ir import dialect
from adaptc.ir.edit import Edit, Result
from adaptc.ir.sites import dialect_nodes, items_of
from adaptc.passes.contract import Context, Contract
from adaptc.passes.walk import Match, each, everywhere
from adaptc.torch_internals import mark_recomputed, node_value, tree_leaves

CONTRACT = Contract(
    level="joint", numerics="reassociates", provides=frozenset({"aten"}), conflicts=frozenset({"aten"})
)


def lower(gm: fx.GraphModule, context: Context) -> Result:
    with tracing_once():
        return everywhere(gm, (_split, _lower), context)


def _stays(node: fx.Node, row: Row) -> bool:
    values = tree_leaves(node_value(node))
    device = next((v.device for v in values if isinstance(v, torch.Tensor)), None)
    return device is not None and row.whole(device, *fx.map_arg(node.args, node_value))


# From the last to the first: the nodes by which they remember where a product stood are still there then.
@each(lambda gm: reversed(dialect_nodes(gm)))
def _split(node: fx.Node) -> Match | None:
    op = dialect.of_target(node.target)
    assert op is not None
    split = registry.row(op.name).split
    if split is None:
        return None

    def write(edit: Edit) -> fx.Node:
        rest, given = split(edit, *node.args)
        return edit.op(rest, *given)

    return Match(node, write)


@each(dialect_nodes)
def _lower(node: fx.Node) -> Match | None:
    op = dialect.of_target(node.target)
    assert op is not None
    if _stays(node, registry.row(op.name)):
        if op.recomputed:
            mark_recomputed(node)
        return None
    outputs = items_of(node)
    if not node.users and not tree_leaves(node_value(node)):
        return None  # an op that was asked for nothing

    def write(edit: Edit) -> fx.Node | list[fx.Node]:
        values = registry.lowering(op.name)(edit, *node.args)
        if op.recomputed:
            for new in edit.new_nodes:
                mark_recomputed(new)
        return [values[cast(int, output.args[1])] for output in outputs] or values[0]

    return Match(node, write, [node, *outputs], outputs or [node])
