"""Write a DoRA layer as a bottleneck and what is made of it: the bottleneck is then as LoRA's is.

before:  %t = dora_linear(%x, %y, %base, %b, A, B, m, %n, s);  f(%t[0]);  g(%t[1])
after:   %h = lora_shrink(%x, [A], [s], [], [])[0];  %y2 = dora_expand(%y, %base, %b, %h, B, m, %n);  f(%y2);  g(%h)

Reassociates nothing: these are the halves of the op. On the joint graph, where the gradients are there already.
"""

from __future__ import annotations

from typing import Any, cast

from torch import fx

from adaptc.ir.edit import Edit
from adaptc.ir.sites import items_of
from adaptc.passes.walk import Match, each


@each("dora_linear")
def split_dora_linear(node: fx.Node) -> Match:
    x, y, base, bias, A, B, magnitude, norm, scale = cast(tuple[Any, ...], node.args)
    outputs = items_of(node)

    def write(edit: Edit) -> list[fx.Node]:
        h = edit.item(edit.op("lora_shrink", x, [A], [scale], [], []), 0)
        new = edit.op("dora_expand", y, base, bias, h, B, magnitude, norm), h
        return [new[cast(int, output.args[1])] for output in outputs]

    return Match(node, write, [node, *outputs], outputs)
