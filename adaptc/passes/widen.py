"""Compute an adapter's products in fp32 where the CPU has no instructions for their dtype.

before:  %h = mm(%x, %a)                                          bfloat16
after:   %h = to(mm(to(%x, float32), to(%a, float32)), bfloat16)

The library computes a 16-bit product there number by number, many times slower than in fp32. Both sum in fp32 and round
once; a bias is added before the rounding. The copies of the factors in fp32 are small, those of activations are made
again in the backward where it reads them. The base model's own products stay as they are, to the bit.
"""

from __future__ import annotations

import torch
from torch import fx

from adaptc.ir.edit import Edit, Result
from adaptc.ir.sites import is_inserted
from adaptc.passes.contract import Context, Contract
from adaptc.passes.walk import Match, each, everywhere
from adaptc.torch_internals import cpu_emulates, mark_recomputed, node_value

CONTRACT = Contract(level="joint", numerics="reassociates")

aten = torch.ops.aten
_CAST = torch.ops.prims.convert_element_type.default
_PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default)


def widen(gm: fx.GraphModule, context: Context) -> Result:
    return everywhere(gm, (_widen,), context)


@each(lambda gm: gm.graph.nodes)
def _widen(node: fx.Node) -> Match | None:
    if node.target not in _PRODUCTS or not is_inserted(node):
        return None
    value = node_value(node)
    if value.device.type != "cpu" or not cpu_emulates(value.dtype):
        return None

    def write(edit: Edit) -> fx.Node:
        wide = [edit.call(_CAST, n, torch.float32) for n in node.args]
        for copy in wide:
            mark_recomputed(copy)
        return edit.call(_CAST, edit.call(node.target, *wide, **node.kwargs), value.dtype)

    return Match(node, write)
