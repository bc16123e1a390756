"""Read a value once for the gradients of all first factors that multiply it.

before:  %dA1 = lora_factor_grad(%q1, %x, f32);   %dA2 = lora_factor_grad(%q2, %x, f32)
after:   %dA1, %dA2 = lora_factor_grads([%q1, %q2], %x, f32)

Reassociates nothing. The new node stands where the last of the old ones did; a gradient that something reads before
that keeps its own product.
"""

from __future__ import annotations

from torch import fx

from adaptc.ir import dialect
from adaptc.ir.edit import Edit, Result
from adaptc.ir.sites import site_of
from adaptc.passes.contract import Context


def share_factors(gm: fx.GraphModule, context: Context, result: Result) -> None:
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    for products in _groups(gm):
        last = order[products[-1]]
        late = [node for node in products if all(order[user] > last for user in node.users)]
        for node in (n for n in products if n not in late):
            result.refuse(site_of(node), "the gradient of its first factor is read before the others are known")
        if len(late) < 2 or products[-1] not in late:
            continue
        if not context.spend():
            result.refused += [(site_of(node), "limit reached") for node in late]
            continue
        edit = Edit(gm, site_of(late[0]), late, late, record=context.record)
        _, x, dtype = late[0].args
        wide = edit.call(dialect.get("lora_factor_grads").overload, [node.args[0] for node in late], x, dtype)
        result.applied.append(edit.finish(*(edit.item(wide, i) for i in range(len(late)))))


def _groups(gm: fx.GraphModule) -> list[list[fx.Node]]:
    """The products with one right operand and dtype, two at least, in graph order."""
    found: dict[tuple[object, object], list[fx.Node]] = {}
    target = dialect.get("lora_factor_grad").overload
    for node in gm.graph.find_nodes(op="call_function", target=target):
        found.setdefault((node.args[1], node.args[2]), []).append(node)
    return [nodes for nodes in found.values() if len(nodes) > 1]
