"""Let the op cast its factors.

before:  %a = to(%A, bfloat16);  %b = to(%B, bfloat16);  %t = lora_linear(%x, %y, %a, %b, ...)
after:   %t = lora_linear(%x, %y, %A, %B, ...)

Exact in the forward; the gradients of A and B are then made in the factors' own dtype, with no copy of them
in the compute dtype kept for the backward. A cast to another dtype than x's rounds differently and is left
alone. Refused when something between cast and op writes to memory.
"""

from __future__ import annotations

from torch import fx

from adaptc.ir.effects import barrier
from adaptc.ir.sites import cast_dtype, is_cast
from adaptc.passes.walk import Match, each
from adaptc.torch_internals import node_value


@each("lora_linear")
def sink_casts(node: fx.Node) -> Match | str | None:
    x, y, *factors, scale, scale_at = node.args
    dtype = getattr(node_value(x), "dtype", None)  # type: ignore[arg-type]
    casts = [f for f in factors if isinstance(f, fx.Node) and is_cast(f) and cast_dtype(f) == dtype]
    if not casts:
        return None
    if reason := next(filter(None, (barrier(c, node) for c in casts)), None):
        return f"{reason} between a factor's cast and the adapter"
    a, b = (f.args[0] if f in casts else f for f in factors)  # type: ignore[union-attr]
    matched = [*(c for c in casts if set(c.users) == {node}), node]
    return Match(node, lambda edit: edit.call(node.target, x, y, a, b, scale, scale_at), matched)
