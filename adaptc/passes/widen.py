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
from adaptc.ir.sites import is_inserted, site_of
from adaptc.passes.contract import Context, Contract, everywhere
from adaptc.torch_internals import cpu_emulates, mark_recomputed, node_value

CONTRACT = Contract(level="joint", numerics="reassociates")

aten = torch.ops.aten
_PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default)


def widen(gm: fx.GraphModule, context: Context) -> Result:
    return everywhere(gm, (_widen,), context)


def _widen(gm: fx.GraphModule, context: Context, result: Result) -> None:
    for node in list(gm.graph.nodes):
        if node.target not in _PRODUCTS or not is_inserted(node):
            continue
        value = node_value(node)
        if value.device.type != "cpu" or not cpu_emulates(value.dtype):
            continue
        if not context.spend():
            result.refuse(site_of(node), "limit reached")
            continue
        edit = Edit(gm, site_of(node), [node], [node], record=context.record)
        wide = [edit.call(torch.ops.prims.convert_element_type.default, n, torch.float32) for n in node.args]
        for copy in wide:
            mark_recomputed(copy)
        product = edit.call(node.target, *wide, **node.kwargs)
        cast = edit.call(torch.ops.prims.convert_element_type.default, product, value.dtype)
        result.applied.append(edit.finish(cast))
