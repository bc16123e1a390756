"""Make one node of several adapters that are live on one site.

before:  %t = lora_linear(%x, %y, %A1, %B1, %s1, "r");      %y1 = %t[0]
         %u = lora_linear(%x, %y1, %A2, %B2, %s2, "r");     %y2 = %u[0]
after:   %A = cat(A1, A2);  %B = cat(B1, B2, dim=1);  %s = cat(s1 x r1, s2 x r2)
         %u = lora_linear(%x, %y, %A, %B, %s, "r");         %y2 = %u[0]

Reassociates: x is read once, and two accumulations into y become one. Refused when the adapters read
different values (each has its own dropout mask), when the value between them is read elsewhere or rounded,
when their factors have different dtypes, when one is trained and the other is not (a gradient that nobody
reads would be computed), and when something between them writes to memory (x may not be the same value then).
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from adaptc.ir.edit import Edit
from adaptc.ir.effects import barrier
from adaptc.ir.sites import adapter_below, is_cast
from adaptc.passes.walk import Match, each
from adaptc.torch_internals import node_value


@each("lora_linear")
def join_adapters(second: fx.Node) -> Match | str | None:
    between = second.args[1]
    first = adapter_below(between)
    if first is None:
        return None
    assert isinstance(between, fx.Node)
    if reason := _why_not(first, between, second):
        return reason
    outputs = list(second.users)
    return Match(second, lambda edit: _join(edit, first, second), [first, between, second, *outputs], outputs)


def _why_not(first: fx.Node, between: fx.Node, second: fx.Node) -> str | None:
    if is_cast(between):
        return "the sum between the adapters is rounded to another dtype"
    if first.args[0] is not second.args[0]:
        return "the adapters read different values (each has its own dropout mask)"
    if first.args[5] != "r" or second.args[5] != "r":
        return "a scale is not folded into its bottleneck"
    if set(between.users) != {second} or set(first.users) != {between}:
        return "the value between the adapters is read by another node"
    if any(u.target is not operator.getitem or u.args[1] != 0 for u in second.users):
        return "a bottleneck is read by another node"
    dtypes = [[node_value(f).dtype for f in (n.args[2], n.args[3])] for n in (first, second)]  # type: ignore[arg-type]
    if differing := next((pair for pair in zip(*dtypes, strict=True) if pair[0] != pair[1]), None):
        return f"the adapters' factors have different dtypes ({differing[0]}, {differing[1]})"
    trained = [[node_value(f).requires_grad for f in (n.args[2], n.args[3])] for n in (first, second)]  # type: ignore[arg-type]
    if trained[0] != trained[1]:
        return "one adapter is trained and the other is not"
    reason = barrier(first, second)
    return None if reason is None else f"{reason} between the adapters"


def _join(edit: Edit, first: fx.Node, second: fx.Node) -> fx.Node:
    x, y, a1, b1, s1, _ = first.args
    _, _, a2, b2, s2, _ = second.args
    scales = []
    for scale, factor in ((s1, a1), (s2, a2)):
        rank = node_value(factor).shape[0]  # type: ignore[arg-type]
        scales.append(edit.call("expand", scale, (rank,)))
    a = edit.call(torch.cat, (a1, a2), 0)
    b = edit.call(torch.cat, (b1, b2), 1)
    s = edit.call(torch.cat, tuple(scales), 0)
    return edit.item(edit.call(second.target, x, y, a, b, s, "r"), 0)
