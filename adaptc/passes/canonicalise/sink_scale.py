"""Multiply the bottleneck by the scale, not the product.

before:  %t = lora_linear(%x, %y, %A, %B, %s, "n")     s * ((x A^T) B^T)    a pass over M x N
after:   %t = lora_linear(%x, %y, %A, %B, %s, "r")     (s * x A^T) B^T      a pass over M x r

Reassociates (rounding only). Refused where the scale is trained: its gradient needs the unscaled bottleneck,
which is gone when the scale is zero.
"""

from __future__ import annotations

import operator

from torch import fx

from adaptc.passes.walk import Match, each
from adaptc.torch_internals import node_value


@each("lora_linear")
def sink_scale(node: fx.Node) -> Match | str | None:
    *operands, scale, scale_at = node.args
    if scale_at == "r":
        return None
    if (value := node_value(scale)) is None:  # type: ignore[arg-type]
        return "nothing is known about the scale: it may be trained"
    if value.requires_grad:
        return "scale is trained: its gradient needs the unscaled bottleneck"
    outputs = list(node.users)
    if any(user.target is not operator.getitem or user.args[1] != 0 for user in outputs):
        return "its unscaled bottleneck is read by another node"
    return Match(
        node, lambda edit: edit.item(edit.call(node.target, *operands, scale, "r"), 0), [node, *outputs], outputs
    )
