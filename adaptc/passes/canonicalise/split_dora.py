"""Read a DoRA layer that drops nothing as a LoRA layer and a factor per column behind it.

before:  %t = dora_linear(%x, %y, None, %bias, %A, %B, %m, %norm, %s);  %y2 = %t[0]
after:   %t = lora_linear(%x, %y, %A, %B, %s, "n");  %y2 = dora_rescale(%t[0], %bias, %m, %norm)

The low-rank part is then everything that LoRA's is. In fp32 and wider: in 16 bits the correction would be rounded once
more than in one op.
"""

from __future__ import annotations

from typing import cast

from torch import fx

from adaptc.ir.edit import Edit
from adaptc.passes.walk import Match, each
from adaptc.torch_internals import node_value


@each("dora_linear")
def split_dora(node: fx.Node) -> Match | None:
    x, y, _, bias, A, B, magnitude, norm, scale = cast(tuple[fx.Node, ...], node.args)
    dtype = node_value(y).dtype
    outputs = list(node.users)
    if node.args[2] is not None or dtype.itemsize < 4 or [user.args[1] for user in outputs] != [0]:
        return None

    def write(edit: Edit) -> fx.Node:
        factors = (edit.cast(n, dtype) for n in (A, B))
        corrected = edit.item(edit.op("lora_linear", x, y, *factors, scale, "n"), 0)
        return edit.op("dora_rescale", corrected, bias, magnitude, norm)

    return Match(node, write, [node, *outputs], outputs)
