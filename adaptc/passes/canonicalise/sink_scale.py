"""Multiply the bottleneck by the scale, not the product.

before:  %t = lora_linear(%x, %y, %A, %B, %s, "n")     s * ((x A^T) B^T)    a pass over M x N
after:   %t = lora_linear(%x, %y, %A, %B, %s, "r")     (s * x A^T) B^T      a pass over M x r

Reassociates (rounding only). Refused where the scale is trained: its gradient needs the unscaled bottleneck,
which is gone when the scale is zero.
"""

from __future__ import annotations

import operator

from torch import fx

from adaptc.ir.edit import Edit, Result
from adaptc.ir.sites import lora_nodes, site_of
from adaptc.passes.contract import Context
from adaptc.torch_internals import node_value


def sink_scale(gm: fx.GraphModule, context: Context, result: Result) -> None:
    for node in lora_nodes(gm):
        *operands, scale, scale_at = node.args
        if scale_at == "r":
            continue
        if (value := node_value(scale)) is None:  # type: ignore[arg-type]
            result.refuse(site_of(node), "nothing is known about the scale: it may be trained")
            continue
        if value.requires_grad:
            result.refuse(site_of(node), "scale is trained: its gradient needs the unscaled bottleneck")
            continue
        if any(u.target is not operator.getitem or u.args[1] != 0 for u in node.users):
            result.refuse(site_of(node), "its unscaled bottleneck is read by another node")
            continue
        if not context.spend():
            result.refuse(site_of(node), "limit reached")
            continue
        outputs = list(node.users)
        edit = Edit(gm, site_of(node), [node, *outputs], outputs, at=node, record=context.record)
        new = edit.item(edit.call(node.target, *operands, scale, "r"), 0)
        result.applied.append(edit.finish(*([new] * len(outputs))))
