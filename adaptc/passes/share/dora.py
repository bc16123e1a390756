"""Write a DoRA layer as a bottleneck and what is made of it: the bottleneck is then as LoRA's is.

before:  %t = dora_linear(%x, %y, %base, %b, A, B, m, %n, s);  f(%t[0]);  g(%t[1])
after:   %h = lora_shrink(%x, [A], [s], [], [])[0];  %y2 = dora_expand(%y, %base, %b, %h, B, m, %n);  f(%y2);  g(%h)

Reassociates nothing: these are the halves of the op. On the joint graph, where the gradients are there already.
"""

from __future__ import annotations

import operator
from typing import Any, cast

from torch import fx

from adaptc.ir import dialect
from adaptc.ir.edit import Edit, Result
from adaptc.ir.sites import site_of
from adaptc.passes.contract import Context


def split_dora_linear(gm: fx.GraphModule, context: Context, result: Result) -> None:
    for node in list(gm.graph.find_nodes(op="call_function", target=dialect.get("dora_linear").overload)):
        if not context.spend():
            result.refuse(site_of(node), "limit reached")
            continue
        x, y, base, bias, A, B, magnitude, norm, scale = cast(tuple[Any, ...], node.args)
        outputs = [user for user in node.users if user.target is operator.getitem]
        edit = Edit(gm, site_of(node), [node, *outputs], outputs, at=node, record=context.record)
        h = edit.item(edit.call(dialect.get("lora_shrink").overload, x, [A], [scale], [], []), 0)
        new = edit.call(dialect.get("dora_expand").overload, y, base, bias, h, B, magnitude, norm), h
        result.applied.append(edit.finish(*(new[cast(int, output.args[1])] for output in outputs)))
